"""Wrapped, compiled, sharded and lazy models, and calls that have no gradient: refused by name."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from simclr_fast.large_batch import LargeBatch
from simclr_fast.losses.nt_xent import nt_xent_loss

MODES = ["plain", "replay", "lockstep", "grad-cache"]
X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(x)))


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Sequential(*(Block() for _ in "123")), nn.Linear(6, 6))


def run(model, memory, x=X):
    return LargeBatch(model, memory=memory, micro_batch=3).backward(x, nt_xent_loss)


def gradients(model):
    return [p.grad for p in model.parameters()]


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_inside(model):
    model[1][0] = torch.compile(model[1][0], backend="eager")
    return model


def scripted(model):
    model[1][1] = torch.jit.trace(model[1][1], X, check_trace=False)
    return model


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("wrap", [compiled, compiled_in_place, compiled_inside, scripted])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_models_are_right_or_refused(wrap, memory):
    """With compilation that generates no code."""
    expected = build()
    nt_xent_loss(expected(X)).backward()
    model = wrap(build())
    if memory in ("replay", "lockstep"):
        says = "scripted" if wrap is scripted else "compiled"
        with pytest.raises(ValueError, match=f"{memory}.*{says}"):
            run(model, memory)
        return
    run(model, memory)
    for found, want in zip(gradients(model), gradients(expected), strict=True):
        torch.testing.assert_close(found, want)
    torch._dynamo.reset()


@pytest.mark.parametrize("memory", MODES)
def test_data_parallel_is_refused(memory):
    with pytest.raises(ValueError, match=r"model must be bare, but 1 \(DataParallel\)"):
        run(nn.Sequential(nn.Linear(6, 6), nn.DataParallel(build())), memory)


@pytest.mark.parametrize("memory", MODES)
def test_lazy_models_are_refused(memory):
    with pytest.raises(ValueError, match=r"1\.weight is not initialised"):
        run(nn.Sequential(build(), nn.LazyLinear(4)), memory)


@pytest.mark.parametrize("memory", MODES)
def test_hooks_for_all_modules_are_honoured_or_refused(memory):
    def double(module, arguments, output):
        return 2 * output if isinstance(module, nn.Linear) else None

    hook = nn.modules.module.register_module_forward_hook(double)
    try:
        model, expected = build(), build()
        nt_xent_loss(expected(X)).backward()
        if memory in ("lockstep", "grad-cache"):
            with pytest.raises(ValueError, match="hooks for all modules"):
                run(model, memory)
            return
        run(model, memory)
    finally:
        hook.remove()
    for found, want in zip(gradients(model), gradients(expected), strict=True):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("memory", MODES)
def test_cached_parametrisations_are_right_or_refused(memory):
    def normed():
        model = build()
        parametrizations.weight_norm(model[1][0].first)
        return model

    expected, model = normed(), normed()
    nt_xent_loss(expected(X)).backward()
    with parametrize.cached():
        if memory != "plain":
            with pytest.raises(ValueError, match="cached"):
                run(model, memory)
            return
        run(model, memory)
    for found, want in zip(gradients(model), gradients(expected), strict=True):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("memory", MODES)
def test_views_that_need_a_gradient_get_it_or_are_refused(memory):
    model, x, expected = build(), X.clone().requires_grad_(), X.clone().requires_grad_()
    nt_xent_loss(copy.deepcopy(model)(expected)).backward()
    if memory == "lockstep":
        with pytest.raises(ValueError, match="no gradient of the views"):
            run(model, memory, x)
        return
    run(model, memory, x)
    torch.testing.assert_close(x.grad, expected.grad)


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_calls_without_gradients_are_refused(off, memory):
    with pytest.raises(RuntimeError, match=r"leave torch\.no_grad"), off():
        run(build(), memory)


@pytest.mark.parametrize("memory", MODES)
def test_an_error_leaves_nothing_behind(memory):
    """An error in the loss, then a step: the same as without."""
    model = nn.Sequential(build(), nn.BatchNorm1d(6), build())
    if memory == "grad-cache":
        model = build()
    expected = copy.deepcopy(model)
    step = LargeBatch(model, memory=memory, micro_batch=3)

    def fails(z):
        raise KeyError("of the user")

    with pytest.raises(KeyError, match="of the user"):
        step.backward(X, fails)
    for buffers in (model.buffers(), expected.buffers()):
        assert all(b.isfinite().all() for b in buffers)
    model.load_state_dict(expected.state_dict())
    assert all(p.grad is None for p in model.parameters())
    step.backward(X, nt_xent_loss)
    nt_xent_loss(expected(X)).backward()
    for found, want in zip(gradients(model), gradients(expected), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)
    for found, want in zip(model.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(found, want)
