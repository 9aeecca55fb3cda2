"""Runs with weights that follow the model's (--queue, --ema), and with small crops."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rank_runs import Run, pixels
from tiny_runs import TINY
from torch import nn

from simclr_fast.augment.params import Augmentation
from simclr_fast.data.sources import ArraySource
from simclr_fast.large_batch import planner
from simclr_fast.models.encoders import SimCLR
from simclr_fast.models.weights import load_weights
from simclr_fast.training import pretrain as module
from simclr_fast.training import report
from simclr_fast.training.pretrain import pretrain
from simclr_fast.training.setup import check_views, workload
from simclr_fast.training.supervised import supervise
from simclr_fast.utils.checkpoint import checkpoints, load_checkpoint
from simclr_fast.utils.distributed import join_world

QUEUE = {"queue": 25, "queue_momentum": 0.9, "ema": 0.8}
CROPS = {"small_crops": 2, "small_size": 12, "ema": 0.8}


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "open_data", lambda config: ArraySource(pixels()))
    own = {"steps": 5, "checkpoint_every": 2, "memory": "plain", "batch_size": 9}
    return replace(TINY, data="noise", out=tmp_path / "run", **own)


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def last(out):
    return load_checkpoint(checkpoints(out / "checkpoints")[-1])


def same(one, two):
    """Whether two checkpoints hold the same bits."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    return True


@pytest.mark.parametrize("options", [QUEUE, CROPS], ids=["queue", "crops"])
def test_resume_is_bit_for_bit(config, options):
    config = replace(config, **options)
    whole = pretrain(replace(config, out=config.out.with_name("whole")))
    # Step 4 is the first of the second epoch of 3, and the queue has been filled once around.
    pretrain(config)
    checkpoints(config.out / "checkpoints")[-1].unlink()
    pretrain(replace(config, resume=True))
    assert losses(config.out) == losses(whole)
    parts = {"ema", *(("queue", "momentum_encoder") if "queue" in options else ())}
    assert parts < last(whole).keys()
    assert same(last(config.out), last(whole))
    averaged = [load_weights(out / "encoder-ema.safetensors") for out in (config.out, whole)]
    assert same(*(weights.encoder.state_dict() for weights in averaged))


@pytest.mark.parametrize("options", [QUEUE, CROPS], ids=["queue", "crops"])
def test_ranks_train_as_one_process(config, options):
    """Two gloo ranks with 5 and 4 of the 9 images of a batch."""
    config = replace(config, **options)
    alone = pretrain(replace(config, out=config.out.with_name("alone")))
    run = Run(config, 2)
    try:
        assert run.wait() == [0, 0], [run.says(rank) for rank in range(2)]
    finally:
        run.kill()
    assert losses(config.out) == pytest.approx(losses(alone), rel=1e-4)
    one, two = (last(out) for out in (alone, config.out))
    names = ["ema", *(["queue", "momentum_encoder"] if "queue" in options else [])]
    for name in names:
        for key, value in one[name].items():
            torch.testing.assert_close(two[name][key], value, rtol=1e-2, atol=1e-3)


def test_the_average_is_of_the_encoder(config, monkeypatch):
    seen = []
    forward = SimCLR.forward

    def noted(self, images):
        seen.append({name: t.clone() for name, t in self.encoder.state_dict().items()})
        return forward(self, images)

    monkeypatch.setattr(SimCLR, "forward", noted)
    out = pretrain(replace(config, ema=0.9))
    raw = load_weights(out).encoder.state_dict()
    averaged = load_weights(out / "encoder-ema.safetensors").encoder.state_dict()
    expected = {name: t.double() for name, t in seen[0].items()}
    for update, after in enumerate([*seen[1:], raw], start=1):
        decay = min(0.9, (1 + update) / (10 + update))
        for name, t in after.items():
            expected[name] = decay * expected[name] + (1 - decay) * t.double()
    for name, t in averaged.items():
        if t.is_floating_point():
            torch.testing.assert_close(t.double(), expected[name], rtol=1e-4, atol=1e-5)
    assert not torch.equal(raw["layer1.0.conv1.weight"], averaged["layer1.0.conv1.weight"])


def test_the_report_probes_the_average(config, monkeypatch):
    labelled = ArraySource(pixels(), np.arange(30) % 3)
    monkeypatch.setattr(report, "images_to_evaluate", lambda config, split="train": labelled)
    config = replace(config, ema=0.9)
    lines = list(report.run_report(config, pretrain(config)))
    assert any(line.startswith("average of its weights") for line in lines)
    assert "average of its weights" in json.loads((config.out / "probe.json").read_text())
    assert any("encoder-ema.safetensors" in line for line in lines)


def test_grad_cache_trains_with_a_queue(config, monkeypatch):
    """A model without batch norm: as in one piece, from micro-batches."""

    def build(config):
        torch.manual_seed(1)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.LayerNorm(16), nn.GELU())
        return SimCLR(encoder, nn.Linear(16, 8))

    monkeypatch.setattr(module, "build_model", build)
    config = replace(config, projector_dim=8, **QUEUE)
    parts = replace(config, out=config.out.with_name("parts"), memory="grad-cache", micro_batch=4)
    assert losses(pretrain(parts)) == pytest.approx(losses(pretrain(config)), rel=1e-4)


def test_the_planner_leaves_lockstep_out_and_counts_the_followers(config):
    with join_world("cpu", 60) as world:
        bare = workload(replace(config, memory="auto"), world.size, world.device, 2)
        work = workload(replace(config, memory="auto", **QUEUE), world.size, world.device, 2)
        assert work.state == bare.state + 2
        setting = work.lockstep(1e9)
        assert "queue cannot be used with memory lockstep" in setting.refusal
        assert planner.choose(work, 1e9).memory == "plain"
        more = workload(replace(config, memory="auto", **CROPS), world.size, world.device, 4)
        # Two crops of 12² have the pixels of 1.125 views of 16².
        assert more.batch_size == 15
        assert "small_crops cannot be used" in more.lockstep(1e9).refusal


@pytest.mark.parametrize("option", [{"queue": 8}, {"small_crops": 2}])
def test_supervised_refuses_what_it_does_not_do(config, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} is for pretrain"):
        supervise(replace(config, **option))


@pytest.mark.parametrize("options", [{"views": 3}, {"small_crops": 2, "small_size": 12}])
def test_the_online_probe_takes_any_number_of_views(config, monkeypatch, options):
    labelled = ArraySource(pixels(), np.arange(30) % 3)
    monkeypatch.setattr(module, "open_data", lambda config: labelled)
    out = pretrain(replace(config, probe_every=2, steps=2, **options))
    (line,) = (out / "online_probe.jsonl").read_text().splitlines()
    assert json.loads(line)["linear"] is not None


def test_small_crops_that_the_encoder_cannot_take_are_refused_before_training(config):
    pytest.importorskip("timm")
    vit = {"model": "vit_tiny_patch16_224", "width": 1, "augmentation": Augmentation(size=224)}
    with pytest.raises(ValueError, match=r"small_size must be .* beside 224, got 12"):
        pretrain(replace(config, **vit, **CROPS))


def test_views_without_colour_distortion_are_warned_of(config, caplog):
    def warned(**options):
        caplog.clear()
        views = Augmentation(size=16, **options)
        check_views(replace(config, augmentation=views), None)
        return "no colour distortion" in caplog.text

    assert warned(p_jitter=0, p_gray=0)
    assert not warned(p_jitter=0)
    assert not warned()
