"""LARS against float64 references of each implementation's semantics, and as an Optimizer."""

import copy
import pickle

import pytest
import torch
from torch import nn

from simclr_fast import reference
from simclr_fast.optim import LARS, lars_param_groups, scaled_lr, warmup_cosine

PATHS = {"native": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}
# The arguments that make LARS follow each implementation.
ARGUMENTS = {
    "google": {"momentum_order": "tf", "norm": "joint", "eps": 0.0},
    "moco": {"norm": "joint", "eps": 0.0},
    "lightly": {},
    "timm": {"when_zero": "decay"},
    "solo_learn": {},
    "larc": {"trust_coefficient": 0.02},
}
SHAPES = [(), (1,), (17,), (3, 5), (64, 3, 7, 7), (0,), (2, 0, 3), (129, 33)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def gradients(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) * 0.3 for p in params]


def run(params, optimizer, steps, grads=gradients):
    for t in range(steps):
        for p, g in zip(params, grads(params, t), strict=True):
            p.grad = g
        optimizer.step()
    return params


def tolerance(dtype):
    # Half precision rounds p and v once per step: 20 steps of half an ulp each, at |p| <= 4.
    return {
        torch.float64: {"rtol": 1e-13, "atol": 1e-14},
        torch.float32: {"rtol": 2e-6, "atol": 2e-6},
        torch.float16: {"rtol": 2e-2, "atol": 4e-3},
        torch.bfloat16: {"rtol": 1e-1, "atol": 4e-2},
    }[dtype]


@pytest.fixture(params=PATHS)
def path(request):
    from simclr_fast import ops

    if request.param == "native" and not ops.has_extension():
        pytest.skip("the extension is not built")
    return PATHS[request.param]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("semantics", reference.LARS_SEMANTICS)
def test_twenty_steps_equal_reference(path, semantics, dtype):
    hyper = {"lr": 0.4, "momentum": 0.9, "weight_decay": 1e-2} | ARGUMENTS[semantics]
    params = parameters(dtype=dtype)
    # Zero weights, and a zero gradient with old momentum, are where the semantics part.
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


def test_group_without_adaptation_is_sgd(path):
    params, twins = parameters(), parameters()
    kwargs = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "maximize": True}
    optimizer = LARS([{"params": params, "adapt": False}], **kwargs, **path)
    run(params, optimizer, 5)
    run(twins, torch.optim.SGD(twins, **kwargs), 5)
    torch.testing.assert_close(params, twins, rtol=2e-6, atol=1e-6)


