"""What a run tells of itself while it trains."""

import json
import logging
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import TINY
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_fast import nt_xent_loss
from simclr_fast.data.sources import ArraySource
from simclr_fast.evaluation import geometry
from simclr_fast.training import metrics as module
from simclr_fast.training import pretrain as training
from simclr_fast.training.metrics import Metrics
from simclr_fast.training.pretrain import pretrain
from simclr_fast.training.setup import build_model, build_optimizer


def orthogonal(n, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, n, dtype=torch.float64, generator=generator)).Q.T


def test_effective_rank():
    basis = orthogonal(6, 10)
    assert geometry.effective_rank(basis) == pytest.approx(6, rel=1e-4)
    assert geometry.effective_rank(basis[:1].expand(8, -1)) == pytest.approx(1, abs=1e-4)
    # Singular values 3, 1: probabilities 3/4, 1/4.
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert geometry.effective_rank(basis[:2] * torch.tensor([[3], [1]])) == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.parametrize(("n", "dim"), [(40, 70), (70, 40), (512, 96)])
def test_effective_rank_is_that_of_the_singular_values(n, dim):
    generator = torch.Generator().manual_seed(0)
    # Singular values over nine orders of magnitude.
    x = torch.randn(n, dim, dtype=torch.float64, generator=generator) * torch.logspace(0, -9, dim)
    values = torch.linalg.svdvals(x)
    p = values / values.sum() + 1e-7
    expected = (-(p * p.log()).sum()).exp().item()
    assert geometry.effective_rank(x) == pytest.approx(expected, rel=1e-4)


def test_alignment_and_uniformity_are_those_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 9, 5, dtype=torch.float64, generator=generator)
    units = [F.normalize(x) for x in (u, v)]
    expected = sum(((a - b) ** 2).sum() for a, b in zip(*units, strict=True)) / 9
    assert geometry.alignment(u, v) == pytest.approx(expected.item())
    pairs = [(i, j) for i in range(9) for j in range(i)]
    terms = [math.exp(-2 * ((units[0][i] - units[0][j]) ** 2).sum()) for i, j in pairs]
    assert geometry.uniformity(u) == pytest.approx(math.log(sum(terms) / len(terms)))


@pytest.fixture
def metrics(tmp_path):
    config = replace(TINY, batch_size=4, log_every=2)
    with Metrics("pretrain", tmp_path / "metrics.jsonl", config, 0, 2000) as metrics:
        yield metrics


def lines(metrics):
    return [json.loads(line) for line in metrics.path.read_text().splitlines()]


def shown(loss):
    return {"loss": torch.tensor(loss), "contrastive_accuracy": torch.tensor(0.5)}


def test_a_line_holds_gradients_ranks_and_the_chance_level(metrics):
    generator = torch.Generator().manual_seed(0)
    h, z = torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)
    model = nn.Sequential()
    model.add_module("encoder", nn.Linear(2, 2))
    model.add_module("projector", nn.Linear(2, 1, bias=False))
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    assert [metrics.wants(step) for step in (1, 2, 3, 2000)] == [False, True, False, True]
    metrics.look(h, z, 2)
    metrics.measure_gradients(model, 2.0)
    metrics.after_step(1, shown(1.5), 0.1)
    assert lines(metrics) == []
    metrics.after_step(2, shown(1.25), 0.1)
    (row,) = lines(metrics)
    assert (row["step"], row["loss"], row["lr"]) == (2, 1.25, 0.1)
    assert row["chance_loss"] == pytest.approx(math.log(7))
    # Gradients of 3, of a loss scaled by 2: six numbers, and two.
    assert row["grad_norm_encoder"] == pytest.approx(1.5 * math.sqrt(6))
    assert row["grad_norm_projector"] == pytest.approx(1.5 * math.sqrt(2))
    assert row["rank_h"] == pytest.approx(geometry.effective_rank(h))
    assert row["rank_z"] == pytest.approx(geometry.effective_rank(z))
    assert row["alignment"] == pytest.approx(geometry.alignment(z[:4], z[4:]))
    assert row["uniformity"] == pytest.approx(geometry.uniformity(z))
    # Without a look, the next line has none of the old values.
    metrics.after_step(4, shown(1.0), 0.1)
    assert "rank_h" not in lines(metrics)[1]


def test_a_stalled_run_is_told_once_what_to_try(metrics, caplog):
    with caplog.at_level(logging.WARNING):
        metrics.after_step(2, shown(math.log(7)), 0.1)
        metrics.after_step(300, shown(0.9 * math.log(7)), 0.1)
        assert caplog.messages == []
        for step in (302, 304):
            metrics.after_step(step, shown(0.99 * math.log(7)), 0.1)
    (said,) = caplog.messages
    assert "1.93, is still near its chance level, 1.95, at step 302" in said
    assert "--temperature" in said


