"""Lockstep with compiled regions: the same gradient, a handful of graphs, nothing more kept."""

import copy
from functools import partial

import pytest
import torch
from large_batch_cases import (
    assert_equal,
    large_batch,
    lively,
    loss_fn,
    plain_autograd,
    simclr,
    step,
    views,
)
from test_large_batch import chain, timm_norm_act, timm_resnet, torchvision_resnet
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from simclr_fast.large_batch import LargeBatch
from simclr_fast.large_batch import global_batch_norm as gbn

COMPILE = torch.compile
MODES = [
    {"micro_batch": 7},
    {"micro_batch": 5},
    {"micro_batch": 13},
    {"micro_batch": 4, "choices": {"turn": "mask", "output": "once"}},
]


def lockstep(model, **mode):
    options = {"memory": "lockstep", "micro_batch": 5, "compile": True, "choices": {}}
    return large_batch(model, **options | mode)


def run(model, **mode):
    return lockstep(model, **mode).backward(views(), loss_fn)


@pytest.fixture
def uncompiled(monkeypatch):
    """Regions as torch.compile gets them: all but its part, which takes seconds per graph."""
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_regions_equal_plain_autograd(uncompiled, name, mode):
    expected = step(simclr(name, stem="cifar"), plain_autograd)
    assert_equal(step(simclr(name, stem="cifar"), lambda m: run(m, **mode)), expected)


@pytest.mark.parametrize("build", [timm_resnet, timm_norm_act, torchvision_resnet, chain])
def test_regions_of_other_libraries(uncompiled, build):
    torch.manual_seed(3)
    model = lively(build())
    if build is chain:
        model[11].eval()
    expected = step(copy.deepcopy(model), plain_autograd)
    assert_equal(step(model, run), expected)


def test_regions_beside_frozen_layers(uncompiled):
    def frozen():
        model = simclr("resnet10", stem="imagenet")
        model.encoder.conv1.requires_grad_(False)
        model.encoder.layer1.requires_grad_(False)
        return model

    assert_equal(step(frozen(), run), step(frozen(), plain_autograd))


def test_a_planted_fault_is_seen(uncompiled, monkeypatch):
    expected = step(simclr("resnet10"), plain_autograd)
    monkeypatch.setattr(gbn, "norm_act_composed", lambda x, norms, relu: x[0])
    with pytest.raises(AssertionError):
        assert_equal(step(simclr("resnet10"), run), expected)


def test_graphs_are_few(monkeypatch):
    """Traced and counted by torch.compile, run without its code generation."""
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(COMPILE, backend=counter))
    model = simclr("resnet10", stem="cifar")
    engine = lockstep(model)
    expected = step(simclr("resnet10", stem="cifar"), plain_autograd)
    found = step(model, lambda m: engine.backward(views(), loss_fn))
    assert_equal(found, expected)
    # Norm and activation, sums with and without a batch norm in the shortcut, with what is made of
    # them; the batch norm's gradient. Some of them for a coincidence of sizes too.
    functions = len(engine.lockstep.regions._functions)
    assert 0 < functions <= 6
    assert counter.frame_count <= 2 * (functions + 1)
    before = counter.frame_count
    for rows in (14, 13, 9, 3):
        engine.backward(views()[:rows], lambda outputs: outputs[1].square().sum())
    assert counter.frame_count <= before + 2


def images(rows=14):
    return views(size=32)[:rows].float().to(memory_format=torch.channels_last)


def gradient(dtype, **mode):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3)
    head = nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(6272, 8)
    model = nn.Sequential(*layers, *head).to(memory_format=torch.channels_last)
    x = images()
    if dtype is torch.float64:
        model, x = model.double(), x.double()
    options = {"autocast": dtype} if dtype is torch.bfloat16 else {}
    LargeBatch(model, **mode, **options).backward(x, loss_fn)
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


@pytest.mark.slow
def test_code_of_inductor():
    exact = gradient(torch.float64, memory="plain")
    for dtype, bound in ((torch.float64, 1e-12 * exact.norm()), (torch.bfloat16, None)):
        bound = bound or 1.5 * (gradient(dtype, memory="plain") - exact).norm()
        found = gradient(dtype, memory="lockstep", micro_batch=5, compile=True)
        assert (found - exact).norm() <= bound


def test_a_failing_compiler_is_said(monkeypatch):
    def backend(module, inputs):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", partial(COMPILE, backend=backend))
    with pytest.raises(RuntimeError, match=r"compile=True.*No working C\+\+ compiler.*g\+\+"):
        run(simclr("resnet10"))
