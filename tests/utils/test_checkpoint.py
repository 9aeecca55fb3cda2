"""Writes are all or nothing, and what cannot be read is named."""

import errno
import os
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from forks import context

from simclr_fast.utils import checkpoint, locks


def test_an_interrupted_write_loses_nothing(tmp_path):
    path = tmp_path / "state.pt"
    checkpoint.write_atomic(path, lambda p: p.write_bytes(b"old"))

    def fails(p):
        p.write_bytes(b"half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_atomic(path, fails)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def write_and_die(path):
    def write(part):
        part.write_bytes(b"half of the n")
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.write_atomic(path, write)


def test_the_next_write_removes_files_of_killed_writes(tmp_path):
    path, hidden = tmp_path / "step-00000007.pt", tmp_path / ".step-00000007.pt-mine"
    hidden.write_bytes(b"not ours")
    process = context.Process(target=write_and_die, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = set(tmp_path.iterdir()) - {hidden}
    assert left.read_bytes() == b"half of the n"

    def write_beside_another(part):
        part.write_bytes(b"outer")
        checkpoint.write_atomic(tmp_path / "inner", lambda p: p.write_bytes(b"inner"))
        assert part.read_bytes() == b"outer"

    checkpoint.write_atomic(path, write_beside_another)
    assert set(tmp_path.iterdir()) == {hidden, path, tmp_path / "inner"}


AS_ON_WINDOWS = """
import os, sys, warnings
import torch
sys.modules["fcntl"] = None
folder_flag = vars(os).pop("O_DIRECTORY")
opened = os.open
def refuses_folders(path, flags, *rest, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return opened(path, flags, *rest, **options)
os.open = refuses_folders
from pathlib import Path
import simclr_fast
from simclr_fast.utils import checkpoint
from simclr_fast.evaluation import features
from simclr_fast.optim.lars import LARS
weight = torch.nn.Parameter(torch.randn(6, 4))
optimizer = LARS([weight], lr=0.1)
simclr_fast.nt_xent_loss(torch.randn(8, 6) @ weight).backward()
optimizer.step()
folder = Path(sys.argv[1])
(folder / ".old.simclr-part").write_bytes(b"perhaps somebody's")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for step in range(4):
        path = checkpoint.save_checkpoint(folder, step, {"optimizer": optimizer.state_dict()})
assert ["no flock" in str(w.message) for w in caught] == [True], caught
assert sorted(p.name for p in folder.iterdir()) == [
    ".old.simclr-part", "step-00000002.pt", "step-00000003.pt"
]
optimizer.load_state_dict(checkpoint.load_checkpoint(path)["optimizer"])
"""


def test_writes_work_without_file_locks(tmp_path):
    """As on Windows, which also opens no folder."""
    command = [sys.executable, "-c", AS_ON_WINDOWS, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_writes_work_on_a_file_system_without_locks(tmp_path, monkeypatch):
    """Like some network file systems. Files that another process may be writing are kept."""

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    locks._no_locks.cache_clear()
    part = tmp_path / ".step-00000001.pt-abc.simclr-part"
    part.write_text("being written")
    with pytest.warns(RuntimeWarning, match="No locks available") as warned:
        checkpoint.save_checkpoint(tmp_path, 1, {"step": 1})
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.save_checkpoint(tmp_path, 2, {"step": 2})
    with locks.locked(tmp_path / ".lock", "busy"), locks.locked(tmp_path / ".lock"):
        pass
    assert len(checkpoint.checkpoints(tmp_path)) == 2
    assert [path.name for path in tmp_path.glob(".*simclr-part")] == [part.name]
    locks._no_locks.cache_clear()


def test_the_newest_two_are_kept(tmp_path):
    for step in (5, 10, 1000):
        checkpoint.save_checkpoint(tmp_path, step, {"step": step})
    assert [checkpoint.load_checkpoint(p)["step"] for p in checkpoint.checkpoints(tmp_path)] == [
        10,
        1000,
    ]


def test_unreadable_files_are_named(tmp_path):
    path = tmp_path / "step-00000001.pt"
    torch.save({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=str(path)):
        checkpoint.load_checkpoint(path)
    with pytest.raises(ValueError, match=str(path)):
        checkpoint.load_encoder(path)
    with pytest.raises(FileNotFoundError):
        checkpoint.load_checkpoint(tmp_path / "none.pt")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save(Evil(), tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt"):
        checkpoint.load_checkpoint(tmp_path / "evil.pt")


def test_an_encoder_is_read_as_it_was_written(tmp_path):
    encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    encoder.to(memory_format=torch.channels_last)
    checkpoint.save_encoder(tmp_path / "e.safetensors", encoder, {"model": "tiny"})
    weights, about = checkpoint.load_encoder(tmp_path / "e.safetensors")
    assert about == {"model": "tiny"}
    assert weights.keys() == encoder.state_dict().keys()
    assert all(torch.equal(weights[k], v) for k, v in encoder.state_dict().items())
