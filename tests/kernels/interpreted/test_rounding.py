"""The losses under the rounding of tensor cores.

The public functions take the CUDA route with CPU tensors, planned for an A100; the kernels run in
Triton's interpreter.
"""

import itertools
import math
import os

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from pretended_driver import cuda_route
from tensor_core_rounding import tensor_core_dot, tensor_cores

from simclr_fast import reference
from simclr_fast.commands import checks
from simclr_fast.losses.nt_xent import nt_xent_loss
from simclr_fast.losses.sup_con import sup_con_loss

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter alone has another dot", allow_module_level=True)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PRECISION = {torch.float32: "tf32x3 float32"}


@pytest.fixture(autouse=True)
def gpu():
    with tensor_cores() as used, cuda_route(80):
        yield used


def make_views(pairs, dim, dtype=torch.float32, noise=0.5):
    generator = torch.Generator().manual_seed(0)
    z1 = torch.randn(pairs, dim, generator=generator)
    z2 = z1 + noise * torch.randn(pairs, dim, generator=generator)
    return z1.to(dtype), z2.to(dtype)


def relative(value, wanted):
    return float((value.double() - wanted).norm() / wanted.norm())


def with_gradient(loss, *views):
    views = [v.detach().clone().requires_grad_() for v in views]
    value = loss(*views)
    gradients = torch.autograd.grad(1.7 * value, views)
    return value.detach(), torch.cat(gradients)


