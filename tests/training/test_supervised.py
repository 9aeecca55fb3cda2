"""The supervised baseline: it learns, its loss is cross-entropy, it resumes exactly."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import TINY
from torch.nn import functional as F

from simclr_fast.augment.params import Augmentation
from simclr_fast.commands import supervised as command
from simclr_fast.commands.cli import run
from simclr_fast.data.loader import OneViewLoader
from simclr_fast.data.sources import ArraySource
from simclr_fast.models.encoders import SimCLR
from simclr_fast.models.weights import load_weights
from simclr_fast.training import supervised
from simclr_fast.training.setup import build_model
from simclr_fast.training.supervised import build_classifier, supervise
from simclr_fast.utils.checkpoint import checkpoints, load_checkpoint

ROOT = Path(__file__).parents[2]


def textures(n, seed):
    """Gray images with horizontal or vertical stripes: two classes that differ only in texture."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    images = rng.integers(90, 130, (n, 16, 16, 3))
    for image, label in zip(images, labels, strict=True):
        lines = image if label else image.swapaxes(0, 1)
        lines[rng.integers(0, 2) :: 2] += 110
    return images.astype(np.uint8), labels


@pytest.fixture
def config(tmp_path, monkeypatch):
    parts = {"train": textures(64, 0), "test": textures(30, 1)}
    for name in ("open_data", "images_to_evaluate"):
        monkeypatch.setattr(
            supervised, name, lambda config, split="train": ArraySource(*parts[split])
        )
    return replace(
        TINY,
        data="stripes",
        out=tmp_path / "run",
        augmentation=Augmentation(size=16, area=(0.6, 1.0), p_blur=0),
        batch_size=16,
        steps=8,
        optimizer="adam",
        checkpoint_every=3,
    )


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_supervised_baseline_learns(config):
    out, scores = supervise(replace(config, steps=32))
    assert rows(out)[-1]["accuracy"] > 0.8
    assert scores.top1.value > 0.8
    assert scores.top1.n == 30
    assert json.loads((out / "supervised.json").read_text())["top1"]["value"] == scores.top1.value
    weights = load_weights(out)
    trained = load_checkpoint(checkpoints(out / "checkpoints")[-1])["model"]
    assert torch.equal(weights.encoder.conv1.weight, trained["encoder.conv1.weight"])
    assert load_weights(checkpoints(out / "checkpoints")[-1]).model == "resnet10"


def test_first_step_is_cross_entropy_of_the_model_that_pretraining_starts_from(config):
    torch.manual_seed(config.seed)
    model = build_classifier(config, 2)
    torch.manual_seed(config.seed)
    pretrained = build_model(config)
    for key, value in pretrained.encoder.state_dict().items():
        assert torch.equal(value, model.encoder.state_dict()[key])
    images, labels = textures(64, 0)
    views, index = next(iter(OneViewLoader(ArraySource(images), 16, config.augmentation)))
    _, logits = model.to(memory_format=torch.channels_last).train()(views)
    targets = torch.from_numpy(labels)[index]
    out, _ = supervise(replace(config, steps=1))
    (row,) = rows(out)
    assert row["loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert row["accuracy"] == (logits.argmax(1) == targets).float().mean().item()


def test_resume_is_bit_for_bit(config):
    whole, _ = supervise(config)
    cut = replace(config, out=config.out.parent / "cut")
    supervise(cut)
    checkpoints(cut.out / "checkpoints")[-1].unlink()
    supervise(replace(cut, resume=True))
    assert [r["loss"] for r in rows(cut.out)] == [r["loss"] for r in rows(whole)]
    a, b = (load_checkpoint(checkpoints(o / "checkpoints")[-1])["model"] for o in (whole, cut.out))
    assert all(torch.equal(value, b[key]) for key, value in a.items())


def test_bad_checkpoints_end_a_resume(config):
    out, _ = supervise(config)
    older, last = checkpoints(out / "checkpoints")
    state = load_checkpoint(last)
    resumed = replace(config, resume=True)

    def fails(changed, says):
        torch.save(changed, last)
        with pytest.raises(ValueError, match=rf"step-00000008\.pt .*{says}"):
            supervise(resumed)

    fails({k: v for k, v in state.items() if k != "optimizer"}, "missing optimizer")
    other = state["model"] | {"projector.bias": torch.zeros(3)}
    fails(state | {"model": other}, r"projector\.bias is \[3\], must be \[2\]")
    fails(state | {"loader": state["loader"] | {"batch_size": 3}}, "loader: .*batch_size=3")
    fails(state | {"optimizer": {"state": {}, "param_groups": []}}, "optimizer: ")
    older.unlink()
    nan = state["model"] | {"projector.bias": torch.full([2], torch.nan)}
    torch.save(state | {"model": nan}, last)
    with pytest.raises(ValueError, match=r"no usable.*step-00000008\.pt: model\.projector\.bias"):
        supervise(resumed)


def test_the_supervised_baseline_needs_labels(config, monkeypatch):
    images, _ = textures(20, 0)
    monkeypatch.setattr(supervised, "open_data", lambda *_: ArraySource(images))
    with pytest.raises(ValueError, match="'stripes' have no labels"):
        supervise(config)


def files(folder):
    images, labels = textures(40, 0)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (folder / f"class{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"class{label}" / f"{i}.png")
    return [
        *("--data", str(folder), "--model", "resnet10", "--width", "0.125", "--device", "cpu"),
        *("--augmentation.size", "16", "--batch-size", "9", "--steps", "3", "--log-every", "1"),
        *("--precision", "float32"),
    ]


def test_the_supervised_command_refuses_a_used_folder(tmp_path, capsys):
    pytest.importorskip("nvidia.dali", reason="decoding needs DALI (Linux)")
    out = tmp_path / "run"
    assert run(["supervised", *files(tmp_path / "data"), "--out", str(out)]) == 0
    assert str(out / "encoder.safetensors") in capsys.readouterr().out
    assert run(["supervised", *files(tmp_path / "data"), "--out", str(out)]) == 1
    assert "not empty" in capsys.readouterr().err


def test_sigterm_ends_it_and_resume_goes_on(config, tmp_path, capsys, monkeypatch):
    """In step 4 of 8, then while the test images are scored."""
    steps, forward = [], SimCLR.forward

    def counted(self, images):
        steps.append(self.training)
        if len(steps) in (4, 9):
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, images)

    whole, _ = supervise(config)
    cut = replace(config, out=tmp_path / "cut", resume=True, memory="plain")
    monkeypatch.setattr(SimCLR, "forward", counted)
    monkeypatch.setattr(command, "parse_run", lambda *_: command.Supervised(cut))
    for says in ("holds a checkpoint: go on with --resume", "interrupted; --resume"):
        assert run(["supervised"]) == 128 + signal.SIGTERM
        assert says in capsys.readouterr().err
    assert sum(steps) == 8
    assert not (cut.out / "supervised.json").exists()
    assert run(["supervised"]) == 0
    assert sum(steps) == 8
    scores = [(folder / "supervised.json").read_text() for folder in (whole, cut.out)]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_ranks_train_as_one_process(tmp_path):
    pytest.importorskip("nvidia.dali", reason="decoding needs DALI (Linux)")
    options = files(tmp_path / "data")
    assert run(["supervised", *options, "--out", str(tmp_path / "one")]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*launcher, "-m", "simclr_fast", "supervised", *options, "--out", str(tmp_path / "two")],
        cwd=ROOT,
        check=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    one, two = ([r["loss"] for r in rows(tmp_path / name)] for name in ("one", "two"))
    assert np.allclose(one, two, rtol=2e-4), (one, two)
