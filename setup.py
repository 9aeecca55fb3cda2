"""Builds the native extension, simclr_fast/_C.abi3.so. Everything else is in pyproject.toml.

Environment variables:

SIMCLR_FAST_BUILD_EXT=0       do not build it: no compiler is needed, and plain torch is used
SIMCLR_FAST_CUDA=auto|0|1     auto: with CUDA kernels if torch has CUDA and an nvcc for it works
TORCH_CUDA_ARCH_LIST          GPUs to compile for, as torch reads it; by default all that nvcc knows
CXXFLAGS                      further flags; they come last, so that -O1 or -g take effect
"""

import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from glob import glob
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
# The stable ABIs of torch 2.10 and Python 3.10: one binary for these and all later versions.
ABI_MACROS = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030A0000"]
# Those that nvcc knows are compiled. CUDA 13 dropped older ones, CUDA 12.8 added the last two.
CUDA_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
USER_FLAGS = shlex.split(os.environ.get("CXXFLAGS", ""))
KERNEL_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast"]


def instruction_sets() -> dict[str, list[str]]:
    """Each csrc/*_kernel.cpp is compiled once per entry; csrc/isa.h picks one at run time."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {"base": []}
    return {
        "base": [],
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": [
            *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")),
            *("-mfma", "-mf16c", "-mprefer-vector-width=512"),
        ],
    }


class NoCuda(Exception):
    """Why the CUDA kernels cannot be compiled here."""


def find_cuda() -> bool:
    """Whether to compile the CUDA kernels. Sets TORCH_CUDA_ARCH_LIST if the user has not."""
    wanted = os.environ.get("SIMCLR_FAST_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"SIMCLR_FAST_CUDA must be auto, 0 or 1, got {wanted!r}")
    if wanted == "0" or not glob("csrc/*.cu"):
        return False
    try:
        check_cuda()
    except NoCuda as reason:
        if wanted == "1":
            raise SystemExit(f"SIMCLR_FAST_CUDA=1, but {reason}") from None
        print(f"simclr_fast: no CUDA kernels are compiled, as {reason}", file=sys.stderr)
        return False
    print(f"simclr_fast: CUDA kernels for {', '.join(compiled_architectures())}", file=sys.stderr)
    return True


def check_cuda() -> None:
    """Raises NoCuda unless nvcc fits torch, knows the architectures, and compiles."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if not torch.version.cuda:
        raise NoCuda("this torch has no CUDA (torch.version.cuda is None)")
    nvcc = CUDA_HOME and Path(CUDA_HOME, "bin", "nvcc")
    if not nvcc or not nvcc.exists():
        raise NoCuda(f"there is no nvcc (CUDA_HOME is {CUDA_HOME})")
    release = re.search(r"release (\d+)\.", run_nvcc(nvcc, "--version"))
    if not release or release[1] != torch.version.cuda.split(".")[0]:
        found = f"CUDA {release[1]}" if release else "an unknown CUDA"
        raise NoCuda(f"{nvcc} is from {found}, but torch is built for CUDA {torch.version.cuda}")
    known = set(re.findall(r"sm_\d+", run_nvcc(nvcc, "--list-gpu-code")))
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        usable = [a for a in CUDA_ARCHITECTURES if "sm_" + a.replace(".", "") in known]
        if not usable:
            raise NoCuda(f"{nvcc} knows none of {', '.join(CUDA_ARCHITECTURES)}")
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(usable) + "+PTX"
    asked = os.environ["TORCH_CUDA_ARCH_LIST"]
    try:
        names = compiled_architectures()
    except ValueError as error:
        raise NoCuda(f"torch does not read TORCH_CUDA_ARCH_LIST={asked}: {error}") from None
    for name in names:
        if re.sub(r"compute_(\d+).*", r"sm_\1", name).rstrip("af") not in known:
            raise NoCuda(f"{nvcc} does not know {name} of TORCH_CUDA_ARCH_LIST={asked}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "trial.cu")
        source.write_text("#include <cuda_fp16.h>\n__global__ void trial() {}\n")
        run_nvcc(nvcc, "-c", str(source), "-o", str(source.with_suffix(".o")))


def run_nvcc(nvcc: Path, *arguments: str) -> str:
    command = [str(nvcc), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except OSError as error:
        raise NoCuda(f"{nvcc} does not run: {error}") from None
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout or "").strip().splitlines()
        raise NoCuda(f"`{' '.join(command)}` failed: {' '.join(said[:3])}") from None


def wheel_cuda_headers() -> list[str]:
    """Folders of CUDA headers from pip. torch's headers include cusparse.h and others, which a
    minimal toolkit lacks."""
    return [p for root in sys.path for p in glob(f"{root}/nvidia/cu*/include")]


def toolkit_libraries() -> list[str]:
    """The toolkit's folders of libraries, as nvcc reports them. CUDA_HOME may be wrong if nvcc is a
    link or a wrapper script."""
    from torch.utils.cpp_extension import CUDA_HOME

    command = [str(Path(CUDA_HOME, "bin", "nvcc")), "--dryrun", "-c", "-x", "cu", os.devnull]
    dry_run = subprocess.run(command, capture_output=True, text=True).stderr
    root = re.search(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE)
    folders = [Path(root[1].strip(), name) for name in ("lib64", "lib")] if root else []
    return [str(folder) for folder in folders if folder.is_dir()]


def compiled_architectures() -> list[str]:
    """Names of the code that nvcc will be asked for, such as sm_80 and compute_120 (PTX)."""
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    return sorted({flag.rpartition("code=")[2] for flag in _get_cuda_arch_flags()})


def extension_options() -> dict:
    if os.environ.get("SIMCLR_FAST_BUILD_EXT", "1") == "0":
        return {}
    from torch.utils import cpp_extension

    with_cuda = find_cuda()
    kernels = sorted(glob("csrc/*_kernel.cpp"))
    sources = sorted(set(glob("csrc/*.cpp")) - set(kernels))
    options = {
        "include_dirs": [str(ROOT / "csrc")],
        "extra_compile_args": {
            "cxx": ["-std=c++17", "-O3", "-fvisibility=hidden", *ABI_MACROS, *USER_FLAGS]
        },
        "py_limited_api": True,
        "depends": [*kernels, *glob("csrc/*.h")],
    }
    if with_cuda:
        sources += sorted(glob("csrc/*.cu"))
        options["include_dirs"] += wheel_cuda_headers()
        options["library_dirs"] = toolkit_libraries()
        options["extra_compile_args"]["cxx"] += [
            "-DSIMCLR_WITH_CUDA",
            "-DUSE_CUDA",
            f"-DSIMCLR_CUDA_ARCHITECTURES={','.join(compiled_architectures())}",
        ]
        options["extra_compile_args"]["nvcc"] = ["-O3", *ABI_MACROS, "-DSIMCLR_WITH_CUDA"]
        extension = cpp_extension.CUDAExtension("simclr_fast._C", sources, **options)
    else:
        extension = cpp_extension.CppExtension("simclr_fast._C", sources, **options)

    class Build(cpp_extension.BuildExtension):
        def build_extension(self, ext):
            for isa, flags in instruction_sets().items():
                ext.extra_objects += self.compiler.compile(
                    kernels,
                    output_dir=os.path.join(self.build_temp, isa),
                    include_dirs=["csrc"],
                    macros=[("SIMCLR_ISA", isa)],
                    extra_postargs=KERNEL_FLAGS + flags + USER_FLAGS,
                    depends=glob("csrc/*.h"),
                )
            super().build_extension(ext)

    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


packages = [
    "simclr_fast",
    *(f"simclr_fast.{p.parent.name}" for p in sorted(ROOT.glob("simclr_fast/*/__init__.py"))),
    "simclr_fast.kernels",
    "simclr_fast.benchmarks",
]
setup(
    packages=packages,
    package_dir={
        "simclr_fast": "simclr_fast",
        "simclr_fast.kernels": "kernels",
        "simclr_fast.benchmarks": "benchmarks",
    },
    package_data={"simclr_fast": ["py.typed", "assets/*"], "simclr_fast.kernels": ["*.md"]},
    **extension_options(),
)
