"""LARS as a torch.optim.Optimizer: state, schedules, scalers, hooks, errors."""

import copy
import pickle

import pytest
import torch
from lars_cases import each_path, gradients, parameters, run
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from simclr_fast.optim.lars import LARS, lars_param_groups
from simclr_fast.optim.schedule import scaled_lr, warmup_cosine


@each_path
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


@each_path
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


@each_path
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


@each_path
def test_closures_hooks_and_missing_gradients(path):
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


def test_hooks_and_profilers_see_each_step_once():
    class Own(LARS):
        pass

    params, calls = parameters([(3, 4)]), []
    optimizer = Own(params, lr=0.1)
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
        optimizer.register_step_post_hook(lambda *_: calls.append("post")),
        register_optimizer_step_pre_hook(lambda *_: calls.append("every pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("every post")),
    ]
    for handle in handles:
        run(params, optimizer, 1)
        handle.remove()
    run(params, optimizer, 1)
    assert calls == [
        *("every pre", "pre", "post", "every post"),
        *("every pre", "post", "every post"),
        *("every pre", "every post"),
        "every post",
    ]
    with torch.profiler.profile() as profile:
        run(params, optimizer, 1)
    names = [event.name for event in profile.events()]
    assert names.count("Optimizer.step#Own.step") == 1


@each_path
def test_the_learning_rate_may_be_a_tensor(path):
    params, twins = parameters(), parameters()
    for order in ("torch", "tf"):
        run(params, LARS(params, lr=torch.tensor(0.25), momentum_order=order, **path), 3)
        run(twins, LARS(twins, lr=0.25, momentum_order=order, **path), 3)
    torch.testing.assert_close(params, twins, rtol=1e-6, atol=1e-7)


@each_path
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


@each_path
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


def test_lars_param_groups_of_a_model():
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
        ({"lr": "0.1"}, "lr must be a number, got '0.1'"),
        ({"momentum": None}, "momentum must be a number, got None"),
        ({"eps": True}, "eps must be a number"),
        ({"trust_clip": "no"}, "trust_clip must be a bool, got 'no'"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_bad_arguments_are_named(kwargs, words):
    with pytest.raises((TypeError, ValueError), match=words):
        LARS(parameters([(2,)]), **({"lr": 0.1} | kwargs))
    if "foreach" not in kwargs:
        optimizer = LARS(parameters([(2,)]), lr=0.1)
        with pytest.raises((TypeError, ValueError), match=words):
            optimizer.add_param_group({"params": parameters([(2,)])} | kwargs)
        assert len(optimizer.param_groups) == 1


@each_path
def test_unsupported_tensors_are_refused(path):
    with pytest.raises(ValueError, match="real floating-point parameters"):
        LARS([nn.Parameter(torch.zeros(2, dtype=torch.complex64))], lr=0.1, **path)
    with pytest.raises(ValueError, match="cannot update an expanded parameter"):
        LARS([nn.Parameter(torch.zeros(1, 3).expand(4, 3))], lr=0.1, **path)
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
