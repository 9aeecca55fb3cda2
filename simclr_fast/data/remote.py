"""Data on web servers and in object stores: copied once to this machine, through fsspec.

Training reads images in random order, epoch after epoch. So the files are first copied into the
cache folder, best on the machine's own disk, and read there.
"""

import hashlib
import logging
import re
from glob import has_magic
from pathlib import Path, PurePosixPath
from typing import Any

from simclr_fast.data.demo import cache_folder
from simclr_fast.utils.checkpoint import write_atomic
from simclr_fast.utils.extras import need
from simclr_fast.utils.locks import locked

log = logging.getLogger(__name__)


def is_address(data: str) -> bool:
    """Whether this is an address such as s3://bucket/a.tar, and no path."""
    return re.match(r"[a-z][a-z0-9+.-]+://", data) is not None


def fetched(address: str) -> list[Path]:
    """Copy what an address stands for, unless it is there already; return the local paths.

    address: a file, a pattern with *, ? and [ ] where the server can list, or a folder, with "/" at
        its end, which becomes one local folder. A file that is there with the size that the server
        reports is not copied again. Of several processes on a machine one copies and the others
        wait.

    Raises:
        FileNotFoundError: nothing is there. ImportError: the protocol needs a package. OSError: the
            server fails.
    """
    system, path = need("fsspec.core").url_to_fs(address)
    whole = path.endswith("/") or address.endswith("/")
    names = _names(system, path, whole)
    if not names:
        raise FileNotFoundError(f"nothing is at {address}")
    parent = path.rstrip("/") if whole else _fixed_part(path)
    key = hashlib.sha256(f"{system.protocol}:{parent}".encode()).hexdigest()[:16]
    root = cache_folder() / "remote" / key
    local = [root / _relative(name, parent, address) for name in names]
    with locked(root / ".lock"):
        sizes = [system.info(name).get("size") for name in names]
        absent = [i for i, size in enumerate(sizes) if not _is_copied(local[i], size)]
        if absent:
            amount = sum(sizes[i] or 0 for i in absent) / 1e9
            log.info("copying %d files (%.3g GB) of %s to %s", len(absent), amount, address, root)
        for i in absent:
            local[i].parent.mkdir(parents=True, exist_ok=True)
            _copy(system, names[i], local[i], sizes[i])
    return [root] if whole else local


def _names(system: Any, path: str, whole: bool) -> list[str]:
    if whole:
        return sorted(system.find(path))
    if has_magic(path):
        return sorted(system.glob(path))
    return [path] if system.exists(path) else []


def _fixed_part(path: str) -> str:
    """The folder before the first part with a wildcard."""
    parts = path.split("/")[:-1]
    wild = next((i for i, part in enumerate(parts) if has_magic(part)), len(parts))
    return "/".join(parts[:wild])


def _relative(name: str, parent: str, address: str) -> Path:
    """The place of a file below its folder. A server may not choose a place outside."""
    # A query, as of signed addresses, is no part of a file's name.
    relative = PurePosixPath(name.removeprefix(parent).lstrip("/").partition("?")[0])
    if relative.is_absolute() or ".." in relative.parts or not relative.parts:
        raise ValueError(f"{address} names a file outside of its folder: {name}")
    return Path(*relative.parts)


def _is_copied(path: Path, size: int | None) -> bool:
    """A server that does not tell the size is believed to have the same file as before."""
    return path.is_file() and (size is None or path.stat().st_size == size)


def _copy(system: Any, name: str, path: Path, size: int | None) -> None:
    def write(part: Path) -> None:
        system.get_file(name, str(part))
        if size is not None and (found := part.stat().st_size) != size:
            raise OSError(f"{name} was cut off: {found:,} of {size:,} bytes arrived")

    write_atomic(path, write)
