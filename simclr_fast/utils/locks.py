"""Locks on files. The system releases a lock when its process ends, even if it is killed."""

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
    """Lock an open file until it is closed.

    Returns:
        True: it is locked. False: another process holds the lock. None: the system has no file
        locks, like Windows and some network file systems; the first call warns, with the cause.
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
        f"files cannot be locked here ({cause}): do not let two processes write to one folder, and "
        "delete the temporary files of killed ones (.*.simclr-part)",
        RuntimeWarning,
        stacklevel=4,
    )


@contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """Hold a lock on the file `path` within the block.

    The file is created if missing and never deleted. Where the system has no file locks, the block
    runs unlocked.

    busy: the message of BlockingIOError if another process holds the lock. Without it, wait for the
        lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if lock(handle, wait=busy is None) is False:
            raise BlockingIOError(busy)
        yield
    finally:
        os.close(handle)
