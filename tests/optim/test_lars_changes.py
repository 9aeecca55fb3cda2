"""LARS sees what changes between steps: state, groups, memory, gradients, devices."""

import pytest
import torch
from lars_cases import each_path, gradients, parameters, run
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from simclr_fast.compat import solo_learn
from simclr_fast.optim import lars_torch
from simclr_fast.optim.lars import LARS

SHAPES = [(3, 4), (5,), (2, 3, 2), (17,)]


def replace_buffer(optimizer):
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    state["momentum_buffer"] = state["momentum_buffer"] * 2


def replace_state(optimizer):
    p = optimizer.param_groups[0]["params"][1]
    optimizer.state[p] = {"momentum_buffer": torch.full_like(p, 0.25)}


def drop_state(optimizer):
    optimizer.state.clear()


def swap_states(optimizer):
    p, q = optimizer.param_groups[0]["params"][:2]
    state = dict(optimizer.state)
    optimizer.state.clear()
    state[p]["momentum_buffer"] = torch.ones_like(p)
    optimizer.state.update({q: state[q], p: state[p]})


def load_itself(optimizer):
    optimizer.load_state_dict(optimizer.state_dict())


def other_memory(optimizer):
    for p in optimizer.param_groups[0]["params"]:
        p.data = p.data * 0.5


def other_layout(optimizer):
    for p in optimizer.param_groups[0]["params"]:
        p.data = p.data.t().contiguous().t() if p.ndim == 2 else p.data.clone()


def remove_parameter(optimizer):
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]


def swap_parameters(optimizer):
    params = optimizer.param_groups[0]["params"]
    params[0], params[1] = params[1], params[0]


def add_group(optimizer):
    p = nn.Parameter(torch.ones(6))
    optimizer.add_param_group({"params": [p], "weight_decay": 0.5, "adapt": False})


def new_group_object(optimizer):
    optimizer.param_groups[0] = dict(optimizer.param_groups[0], lr=0.3)


def new_hyperparameters(**values):
    def change(optimizer):
        optimizer.param_groups[0] |= values

    return change


CHANGES = {
    change.__name__: change
    for change in (
        *(replace_buffer, replace_state, drop_state, swap_states, load_itself, other_memory),
        *(other_layout, remove_parameter, swap_parameters, add_group, new_group_object),
    )
}
CHANGES |= {
    "hyperparameters": new_hyperparameters(lr=0.2, weight_decay=0.1, momentum=0.5, eps=1e-3),
    "no_momentum": new_hyperparameters(momentum=0.0),
    "rules": new_hyperparameters(adapt=False, maximize=True, norm="joint", momentum_order="tf"),
    "foreach": new_hyperparameters(foreach=True),
    "tensor_lr": new_hyperparameters(lr=torch.tensor(0.3)),
    "dampening": new_hyperparameters(dampening=0.5),
}


def train(optimizer, steps, start, missing=()):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for t in range(start, start + steps):
        for i, (p, g) in enumerate(zip(params, gradients(params, t), strict=True)):
            p.grad = None if i in missing else g
        optimizer.step()


@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_steps_are_seen(change):
    results = []
    for fused in (None, False):
        optimizer = LARS(parameters(SHAPES), lr=0.4, weight_decay=1e-2, fused=fused)
        train(optimizer, 3, 0)
        CHANGES[change](optimizer)
        train(optimizer, 3, 3)
        new_hyperparameters(momentum=0.9)(optimizer)
        train(optimizer, 2, 6)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        results.append([(p.detach(), optimizer.state[p]["momentum_buffer"]) for p in params])
    torch.testing.assert_close(results[0], results[1], rtol=2e-6, atol=1e-6)


def test_gradients_may_come_and_go():
    results = []
    for fused in (None, False):
        optimizer = LARS(parameters(SHAPES), lr=0.4, weight_decay=1e-2, fused=fused)
        for t, missing in enumerate([(), (1,), (1,), (0, 3), (0, 1, 2, 3), (), ()]):
            train(optimizer, 2, 2 * t, missing)
        results.append(optimizer.param_groups[0]["params"])
    torch.testing.assert_close(*results, rtol=2e-6, atol=1e-6)


def test_excluded_layers_may_change_between_steps():
    results = []
    for fused in (None, False):
        optimizer = solo_learn.LARS(parameters(SHAPES), lr=0.4, momentum=0.9, weight_decay=0.1)
        optimizer.param_groups[0]["fused"] = fused
        for t, exclude in enumerate((False, True, False)):
            optimizer.param_groups[0]["exclude_bias_n_norm_lars"] = exclude
            train(optimizer, 3, 3 * t)
        results.append(optimizer.param_groups[0]["params"])
    torch.testing.assert_close(*results, rtol=2e-6, atol=1e-6)


@each_path
def test_an_infinite_weight_without_decay_stays_infinite(path):
    (p,) = parameters([(33,)])
    p.data[3], p.data[32] = float("inf"), -float("inf")
    expected = p.detach() - 0.1
    optimizer = LARS([{"params": [p], "adapt": False}], lr=0.1, **path)
    p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach(), expected)


def test_a_group_may_have_several_devices():
    # The meta device stands for a second one: it has shapes and no values.
    here, twin = parameters([(7, 3), (4,)]), parameters([(7, 3), (4,)])
    there = [nn.Parameter(torch.empty(5, 2, device="meta")) for _ in range(2)]
    mixed = [here[0], there[0], here[1], there[1]]
    optimizer, plain = LARS(mixed, lr=0.4), LARS(twin, lr=0.4)
    for t in range(3):
        for p, q, g in zip(here, twin, gradients(here, t), strict=True):
            p.grad, q.grad = g, g.clone()
        for p in there:
            p.grad = torch.empty_like(p)
        optimizer.step()
        plain.step()
    assert all(torch.equal(p, q) for p, q in zip(here, twin, strict=True))
    devices = [[p.device.type for p in b.params] for b in optimizer._batches(None)]
    assert devices == [["cpu", "cpu"], ["meta", "meta"]]
    assert optimizer.state[there[0]]["momentum_buffer"].device.type == "meta"


def test_wrapped_tensors_take_plain_operations():
    (twin,) = parameters([(6, 3)])
    p = nn.Parameter(TwoTensor(twin.detach().clone(), twin.detach().clone()))
    run([twin], LARS([twin], lr=0.4, weight_decay=1e-2), 3)
    optimizer = LARS([p], lr=0.4, weight_decay=1e-2)
    for t in range(3):
        (g,) = gradients([twin], t)
        p.grad = TwoTensor(g, g.clone())
        optimizer.step()
    torch.testing.assert_close(p.a, twin.detach(), rtol=2e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match="not a TwoTensor"):
        LARS([p], lr=0.4, fused=True).step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_plain_operations_that_never_look_at_values(monkeypatch, dtype):
    """As on a GPU without kernels: the scaler's flag and the norms stay on the device."""
    monkeypatch.setattr(lars_torch, "_on_host", lambda tensor: False)
    params, twins = parameters(SHAPES, dtype), parameters(SHAPES, dtype)
    optimizer, plain = LARS(params, lr=0.4, foreach=True), LARS(twins, lr=0.4)
    optimizer.grad_scale = torch.tensor(16.0)
    for t, found in enumerate((0.0, 1.0, 0.0)):
        optimizer.found_inf = torch.tensor(found)
        for p, g in zip(params, gradients(params, t), strict=True):
            p.grad = g * 16
        optimizer.step()
        if not found:
            run(twins, plain, 1, lambda ps, _, t=t: gradients(ps, t))
    bound = 2e-6 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(params, twins, rtol=bound, atol=bound)