class Counted(TorchDispatchMode):
    """The number of operations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_the_metrics_add_less_than_two_percent_of_a_steps_operations(tmp_path):
    """At the default of a line in 20 steps, beside a ResNet-18."""
    config = replace(TINY, model="resnet18", batch_size=4, log_every=20)
    model = build_model(config)
    optimizer = build_optimizer(model, config)
    views = torch.rand(8, 3, 16, 16)
    with Metrics("pretrain", tmp_path / "metrics.jsonl", config, 0, 2000) as metrics:
        with Counted() as step:
            h, z = model(views)
            loss = nt_xent_loss(z)
            loss.backward()
            optimizer.step()
        values = shown(loss.item())
        with Counted() as silent:
            assert not metrics.wants(19)
            metrics.after_step(19, values, 0.1)
        with Counted() as line:
            assert metrics.wants(20)
            metrics.look(h, z, 2)
            metrics.measure_gradients(model, 1.0)
            metrics.after_step(20, values, 0.1)
    assert silent.count == 0
    assert line.count < 0.02 * 20 * step.count
    assert {"rank_h", "rank_z", "alignment", "uniformity", "grad_norm_encoder"} < lines(metrics)[
        0
    ].keys()


def test_a_collapse_is_named(metrics, caplog):
    line = torch.ones(8, 3) + 1e-6 * torch.rand(8, 3)
    spread = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING):
        metrics.look(spread, spread, 2)
        metrics.after_step(400, shown(1.0), 0.1)
        assert caplog.messages == []
        metrics.look(spread, line, 2)
        metrics.after_step(402, shown(1.0), 0.1)
    (said,) = caplog.messages
    assert "have collapsed: their effective rank is 1.0 and their uniformity -0.00" in said
    assert "at step 402" in said


def test_small_crops_do_not_disturb_the_pictures(metrics):
    class Recorder:
        def __init__(self):
            self.shapes = []

        def picture(self, step, name, pixels):
            self.shapes.append((name, pixels.shape))

        def close(self):
            pass

    recorder = Recorder()
    metrics._loggers = [recorder]
    metrics.pictures(2, [torch.rand(4, 3, size, size) for size in (16, 16, 8, 8)])
    assert recorder.shapes == [("views", (4 * 16, 2 * 16, 3))]


class Slow(ArraySource):
    """A slow disk."""

    def read(self, i):
        time.sleep(0.04)
        return super().read(i)


# One colour per image: easy to tell apart without colour distortion.
COLOURS = np.random.default_rng(0).integers(0, 255, (24, 1, 1, 3), dtype=np.uint8)
COLOURS = np.broadcast_to(COLOURS, (24, 16, 16, 3)).copy()
# Images that only their random colours differ in, which say nothing about the image.
EQUAL = np.tile(COLOURS[:1], (24, 1, 1, 1))
NO_BATCH_NORM = {"optimizer": "sgd", "projector_batch_norm": False}


@pytest.mark.parametrize(("percent", "lines", "told"), [(9, 12, 0), (11, 6, 0), (11, 7, 1)])
def test_waiting_is_told_from_a_tenth_of_the_time_in_five_lines(
    tmp_path, monkeypatch, caplog, percent, lines, told
):
    """The line of the start is not counted, and one without waiting begins anew."""
    now = iter(range(0, 1000, 20))
    config = replace(TINY, log_every=1, log=())
    shown = {"loss": torch.tensor(1.0), "contrastive_accuracy": torch.tensor(0.5)}
    with Metrics("supervised", tmp_path / "m.jsonl", config, 0, 100) as metrics:
        monkeypatch.setattr(module.time, "perf_counter", lambda: next(now))
        metrics._since = next(now)
        for line in range(lines):
            metrics.waited = 20 * percent / 100 * (line != 1)
            metrics.after_step(line + 1, shown, 0.1)
    said = [m for m in caplog.messages if "of the time is spent waiting for data" in m]
    assert len(said) == told, caplog.messages


@pytest.mark.parametrize(
    ("source", "p_jitter", "options", "says"),
    [
        (ArraySource(COLOURS), 0, {}, ""),
        (ArraySource(COLOURS), 0, NO_BATCH_NORM | {"lr": 50.0}, "the embeddings have collapsed"),
        (ArraySource(EQUAL), 1, {}, "still near its chance level"),
        (Slow(COLOURS), 0, {"steps": 14}, "of the time is spent waiting for data"),
    ],
    ids=["good", "collapsed", "stalled", "starved"],
)
def test_bad_runs_are_told_so_and_a_good_one_is_not(
    tmp_path, monkeypatch, caplog, source, p_jitter, options, says
):
    monkeypatch.setattr(training, "open_data", lambda config: source)
    monkeypatch.setattr(module, "_STALL_STEPS", 30)
    # Two lines' time. A machine that is busy with other things makes a good run wait as well.
    monkeypatch.setattr(module, "_MEASURED", 0.0)
    monkeypatch.setattr(module, "_SLOW_DATA", 30.0)
    config = replace(TINY, data="colours", out=tmp_path / "run", memory="plain", temperature=0.2)
    # Seldom gray: without any colour distortion there is a warning of its own.
    augmentation = replace(config.augmentation, p_jitter=p_jitter, p_gray=1e-9)
    config = replace(config, augmentation=augmentation, steps=40, log_every=2)
    with caplog.at_level(logging.WARNING, logger="simclr_fast"):
        pretrain(replace(config, **options))
    messages = [m for m in caplog.messages if "slower than its kernels" not in m]
    assert len(messages) == bool(says), messages
    assert says in "".join(messages)
