"""What any torch.optim optimizer does, for LARS and the drop-ins; torch's SGD is the control."""

import copy
import inspect
import io
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
from lars_peers import SOLO_NAMES, model_parameters, train
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from simclr_fast import ops
from simclr_fast.compat import lightly, solo_learn, timm
from simclr_fast.optim import LARS

BASE = {"lr": 0.5, "momentum": 0.9, "weight_decay": 1e-2}
MAKERS = {
    "SGD": lambda ps, **kw: torch.optim.SGD(ps, **BASE | kw),
    "LARS": lambda ps, **kw: LARS(ps, **BASE | kw),
    "LARS-plain": lambda ps, **kw: LARS(ps, fused=False, **BASE | kw),
    "lightly": lambda ps, **kw: lightly.LARS(ps, **BASE | kw),
    "timm": lambda ps, **kw: timm.Lars(ps, **BASE | kw),
    "timm-foreach": lambda ps, **kw: timm.Lars(ps, foreach=True, **BASE | kw),
    "solo": lambda ps, **kw: solo_learn.LARS(ps, exclude_bias_n_norm=True, **BASE | kw),
    "solo-old": lambda ps, **kw: solo_learn.LARS(
        ps, **dict.fromkeys(SOLO_NAMES[2], True), **BASE | kw
    ),
}
each = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
ours = pytest.mark.parametrize(
    "make", [m for name, m in MAKERS.items() if name != "SGD"], ids=list(MAKERS)[1:]
)


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def clones(params):
    return [p.detach().clone() for p in params]


def keys(optimizer):
    return [set(group) for group in optimizer.param_groups]


@each
def test_constructor_refuses_what_torch_refuses(make):
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="empty parameter list"):
        make([])
    with pytest.raises(TypeError, match="iterable of Tensors or dicts"):
        make(p)
    with pytest.raises(TypeError, match="collections, but the ordering"):
        make([{"params": {p}}])
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        make([1.0])
    with pytest.raises(ValueError, match="non-leaf"):
        make([p * 2])
    with pytest.raises(ValueError, match="more than one parameter group"):
        make([{"params": [p]}, {"params": [p]}])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        make([p, p])
    for bad in ({"lr": -0.1}, {"momentum": -0.1}, {"weight_decay": -0.1}):
        with pytest.raises(ValueError, match=r"-0\.1"):
            make([p], **bad)
    with pytest.raises(ValueError, match=r"(?i)nesterov"):
        make([p], nesterov=True, momentum=0.0)
    with pytest.raises(ValueError, match=r"(?i)nesterov"):
        make([p], nesterov=True, dampening=0.1)
    with pytest.raises(ValueError, match=r"(?i)1-element|one-element"):
        make([p], lr=torch.ones(2))
    with pytest.raises(TypeError, match="must be a dict"):
        make([p]).add_param_group([p])


