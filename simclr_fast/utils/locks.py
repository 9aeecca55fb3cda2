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


def lock(handle: int, wait: bool = False) -> bool | None:
    """True: an open file is locked until it is closed. False: another process has it.

    None: the system or the file system has no locks, as Windows and some network ones; the first
    time warns, with the cause.
    """
    if fcntl is None:
        _no_locks("no flock on this system")
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        _no_locks(str(error))
        return None
    return True


@cache
def _no_locks(cause: str) -> None:
    warnings.warn(
        f"files cannot be locked here ({cause}): let no two processes write to one folder, and "
        "remove what a killed one left (.*.simclr-part)",
        RuntimeWarning,
        stacklevel=4,
    )


@contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """Hold a lock on `path`, a file that is made if need be and left there; none where none is.

    busy: what BlockingIOError says where another process holds it; without, it is waited for.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if lock(handle, wait=busy is None) is False:
            raise BlockingIOError(busy)
        yield
    finally:
        os.close(handle)
