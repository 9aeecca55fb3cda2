"""NT-Xent's calls without the dispatcher: taken for ordinary CUDA tensors only, same results."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_fast import nt_xent_loss, ops, reference
from simclr_fast.ops.library import goes_straight_to_cuda


class Recorder(TorchDispatchMode):
    """Lists the names of the ops that it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **kwargs or {})


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


class Subclass(Tensor):
    pass


def z(requires_grad=False):
    return torch.rand(4, 6, requires_grad=requires_grad)


def negated():
    """A view that torch negates only when it is read."""
    made = torch.zeros(4, 6, dtype=torch.complex64).conj().imag
    assert made.is_neg()
    return made


@pytest.fixture
def as_on_cuda(monkeypatch):
    monkeypatch.setattr(Tensor, "is_cuda", True)


@pytest.mark.parametrize(
    "around", [nullcontext, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu")]
)
def test_ordinary_tensors_go_straight(around, as_on_cuda):
    with around():
        assert goes_straight_to_cuda(z(requires_grad=True), None, z())
        assert goes_straight_to_cuda(nn.Parameter(z()), z())


def test_cpu_tensors_do_not():
    assert not goes_straight_to_cuda(z(), None, z())


@pytest.mark.parametrize(
    "around", [Recorder, FunctionMode, FakeTensorMode, lambda: torch.device("cpu")]
)
def test_modes_see_the_ops(around, as_on_cuda):
    made = z()
    with around():
        assert not goes_straight_to_cuda(made, None, made)


@pytest.mark.parametrize(
    "make",
    [
        lambda: z().as_subclass(Subclass),
        lambda: FakeTensorMode().from_tensor(z()),
        negated,
        lambda: torch._efficientzerotensor(4, 6),
    ],
    ids=["subclass", "fake", "negated", "zeros"],
)
def test_other_tensors_take_the_dispatcher(make, as_on_cuda):
    assert not goes_straight_to_cuda(make(), None, z())
    assert not goes_straight_to_cuda(z(), make(), z())


def test_transforms_and_tracers_see_the_ops(as_on_cuda):
    answers = []

    def ask(x):
        answers.append(goes_straight_to_cuda(x, None))
        answers.append(goes_straight_to_cuda(outside, None))
        return x + 1

    outside = z()
    torch.vmap(ask)(z())
    assert answers == [False, False]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(ask, z(), check_trace=False)
    assert answers == [False] * 4


@pytest.fixture
def straight(monkeypatch):
    """Plain torch in place of the kernels for CUDA, called as they are."""
    monkeypatch.setattr(ops.nt_xent, "goes_straight_to_cuda", lambda *tensors: True)
    monkeypatch.setattr(ops.nt_xent, "_kernels", lambda tensor: ops.nt_xent_plain)


def views(joined):
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(18, 7, dtype=torch.float64, generator=generator).requires_grad_()
    return (made, None) if joined else tuple(v.detach().requires_grad_() for v in made.chunk(2))


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_straight_calls_match_float64(joined, reduction, straight):
    inputs = [*views(joined), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)]
    leaves = [x for x in inputs if x is not None]
    upstream = torch.rand(18 if reduction == "none" else (), dtype=torch.float64)

    def run(loss):
        value = loss(*inputs)
        return value, *torch.autograd.grad(value, leaves, upstream)

    ours = run(lambda *x: nt_xent_loss(*x, reduction=reduction))
    reduce = {"mean": Tensor.mean, "sum": Tensor.sum, "none": Tensor.clone}[reduction]
    wanted = run(lambda *x: reduce(reference.nt_xent(*x)))
    for value, exact in zip(ours, wanted, strict=True):
        assert torch.allclose(value, exact, rtol=1e-10)


def test_a_mode_around_the_backward_pass_sees_its_op(straight):
    z1, z2 = views(False)
    loss = nt_xent_loss(z1, z2)
    with Recorder() as recorder:
        loss.backward()
    assert "simclr_fast::nt_xent_backward" in recorder.seen


@pytest.mark.parametrize("gradient", [False, True])
def test_straight_statistics_are_those_of_the_ops(gradient, monkeypatch):
    with torch.set_grad_enabled(gradient):
        loss, stats = nt_xent_loss(*views(False), 0.3, return_stats=True)
        monkeypatch.setattr(ops.nt_xent, "goes_straight_to_cuda", lambda *tensors: True)
        monkeypatch.setattr(ops.nt_xent, "_kernels", lambda tensor: ops.nt_xent_plain)
        ours, our_stats = nt_xent_loss(*views(False), 0.3, return_stats=True)
    assert torch.allclose(ours, loss)
    assert ours.requires_grad == gradient
    assert torch.allclose(torch.stack(our_stats), torch.stack(stats))
    assert not our_stats[0].requires_grad


def test_straight_calls_refuse_a_double_backward(straight):
    z1, z2 = views(False)
    (grad,) = torch.autograd.grad(nt_xent_loss(z1, z2), z1, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        grad.sum().backward()


def test_a_straight_backward_needs_no_dispatcher(straight, monkeypatch):
    """Its kernel is called directly: an op in its place would raise."""
    z1, z2 = views(False)
    monkeypatch.setattr(ops.nt_xent, "backward", None)
    monkeypatch.setattr(ops.nt_xent, "loss", None)
    nt_xent_loss(z1, z2).backward()
    assert z1.grad is not None
