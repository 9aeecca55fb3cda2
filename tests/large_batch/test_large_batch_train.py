"""`pretrain` in every memory mode, and float16 through an interruption."""

import json
import multiprocessing
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import TINY, write_photos

from simclr_fast.large_batch.lockstep import Lockstep
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


def die_in_backward(config):
    """Run until the third step's backward is half done, and be killed."""
    steps, run_pass = [], Lockstep._run_pass

    def counted(self, number, current, parts):
        # The planner runs steps without data.
        if number == 0 and type(self) is Lockstep:
            steps.append(self)
        if len(steps) == 3 and number == 3 * len(self.program.passes) // 4:
            assert current.phase == "backward"
            os.kill(os.getpid(), signal.SIGKILL)
        run_pass(self, number, current, parts)

    Lockstep._run_pass = counted
    pretrain(config)


def test_a_run_killed_within_a_step_resumes_bit_for_bit(config):
    config = replace(config, memory="lockstep", micro_batch=5)
    whole = pretrain(config)
    cut = replace(config, out=config.out.parent / "cut")
    process = multiprocessing.get_context("spawn").Process(target=die_in_backward, args=(cut,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    found = [path.name for path in checkpoints(cut.out / "checkpoints")]
    assert found == [checkpoints(whole / "checkpoints")[0].name]
    pretrain(replace(cut, resume=True))
    assert losses(cut.out) == losses(whole)
    one, two = (
        load_checkpoint(checkpoints(folder / "checkpoints")[-1]) for folder in (whole, cut.out)
    )
    assert all(torch.equal(value, two["model"][key]) for key, value in one["model"].items())


@pytest.mark.slow
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
