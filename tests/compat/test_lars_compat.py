"""LARS with other libraries' signatures against those libraries themselves."""

import logging

import pytest
import torch
from torch import nn

from simclr_fast import reference
from simclr_fast.compat import lightly as our_lightly
from simclr_fast.compat import solo_learn as our_solo_learn
from simclr_fast.compat import timm as our_timm
from simclr_fast.optim.lars import LARS

SHAPES = [(7, 5), (3,), (4, 4), (0, 3), (16, 3, 3, 3), (1,)]


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]
    params[2].data.zero_()
    return params


def groups(params):
    return [
        {"params": params[:3]},
        {"params": params[3:5], "weight_decay": 0.0},
        {"params": params[5:], "lr": 0.01},
    ]


def train(pairs, steps, start=0):
    for t in range(start, start + steps):
        generator = torch.Generator().manual_seed(t)
        grads = [torch.randn(s, generator=generator) for s in SHAPES]
        if t in (0, 5):
            grads[0].zero_()
        for params, optimizer in pairs:
            for p, g in zip(params, grads, strict=True):
                p.grad = g.to(p.dtype)
            optimizer.step()


def peer(name):
    if name == "timm":
        return pytest.importorskip("timm.optim.lars").Lars, our_timm.Lars
    return pytest.importorskip("lightly.utils.lars").LARS, our_lightly.LARS


CASES = [
    ("timm", {"momentum": 0.9, "weight_decay": 1e-2}),
    ("timm", {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": True, "always_adapt": True}),
    ("timm", {"momentum": 0.9, "weight_decay": 1e-2, "trust_clip": True, "dampening": 0.2}),
    ("timm", {"weight_decay": 1e-2, "trust_coeff": 0.02, "eps": 1e-3, "foreach": False}),
    ("lightly", {"momentum": 0.9, "weight_decay": 1e-2}),
    ("lightly", {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}),
    ("lightly", {"weight_decay": 1e-2, "trust_coefficient": 0.02, "eps": 1e-3}),
    ("lightly", {"momentum": 0.5, "weight_decay": 1e-2, "dampening": 0.2}),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("name", "kwargs"), CASES, ids=[f"{n}-{'-'.join(k)}" for n, k in CASES])
def test_twenty_steps_equal_the_library(name, kwargs, dtype):
    theirs, ours = peer(name)
    a, b = parameters(dtype), parameters(dtype)
    first = theirs(groups(a), lr=2.0, **kwargs)
    second = ours(groups(b), lr=2.0, **kwargs)
    train([(a, first), (b, second)], 20)
    bound = 1e-13 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(b, a, rtol=bound, atol=bound)
    if kwargs.get("momentum"):
        for p, q in zip(a, b, strict=True):
            buffer = second.state[q]["momentum_buffer"]
            expected = first.state[p]["momentum_buffer"]
            torch.testing.assert_close(buffer, expected, rtol=10 * bound, atol=bound)


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_solo_learn_equals_its_formula(clip, exclude):
    params = parameters()
    optimizer = our_solo_learn.LARS(
        params,
        lr=0.4,
        momentum=0.9,
        weight_decay=1e-2,
        eta=0.02,
        clip_lr=clip,
        exclude_bias_n_norm=exclude,
    )
    state = [(p.detach().clone(), None) for p in params]
    for t in range(8):
        train([(params, optimizer)], 1, start=t)
        state = [
            reference.lars_step(
                p,
                q.grad,
                v,
                "solo_learn",
                lr=0.4,
                momentum=0.9,
                weight_decay=1e-2,
                trust_coefficient=0.02,
                trust_clip=clip,
                adapt=not (exclude and p.ndim == 1),
            )
            for (p, v), q in zip(state, params, strict=True)
        ]
    for p, (expected, _) in zip(params, state, strict=True):
        torch.testing.assert_close(p.detach().double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("foreach", [None, True], ids=["native", "foreach"])
def test_a_compiled_training_step_is_quiet_and_equals_the_eager_one(foreach, recwarn, caplog):
    results = []
    for compiled in (False, True):
        params = parameters()
        optimizer = LARS(groups(params), lr=2.0, weight_decay=1e-2, foreach=foreach)

        def train(params=params, optimizer=optimizer):
            optimizer.zero_grad()
            loss = sum((p - 1).square().sum() for p in params)
            loss.backward()
            optimizer.step()
            return loss

        step = torch.compile(train, backend="aot_eager") if compiled else train
        results.append(([step().item() for _ in range(4)], params))
    torch.testing.assert_close(results[1], results[0], rtol=2e-6, atol=2e-6)
    assert not [str(w.message) for w in recwarn if "Dynamo" in str(w.message)]
    # torch's wrapper around every optimizer's step logs this; torch.optim.SGD's does too.
    # The second wording is torch 2.10's.
    usual = ("Profiler record function", "Profiler function")
    messages = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert not [message for message in messages if not message.startswith(usual)]


def test_lars_trains_a_compiled_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = LARS(model.parameters(), lr=2.0, weight_decay=1e-6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(64, 8)
    y = x.sum(1, keepdim=True)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (compiled(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5


def test_the_lars_op_passes_opcheck():
    from simclr_fast import ops

    if not ops.has_extension():
        pytest.skip("the extension is not built")
    tensors = [[torch.randn(5, 3), torch.randn(7)] for _ in range(3)]
    hyper = [0.1, 0.9, 0.0, 1e-4, 1e-3, 1e-8]
    arguments = (*tensors, [2], [ops.lars.LarsFlag.ADAPT], hyper, [], None, None)
    torch.library.opcheck(torch.ops.simclr_fast.lars_.default, arguments)
