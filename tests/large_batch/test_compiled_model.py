"""Plain and grad-cache with a compiled forward: the same gradient, few graphs, the same names.

The graphs are traced and counted by torch.compile, and run without its code generation, which takes
seconds per graph; `make test-slow` runs that too.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from large_batch_cases import (
    assert_equal,
    crop_loss,
    crops,
    lively,
    loss_fn,
    plain_autograd,
    plain_autograd_of_crops,
    simclr,
    step,
    views,
    with_norms,
)
from rank_runs import on_ranks
from tiny_runs import TINY
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from simclr_fast.data.sources import ArraySource
from simclr_fast.large_batch import LargeBatch, planner
from simclr_fast.large_batch.refusals import compile_refusal
from simclr_fast.models.weights import load_weights
from simclr_fast.training import pretrain as module
from simclr_fast.training.config import PretrainConfig
from simclr_fast.training.pretrain import pretrain
from simclr_fast.training.setup import choose_memory, workload
from simclr_fast.utils.checkpoint import checkpoints, load_checkpoint
from simclr_fast.utils.distributed import World

COMPILE = torch.compile
PLAIN = {"memory": "plain", "compile": True}
CACHED = {"memory": "grad-cache", "micro_batch": 5, "compile": True}


@pytest.fixture(params=["eager"])
def graphs(monkeypatch, request):
    """Counts the graphs."""
    counter = CompileCounterWithBackend(request.param)
    monkeypatch.setattr(torch, "compile", partial(COMPILE, backend=counter))
    return counter


def without_norms(dropout=0.0):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.GELU(), nn.AdaptiveAvgPool2d(3)
    return lively(nn.Sequential(*layers, nn.Flatten(), nn.Dropout(dropout), nn.Linear(72, 8)))


# With "aot_eager" torch.compile also makes the graph of the backward.
@pytest.mark.parametrize("graphs", ["aot_eager"], indirect=True)
@pytest.mark.parametrize(
    ("make", "mode"),
    [(with_norms, PLAIN), (without_norms, CACHED)],
    ids=["plain", "grad-cache"],
)
def test_the_step_is_that_of_plain_autograd(graphs, make, mode):
    expected = step(make(), plain_autograd)
    model = make()
    engine = LargeBatch(model, **mode)
    assert_equal(step(model, lambda m: engine.backward(views(), loss_fn)), expected)
    # Of 14 rows, or of 5 and of 4.
    assert graphs.frame_count == (1 if mode is PLAIN else 2)


@pytest.mark.parametrize("mode", [PLAIN, CACHED], ids=["plain", "grad-cache"])
def test_float32_is_as_exact_as_eager(graphs, mode):
    def gradient(dtype, **mode):
        model = without_norms().to(dtype)
        LargeBatch(model, **mode).backward(views().to(dtype), loss_fn)
        return torch.cat([p.grad.flatten().double() for p in model.parameters()])

    exact = gradient(torch.float64, memory="plain")
    bound = 2 * (gradient(torch.float32, memory="plain") - exact).norm()
    assert 0 < (gradient(torch.float32, **mode) - exact).norm() <= bound


def test_other_numbers_of_rows_share_a_graph(graphs):
    engine = LargeBatch(with_norms(), **PLAIN)
    for rows, count in ((14, 1), (14, 1), (13, 2), (9, 2), (4, 2), (14, 2), (3, 2)):
        engine.backward(views()[:rows], loss_fn if rows % 2 == 0 else square)
        assert graphs.frame_count == count, rows


def square(outputs):
    return outputs.square().sum()


def test_each_size_of_small_crops_has_a_graph(graphs):
    expected = step(with_norms(), plain_autograd_of_crops)
    model = with_norms()
    engine = LargeBatch(model, **PLAIN)
    assert_equal(step(model, lambda m: engine.backward(crops(), crop_loss)), expected)
    assert graphs.frame_count == 2
    for last in (6, 5, 4):
        engine.backward(crops(last=last), crop_loss)
    assert graphs.frame_count == 4


def test_hooks_of_the_model_are_called(graphs):
    model, seen = with_norms(), []
    model.register_forward_hook(lambda module, given, outputs: seen.append(tuple(outputs.shape)))
    engine = LargeBatch(model, **PLAIN)
    for _ in range(2):
        engine.backward(views(), loss_fn)
    assert seen == [(14, 8), (14, 8)]


def test_models_do_not_use_up_each_others_graphs(graphs):
    """torch.compile makes at most 8 graphs for a code object, and then runs it eagerly."""
    for _ in range(10):
        LargeBatch(without_norms(), **PLAIN).backward(views(), loss_fn)
    assert graphs.frame_count == 10


def test_dropout_is_the_same_in_both_passes(graphs):
    model = without_norms(dropout=0.5)
    for _ in range(2):
        LargeBatch(model, **CACHED).backward(views(), loss_fn)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_mixed_rows_are_refused(graphs):
    class Centered(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    model = without_norms().append(Centered())
    with pytest.raises(ValueError, match="depends on the other views in the batch"):
        LargeBatch(model, **CACHED).backward(views(), loss_fn)


@pytest.mark.parametrize("mode", [PLAIN, CACHED], ids=["plain", "grad-cache"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_failing_compiler_is_said(monkeypatch, mode, where):
    def fail(graph, inputs):
        error = RuntimeError("No working C++ compiler found")
        raise torch._dynamo.exc.BackendCompilerFailed(fail, error, None)

    def forward_works(graph, inputs):
        return torch._dynamo.backends.common.aot_autograd(
            fw_compiler=lambda graph, inputs: graph, bw_compiler=fail
        )(graph, inputs)

    backend = fail if where == "forward" else forward_works
    monkeypatch.setattr(torch, "compile", partial(COMPILE, backend=backend))
    engine = LargeBatch(without_norms(), **mode)
    with pytest.raises(RuntimeError, match=r"compile=True.*No working C\+\+ compiler.*g\+\+"):
        engine.backward(views(), loss_fn)


def test_who_cannot_compile(monkeypatch, caplog):
    with pytest.raises(ValueError, match=r"memory='replay' cannot compile: .* memory='plain'"):
        LargeBatch(simclr("resnet10"), memory="replay", compile=True)
    with pytest.raises(ValueError, match=r"compile is for memory auto or plain .*'replay'"):
        PretrainConfig(memory="replay", compile=True)
    assert not any(compile_refusal(memory) for memory in ("plain", "lockstep", "grad-cache"))
    config, device = PretrainConfig(compile=True), torch.device("cpu")
    for memory, ranks, compiles in (
        ("plain", 1, True),
        ("plain", 2, True),
        ("replay", 1, False),
        ("lockstep", 2, True),
    ):
        caplog.clear()
        monkeypatch.setattr(World, "least", lambda self, value: value)
        monkeypatch.setattr(planner, "choose", lambda *_, m=memory: planner.Setting(m, None, 1))
        world = World(0, ranks, device)
        _, options = choose_memory(config, world, workload(config, world.size, world.device, 2))
        assert options["compile"] is compiles
        said = f"compile has no effect: memory 'auto' chose {memory}; memory='{memory}' cannot"
        assert (said in caplog.text) is not compiles


def test_files_of_a_run_have_the_names_of_the_model(graphs, monkeypatch, tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (24, 16, 16, 3), dtype=np.uint8)
    monkeypatch.setattr(module, "open_data", lambda config: ArraySource(images, np.arange(24) % 3))
    config = replace(TINY, data="noise", memory="plain", steps=2, ema=0.9, queue=16)
    names = []
    for compiled in (False, True):
        out = tmp_path / str(compiled)
        pretrain(replace(config, out=out, compile=compiled))
        state = load_checkpoint(checkpoints(out / "checkpoints")[-1])
        names.append([list(state[part]) for part in ("model", "ema", "momentum_encoder")])
        for file in ("encoder.safetensors", "encoder-ema.safetensors"):
            load_weights(out / file)
            assert b"_orig_mod" not in (out / file).read_bytes()
    assert graphs.frame_count == 1
    assert names[0] == names[1]


@pytest.mark.slow
def test_code_of_inductor_over_ranks(tmp_path):
    on_ranks(_several_steps, (str(tmp_path / "store"),), 2)


def _several_steps(rank, store):
    """Steps with other numbers of rows on the ranks, also none, which share graphs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    group = dist.group.WORLD
    model, exact = with_norms(), with_norms()
    engine = LargeBatch(model, group=group, **PLAIN)
    for pairs in ([4, 3], [3, 4], [2, 3], [5, 0], [4, 3]):
        first = sum(pairs[:rank])
        own, whole = views(first, first + pairs[rank]), views(0, sum(pairs))
        found = step(model, lambda m, x=own: engine.backward(x, _loss))
        assert_equal(found, step(exact, lambda m, x=whole: plain_autograd(m, x)), 1e-11)
        model.load_state_dict(exact.state_dict())
        model.zero_grad()
        exact.zero_grad()

    # In float32 the error is at most twice that of the operations that are not compiled.
    def gradient(dtype, **mode):
        model, own = with_norms().to(dtype), views(4 * rank, 4 + 3 * rank).to(dtype)
        LargeBatch(model, group=group, **mode).backward(own, _loss)
        return torch.cat([p.grad.flatten().double() for p in model.parameters()])

    true = gradient(torch.float64, memory="plain")
    bound = 2 * (gradient(torch.float32, memory="plain") - true).norm()
    assert 0 < (gradient(torch.float32, **PLAIN) - true).norm() <= bound
    dist.destroy_process_group()


def _loss(outputs):
    return loss_fn(outputs, dist.group.WORLD)


@pytest.mark.slow
def test_code_of_inductor():
    for make, mode in ((lambda: simclr("resnet10"), PLAIN), (without_norms, CACHED)):
        expected = step(make(), plain_autograd)
        model = make()
        engine = LargeBatch(model, **mode)
        assert_equal(step(model, lambda m, e=engine: e.backward(views(), loss_fn)), expected)
    for _ in range(3):
        LargeBatch(without_norms(dropout=0.5), **CACHED).backward(views(), loss_fn)
