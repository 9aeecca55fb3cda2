"""`pretrain` in every memory mode, and float16 through an interruption."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import TINY, write_photos

from simclr_fast.training.pretrain import pretrain
from simclr_fast.utils.checkpoint import checkpoints, load_checkpoint

pytest.importorskip("nvidia.dali", reason="decoding needs DALI (Linux)")


@pytest.fixture
def config(tmp_path):
    photos = write_photos(tmp_path / "photos", 16)
    return replace(
        TINY, data=str(photos), out=tmp_path / "plain", steps=4, checkpoint_every=2, memory="plain"
    )


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_every_mode_trains_alike(config):
    expected = losses(pretrain(config))
    for memory in ("replay", "lockstep"):
        out = config.out.parent / memory
        size = 5 if memory == "lockstep" else None
        found = losses(pretrain(replace(config, out=out, memory=memory, micro_batch=size)))
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