@ours
def test_unsupported_tensors_are_refused(make):
    for dtype in (torch.complex64, torch.complex128):
        with pytest.raises(ValueError, match=f"real floating-point parameters, got {dtype}"):
            make([nn.Parameter(torch.zeros(2, dtype=dtype))])
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = make(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises((ValueError, RuntimeError), match="strided gradients"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)


@each
@pytest.mark.parametrize("flag", ["maximize", "foreach", "capturable", "differentiable", "fused"])
def test_flags_are_honoured_or_refused_by_name(make, flag):
    """A flag that the constructor lacks is a TypeError, as with other optimizers of torch."""
    owner = type(make(model_parameters()))
    if flag not in inspect.signature(owner.__init__).parameters:
        with pytest.raises(TypeError, match=flag):
            owner(model_parameters(), lr=0.1, **{flag: True})
        return
    plain, flagged = model_parameters(), model_parameters()
    if flag == "fused" and owner is LARS and not ops.has_extension():
        pytest.skip("the extension is not built")
    one, two = owner(plain, **BASE), owner(flagged, **BASE, **{flag: True})
    assert two.param_groups[0][flag] is True
    if flag == "differentiable":
        return  # Only the control has it.
    for t in range(3):
        for p, q in zip(plain, flagged, strict=True):
            p.grad = torch.full_like(p, 0.1 * (t + 1))
            q.grad = -p.grad if flag == "maximize" else p.grad.clone()
        one.step()
        two.step()
    torch.testing.assert_close(flagged, plain)


@each
def test_order_of_hooks_and_their_arguments(make):
    params, calls = model_parameters(), []
    optimizer = make(params)

    def closure():
        calls.append("closure")
        assert torch.is_grad_enabled()
        loss = sum(p.square().sum() for p in params)
        optimizer.zero_grad()
        loss.backward()
        return loss

    def pre(hooked, args, kwargs):
        calls.append("pre")
        assert hooked is optimizer
        assert args[1:] == (closure,) or kwargs == {"closure": closure}

    handles = [
        optimizer.register_step_pre_hook(pre),
        optimizer.register_step_post_hook(lambda o, a, k: calls.append("post")),
        register_optimizer_step_pre_hook(lambda o, a, k: calls.append("every pre")),
        register_optimizer_step_post_hook(lambda o, a, k: calls.append("every post")),
    ]
    try:
        with torch.no_grad():
            loss = optimizer.step(closure)
        optimizer.step(closure=closure)
    finally:
        for handle in handles:
            handle.remove()
    assert calls == 2 * ["every pre", "pre", "closure", "post", "every post"]
    assert loss.requires_grad
    replaced = []
    handle = optimizer.register_step_pre_hook(
        lambda o, args, kwargs: ((o, lambda: replaced.append(1) or 7.0), {})
    )
    assert optimizer.step() == 7.0
    handle.remove()
    optimizer.register_step_pre_hook(lambda *_: 1)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()


@each
def test_steps_with_a_closure_reduce_the_loss(make):
    p = nn.Parameter(torch.tensor([3.0, -2.0, 1.0]))
    optimizer = make([p], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(30)]
    assert losses[-1] < losses[0]


@each
def test_state_dict_hooks_are_called(make):
    params, calls = model_parameters(), []
    optimizer = make(params)
    train([(params, optimizer)], 1)
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("pre save"))
    optimizer.register_state_dict_post_hook(lambda o, state: calls.append("post save"))
    optimizer.register_load_state_dict_pre_hook(lambda o, state: calls.append("pre load"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("post load"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["pre save", "post save", "pre load", "post load"]

    def replace(o, state):
        state = copy.deepcopy(state)
        state["param_groups"][0]["lr"] = 0.25
        del state["param_groups"][0]["momentum"]
        return state

    if isinstance(optimizer, torch.optim.SGD):
        return
    optimizer.register_load_state_dict_pre_hook(replace)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[0]["momentum"] == 0.9


@each
def test_a_group_may_be_added_later(make):
    params = model_parameters()
    optimizer = make(params[:3])
    train([(params, optimizer)], 2)
    optimizer.add_param_group({"params": iter(params[3:]), "lr": 0.125})
    optimizer.add_param_group({"params": nn.Parameter(torch.ones(2))})
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.125, 0.5]
    assert keys(optimizer)[0] == keys(optimizer)[1] == keys(optimizer)[2]
    assert optimizer.param_groups[2]["params"][0].shape == (2,)
    before = clones(params)
    train([(params, optimizer)], 2)
    assert not torch.equal(before[4], params[4])


@ours
def test_a_refused_group_is_not_added(make):
    optimizer = make(model_parameters())
    for bad in ({"momentum": "much"}, {"lr": -1}, {"params": [torch.zeros(2, dtype=torch.cfloat)]}):
        with pytest.raises((TypeError, ValueError)):
            optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)]} | bad)
    assert len(optimizer.param_groups) == 1


@ours
def test_groups_never_get_other_keys(make):
    """torch gives `differentiable` to optimizers that are loaded, copied or unpickled."""
    params = model_parameters()
    optimizer = make(params)
    expected = keys(optimizer)
    assert expected == [{"params", *optimizer.defaults}]
    assert "differentiable" not in expected[0]
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        other.load_state_dict(optimizer.state_dict())
        other.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        assert keys(other) == 2 * expected
        assert other.defaults == optimizer.defaults
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state_dict()["param_groups"] == before


@each
def test_copies_continue_and_keep_public_attributes(make):
    params = model_parameters()
    optimizer = make(params)
    train([(params, optimizer)], 2)
    others = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    train([(params, optimizer)], 2, start=2)
    for other in others:
        assert {name for name in vars(other) if not name.startswith("_")} == public
        train([(other.param_groups[0]["params"], other)], 2, start=2)
        assert same(params, other.param_groups[0]["params"])
    assert repr(optimizer).count("Parameter Group") == 1


@each
def test_a_saved_state_continues_the_run(make):
    params, twins = model_parameters(), model_parameters()
    optimizer, twin = make(params), make(twins, lr=9.0)
    train([(params, optimizer)], 2)
    assert str(optimizer.state_dict()) == str(optimizer.state_dict())
    assert set(optimizer.state_dict()) == {"state", "param_groups"}
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    saved = copy.deepcopy(state)
    twin.load_state_dict(state)
    with torch.no_grad():
        torch._foreach_copy_(twins, params)
    train([(params, optimizer), (twins, twin)], 2, start=2)
    assert same(params, twins)
    assert state["param_groups"] == saved["param_groups"]
    for wrong in (saved["param_groups"] * 2, [saved["param_groups"][0] | {"params": [0]}]):
        with pytest.raises(ValueError, match="loaded state dict"):
            optimizer.load_state_dict({"state": {}, "param_groups": wrong})


