"""`pretrain` in every memory mode, and float16 through an interruption."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_fast.augment import Augmentation
from simclr_fast.checkpoint import checkpoints, load_checkpoint
from simclr_fast.config import PretrainConfig
from simclr_fast.train import pretrain

pytest.importorskip("nvidia.dali", reason="decoding needs DALI (Linux)")


@pytest.fixture
def config(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(16):
        pixels = rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.jpg")
    return PretrainConfig(
        data=str(tmp_path / "photos"),
        out=tmp_path / "plain",
        model="resnet10",
        width=0.125,
        augmentation=Augmentation(size=16),
        batch_size=8,
        steps=4,
        warmup_epochs=1,
        log_every=1,
        checkpoint_every=2,
        device="cpu",
        memory="plain",
        workers=1,
    )


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_every_mode_trains_alike(config):
    expected = losses(pretrain(config))
    for memory in ("replay", "lockstep"):
        out = config.out.parent / memory
        found = losses(pretrain(replace(config, out=out, memory=memory, micro_batch=5)))
        assert np.allclose(found, expected, rtol=2e-4), (memory, found, expected)


def test_float16_resumes_with_its_scale(config):
    config = replace(config, memory="lockstep", micro_batch=5, precision="float16")
    whole = pretrain(config)
    last = checkpoints(whole / "checkpoints")[-1]
    cut = replace(config, out=config.out.parent / "cut")
    pretrain(cut)
    checkpoints(cut.out / "checkpoints")[-1].unlink()
    pretrain(replace(cut, resume=True))
    assert losses(cut.out) == losses(whole)
    one, two = (load_checkpoint(folder / "checkpoints" / last.name) for folder in (whole, cut.out))
    assert one["scaler"] == two["scaler"]
    assert all(torch.equal(value, two["model"][key]) for key, value in one["model"].items())
