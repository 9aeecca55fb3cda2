"""Locks on files: the system lets go of them when their holder ends, however it ends."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@cache
def have_locks() -> bool:
    """Whether this system has such locks. The first False warns."""
    if fcntl is not None:
        return True
    warnings.warn(
        "this system has no flock: let no two processes write to one folder, and remove what a "
        "killed one left (.*.simclr-part)",
        RuntimeWarning,
        stacklevel=3,
    )
    return False


def lock(handle: int, wait: bool = False) -> bool:
    """Lock an open file until it is closed; False if another process has it and `wait` is False.

    True where there are no locks.
    """
    if not have_locks():
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """Hold a lock on `path`, a file that is made if need be and left there.

    busy: what BlockingIOError says where another process holds it; without, it is waited for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not lock(handle, wait=busy is None):
            raise BlockingIOError(busy)
        yield
    finally:
        os.close(handle)