@ours
def test_every_key_may_be_missing_from_a_state(make):
    params = model_parameters()
    optimizer = make(params)
    optimizer.param_groups[0]["mark"] = "own"
    train([(params, optimizer)], 1)
    own = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    for key in own:
        state = copy.deepcopy(optimizer.state_dict())
        del state["param_groups"][0][key]
        optimizer.load_state_dict(state)
        group = optimizer.param_groups[0]
        assert {k: v for k, v in group.items() if k != "params"} == own
    optimizer.load_state_dict({"state": {}, "param_groups": [{"params": list(range(len(params)))}]})
    assert {k: v for k, v in optimizer.param_groups[0].items() if k != "params"} == own
    train([(params, optimizer)], 1)


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_loaded_buffers_take_the_dtype_and_device_of_their_parameters(make, dtype):
    params = model_parameters(torch.float32)
    optimizer = make(params)
    train([(params, optimizer)], 2)
    others = model_parameters(dtype)
    other = make(others)
    other.load_state_dict(optimizer.state_dict())
    assert {other.state[p]["momentum_buffer"].dtype for p in others} == {dtype}
    train([(others, other)], 1)
    there = [nn.Parameter(torch.empty(p.shape, device="meta")) for p in params]
    other = make(there)
    other.load_state_dict(optimizer.state_dict())
    assert {other.state[p]["momentum_buffer"].device.type for p in there} == {"meta"}


@each
def test_named_parameters_are_accepted(make):
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = make(net.named_parameters())
    names = [name for name, _ in net.named_parameters()]
    assert optimizer.param_groups[0]["param_names"] == names
    state = optimizer.state_dict()
    assert state["param_groups"][0]["param_names"] == names
    unnamed = make(net.parameters())
    unnamed.load_state_dict(state)
    assert unnamed.param_groups[0]["param_names"] == names
    optimizer.load_state_dict(make(net.parameters()).state_dict())
    assert optimizer.param_groups[0]["param_names"] == names
    grouped = make([{"params": list(net[0].named_parameters())}])
    grouped.add_param_group({"params": list(net[1].named_parameters())})
    assert grouped.param_groups[1]["param_names"] == ["weight", "bias"]
    with pytest.raises(ValueError, match="without names"):
        grouped.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    net(torch.ones(2, 3)).sum().backward()
    for one in (optimizer, unnamed, grouped):
        one.step()


@each
def test_nothing_happens_without_gradients(make):
    params = model_parameters()
    optimizer = make(params)
    before = clones(params)
    optimizer.step()
    assert same(params, before)
    assert not any(optimizer.state.values())
    optimizer.add_param_group({"params": []})
    train([(params, optimizer)], 1, start=1)
    for p in params[1:]:
        p.grad = None
    before = clones(params)
    optimizer.step()
    assert not torch.equal(params[0], before[0])
    assert same(params[1:], before[1:])
    optimizer.zero_grad(set_to_none=False)
    assert params[0].grad.count_nonzero() == 0
    optimizer.zero_grad()
    assert params[0].grad is None


@each
def test_zero_gradients_without_decay_and_empty_tensors(make):
    params = [*model_parameters(), nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(2, 0))]
    optimizer = make(params, weight_decay=0.0)
    before = clones(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    for _ in range(2):
        optimizer.step()
    assert same(params, before)


@each
@pytest.mark.parametrize("lr", [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5).double()])
def test_lr_may_be_a_tensor(make, lr):
    params, twins = model_parameters(), model_parameters()
    optimizer, twin = make(params, lr=lr.clone()), make(twins, lr=0.5)
    train([(params, optimizer), (twins, twin)], 2)
    torch.testing.assert_close(params, twins)
    optimizer.param_groups[0]["lr"].fill_(0.25)
    twin.param_groups[0]["lr"] = 0.25
    train([(params, optimizer), (twins, twin)], 2, start=2)
    torch.testing.assert_close(params, twins)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    train([(params, optimizer), (twins, twin)], 2, start=4)
    torch.testing.assert_close(params, twins)


SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 1, 0.5),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=10),
    "warm-up, cosine": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, 1, 2), lr_scheduler.CosineAnnealingLR(o, 4)],
        milestones=[2],
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@each
@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("tensor", [False, True])
def test_schedulers_change_lr_and_momentum(make, schedule, tensor):
    params = model_parameters()
    optimizer = make(params, lr=torch.tensor(0.5) if tensor else 0.5)
    scheduler = schedule(optimizer)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            train([(params, optimizer)], 1)
            plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.step(1.0) if plateau else scheduler.step()
            rates.append(float(optimizer.param_groups[0]["lr"]))
    assert len(set(rates)) > 1
    state = optimizer.state_dict()
    twin = make(model_parameters())
    twin.load_state_dict(state)
    assert float(twin.param_groups[0]["lr"]) == rates[-1]
    assert twin.param_groups[0].get("initial_lr") == optimizer.param_groups[0].get("initial_lr")


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "every second": lambda t: torch.zeros(*t.shape, 2, dtype=t.dtype)[..., 0].copy_(t),
}


