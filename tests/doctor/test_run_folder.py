"""simclr-fast doctor: what it says of a run's folder."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_runs import TINY

from simclr_fast.augment.params import Augmentation
from simclr_fast.commands.cli import run
from simclr_fast.doctor.run_folder import examine
from simclr_fast.training.config import to_json
from simclr_fast.training.pretrain import pretrain
from simclr_fast.utils.checkpoint import checkpoints

CHANCE = math.log(2 * 256 - 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three steps whose folder says that it had a batch of 256 and 900 steps."""
    out = tmp_path_factory.mktemp("run") / "run"
    config = replace(TINY, data="demo", out=out, steps=3, augmentation=Augmentation(size=16))
    pretrain(config)
    (out / "config.json").write_text(to_json(replace(config, batch_size=256, steps=900)))
    path = checkpoints(out / "checkpoints")[-1]
    path.rename(path.with_name("step-00000900.pt"))
    return out


@pytest.fixture
def folder(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    write_metrics(tmp_path / "run")
    return tmp_path / "run"


def write_metrics(folder, loss=lambda t: CHANCE - 2 * t, wait=1.0, accuracy=0.5, rows=30):
    lines = []
    for i in range(1, rows + 1):
        t = i / rows
        rate = min(1.0, 5 * t) * (1 - 0.9 * t)
        lines.append(
            {
                "step": 30 * i,
                "loss": loss(t),
                "contrastive_accuracy": accuracy,
                "lr": rate,
                "images_per_second": 100.0,
                "data_wait_percent": 90.0 if i == 1 else wait,
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


def change(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["augmentation"] |= values.pop("augmentation", {})
    path.write_text(json.dumps(config | values))


def names(folder):
    return examine(folder, images=32).names


def test_a_good_run_has_no_findings(folder, capsys):
    report = examine(folder, images=32)
    assert not report.findings, str(report)
    assert not report.unchecked
    assert any("effective rank of z" in fact for fact in report.facts)
    assert run(["doctor", str(folder), "--images", "32", "--device", "cpu"]) == 0
    assert "nothing wrong was found" in capsys.readouterr().out


def test_chance_level(folder):
    write_metrics(folder, loss=lambda t: CHANCE, accuracy=0.004)
    assert names(folder) == ["at-chance"]
    # It found the partners: only the loss is high, as with a high temperature.
    write_metrics(folder, loss=lambda t: CHANCE, accuracy=0.9)
    assert names(folder) == []
    # The learning rate is still rising.
    write_metrics(folder, loss=lambda t: CHANCE, accuracy=0.004)
    lines = (folder / "metrics.jsonl").read_text().splitlines()[:5]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert names(folder) == []


def test_plateau(folder):
    write_metrics(folder, loss=lambda t: CHANCE - 1 - max(0, t - 0.9))
    assert names(folder) == ["plateau"]


def test_not_finite(folder, capsys):
    write_metrics(folder, loss=lambda t: math.nan if t > 0.5 else 4.0)
    assert names(folder) == ["not-finite"]
    assert run(["doctor", str(folder), "--device", "cpu"]) == 1
    assert "the loss is NaN or infinite at step 480" in capsys.readouterr().out


def test_waiting_for_data(folder):
    write_metrics(folder, wait=20.0)
    report = examine(folder, images=32)
    assert report.names == ["waiting-for-data"]
    assert "20% of the time" in report.findings[0].seen


def test_settings(folder):
    change(folder, lr=0.02)
    assert names(folder) == ["learning-rate"]
    change(folder, lr=None, warmup_epochs=0)
    assert names(folder) == ["no-warm-up"]
    change(folder, warmup_epochs=10, augmentation={"s": 0.0})
    assert names(folder) == ["no-colour-distortion"]
    change(folder, augmentation={"s": 1.0, "p_jitter": 0.0})
    assert names(folder) == ["no-colour-distortion"]
    change(folder, memory="grad-cache", allow_ghost_bn=True, augmentation={"p_jitter": 0.8})
    assert names(folder) == ["ghost-batch-norm"]


@pytest.mark.parametrize("part", ["encoder", "projector"])
def test_collapse(folder, part):
    path = checkpoints(folder / "checkpoints")[-1]
    state = torch.load(path, weights_only=True)
    for name, tensor in state["model"].items():
        if name.startswith(part) and name.endswith("weight"):
            tensor.mul_(1e-3 if tensor.dim() > 1 else 1)
        if name.startswith(part) and name.endswith("bias"):
            tensor.add_(1)
    torch.save(state, path)
    assert set(names(folder)) == {"collapse"}


def test_damaged_weights(folder):
    path = checkpoints(folder / "checkpoints")[-1]
    state = torch.load(path, weights_only=True)
    state["model"]["encoder.conv1.weight"][0] = torch.nan
    torch.save(state, path)
    report = examine(folder)
    assert report.names == ["damaged-weights"]
    assert report.serious


def test_what_cannot_be_checked_is_said(folder):
    change(folder, data="/nowhere/photos")
    report = examine(folder)
    assert not report.findings
    assert "/nowhere/photos" in report.unchecked[0]
    shutil.rmtree(folder / "checkpoints")
    assert "no checkpoint in" in str(examine(folder))


def test_other_folders(folder, tmp_path, capsys):
    assert run(["doctor", str(tmp_path / "none")]) == 1
    assert "no config.json" in capsys.readouterr().err
    assert run(["doctor", str(folder), "--images", "2"]) == 2
    assert "images must be at least 8, got 2" in capsys.readouterr().err
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="has no lines yet"):
        examine(folder)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "accuracy": 0.1}\n')
    with pytest.raises(ValueError, match="is not a pretraining run"):
        examine(folder)
