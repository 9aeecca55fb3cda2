"""A batch norm in training with a residual and ReLU, forward and backward, against float64."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from instruction_sets import has_isa
from torch.nn import functional as F

from simclr_fast import ops
from simclr_fast.ops.norm_train import fits, norm_train, op, op_backward

pytestmark = pytest.mark.skipif(not ops.has_extension(), reason="the extension is not built")
LAST = torch.channels_last
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows and channels that fill no block, one block, many parts.
SHAPES = [
    (3, 5, 7, 9),
    (2, 33, 3, 3),
    (70, 33),
    (2, 1),
    (2, 2048, 2, 2),
    (40, 24, 31, 3),
    (257, 64),
]
EPS = 1e-3
NAMES = ("y", "x", "weight", "bias", "other")


def made(shape, dtype, seed=0):
    """x with a mean and deviation that differ between channels, weight, bias, other, dy."""
    generator = torch.Generator().manual_seed(seed)
    x, other, dy = (torch.randn(shape, generator=generator) for _ in range(3))
    scale, weight, bias = torch.randn(3, shape[1], generator=generator)
    along = (-1, *[1] * (len(shape) - 2))
    x = x * scale.view(along) + 5 * bias.view(along)
    tensors = [t.to(dtype) for t in (x, other, dy)]
    if len(shape) == 4:
        tensors = [t.contiguous(memory_format=LAST) for t in tensors]
    x, other, dy = tensors
    return x, weight, bias, other, dy


def plain(x, weight, bias, other, relu):
    y = F.batch_norm(x, None, None, weight, bias, True, 0.0, EPS)
    y = y if other is None else y + other
    return y.relu() if relu else y


def results(function, given, dtype, residual, relu):
    """y and the gradients of x, weight, bias and other."""
    wide = torch.promote_types(dtype, torch.float32)
    *leaves, dy = given
    leaves = [t.to(dtype if t.dim() > 1 else wide).requires_grad_() for t in leaves]
    x, weight, bias, other = leaves
    y = function(x, weight, bias, other if residual else None, relu)
    wanted = leaves if residual else leaves[:3]
    return [y.detach(), *torch.autograd.grad(1.7 * y, wanted, dy.to(dtype))]


def fused(x, weight, bias, other, relu):
    return norm_train(x, weight, bias, other, EPS, relu)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_as_exact_as_plain_torch(dtype, shape):
    given = made(shape, dtype)
    for residual, relu in itertools.product((True, False), repeat=2):
        assert fits(given[0], given[3])
        exact = results(plain, given, torch.float64, residual, relu)
        if relu:
            # A y that rounds to 0 in one of them only has another gradient.
            near = exact[0].abs() < 1e-3 * exact[0].abs().max()
            given[-1][near & (exact[0] != 0)] = 0
            exact = results(plain, given, torch.float64, residual, relu)
        ours = results(fused, given, dtype, residual, relu)
        torchs = results(plain, given, dtype, residual, relu)
        for name, a, b, c in zip(NAMES, ours, torchs, exact, strict=False):
            assert a.dtype == b.dtype, name
            error, limit = ((t.double() - c).norm() for t in (a, b))
            least = torch.finfo(torch.float32).eps * c.norm()
            assert error <= 2 * limit + least, (name, residual, relu, error / c.norm())


def test_mean_and_variance():
    x = made((40, 24, 31, 3), torch.float32)[0] + 1000
    _, mean, variance = norm_train(x, None, None)
    exact = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), exact.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), exact.var(1, correction=0), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("deviations", [10, 100, 1000])
def test_a_first_row_far_outside(deviations):
    """Sums are of differences from the first row."""
    x, *rest = made((2000, 32), torch.float32)
    x = torch.cat([x[:1] + deviations * x.std(0), x[1:]])
    exact, ours, torchs = (
        results(function, (x, *rest), dtype, True, False)
        for function, dtype in (
            (plain, torch.float64),
            (fused, torch.float32),
            (plain, torch.float32),
        )
    )
    for a, b, c in zip(ours, torchs, exact, strict=True):
        least = torch.finfo(torch.float32).eps * c.norm()
        assert (a.double() - c).norm() <= 2 * (b.double() - c).norm() + least


def test_the_bits_are_those_of_any_number_of_threads():
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for dtype in DTYPES:
                found.append(results(fused, made((90, 24, 31, 3), dtype), dtype, True, True))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(found[:3], found[3:], strict=True):
        assert all(map(torch.equal, one, three))


def test_only_the_gradients_that_are_needed():
    x, weight, bias, other, dy = made((3, 5, 7, 9), torch.float32)
    for relu in (True, False):
        y = norm_train(x, weight, bias, other.requires_grad_(), EPS, relu)[0]
        y.backward(dy)
        assert torch.equal(other.grad, dy * (y > 0) if relu else dy)
        other.grad = None
        assert (x.grad, weight.grad, bias.grad) == (None, None, None)
    y = norm_train(x.requires_grad_(), weight, bias, other, EPS)[0]
    (gradient,) = torch.autograd.grad(y, x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


def test_nan_stays():
    x = torch.randn(40, 4)
    x[3, 0] = torch.nan
    x.requires_grad_()
    y = norm_train(x, None, None)[0]
    y.sum().backward()
    assert y[:, 0].isnan().all()
    assert x.grad[:, 0].isnan().all()
    assert torch.isfinite(torch.cat([y[:, 1:], x.grad[:, 1:]])).all()


def test_what_does_not_fit():
    x = torch.randn(4, 6, 5, 5).contiguous(memory_format=LAST)
    assert fits(x)
    assert fits(x, x)
    wrong = [x.contiguous(), x.double(), x[:0], x[..., ::2], x[0], torch.randn(1, 6), x.to("meta")]
    assert not any(map(fits, wrong))
    assert not any(fits(x, other) for other in (x.contiguous(), x.bfloat16(), x[:2]))


def test_arguments_that_do_not_belong_together_are_refused():
    x, c = torch.randn(4, 6), torch.ones(6)
    for message, call in {
        "channels_last": lambda: op(torch.randn(4, 6, 5, 5), c, c, None, EPS, True),
        "float16, bfloat16 or float32": lambda: op(x.double(), c, c, None, EPS, True),
        "not empty": lambda: op(x[:0], c, c, None, EPS, True),
        "layout of x": lambda: op(x, c, c, x[:2], EPS, True),
        "one per channel": lambda: op_backward(x, x, None, torch.ones(5), c, None, False),
        "layout of x ": lambda: op_backward(x[:2], x, None, c, c, None, False),
    }.items():
        with pytest.raises(RuntimeError, match=message.strip()):
            call()


ISA_PROGRAM = """
import sys
from test_norm_train import DTYPES, SHAPES, test_it_is_as_exact_as_plain_torch as check
from simclr_fast import ops
assert ops.library.EXTENSION.instruction_set() == sys.argv[1]
for shape in SHAPES:
    for dtype in DTYPES:
        check(dtype, shape)
"""


@pytest.mark.parametrize(
    "isa", [pytest.param(isa, marks=pytest.mark.slow) for isa in ("base", "avx2", "avx512")]
)
def test_every_instruction_set(isa):
    if not has_isa(isa):
        pytest.skip(f"this CPU lacks {isa}")
    paths = [*sys.path, os.path.dirname(__file__)]
    environment = os.environ | {"SIMCLR_FAST_ISA": isa, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", ISA_PROGRAM, isa], env=environment)
    assert done.returncode == 0
