"""Files from strangers run no code: weights, checkpoints, arrays."""

import ast
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from simclr_fast import load_weights
from simclr_fast.augment.params import Augmentation
from simclr_fast.commands.cli import run
from simclr_fast.data.decode import CorruptImageError
from simclr_fast.data.loader import TwoViewLoader
from simclr_fast.utils import checkpoint

PACKAGE = Path(__file__).parents[2] / "simclr_fast"


class Malicious:
    """When it is unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def planted(tmp_path):
    """A malicious object, and a check that nobody unpickled it."""
    folder = tmp_path / "pwned"
    yield Malicious(folder)
    assert not folder.exists()


def test_the_plant_works(tmp_path):
    torch.save(Malicious(tmp_path / "pwned"), tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt"])
@pytest.mark.parametrize("new_format", [True, False])
def test_weights_of_strangers_run_no_code(planted, tmp_path, suffix, new_format):
    path = tmp_path / f"model.{suffix}"
    state = {"state_dict": {"conv1.weight": torch.zeros(1)}, "extra": planted}
    torch.save(state, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match="could run code"):
        load_weights(path)


def test_a_checkpoint_to_resume_from_runs_no_code(planted, tmp_path, capsys):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save({"step": 3, "model": planted}, folder / "step-00000003.pt")
    with pytest.raises(ValueError, match="could run code"):
        checkpoint.load_checkpoint(folder / "step-00000003.pt")
    command = ["pretrain", "--steps", "4", "--out", str(tmp_path / "run"), "--resume"]
    assert run(command) == 1
    assert "no usable checkpoint" in capsys.readouterr().err


def test_arrays_of_strangers_run_no_code(planted, tmp_path):
    (tmp_path / "images").mkdir()
    array = np.empty(1, dtype=object)
    array[0] = planted
    np.save(tmp_path / "images" / "a.npy", array, allow_pickle=True)
    augmentation = Augmentation(32, channels=2, saturation=0, hue=0, p_gray=0)
    with pytest.raises(CorruptImageError, match="allow_pickle=False"):
        next(iter(TwoViewLoader(str(tmp_path / "images"), 1, augmentation=augmentation)))


def test_nothing_is_unpickled_in_the_package():
    """torch.load only with weights_only=True; numpy's default is allow_pickle=False."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "dill", "joblib", "cloudpickle"}, path
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if ast.unparse(node.func) == "torch.load":
                assert given.get("weights_only") == "True", path
            if node.func.attr == "load" and ast.unparse(node.func) in ("np.load", "numpy.load"):
                assert given.get("allow_pickle", "False") == "False", path
            assert given.get("trust_remote_code", "False") == "False", path
