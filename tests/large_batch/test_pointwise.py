"""1×1 convolutions of lockstep as matrix products, and gradients that are overwritten."""

import pytest
import torch
from large_batch_cases import (
    assert_equal,
    large_batch,
    loss_fn,
    plain_autograd,
    simclr,
    step,
    views,
)
from torch import nn

from simclr_fast.large_batch import global_batch_norm as gbn
from simclr_fast.large_batch import pointwise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_it_equals_the_convolution(bias, dtype):
    conv = nn.Conv2d(5, 7, 1, bias=bias).to(dtype)
    x = torch.randn(3, 5, 4, 3, dtype=dtype).to(memory_format=torch.channels_last)
    assert pointwise.is_product(conv, x)
    y = conv(x.requires_grad_())
    made = pointwise.forward(x.detach(), conv.weight.detach(), conv.bias)
    torch.testing.assert_close(made, y)
    assert made.stride() == y.stride()
    g = torch.randn_like(y)
    expected = torch.autograd.grad(y, [x, *conv.parameters()], g)
    wanted = [True, True, bias]
    found = pointwise.backward(conv, g, x.detach(), conv.weight.detach(), wanted)
    for a, b in zip(found, expected, strict=False):
        torch.testing.assert_close(a, b)
    assert found[0].stride() == x.stride()
    assert pointwise.backward(conv, g, x, conv.weight, [False] * 3) == (None, None, None)


def test_other_convolutions_are_none():
    x = torch.randn(3, 4, 5, 5)
    last = x.to(memory_format=torch.channels_last)
    assert pointwise.is_product(nn.Conv2d(4, 6, 1), last)
    others = ({"stride": 2}, {"padding": 1}, {"groups": 2})
    convs = [nn.Conv2d(4, 6, 1, **other) for other in others] + [nn.Conv2d(4, 6, 3)]
    assert not any(pointwise.is_product(conv, last) for conv in convs)
    half = last.bfloat16()
    # torch's three-dimensional convolutions return another layout.
    volume = torch.randn(3, 4, 2, 5, 5).to(memory_format=torch.channels_last_3d)
    assert not pointwise.is_product(nn.Conv3d(4, 6, 1), volume)
    for t in (x, half, last[..., ::2], last.to("meta")):
        assert not pointwise.is_product(nn.Conv2d(4, 6, 1), t)


@pytest.mark.parametrize("turn", ["kept", "mask"])
def test_steps_in_channels_last_equal_plain_autograd(turn, monkeypatch):
    """Bottlenecks, of which products and overwritten gradients are most of the work."""
    calls = dict.fromkeys(("forward", "backward", "spare", "relu"), 0)

    def counted(name, original, *args):
        calls[name] += 1
        return original(*args)

    for name in ("forward", "backward"):
        original = getattr(pointwise, name)
        monkeypatch.setattr(pointwise, name, lambda *a, n=name, o=original: counted(n, o, *a))
    found = gbn.input_gradient
    monkeypatch.setattr(
        gbn, "input_gradient", lambda *a: counted("spare", found, *a) if a[-1] else found(*a)
    )

    def run(model):
        engine = large_batch(model, micro_batch=3, choices={"turn": turn})
        made = engine.backward(views().to(memory_format=torch.channels_last), loss_fn)
        passes = engine.lockstep.program.passes
        relus = engine.lockstep.graph.relus
        calls["relu"] = sum(op.spare for p in passes for op in p.ops if op.node in relus)
        return made

    def model():
        return simclr("resnet50").to(memory_format=torch.channels_last)

    assert_equal(step(model(), run), step(model(), plain_autograd))
    assert all(calls.values()), calls


def test_a_gradient_that_is_needed_is_not_overwritten():
    """A gradient that only a sum handed on, or that stays for a later pass."""
    engine = large_batch(simclr("resnet18"), micro_batch=7, choices={})
    engine.backward(views(), loss_fn)
    program = engine.lockstep.program
    spare = 0
    for current in program.passes:
        for op in current.ops:
            if op.spare:
                key = op.reads[0]
                assert set(key.node.users) - program.sums
                assert key in op.last
                assert key not in current.keeps
                spare += 1
    assert spare