@each
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_memory_format_gives_the_same_step(make, layout):
    whole = torch.randn(4, 3, 5, 2, generator=torch.Generator().manual_seed(0))
    one, two = nn.Parameter(whole.clone()), nn.Parameter(layout(whole))
    first, second = make([one]), make([two])
    for t in range(3):
        g = torch.randn(4, 3, 5, 2, generator=torch.Generator().manual_seed(t))
        one.grad, two.grad = g, layout(g) if t else g
        first.step()
        second.step()
    assert two.stride() == layout(whole).stride()
    torch.testing.assert_close(one.detach(), two.detach())


@each
def test_a_group_may_mix_dtypes_and_devices(make):
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    torch.manual_seed(0)
    whole = [torch.randn(5, 3, dtype=torch.float64) for _ in dtypes]
    alone = [nn.Parameter(w.to(d)) for w, d in zip(whole, dtypes, strict=True)]
    mixed = [nn.Parameter(w.to(d)) for w, d in zip(whole, dtypes, strict=True)]
    there = nn.Parameter(torch.empty(2, device="meta"))
    optimizer = make([mixed[0], there, *mixed[1:]])
    separate = [make([p]) for p in alone]
    for t in range(3):
        there.grad = torch.empty(2, device="meta")
        for p, q in zip(alone, mixed, strict=True):
            g = torch.randn(5, 3, generator=torch.Generator().manual_seed(t)).to(p.dtype)
            p.grad, q.grad = g, g.clone()
        optimizer.step()
        for one in separate:
            one.step()
    torch.testing.assert_close(alone, mixed)


@each
@pytest.mark.parametrize("where", ["dtype", "device", "device context"])
def test_ambient_defaults_do_not_matter(make, where):
    params, twins = model_parameters(torch.float32), model_parameters(torch.float32)
    optimizer, twin = make(params), make(twins)
    train([(twins, twin)], 3)
    context = torch.device("meta" if where == "device context" else "cpu")
    generator = {t: [torch.randn(p.shape, dtype=torch.float64) for p in params] for t in range(3)}
    for t in generator:
        g = torch.Generator().manual_seed(t)
        generator[t] = [torch.randn(p.shape, dtype=torch.float64, generator=g) for p in params]
        if t == 0:
            generator[t][0].zero_()
    try:
        if where == "dtype":
            torch.set_default_dtype(torch.float64)
        if where == "device":
            torch.set_default_device("meta")
        with context if where == "device context" else torch.no_grad():
            for t in range(3):
                for p, g in zip(params, generator[t], strict=True):
                    p.grad = g.to(p.dtype)
                optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert same(params, twins)


@each
def test_a_grad_scaler_skips_and_unscales(make):
    """Skips an overflow, unscales, and works after unscale_ and without a scaler."""
    params, twins = model_parameters(torch.float32), model_parameters(torch.float32)
    optimizer, plain = make(params), make(twins)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for t, (bad, unscale) in enumerate([(True, 0), (False, 0), (False, 1), (True, 1), (False, 0)]):
        grads = [torch.full_like(p, 0.1 * (t + 1)) for p in params]
        for p, q, g in zip(params, twins, grads, strict=True):
            p.grad, q.grad = g * scaler.scale(torch.ones(())), g.clone()
        if bad:
            params[0].grad[0, 0] = float("inf")
        before = clones(params)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if bad:
            assert same(params, before)
        else:
            plain.step()
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")
    for p, q in zip(params, twins, strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    plain.step()
    torch.testing.assert_close(params, twins, rtol=1e-6, atol=1e-6)
    assert scaler.get_scale() == 64.0


@each
def test_steps_on_a_model_and_clipped_gradients(make):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = make(net.parameters())
    x = torch.randn(16, 4)
    losses = []
    for _ in range(40):
        loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    averaged = torch.optim.swa_utils.AveragedModel(net)
    averaged.update_parameters(net)


@each
def test_state_is_one_buffer_for_each_parameter(make):
    params = model_parameters()
    optimizer = make(params)
    train([(params, optimizer)], 1)
    state = optimizer.state_dict()["state"]
    assert list(state) == list(range(len(params)))
    assert all(set(s) == {"momentum_buffer"} for s in state.values())
    assert all(
        s["momentum_buffer"].shape == p.shape for s, p in zip(state.values(), params, strict=True)
    )
    ordered = OrderedDict(optimizer.state_dict())
    optimizer.load_state_dict(ordered)
