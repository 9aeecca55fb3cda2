"""Steps that are replayed as a CUDA graph train as eager ones do, bit for bit.

There need not be a GPU: `replayed_graph` stands in for CUDA's graphs on the CPU.
"""

import contextlib
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda
from replayed_graph import replayed_graphs
from tiny_runs import TINY
from torch import nn
from torch.utils._pytree import tree_flatten

from simclr_fast.data.sources import ArraySource
from simclr_fast.large_batch import planner
from simclr_fast.models.encoders import SimCLR
from simclr_fast.training import cuda_graph, loop
from simclr_fast.training import pretrain as module
from simclr_fast.training.cuda_graph import StepGraph, refuse_cuda_graph, step_graph
from simclr_fast.training.pretrain import pretrain
from simclr_fast.training.setup import workload
from simclr_fast.training.supervised import supervise
from simclr_fast.utils.checkpoint import checkpoints, load_checkpoint

# Steps 4, 8 and 10 are logged, so they run eagerly.
STEPS, LOG_EVERY = 10, 4


@pytest.fixture
def config(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 255, (24, 16, 16, 3), dtype=np.uint8)
    labels = np.arange(24) % 3
    monkeypatch.setattr(module, "open_data", lambda config: ArraySource(images, labels))
    # The CPU is taken for a GPU.
    monkeypatch.setattr(loop, "refuse_cuda_graph", lambda *_: None)
    monkeypatch.setattr(cuda_graph, "WARM_UP", 1)
    own = {"steps": STEPS, "log_every": LOG_EVERY, "checkpoint_every": 3, "memory": "plain"}
    return replace(TINY, data="noise", out=tmp_path / "eager", **own)


def graphed(config):
    return replace(config, out=config.out.with_name("graphed"), cuda_graph=True)


def replayed(config):
    """The steps that are not logged."""
    return [step for step in range(1, config.steps) if step % LOG_EVERY]


def with_dropout(config):
    model = build_model(config)
    model.projector = nn.Sequential(nn.Dropout(0.5), model.projector)
    return model


build_model = module.build_model


def lines(config):
    """What metrics.jsonl and online_probe.jsonl hold, without what the clock says."""
    rows = []
    for path in sorted(config.out.glob("*.jsonl")):
        rows += map(json.loads, path.read_text().splitlines())
    clock = ("images_per_second", "data_wait_percent", "percent_of_time")
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]


def equal(x, y):
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def assert_same(config, other):
    """The lines and the last two checkpoints: weights, buffers, optimizer, averages, probe, loss.

    The losses of the checkpoints of replayed steps are those of the replays.
    """
    assert lines(config) == lines(other)
    both = [checkpoints(c.out / "checkpoints") for c in (config, other)]
    assert [p.name for p in both[0]] == [p.name for p in both[1]]
    for paths in zip(*both, strict=True):
        (a, structure), (b, structure_b) = (tree_flatten(load_checkpoint(p)) for p in paths)
        assert structure == structure_b
        differing = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if not equal(x, y)]
        assert differing == [], paths


def train_both(config):
    """Train eagerly and with a graph, and compare. Returns how often each graph was replayed."""
    pretrain(config)
    with replayed_graphs() as graphs:
        pretrain(graphed(config))
    assert_same(config, graphed(config))
    return [graph.replays for graph in graphs]