def test_state_dict_exchanges_momentum_with_sgd(path):
    params, twins = parameters(), parameters()
    kwargs = {"lr": 0.1, "momentum": 0.9}
    sgd = torch.optim.SGD(twins, **kwargs)
    run(twins, sgd, 3)
    optimizer = LARS([{"params": params, "adapt": False}], **kwargs, **path)
    with torch.no_grad():
        for p, twin in zip(params, twins, strict=True):
            p.copy_(twin)
    saved = copy.deepcopy(sgd.state_dict())
    saved["param_groups"][0]["adapt"] = False
    optimizer.load_state_dict(saved)
    run(params, optimizer, 3)
    run(twins, sgd, 3)
    torch.testing.assert_close(params, twins, rtol=2e-6, atol=1e-6)
    back = torch.optim.SGD(twins, **kwargs)
    back.load_state_dict(optimizer.state_dict())
    for p, twin in zip(params, twins, strict=True):
        ours = optimizer.state[p]["momentum_buffer"]
        assert torch.equal(back.state[twin]["momentum_buffer"], ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_save_load_continue_is_bitwise(path, dtype, tmp_path):
    params = parameters(dtype=dtype)
    optimizer = LARS(params, lr=0.4, weight_decay=1e-4, **path)
    scheduler = warmup_cosine(optimizer, 2, 20)
    run(params, optimizer, 4)
    scheduler.step()
    torch.save(
        {"p": params, "o": optimizer.state_dict(), "s": scheduler.state_dict()}, tmp_path / "c.pt"
    )
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    twins = [nn.Parameter(p.detach().clone()) for p in saved["p"]]
    twin_optimizer = LARS(twins, lr=9.0, momentum=0.1, **path)
    twin_scheduler = warmup_cosine(twin_optimizer, 2, 20)
    twin_optimizer.load_state_dict(saved["o"])
    twin_scheduler.load_state_dict(saved["s"])
    for _ in range(3):
        run(params, optimizer, 1)
        run(twins, twin_optimizer, 1)
        scheduler.step()
        twin_scheduler.step()
    assert twin_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


def test_pickle_and_deepcopy_continue(path):
    params = parameters()
    optimizer = LARS(params, lr=0.4, **path)
    run(params, optimizer, 2)
    twin = copy.deepcopy(optimizer)
    pickled = pickle.loads(pickle.dumps(optimizer))
    run(params, optimizer, 2)
    for other in (twin, pickled):
        others = other.param_groups[0]["params"]
        run(others, other, 2)
        assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_closure_hooks_zero_grad_and_missing_gradients(path):
    p, untouched = parameters([(3, 4), (5,)])
    before = untouched.detach().clone()
    optimizer = LARS([p], lr=0.1, **path)
    optimizer.add_param_group({"params": [untouched], "weight_decay": 0.5})
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        calls.append("closure")
        return loss

    loss = optimizer.step(closure)
    assert calls == ["pre", "closure", "post"]
    assert loss.requires_grad
    assert torch.equal(untouched, before)
    assert untouched not in optimizer.state
    optimizer.zero_grad()
    assert p.grad is None
    optimizer.step()
    LARS([p], lr=0.1, **path).step()


def test_learning_rate_as_tensor(path):
    params, twins = parameters(), parameters()
    for order in ("torch", "tf"):
        run(params, LARS(params, lr=torch.tensor(0.25), momentum_order=order, **path), 3)
        run(twins, LARS(twins, lr=0.25, momentum_order=order, **path), 3)
    torch.testing.assert_close(params, twins, rtol=1e-6, atol=1e-7)


def test_capturable_schedule_fills_the_same_tensor(path):
    params, twins = parameters(), parameters()
    optimizer = LARS(params, lr=0.4, capturable=True, **path)
    lr = optimizer.param_groups[0]["lr"]
    scheduler = warmup_cosine(optimizer, 2, 6)
    other = LARS(twins, lr=0.4, **path)
    other_scheduler = warmup_cosine(other, 2, 6)
    for _ in range(6):
        run(params, optimizer, 1)
        run(twins, other, 1)
        scheduler.step()
        other_scheduler.step()
        assert optimizer.param_groups[0]["lr"] is lr
    torch.testing.assert_close(params, twins, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_grad_scaler_skips_and_unscales(path, dampening):
    params, twins = parameters(), parameters()
    optimizer = LARS(params, lr=0.4, weight_decay=1e-3, dampening=dampening, **path)
    plain = LARS(twins, lr=0.4, weight_decay=1e-3, dampening=dampening, **path)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for t, bad in enumerate([True, False, False, True, False]):
        grads = gradients(params, t)
        scale = scaler.scale(torch.ones(()))
        for p, g in zip(params, grads, strict=True):
            p.grad = g * scale
        if bad:
            params[4].grad[0, 0, 0, 0] = float("nan") if t else float("inf")
        before = [p.detach().clone() for p in params]
        scaler.step(optimizer)
        scaler.update()
        if bad:
            assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        else:
            run(twins, plain, 1, lambda _, __, grads=grads: [g.clone() for g in grads])
    assert scaler.get_scale() == 256.0
    torch.testing.assert_close(params, twins, rtol=1e-6, atol=1e-7)


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


def test_half_norm_beyond_float16_still_steps(path):
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


@pytest.mark.parametrize("grad_layout", ["contiguous", *STRIDED])
@pytest.mark.parametrize("layout", ["contiguous", *STRIDED])
def test_layouts(path, layout, grad_layout):
    def lay(t, name):
        return t if name == "contiguous" else STRIDED[name](t)

    (twin,) = parameters([(6, 5, 3, 2)])
    p = nn.Parameter(lay(twin.detach().clone(), layout))
    strides = p.stride()
    run([twin], LARS([twin], lr=0.4, weight_decay=1e-3, foreach=True), 3)
    optimizer = LARS([p], lr=0.4, weight_decay=1e-3, **path)
    for t in range(3):
        # The engine's layout contract is for leaves; assignment takes any strides.
        p.grad = lay(gradients([p], t)[0], grad_layout)
        optimizer.step()
    assert p.stride() == strides
    torch.testing.assert_close(p.detach(), twin.detach(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("tail", range(18))
def test_tail_lengths(path, tail):
    shapes = [(tail,), (64 + tail,), (65536 + tail,)]
    params, twins = parameters(shapes), parameters(shapes)
    run(params, LARS(params, lr=0.4, weight_decay=1e-3, **path), 3)
    run(twins, LARS(twins, lr=0.4, weight_decay=1e-3, foreach=False), 3)
    torch.testing.assert_close(params, twins, rtol=2e-6, atol=1e-6)


def test_mixed_dtypes_in_one_group(path):
    params = [parameters([(9, 9)], dtype, seed)[0] for seed, dtype in enumerate(DTYPES)]
    twins = [p.detach().clone().double() for p in params]
    run(params, LARS(params, lr=0.4, momentum=0.0, **path), 1)
    for p, twin, g in zip(params, twins, gradients(params, 0), strict=True):
        expected, _ = reference.lars_step(twin, g, None, "lightly", lr=0.4)
        torch.testing.assert_close(p.detach().double(), expected, **tolerance(p.dtype))


def test_param_groups_of_a_model():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LayerNorm([4, 4]), nn.Linear(4, 2), nn.PReLU()
    )
    model[0].weight.requires_grad_(False)
    weights, rest = lars_param_groups(model, weight_decay=1e-4)
    assert weights["params"] == [model[3].weight]
    assert weights["weight_decay"] == 1e-4
    assert {id(p) for p in rest["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad and p is not model[3].weight
    }
    assert rest["weight_decay"] == 0
    assert rest["adapt"] is False


def test_schedule_of_the_paper_at_batch_4096():
    # google-research/simclr: 1,281,167 images, 10 warm-up epochs of 100, batch 4096.
    warmup, total = 10 * 1281167 // 4096, 1281167 * 100 // 4096 + 1
    assert (warmup, total) == (3127, 31279)
    assert scaled_lr(4096) == pytest.approx(4.8)
    assert scaled_lr(4096, "sqrt") == pytest.approx(4.8)
    p = nn.Parameter(torch.zeros(1))
    optimizer = LARS([p], lr=scaled_lr(4096))
    scheduler = warmup_cosine(optimizer, warmup, total)
    rates = []
    for _ in range(total + 2):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    steps = torch.arange(total + 2, dtype=torch.float64)
    cosine = 2.4 * (1 + torch.cos(torch.pi * (steps - warmup) / (total - warmup)))
    expected = torch.where(steps < warmup, 4.8 * steps / warmup, cosine)
    expected[total:] = 0
    torch.testing.assert_close(torch.tensor(rates, dtype=torch.float64), expected)
    assert rates[0] == 0
    assert rates[warmup] == pytest.approx(4.8)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"lr": float("nan")}, "lr must be"),
        ({"lr": torch.ones(2)}, "one-element"),
        ({"momentum": -0.1}, "momentum"),
        ({"weight_decay": float("inf")}, "weight_decay"),
        ({"trust_coefficient": -1}, "trust_coefficient"),
        ({"eps": -1e-9}, "eps"),
        ({"nesterov": True, "dampening": 0.1}, "nesterov=True needs"),
        ({"momentum_order": "jax"}, "momentum_order must be one of"),
        ({"norm": "l1"}, "norm must be one of"),
        ({"when_zero": "never"}, "when_zero must be one of"),
        ({"foreach": True, "fused": True}, "exclude each other"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_bad_arguments(kwargs, words):
    with pytest.raises(ValueError, match=words):
        LARS(parameters([(2,)]), **({"lr": 0.1} | kwargs))
    if "foreach" not in kwargs:
        optimizer = LARS(parameters([(2,)]), lr=0.1)
        with pytest.raises(ValueError, match=words):
            optimizer.add_param_group({"params": parameters([(2,)])} | kwargs)
        assert len(optimizer.param_groups) == 1


def test_bad_tensors(path):
    with pytest.raises(ValueError, match="real floating-point parameters"):
        LARS([nn.Parameter(torch.zeros(2, dtype=torch.complex64))], lr=0.1, **path)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        scaled_lr(0)
    with pytest.raises(ValueError, match="rule must be"):
        scaled_lr(1, "cubic")
    with pytest.raises(ValueError, match="warmup_steps < total_steps"):
        warmup_cosine(LARS(parameters([(2,)]), lr=0.1), 5, 5)
    p = nn.Embedding(5, 3, sparse=True).weight
    torch.nn.functional.embedding(torch.tensor([1]), p, sparse=True).sum().backward()
    with pytest.raises((ValueError, RuntimeError), match="strided gradients"):
        LARS([p], lr=0.1, **path).step()
