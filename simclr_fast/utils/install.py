"""How this copy of simclr_fast was installed, for messages that name a command which works."""

import json
import os
import shlex
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path
from urllib.parse import unquote, urlparse

_PACKAGE = Path(__file__).resolve().parents[1]
_NAME = "simclr-fast"


def build_command(variable: str = "") -> str:
    """The command that compiles the extension of this copy.

    variable: an environment variable to set for it, such as SIMCLR_FAST_CUDA=1.
    """
    source = source_here()
    if source is None:
        # From an index: build from the source distribution instead of taking the wheel.
        what = f"--no-deps --force-reinstall --no-binary {_NAME} {_NAME}"
    else:
        editable = "-e " if source == _PACKAGE.parent else ""
        what = f"--no-deps --force-reinstall {editable}{shlex.quote(_shown(source))}"
    return f"{variable} pip install --no-build-isolation {what}".strip()


def source_here() -> Path | None:
    """The source tree, or source distribution, that this copy lies in or was installed from; None
    if it is not on this machine."""
    if _is_source(_PACKAGE.parent):
        return _PACKAGE.parent
    installed = _distribution()
    origin = json.loads((installed and installed.read_text("direct_url.json")) or "{}")
    url = urlparse(origin.get("url", ""))
    path = Path(unquote(url.path)) if url.scheme == "file" else None
    return path if path is not None and (_is_source(path) or _is_archive(path)) else None


def hidden_copy() -> Path | None:
    """The installed package that this one, in a source tree, hides; None if there is none.

    Python started in a clone takes the package of the clone, which may not be compiled.
    """
    if not _is_source(_PACKAGE.parent):
        return None
    # An unpacked source distribution counts as installed as well, by its folder of metadata.
    for installed in distributions(name=_NAME):
        other = Path(str(installed.locate_file("simclr_fast"))).resolve()
        if other != _PACKAGE and (other / "__init__.py").exists():
            return other
    return None


def _distribution() -> Distribution | None:
    try:
        return distribution(_NAME)
    except PackageNotFoundError:
        return None


def _is_source(folder: Path) -> bool:
    return (folder / "setup.py").is_file() and (folder / "csrc").is_dir()


def _is_archive(path: Path) -> bool:
    return path.name.endswith(".tar.gz") and path.is_file()


def _shown(folder: Path) -> str:
    return "." if folder == Path(os.getcwd()).resolve() else str(folder)
