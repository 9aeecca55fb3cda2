"""Wrapped, compiled, sharded and lazy models, and calls that have no gradient: refused by name."""

import copy
import re
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm

from simclr_fast.large_batch import LargeBatch
from simclr_fast.large_batch.graph import _other_rows
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


class Of(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


MIXING = {
    "sort": lambda x: x[torch.argsort(x.sum(1))],
    "flip": lambda x: x + x.flip(0),
    "roll": lambda x: x.roll(1, 0),
    "cumsum": lambda x: x.cumsum(0),
    "attention": lambda x: torch.softmax(x @ x.t(), 1) @ x,
    "negative dim": lambda x: x.softmax(-2),
    "standardised": lambda x: x / x.std(-2, keepdim=True),
    "transposed": lambda x: x.t().softmax(1).t(),
    "halves": lambda x: torch.cat([a + b for a, b in [x.chunk(2), x.chunk(2)[::-1]]]),
    "neighbours": lambda x: x + x.view(-1, 2, 6).flip(1).reshape(-1, 6),
    "from the end": lambda x: x.flip(0).cumsum(0).flip(0),
    "functional batch norm": lambda x: nn.functional.batch_norm(x, None, None, training=True),
}
APART = {
    "softmax": lambda x: x.softmax(1),
    "sort": lambda x: x.sort(1).values,
    "reshaped": lambda x: x.reshape(-1, 2, 3).transpose(1, 2).reshape(-1, 6),
    "attention": lambda x: (x[:, :, None] * x[:, None]).softmax(2).sum(2),
    "far": lambda x: x * 1e30,
}


@pytest.mark.parametrize("memory", ["lockstep", "grad-cache"])
@pytest.mark.parametrize("name", MIXING)
def test_layers_that_mix_the_rows_of_the_batch_are_refused(name, memory):
    """Whatever the operation is called: the output of a view changes without the others."""
    model = nn.Sequential(nn.Linear(6, 6), Of(MIXING[name]), nn.Linear(6, 6))
    with pytest.raises(ValueError, match=r"cannot run this model|on the other|fewer views"):
        LargeBatch(model, memory=memory, micro_batch=8).backward(X, nt_xent_loss)


@pytest.mark.parametrize("name", APART)
def test_layers_that_keep_the_rows_apart_are_not(name):
    model = nn.Sequential(nn.Linear(6, 6), Of(APART[name]), nn.BatchNorm1d(6), nn.Linear(6, 6))
    run(model, "lockstep")
    assert all(p.grad is not None for p in model.parameters())


TUPLES = {
    "a name": Of(lambda x: x.sort(1).values),
    "a name and another": Of(lambda x: (lambda s: s.values * s.indices)(x.sort(1))),
    "the largest": Of(lambda x: x * x.max(1, keepdim=True).values),
    "a slice": Of(lambda x: torch.cat(x.split(2, 1)[::-1], 1)),
    "all": Of(lambda x: torch.stack(x.unbind(1), 1)),
    "one part twice": Of(lambda x: (lambda t: torch.cat([t[0] * t[1], t[0]], 1))(x.chunk(2, 1))),
    "from the end": Of(lambda x: x.split(2, 1)[-1].repeat(1, 3)),
}


@pytest.mark.parametrize("name", TUPLES)
@pytest.mark.parametrize("micro_batch", [3, 8])
def test_gradients_through_operations_that_return_tuples(name, micro_batch):
    """Of a part by its name, of a slice, of a part used twice: lockstep lost or replaced them."""
    model = nn.Sequential(nn.Linear(6, 6), TUPLES[name], nn.BatchNorm1d(6), nn.Linear(6, 6))
    model = copy.deepcopy(model).double()
    expected = copy.deepcopy(model)
    nt_xent_loss(expected(X.double())).backward()
    step = LargeBatch(model, memory="lockstep", micro_batch=micro_batch)
    step.backward(X.double(), nt_xent_loss)
    for found, want in zip(gradients(model), gradients(expected), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


class NormsOnParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x):
        parts = x.chunk(2, 1)
        return torch.cat([self.first(parts[0]), self.second(parts[1]) * parts[0]], 1)


def test_a_tuple_that_is_needed_behind_a_batch_norm_is_refused():
    model = nn.Sequential(nn.Linear(6, 6), NormsOnParts(), nn.Linear(6, 6))
    with pytest.raises(ValueError, match="is no tensor, and it is needed behind a batch norm"):
        run(model, "lockstep")


def test_a_row_that_overflows_by_a_rounding_is_no_other_row():
    whole, part = torch.ones(2, 4, 3, dtype=torch.float16)
    part = part[:2].clone()
    part[0, 1] = torch.inf
    assert not _other_rows(whole, part, 4, slice(0, 2))
    part[1, 2] = 2
    assert _other_rows(whole, part, 4, slice(0, 2))
    assert _other_rows(whole, part[:, :2], 4, slice(0, 2))


class Odd(nn.Module):
    """A model that does one thing that modes cannot do twice, in a micro-batch, or in a trace."""

    def __init__(self, model, kind):
        super().__init__()
        self.model, self.kind = model, kind
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        if self.kind == "counter":
            self.count += 1
        with torch.no_grad() if self.kind == "no_grad" else nullcontext():
            x = self.model[0](x)
        x = self.model[1:](x)
        return x - x.mean(0) if self.kind == "mean of the batch" else x


def odd(kind, flat):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) if flat else build()
    if kind == "forward hook":
        model[0].register_forward_hook(lambda module, args, output: 2 * output)
    elif kind == "gradient hook":
        model[0].weight.register_hook(lambda gradient: 2 * gradient)
    elif kind == "spectral norm":
        spectral_norm(model[0])
    elif kind == "dropout":
        model.append(nn.Dropout(0.5))
    return Odd(model, kind)


ODD = [
    *("forward hook", "gradient hook", "spectral norm", "dropout"),
    *("counter", "no_grad", "mean of the batch"),
]


@pytest.mark.parametrize("flat", [False, True], ids=["blocks", "flat"])
@pytest.mark.parametrize("kind", ODD)
def test_each_mode_that_a_refusal_names_can_run_the_model(kind, flat):
    refusals = {}
    for memory in MODES:
        try:
            run(odd(kind, flat), memory)
        except ValueError as error:
            refusals[memory] = str(error)
    assert refusals
    for memory, says in refusals.items():
        named = set(re.findall(r"memory='([^']*)'", says)) - {memory}
        assert named, says
        for mode in named:
            run(odd(kind, flat), mode)
