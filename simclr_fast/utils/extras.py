"""Optional packages. Each is imported when it is used; an error says how to install it."""

import platform
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType

_DALI = "nvidia.dali"
# Module → (its name for pip, its purpose). DALI's name depends on CUDA: see `pip_name`.
_PACKAGES = {
    "tyro": ("tyro", "reads the command line"),
    "tqdm": ("tqdm", "shows progress"),
    "torchvision": ("torchvision", "brings models and data sets"),
    "matplotlib": ("matplotlib", "draws the pictures"),
    "PIL": ("pillow", "reads and writes image files"),
    "tifffile": ("tifffile", "reads TIFF files of many channels"),
    "safetensors": ("safetensors", "reads and writes encoder weights"),
    "sklearn": ("scikit-learn", "brings t-SNE, and photographs for the benchmarks"),
    "datasets": ("datasets", "reads Hugging Face's data sets"),
    "tensorboard": ("tensorboard", "shows the curves of runs"),
    "wandb": ("wandb", "shows the curves of runs on a server"),
    "trackio": ("trackio", "shows the curves of runs"),
    "yaml": ("pyyaml", "reads files of settings"),
    "fsspec": ("fsspec", "reads from web servers and object stores"),
    "huggingface_hub": ("huggingface_hub", "reads from the Hugging Face Hub, and uploads"),
    "umap": ("umap-learn", "computes UMAP"),
    "timm": ("timm", "brings more models and is compared with"),
    "lightly": ("lightly", "is compared with"),
    "onnx": ("onnx", "writes ONNX files"),
    "onnxscript": ("onnxscript", "translates models to ONNX"),
    "onnxruntime": ("onnxruntime", "runs ONNX files"),
    _DALI: ("", "decodes image files on a GPU, and on the CPU in place of Pillow"),
}
# Packages whose versions a report or a benchmark names, by their names for pip.
_REPORTED = (
    "numpy",
    "torchvision",
    "triton",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "lightly",
    "pytorch-metric-learning",
    "timm",
    "kornia",
    "pillow",
)
# Packages that are needed together: a message about one of them names all that are missing.
_TOGETHER = [{"onnx", "onnxscript", "onnxruntime"}]


def installed_versions() -> dict[str, str]:
    """Package → version, for Python, torch and those packages that are installed."""
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in _REPORTED:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def need(module: str) -> ModuleType:
    """Import `module`, one of the optional packages or a part of one.

    Raises:
        ImportError: it is not installed. The message has its purpose and the command to install it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = _package(module)
        others = next((group for group in _TOGETHER if package in group), {package})
        absent = [package, *(m for m in missing(sorted(others)) if m != package)]
        raise ImportError(explain(absent, error)) from error


def require(modules: Iterable[str], also: Iterable[str] = ()) -> None:
    """Raise ImportError if any of `modules` is not installed; one message names them all.

    also: packages that are useful but not required. A message names those that are missing too.
    """
    if absent := missing(modules):
        raise ImportError(explain([*absent, *missing(also)]))


def missing(modules: Iterable[str]) -> list[str]:
    """Those of `modules` that are not installed. Imports at most their parent packages."""
    return [module for module in modules if not _installed(module)]


def explain(absent: list[str], cause: ImportError | None = None) -> str:
    """A message: the purpose of each missing package, and the command that installs them all.

    cause: shown if the first package is installed but fails to import.
    """
    if cause is not None and _installed(absent[0]):
        return f"{pip_name(absent[0])} is installed but cannot be imported: {cause}"
    if _DALI in absent and platform.system() != "Linux":
        dali = "DALI is for Linux only; Pillow decodes image files here"
        rest = [module for module in absent if module != _DALI]
        return f"{explain(rest)}; {dali}" if rest else dali
    reasons = "; ".join(f"{pip_name(m)} ({_PACKAGES[m][1]})" for m in absent)
    verb = "is" if len(absent) == 1 else "are"
    return f"{reasons} {verb} missing: pip install {' '.join(map(pip_name, absent))}"


def pip_name(module: str) -> str:
    """The name of `module` for pip. DALI's contains the major CUDA version of this torch."""
    if module == _DALI:
        import torch

        return f"nvidia-dali-cuda{120 if (torch.version.cuda or '').startswith('12') else 130}"
    return _PACKAGES[module][0]


def _package(module: str) -> str:
    """The key in _PACKAGES: `module` itself or its parent package."""
    return module if module in _PACKAGES else module.partition(".")[0]


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        # The parent package is missing, or sys.modules holds None or a module without a spec.
        return False
