"""LARS against float64 references of each implementation's semantics."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lars_cases import DTYPES, each_path, gradients, parameters, run
from torch import nn

from simclr_fast import reference
from simclr_fast.optim.lars import LARS

# The arguments that make LARS follow each implementation.
ARGUMENTS = {
    "google": {"momentum_order": "tf", "norm": "joint", "eps": 0.0},
    "moco": {"norm": "joint", "eps": 0.0},
    "lightly": {},
    "timm": {"when_zero": "decay"},
    "solo_learn": {},
    "larc": {"trust_coefficient": 0.02},
}


def tolerance(dtype):
    # Half precision rounds p and v once per step: 20 steps of half an ulp each, at |p| <= 4.
    return {
        torch.float64: {"rtol": 1e-13, "atol": 1e-14},
        torch.float32: {"rtol": 2e-6, "atol": 2e-6},
        torch.float16: {"rtol": 2e-2, "atol": 4e-3},
        torch.bfloat16: {"rtol": 1e-1, "atol": 4e-2},
    }[dtype]


@each_path
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("semantics", reference.LARS_SEMANTICS)
def test_twenty_steps_equal_reference(path, semantics, dtype):
    hyper = {"lr": 0.4, "momentum": 0.9, "weight_decay": 1e-2} | ARGUMENTS[semantics]
    params = parameters(dtype=dtype)
    # The semantics differ for zero weights, and for a zero gradient with old momentum.
    params[3].data.zero_()

    def grads(params, t):
        all_grads = gradients(params, t)
        if t in (0, 7):
            all_grads[4].zero_()
        return all_grads

    state = [(p.detach().clone().double(), None) for p in params]
    optimizer = LARS(params, **hyper, **path)
    keys = {"momentum_order", "norm", "when_zero"}
    reference_hyper = {k: v for k, v in hyper.items() if k not in keys}
    for t in range(20):
        lr = 0.4 * (t + 1) / 20
        optimizer.param_groups[0]["lr"] = lr
        run(params, optimizer, 1, lambda ps, _, t=t: grads(ps, t))
        state = [
            reference.lars_step(p, g, v, semantics, **(reference_hyper | {"lr": lr}))
            for (p, v), g in zip(state, grads(params, t), strict=True)
        ]
    for p, (expected, v) in zip(params, state, strict=True):
        torch.testing.assert_close(p.detach().double(), expected, **tolerance(dtype))
        buffer = optimizer.state[p]["momentum_buffer"]
        assert buffer.dtype == dtype
        torch.testing.assert_close(buffer.double(), v, **tolerance(dtype))


@each_path
@settings(max_examples=25, deadline=None)
@given(
    semantics=st.sampled_from(reference.LARS_SEMANTICS),
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=4).map(tuple), min_size=1, max_size=4),
    zero=st.sampled_from(["nothing", "weights", "gradients"]),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    weight_decay=st.sampled_from([0.0, 1e-6, 0.1]),
    trust_coefficient=st.sampled_from([1e-3, 0.02, 1.0]),
    lr=st.sampled_from([0.0, 1e-3, 0.5, 4.8]),
)
def test_any_shapes_and_hyperparameters_equal_reference(path, semantics, shapes, zero, **hyper):
    arguments = ARGUMENTS[semantics] | hyper
    params = parameters(shapes, torch.float64)
    if zero == "weights":
        params[0].data.zero_()

    def grads(params, t):
        return [g * (zero != "gradients") for g in gradients(params, t)]

    keys = {"momentum_order", "norm", "when_zero"}
    reference_hyper = {k: v for k, v in arguments.items() if k not in keys}
    state = [(p.detach().clone(), None) for p in params]
    for t in range(3):
        state = [
            reference.lars_step(p, g, v, semantics, **reference_hyper)
            for (p, v), g in zip(state, grads(params, t), strict=True)
        ]
    run(params, LARS(params, **arguments, **path), 3, grads)
    for p, (expected, _) in zip(params, state, strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)


@each_path
@pytest.mark.parametrize(
    ("semantics", "extra"),
    [
        ("google", {"nesterov": True}),
        ("lightly", {"nesterov": True}),
        ("lightly", {"dampening": 0.3}),
        ("lightly", {"momentum": 0.0}),
        ("timm", {"trust_clip": True, "lr": 3.0}),
        ("solo_learn", {"trust_clip": True, "lr": 3.0}),
        ("larc", {"trust_clip": True, "lr": 0.01}),
        ("timm", {"weight_decay": 0.0}),
        ("lightly", {"lr": 0.0}),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(f"{k}={x}" for k, x in v.items()),
)
def test_hyperparameters_equal_reference(path, semantics, extra):
    hyper = {"lr": 0.4, "momentum": 0.9, "weight_decay": 1e-2} | ARGUMENTS[semantics] | extra
    params = parameters()
    params[3].data.zero_()
    keys = {"momentum_order", "norm", "when_zero"}
    reference_hyper = {k: v for k, v in hyper.items() if k not in keys}
    state = [(p.detach().clone().double(), None) for p in params]
    for t in range(5):
        state = [
            reference.lars_step(p, g, v, semantics, **reference_hyper)
            for (p, v), g in zip(state, gradients(params, t), strict=True)
        ]
    run(params, LARS(params, **hyper, **path), 5)
    for p, (expected, _) in zip(params, state, strict=True):
        torch.testing.assert_close(p.detach().double(), expected, rtol=2e-6, atol=2e-6)


@each_path
def test_group_without_adaptation_is_sgd(path):
    params, twins = parameters(), parameters()
    kwargs = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "maximize": True}
    optimizer = LARS([{"params": params, "adapt": False}], **kwargs, **path)
    run(params, optimizer, 5)
    run(twins, torch.optim.SGD(twins, **kwargs), 5)
    torch.testing.assert_close(params, twins, rtol=2e-6, atol=1e-6)


@each_path
def test_non_finite_gradients_propagate_without_a_scaler(path):
    for value in (float("nan"), float("inf")):
        (p,) = parameters([(5, 5)])
        optimizer = LARS([p], lr=0.1, **path)
        p.grad = torch.ones_like(p)
        p.grad[2, 2] = value
        optimizer.step()
        assert p[2, 2].isnan()
        if value != value:
            assert p.isnan().all()


@each_path
@pytest.mark.parametrize("scale", [1e-30, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_norms_neither_overflow_nor_underflow(path, scale, dtype):
    (p,) = parameters([(300, 7)], dtype)
    p.data.mul_(scale)
    start = p.detach().clone().double()
    (g,) = gradients([p], 0)
    p.grad = g * scale
    expected, _ = reference.lars_step(start, p.grad, None, "lightly", lr=100.0, eps=0.0)
    LARS([p], lr=100.0, momentum=0.0, eps=0.0, **path).step()
    bound = scale * (1e-6 if dtype == torch.float32 else 4e-2)
    torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=bound)
    assert not torch.equal(p.detach().double(), start)


@each_path
def test_norms_beyond_float16_still_give_a_step(path):
    p = nn.Parameter(torch.full((400, 400), 200.0, dtype=torch.float16))
    p.grad = torch.full_like(p, 300.0)
    LARS([p], lr=100.0, momentum=0.0, **path).step()
    torch.testing.assert_close(p.detach().float(), torch.full((400, 400), 180.0))


STRIDED = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "unaligned": lambda t: torch.empty(t.numel() + 1).as_strided(t.shape, t.stride(), 1).copy_(t),
    "holes": lambda t: torch.zeros(*t.shape, 2)[..., 1].copy_(t),
}


@each_path
@pytest.mark.parametrize("grad_layout", ["contiguous", *STRIDED])
@pytest.mark.parametrize("layout", ["contiguous", *STRIDED])
def test_every_memory_layout_gives_the_same_step(path, layout, grad_layout):
    def lay(t, name):
        return t if name == "contiguous" else STRIDED[name](t)

    (twin,) = parameters([(6, 5, 3, 2)])
    p = nn.Parameter(lay(twin.detach().clone(), layout))
    strides = p.stride()
    run([twin], LARS([twin], lr=0.4, weight_decay=1e-3, foreach=True), 3)
    optimizer = LARS([p], lr=0.4, weight_decay=1e-3, **path)
    for t in range(3):
        # Autograd gives a gradient its parameter's layout; an assigned one may have any strides.
        p.grad = lay(gradients([p], t)[0], grad_layout)
        optimizer.step()
    assert p.stride() == strides
    torch.testing.assert_close(p.detach(), twin.detach(), rtol=2e-6, atol=1e-6)


@each_path
@pytest.mark.parametrize("tail", range(18))
def test_every_tensor_length_gives_the_same_step(path, tail):
    shapes = [(tail,), (64 + tail,), (65536 + tail,)]
    params, twins = parameters(shapes), parameters(shapes)
    run(params, LARS(params, lr=0.4, weight_decay=1e-3, **path), 3)
    run(twins, LARS(twins, lr=0.4, weight_decay=1e-3, foreach=False), 3)
    torch.testing.assert_close(params, twins, rtol=2e-6, atol=1e-6)


@each_path
def test_a_group_may_mix_dtypes(path):
    params = [parameters([(9, 9)], dtype, seed)[0] for seed, dtype in enumerate(DTYPES)]
    twins = [p.detach().clone().double() for p in params]
    run(params, LARS(params, lr=0.4, momentum=0.0, **path), 1)
    for p, twin, g in zip(params, twins, gradients(params, 0), strict=True):
        expected, _ = reference.lars_step(twin, g, None, "lightly", lr=0.4)
        torch.testing.assert_close(p.detach().double(), expected, **tolerance(p.dtype))
