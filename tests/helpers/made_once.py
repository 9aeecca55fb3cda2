"""A folder that one of pytest's processes makes for all of them."""

import fcntl
import os
import shutil


def made_once(tmp_path_factory, name, make):
    """The folder `name`. The first process that asks for it calls `make(folder)`."""
    parent = tmp_path_factory.getbasetemp()
    shared = parent.parent if "PYTEST_XDIST_WORKER" in os.environ else parent
    folder = shared / name
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            (folder / "made").touch()
    return folder