# All features in one block, padding, and blocks of features. bfloat16 is made float16 on loading,
# then takes the path of float16.
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [
        *itertools.product(DTYPES[:2], [24, 100, 128, 300]),
        *((torch.bfloat16, dim) for dim in (100, 300)),
    ],
    ids=str,
)
def test_a_collapsed_encoder_has_no_accuracy(dim, dtype, gpu):
    """All rows equal: the positive ties with every negative, and a tie counts as wrong."""
    row = torch.randn(1, dim, generator=torch.Generator().manual_seed(dim)).to(dtype)
    z = row.expand(20, dim)
    _, stats = nt_xent_loss(z, z, 0.1, return_stats=True)
    assert set(gpu) == {PRECISION.get(dtype, "ieee float16")}
    assert stats.contrastive_accuracy == 0
    assert stats.accuracy == 0
    assert math.isclose(stats.entropy, math.log(39), rel_tol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_copy_of_the_positive_is_a_tie(dtype):
    """Only the rows whose positive has a copy among the negatives lose."""
    z1, z2 = make_views(40, 100, dtype, noise=0.05)
    z2[:10] = z2[10:20]
    z1[:10] = z1[10:20]
    _, stats = nt_xent_loss(z1, z2, 0.1, return_stats=True)
    assert math.isclose(stats.contrastive_accuracy, 0.5, rel_tol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_statistics_equal_those_in_float64(dtype, temperature):
    z1, z2 = make_views(45, 100, dtype, noise=1.0)
    loss, stats = nt_xent_loss(z1, z2, temperature, return_stats=True)
    # float64 has no kernel: plain torch computes these.
    wanted_loss, wanted = nt_xent_loss(z1.double(), z2.double(), temperature, return_stats=True)
    # 16-bit rows are rounded to float16 before the product: 2⁻¹¹ of a logit.
    tolerance = (2e-6 if dtype == torch.float32 else 2e-4) / temperature
    assert relative(loss, wanted_loss) < tolerance
    for name, value, exact in zip(stats._fields, stats, wanted, strict=True):
        assert abs(float(value) - float(exact)) < tolerance * max(1, abs(float(exact))), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("pairs", "dim"), [(64, 128), (45, 100), (17, 576)])
def test_loss_and_gradient_within_twice_plain_torch(pairs, dim, dtype):
    z1, z2 = make_views(pairs, dim, dtype)
    exact = reference.nt_xent
    loss, grad = with_gradient(lambda *z: exact(*z, 0.1).mean(), *(z.double() for z in (z1, z2)))
    _, plain = with_gradient(lambda *z: exact(*z, 0.1).mean(), z1, z2)
    our_loss, ours = with_gradient(lambda *z: nt_xent_loss(*z, 0.1), z1, z2)
    assert relative(ours, grad) <= 2 * relative(plain, grad) + torch.finfo(dtype).eps
    assert relative(our_loss, loss) < (3e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_supervised_loss_and_gradient(dtype):
    z1, _ = make_views(33, 100, dtype)
    labels = torch.arange(33) // 3
    exact = reference.sup_con
    loss, grad = with_gradient(lambda z: exact(z, labels, 0.1).mean(), z1.double())
    _, plain = with_gradient(lambda z: exact(z, labels, 0.1).mean(), z1)
    our_loss, ours = with_gradient(lambda z: sup_con_loss(z, labels, 0.1), z1)
    assert relative(ours, grad) <= 2 * relative(plain, grad) + torch.finfo(dtype).eps
    assert relative(our_loss, loss) < (3e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_self_checks_tolerances_hold(dtype, monkeypatch):
    # Fewer pairs than selfcheck takes: the interpreter is slow.
    monkeypatch.setattr(checks, "_PAIRS", 37)
    device = torch.device("cpu")
    assert "gradient by" in checks.nt_xent(device, dtype)
    assert "gradient by" in checks.supervised(device, dtype)
    if dtype != torch.float16:
        assert "6 statistics" in checks.statistics(device, dtype)
    if dtype == torch.float32:
        assert "gradient by" in checks.decoupled(device)
        assert "gradient is off by" in checks.learnable_temperature(device)


# These checks must find a planted fault.


@triton.jit
def _wins_kernel(u_ptr, wins_ptr, rows, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The planted fault: the maximum by tensor cores, the positive by multiply-adds."""
    i = tl.arange(0, BLOCK)
    d = tl.arange(0, DIM)
    inside = i < rows
    u = tl.load(u_ptr + i[:, None] * DIM + d[None, :], mask=inside[:, None], other=0.0)
    partner = tl.load(u_ptr + (i ^ 1)[:, None] * DIM + d[None, :], mask=inside[:, None], other=0.0)
    x = tl.dot(u, tl.trans(u))
    negative = ((i >> 1)[:, None] != (i >> 1)[None, :]) & inside[None, :]
    top = tl.max(tl.where(negative, x, float("-inf")), axis=1)
    positive = tl.sum(u.to(tl.float32) * partner.to(tl.float32), axis=1)
    tl.store(wins_ptr + i, (positive > top).to(tl.float32), mask=inside)


def test_planted_positive_outside_the_tile_is_found():
    row = torch.randn(1, 64, generator=torch.Generator().manual_seed(1)).half()
    wins = torch.zeros(20)
    _wins_kernel[(1,)](row.expand(20, 64).contiguous(), wins, 20, DIM=64, BLOCK=32)
    assert wins.all()


def test_products_are_exact_and_sums_are_cut_off():
    one, tiny = np.float16(1), np.float16(2.0**-12)
    a = np.array([[one] + [tiny] * 7], np.float16)
    b = np.array([[one]] + [[tiny]] * 7, np.float16)
    zero = np.zeros((1, 1), np.float32)
    # Each of the seven terms of 2⁻²⁴ is kept; their sum, 3.5 · 2⁻²³, is cut off to 3 · 2⁻²³.
    assert tensor_core_dot(a, b, zero, "ieee")[0, 0] == 1 + 3 * 2.0**-23
    assert tensor_core_dot(-a, b, zero, "ieee")[0, 0] == -1 - 3 * 2.0**-23
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 40, 40)).astype(np.float32)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    zero = np.zeros((40, 40), np.float32)
    errors = {p: np.abs(tensor_core_dot(a, b, zero, p) - exact).max() for p in ("tf32", "tf32x3")}
    assert 1e-3 < errors["tf32"] < 5e-2
    assert 1e-7 < errors["tf32x3"] < 2e-5