CASES = {
    "lars, dropout": {},
    "lars, ema, probe": {"ema": 0.9, "probe_every": 3},
    "adamw, bfloat16": {"optimizer": "adamw", "precision": "bfloat16"},
    # The first scale is too large: the step is skipped, and the next scale is smaller.
    # The CPU is slow in float16.
    "adam, float16, decoupled": {
        **{"optimizer": "adam", "precision": "float16", "loss": "decoupled"},
        **{"steps": 6, "batch_size": 4},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_equal_eager_ones(config, monkeypatch, case):
    if "dropout" in case:
        monkeypatch.setattr(module, "build_model", with_dropout)
    config = replace(config, **CASES[case])
    assert train_both(config) == [len(replayed(config))]


def test_a_resumed_run_captures_anew(config):
    config = replace(config, checkpoint_every=5)
    pretrain(config)
    with replayed_graphs() as graphs:
        pretrain(graphed(config))
        checkpoints(graphed(config).out / "checkpoints")[-1].unlink()
        pretrain(replace(graphed(config), resume=True))
    # Of the steps from 6 on, 8 and 10 are logged.
    assert [graph.replays for graph in graphs] == [len(replayed(config)), 3]
    assert_same(config, graphed(config))


FAULTS = {
    "the views are not copied": {"_views": lambda views: [view.clone() for view in views]},
    "gradients stay None": {"_gradients": lambda pairs: []},
    "gradients are in other tensors": {
        "_gradients": lambda pairs: [(p, torch.zeros_like(g)) for p, g in pairs]
    },
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_replay_is_seen(config, monkeypatch, fault):
    capture = StepGraph.capture

    def faulty(self, *given):
        capture(self, *given)
        for name, change in FAULTS[fault].items():
            setattr(self, name, change(getattr(self, name)))

    monkeypatch.setattr(StepGraph, "capture", faulty)
    # Memory that was never filled may hold NaN.
    with pytest.raises((AssertionError, FloatingPointError)):
        train_both(config)


def test_the_stand_in_repeats_no_python():
    """A learning rate of the capture stays, and so would a step's that is in the graph."""
    weight, gradient = torch.ones(2), torch.ones(2)
    sgd = torch.optim.SGD([weight], lr=1.0)
    weight.grad = gradient
    with replayed_graphs():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            sgd.step()
            twice = 2 * weight
        assert weight.tolist() == [1, 1]
        assert twice.isnan().all()
        graph.replay()
        assert (weight.tolist(), twice.tolist()) == ([0, 0], [0, 0])
        sgd.param_groups[0]["lr"] = 5.0
        graph.replay()
        assert (weight.tolist(), twice.tolist()) == ([-1, -1], [-2, -2])


@pytest.mark.parametrize(
    ("cause", "kind", "words"),
    [
        ("operation not permitted", RuntimeError, "operation not permitted.*--no-cuda-graph"),
        ("CUDA out of memory", planner.OutOfMemory, "step 1, with --cuda-graph, which takes activ"),
    ],
)
def test_a_failed_capture_says_how_to_go_on(config, monkeypatch, cause, kind, words):
    capturing, forward = [], SimCLR.forward

    @contextlib.contextmanager
    def capture(graph, **options):
        capturing.append(1)
        try:
            yield
        finally:
            capturing.clear()
            raise RuntimeError("the capture was invalidated")

    def refused(self, images):
        if capturing:
            raise RuntimeError(cause)
        return forward(self, images)

    monkeypatch.setattr(SimCLR, "forward", refused)
    # The planner's search takes seconds.
    monkeypatch.setattr(planner, "next_smaller", lambda *_: None)
    with replayed_graphs():
        monkeypatch.setattr(torch.cuda, "graph", capture)
        with pytest.raises(kind, match=words):
            pretrain(graphed(config))


def test_the_capture_is_over_before_the_loader_starts(config, monkeypatch):
    """On a GPU, a thread of DALI ended the capture of a step."""
    done, read = [], ArraySource.read
    capture = StepGraph.capture

    def captured(self, *given):
        capture(self, *given)
        done.append(1)

    def read_after_it(self, i):
        assert done, "the loader reads images during the capture"
        return read(self, i)

    monkeypatch.setattr(StepGraph, "capture", captured)
    with replayed_graphs():
        monkeypatch.setattr(ArraySource, "read", read_after_it)
        pretrain(replace(graphed(config), steps=2))
    assert done == [1]


@pytest.mark.parametrize("missing", ["nothing", "wait_stream"])
def test_the_streams_wait_for_each_other(monkeypatch, missing):
    with FakeCuda() as cuda:
        if missing == "wait_stream":
            monkeypatch.setattr(type(torch.cuda.current_stream()), missing, lambda *_: None)
        made = torch.ones(3, device="cuda")
        made += 1
        with step_graph(nn.Linear(1, 1), torch.device("cuda", 0)):
            assert torch.cuda.current_stream() is not torch.cuda.default_stream()
            made += 1
        made += 1
    # The memory is not recorded on the run's stream: it is freed after the streams have waited.
    faults = [fault for fault in cuda.faults if "was not recorded" not in fault]
    assert len(faults) == (2 if missing == "wait_stream" else 0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"memory": "replay"}, "cuda_graph is for memory auto or plain, got 'replay'"),
        ({"loss": "sup-con"}, "cuda_graph is for loss 'nt-xent' or 'decoupled', got 'sup-con'"),
        ({"views": 3}, "cuda_graph is for views 2, got 3"),
        ({"small_crops": 2}, "cuda_graph is for small_crops 0, got 2"),
        ({"queue": 8}, "cuda_graph is for queue None, got 8"),
        ({"compile": True}, "cuda_graph is for compile False, got True"),
        ({"log_every": 1}, "log_every must be at least 2 with it, got 1"),
    ],
)
def test_settings_that_are_refused(config, settings, words):
    with pytest.raises(ValueError, match=words):
        replace(config, **{"cuda_graph": True, **settings})


def test_runs_that_are_refused(config, monkeypatch):
    gpu = torch.device("cuda", 0)
    for device, ranks, memory, words in (
        (torch.device("cpu"), 1, "plain", "cuda_graph is for device cuda, got 'cpu'"),
        (gpu, 2, "plain", "cuda_graph is for one rank, got 2"),
        (gpu, 1, "lockstep", "memory 'auto' chose 'lockstep'"),
    ):
        with pytest.raises(ValueError, match=words):
            refuse_cuda_graph(SimpleNamespace(device=device, size=ranks), memory)
    refuse_cuda_graph(SimpleNamespace(device=gpu, size=1), "plain")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="device cuda, got 'cpu'"):
        pretrain(replace(graphed(config), data="demo"))
    assert not graphed(config).out.exists()
    with pytest.raises(ValueError, match="cuda_graph is for pretrain, got True"):
        supervise(graphed(config))


def test_the_planner_counts_activations_twice(config):
    """A CUDA graph keeps its own, beside those of logged steps."""
    cpu = torch.device("cpu")
    given = (config, graphed(config))
    eager, captured = (workload(c, 1, cpu, 2) for c in given)
    fixed = eager.bytes_outside_step("plain")
    plain, twice = (w.setting("plain").device_bytes - fixed for w in (eager, captured))
    assert plain > 0
    assert twice == 2 * plain
    assert captured.setting("replay") == eager.setting("replay")
    assert captured.setting("grad-cache", 4) == eager.setting("grad-cache", 4)
