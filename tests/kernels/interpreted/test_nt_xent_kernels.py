"""NT-Xent's Triton kernels against float64: losses, statistics, gradients, memory accesses."""

import math

import pytest
import torch
from kernel_memory import checked_memory, seeded

from simclr_fast import nt_xent_loss, ops
from simclr_fast.kernels import nt_xent, nt_xent_configs
from simclr_fast.kernels.nt_xent_configs import Config, Plan
from simclr_fast.ops import nt_xent_plain

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch):
    """A buffer that a kernel fails to fill shows up as NaN."""

    def poison(empty):
        def poisoned(*args, **kwargs):
            tensor = empty(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


def use_plan(monkeypatch, **changes):
    """Force parts of the launch plan of all tile kernels."""

    def forced(kernel, u_all, rows):
        made = nt_xent_configs.plan_for(kernel, u_all, rows)
        config = {k: v for k, v in changes.items() if k in Config._fields}
        other = {k: v for k, v in changes.items() if k in Plan._fields}
        return made._replace(config=made.config._replace(**config), **other)

    monkeypatch.setattr(nt_xent, "plan_for", forced)


def make_views(pairs, dim, dtype=torch.float32, noise=0.5, seed=0):
    generator = seeded(seed)
    z1 = torch.randn(pairs, dim, generator=generator)
    z2 = z1 + noise * torch.randn(pairs, dim, generator=generator)
    return z1.to(dtype), z2.to(dtype)


def interleave(a, b):
    return torch.stack((a, b), 1).flatten(0, 1)


def reference(z1, z2, temperature, grad, decoupled=False):
    """float64 by autograd, the positive outside the sum; rows interleaved, grad_z view-major."""
    z1, z2 = (z.detach().double().requires_grad_() for z in (z1, z2))
    tau = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    u = torch.nn.functional.normalize(interleave(z1, z2), dim=1)
    s = u @ u.T / tau
    i = torch.arange(len(u))
    positive = s[i, i ^ 1]
    same_pair = (i[:, None] >> 1) == (i[None, :] >> 1)
    negatives = s.masked_fill(same_pair, -math.inf)
    loss = 0 * positive
    if len(u) > 2:
        loss = negatives.logsumexp(1) - positive
        loss = loss if decoupled else torch.logaddexp(0 * loss, loss)
    (loss * grad.double()).sum().backward()
    other = negatives.masked_fill(((i[:, None] ^ i[None, :]) & 1) == 0, -math.inf)
    columns = []
    for logits in (other, negatives):
        log_p = torch.cat((positive[:, None], logits), 1).log_softmax(1)
        entropy = -torch.where(log_p == -math.inf, 0, log_p.exp() * log_p).sum(1)
        columns += [(positive > logits.amax(1)).double(), entropy]
    grad_z = torch.cat((z1.grad, z2.grad))
    stats = torch.stack(columns, 1).detach()
    return loss.detach(), (positive + loss).detach(), stats, grad_z, tau.grad


def relative(value, expected):
    return float((value.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def run(z1, z2, temperature, grad, statistics=False, decoupled=False, mean=False):
    tau = torch.tensor(temperature)
    u, inv_norm = nt_xent.normalize(z1, z2, tau)
    loss, lse, stats = nt_xent.forward(u, tau, 0, len(u), decoupled, statistics)
    grad_z, grad_tau = nt_xent.backward(
        grad, mean, u, lse, loss, inv_norm, z1, z2, tau, 0, decoupled
    )
    return loss, lse, stats, grad_z, grad_tau


def textbook_error(z1, z2, temperature, grad, expected):
    """The error of plain torch's gradient in the same dtype."""
    z1, z2 = z1.detach().clone().requires_grad_(), z2.detach().clone().requires_grad_()
    u = torch.nn.functional.normalize(interleave(z1, z2), dim=1)
    s = (u @ u.T / temperature).fill_diagonal_(-math.inf)
    i = torch.arange(len(u))
    loss = s.logsumexp(1) - s[i, i ^ 1]
    (loss * grad.to(loss.dtype)).sum().backward()
    return relative(torch.cat((z1.grad, z2.grad)), expected)


# 33 pairs: a ragged tile, 32: whole ones; 24 features: padding; 64, 192, 300: blocks of features.
@pytest.mark.parametrize(
    ("pairs", "dim", "temperature", "dtype"),
    [
        (33, 24, 0.1, torch.float32),
        (33, 24, 0.1, torch.float16),
        (33, 24, 0.1, torch.bfloat16),
        (32, 64, 0.5, torch.float32),
        (17, 192, 0.07, torch.float16),
        (9, 300, 0.2, torch.bfloat16),
        (9, 300, 0.2, torch.float32),
        (2, 1, 1.0, torch.float32),
        (20, 16, 100.0, torch.float32),
    ],
    ids=str,
)
def test_loss_and_gradients_match_float64(pairs, dim, temperature, dtype):
    z1, z2 = make_views(pairs, dim, dtype)
    grad = torch.tensor(0.37)
    with checked_memory() as launches:
        loss, lse, _, grad_z, grad_tau = run(z1, z2, temperature, grad)
    assert len(launches) == 6
    ref_loss, ref_lse, _, ref_grad, ref_tau = reference(z1, z2, temperature, grad)
    # û is float16 for 16-bit z: 2⁻¹¹ in x.
    tolerance = 3e-6 if dtype == torch.float32 else 1e-3
    assert relative(loss, ref_loss) < tolerance
    assert relative(lse, ref_lse) < tolerance
    assert abs(float(grad_tau) - float(ref_tau)) <= tolerance * abs(float(ref_tau)) + 1e-6
    if dim > 1:
        allowed = 2 * textbook_error(z1, z2, temperature, grad, ref_grad) + 1e-6
        assert relative(grad_z, ref_grad) <= allowed
    assert grad_z.dtype == dtype


@pytest.mark.parametrize(
    ("temperature", "symmetric"),
    [(0.001, False), (0.001, True), (0.0149, True), (0.0151, True), (0.0149, False)],
)
def test_low_temperatures_keep_a_running_maximum(temperature, symmetric, monkeypatch):
    use_plan(monkeypatch, symmetric=symmetric, splits=3, block_m=16)
    z1, z2 = make_views(48, 32, noise=2.0)
    grad = torch.tensor(1.0)
    loss, lse, _, grad_z, grad_tau = run(z1, z2, temperature, grad)
    ref_loss, ref_lse, _, ref_grad, ref_tau = reference(z1, z2, temperature, grad)
    assert relative(loss, ref_loss) < 2e-6
    assert relative(lse, ref_lse) < 1e-6
    # x itself is rounded to 2⁻²⁴ · 1.44 / τ.
    assert relative(grad_z, ref_grad) < 4e-7 / temperature
    assert abs(float(grad_tau / ref_tau) - 1) < 4e-7 / temperature


# Tiles of 16 rows of one view: T = 2, 4, 6, 8; with more chunks than there is work for too.
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("temperature", [0.2, 0.005])
@pytest.mark.parametrize(("pairs", "splits"), [(16, 1), (32, 3), (48, 2), (64, 1), (64, 7)])
def test_symmetric_forward_equals_the_plain_one(
    pairs, splits, temperature, statistics, monkeypatch
):
    z1, z2 = make_views(pairs, 16)
    tau = torch.tensor(temperature)
    u, _ = nt_xent.normalize(z1, z2, tau)
    plain = nt_xent.forward(u, tau, 0, len(u), False, statistics)
    use_plan(monkeypatch, symmetric=True, splits=splits, block_m=16)
    with checked_memory() as launches:
        symmetric = nt_xent.forward(u, tau, 0, len(u), False, statistics)
    assert "symmetric_kernel" in launches
    for a, b in zip(plain, symmetric, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("blocks", "splits"), [((32, 64), 1), ((64, 32), 3), ((64, 16), 5), ((16, 64), 2)], ids=str
)
def test_every_split_and_tile_shape_matches_float64(blocks, splits, monkeypatch):
    # With eight warps and 16 keys ptxas 12.8 can compute wrong addresses for sm_90: see sass.py.
    use_plan(monkeypatch, block_m=blocks[0], block_n=blocks[1], splits=splits, warps=4)
    z1, z2 = make_views(75, 16)
    grad = torch.randn(150, generator=seeded(1))
    loss, _, _, grad_z, grad_tau = run(z1, z2, 0.1, grad)
    ref_loss, _, _, ref_grad, ref_tau = reference(z1, z2, 0.1, grad)
    assert relative(loss, ref_loss) < 2e-6
    assert relative(grad_z, ref_grad) < 2e-6
    assert relative(grad_tau, ref_tau) < 1e-5


def test_large_tiles_at_a_low_temperature_match_float64(monkeypatch):
    """The gradient's pass for low temperatures reads factors and weights anew in each tile."""
    use_plan(monkeypatch, block_m=128, block_n=128, splits=1, warps=8)
    z1, z2 = make_views(75, 16, noise=2.0)
    grad = torch.randn(150, generator=seeded(1))
    loss, _, _, grad_z, grad_tau = run(z1, z2, 0.005, grad)
    ref_loss, _, _, ref_grad, ref_tau = reference(z1, z2, 0.005, grad)
    assert relative(loss, ref_loss) < 2e-6
    assert relative(grad_z, ref_grad) < 8e-5
    assert abs(float(grad_tau / ref_tau) - 1) < 8e-5


@pytest.mark.parametrize(
    ("pairs", "splits", "temperature"),
    [(37, 1, 0.1), (37, 3, 0.005), (32, 2, 2.0), (2, 1, 0.5), (1, 1, 0.5)],
)
def test_statistics_match_float64(pairs, splits, temperature, monkeypatch):
    use_plan(monkeypatch, splits=splits)
    z1, z2 = make_views(pairs, 12, noise=1.0)
    grad = torch.ones(2 * pairs)
    loss, lse, stats, _, _ = run(z1, z2, temperature, grad, statistics=True)
    ref_loss, ref_lse, ref_stats, _, _ = reference(z1, z2, temperature, grad)
    torch.testing.assert_close(stats.double(), ref_stats, rtol=1e-4, atol=5e-6 + 1e-7 / temperature)
    torch.testing.assert_close(loss.double(), ref_loss, rtol=1e-4, atol=1e-6)
    assert relative(lse, ref_lse) < 1e-6


@pytest.mark.parametrize(("pairs", "dim", "dtype"), [(150, 20, torch.float32), (1, 24, torch.half)])
def test_mean_statistics_match_float64(pairs, dim, dtype):
    z1, z2 = make_views(pairs, dim, dtype)
    tau = torch.tensor(0.2)
    u, _ = nt_xent.normalize(z1, z2, tau)
    loss, lse, stats = nt_xent.forward(u, tau, 0, len(u), False, True)
    # Columns of one tensor, as several ranks gather them.
    gathered = torch.cat((torch.stack((loss, lse), 1), stats), 1)
    with checked_memory() as launches:
        means = nt_xent.mean_statistics(gathered[:, 0], gathered[:, 1], gathered[:, 2:], u, tau)
    assert len(launches) == 2
    exact = nt_xent_plain.mean_statistics(*(x.double() for x in (loss, lse, stats, u, tau)))
    torch.testing.assert_close(means.double(), exact, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("path", [nt_xent, nt_xent_plain], ids=["triton", "plain"])
@pytest.mark.parametrize("noise", [0.0, 1e-3, -1e-3])
def test_a_single_pair_has_no_negative_similarity(noise, path):
    """Whatever rounding leaves of the negatives' sum: nothing, or either sign."""
    z1, z2 = make_views(1, 24, torch.float32)
    tau = torch.tensor(0.2)
    u, _ = nt_xent.normalize(z1, z2, tau)
    loss, lse, stats = nt_xent.forward(u, tau, 0, 2, False, True)
    means = path.mean_statistics(loss, lse + noise, stats, u, tau)
    assert means[5].isnan()
    assert means[:5].isfinite().all()


def test_upstream_gradients_of_any_scale():
    z1, z2 = make_views(20, 16)
    generator = seeded(2)
    for scale in (1e-20, 1.0, 1e6):
        grad = scale * torch.randn(40, generator=generator)
        grad_z, grad_tau = run(z1, z2, 0.3, grad)[3:]
        ref_grad, ref_tau = reference(z1, z2, 0.3, grad)[3:]
        assert relative(grad_z, ref_grad) < 2e-6
        assert relative(grad_tau, ref_tau) < 2e-5
    assert not run(z1, z2, 0.3, torch.zeros(40))[3].any()


@pytest.mark.parametrize("statistics", [False, True])
def test_ranks_with_uneven_rows_equal_one_process(statistics):
    z1, z2 = make_views(61, 24)
    tau = torch.tensor(0.15)
    grad = torch.randn(122, generator=seeded(3))
    parts = [(0, 20), (20, 21), (21, 61)]
    local = [nt_xent.normalize(z1[a:b], z2[a:b], tau) for a, b in parts]
    u_all = torch.cat([u for u, _ in local])
    rows = [nt_xent.forward(u_all, tau, 2 * a, 2 * (b - a), False, statistics) for a, b in parts]
    lse_all = torch.cat([lse for _, lse, _ in rows])
    ref_loss, ref_lse, ref_stats, ref_grad, ref_tau = reference(z1, z2, 0.15, grad)
    assert relative(torch.cat([r[0] for r in rows]), ref_loss) < 2e-6
    assert relative(lse_all, ref_lse) < 1e-6
    if statistics:
        stats = torch.cat([r[2] for r in rows])
        torch.testing.assert_close(stats.double(), ref_stats, rtol=1e-5, atol=5e-6)
    total_tau, ref_views = 0.0, ref_grad.chunk(2)
    for (a, b), (_, inv_norm), (loss, _, _) in zip(parts, local, rows, strict=True):
        grad_z, grad_tau = nt_xent.backward(
            grad, False, u_all, lse_all, loss, inv_norm, z1[a:b], z2[a:b], tau, 2 * a, False
        )
        expected = torch.cat([view[a:b] for view in ref_views])
        assert relative(grad_z, expected) < 2e-6
        total_tau += float(grad_tau)
    assert abs(total_tau / float(ref_tau) - 1) < 2e-5


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("temperature", [0.2, 0.005])
def test_the_decoupled_loss_matches_float64(statistics, temperature):
    z1, z2 = make_views(37, 24, noise=0.3)
    for grad, mean in ((torch.tensor(3.0), True), (torch.rand(74), False)):
        loss, _, _, grad_z, grad_tau = run(z1, z2, temperature, grad, statistics, True, mean)
        exact = grad / 74 if mean else grad
        ref_loss, _, _, ref_grad, ref_tau = reference(z1, z2, temperature, exact, True)
        assert relative(loss, ref_loss) < 3e-6
        assert relative(grad_z, ref_grad) < 4e-7 / min(temperature, 0.1)
        assert abs(float(grad_tau / ref_tau) - 1) < 4e-7 / min(temperature, 0.1)


def test_aligned_views_keep_a_precise_gradient():
    z1, z2 = make_views(32, 32, noise=1e-3)
    grad = torch.ones(64)
    loss, _, _, grad_z, _ = run(z1, z2, 0.05, grad)
    ref_loss, _, _, ref_grad, _ = reference(z1, z2, 0.05, grad)
    assert relative(loss, ref_loss) < 5e-6
    assert relative(grad_z, ref_grad) < 5e-6


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("joined", torch.float32),
        ("transposed", torch.bfloat16),
        ("strided", torch.float16),
        ("expanded", torch.float32),
    ],
    ids=str,
)
def test_normalize_accepts_every_layout(layout, dtype):
    generator = seeded(4)
    z = torch.randn(14, 24, generator=generator).to(dtype)
    z1, z2 = z.chunk(2)
    if layout == "transposed":
        z1, z2 = (v.T.contiguous().T for v in (z1, z2))
    elif layout == "strided":
        z1, z2 = z.repeat(1, 2)[::2, ::2], z.repeat_interleave(2, 1)[1::2, ::2]
    elif layout == "expanded":
        z2 = z[:1].expand(7, 24)
    with checked_memory():
        arguments = (z, None) if layout == "joined" else (z1, z2)
        u, inv_norm = nt_xent.normalize(*arguments, torch.tensor(0.25))
    both = interleave(z1.double(), z2.double())
    expected = torch.nn.functional.normalize(both, dim=1) * math.sqrt(math.log2(math.e) / 0.25)
    assert u.shape == (14, 32)
    assert not u[:, 24:].any()
    assert u.dtype == (torch.float32 if dtype == torch.float32 else torch.float16)
    assert relative(u[:, :24], expected) < (2e-7 if dtype == torch.float32 else 4e-4)
    assert relative(inv_norm, 1 / both.norm(dim=1)) < 2e-7
    grad = torch.ones(14)
    *_, grad_z, _ = run(*arguments, 0.25, grad)
    ref_grad = reference(z1, z2, 0.25, grad)[3]
    assert relative(grad_z, ref_grad) < {torch.float32: 1e-6, torch.float16: 1e-3}.get(dtype, 6e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_rows_behave_as_normalize(dtype):
    z1, z2 = make_views(6, 8, dtype)
    z1[2] = 0
    z2[4] = 0
    grad = torch.tensor(1.0)
    loss, _, _, grad_z, _ = run(z1, z2, 0.5, grad)
    ref_loss, _, _, ref_grad, _ = reference(z1, z2, 0.5, grad)
    assert relative(loss, ref_loss) < (1e-6 if dtype == torch.float32 else 1e-3)
    zero = torch.zeros(12, dtype=torch.bool)
    zero[[2, 10]] = True
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3}.get(dtype, 8e-3)
    assert relative(grad_z[~zero], ref_grad[~zero]) < tolerance
    if dtype != torch.float16:
        # About 1e12, as autograd of torch.nn.functional.normalize gives: beyond float16.
        assert relative(grad_z[zero], ref_grad[zero]) < max(tolerance, 2e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("statistics", [False, True])
def test_nan_and_infinity_give_nan(bad, statistics):
    z1, z2 = make_views(9, 8)
    z2[3, 5] = bad
    loss, _, _, grad_z, grad_tau = run(z1, z2, 0.5, torch.ones(18), statistics)
    assert loss.isnan().all()
    assert grad_z.isnan().all()
    assert grad_tau.isnan()


@pytest.mark.parametrize("joined", [False, True])
def test_the_ops_call_the_kernels(joined, monkeypatch):
    """The op's own functions, with CPU tensors taken for CUDA ones."""
    monkeypatch.setattr(ops.nt_xent, "on_triton", lambda tensor: True)
    z1, z2 = make_views(12, 20, torch.bfloat16)
    views = (torch.cat((z1, z2)), None) if joined else (z1, z2)
    tau, grad = torch.tensor(0.2), torch.rand(24, generator=seeded(5))
    with checked_memory() as launches:
        outputs = ops.nt_xent._loss(*views, tau, ops.nt_xent.NONE, False, True)
        loss, rows, lse, stats, u, inv_norm, kept = outputs
        arguments = grad, False, u, lse, rows, inv_norm, *views, tau, 0, False, kept
        results = ops.nt_xent._backward(*arguments)
    assert "gradient_kernel" in launches
    ref_loss, _, ref_stats, ref_grad, ref_tau = reference(z1, z2, 0.2, grad)
    assert relative(rows, ref_loss) < 1e-3
    assert relative(loss, torch.cat((ref_loss[::2], ref_loss[1::2]))) < 1e-3
    assert relative(stats, ref_stats) < 1e-3
    assert relative(results[0], ref_grad) < 6e-3
    assert relative(results[1], ref_tau) < 1e-3
    fakes = ops.nt_xent._loss_shapes(*views, tau, ops.nt_xent.NONE, False, True)
    fakes += ops.nt_xent._backward_shapes(*arguments)
    for made, fake in zip((*outputs, *results), fakes, strict=True):
        assert made.shape == fake.shape
        assert made.dtype == fake.dtype
        assert made.stride() == fake.stride()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_public_loss_calls_the_kernels(reduction, monkeypatch):
    """Without the dispatcher, as for CUDA tensors, which these are taken for."""
    monkeypatch.setattr(ops.nt_xent, "on_triton", lambda tensor: True)
    monkeypatch.setattr(ops.nt_xent, "goes_straight_to_cuda", lambda *tensors: True)
    monkeypatch.setattr(ops.nt_xent, "has_ambient_state", lambda: False)
    z1, z2 = (z.requires_grad_() for z in make_views(12, 20, torch.float16))
    tau = torch.tensor(0.2, requires_grad=True)
    with checked_memory() as launches:
        loss, stats = nt_xent_loss(z1, z2, tau, reduction=reduction, return_stats=True)
        loss.backward(torch.tensor(3.0))
    assert {"losses_kernel", "mean_statistics_kernel", "finish_gradient_kernel"} <= set(launches)
    scale = 1 / 24 if reduction == "mean" else 1
    grad = torch.full((24,), 3.0 * scale)
    ref_loss, _, ref_stats, ref_grad, ref_tau = reference(z1, z2, 0.2, grad)
    assert relative(loss.detach(), ref_loss.sum() * scale) < 1e-3
    assert relative(torch.cat((z1.grad, z2.grad)), ref_grad) < 1e-3
    assert relative(tau.grad, ref_tau) < 1e-3
    means = (ref_stats[::2, 0].mean(), ref_stats[::2, 1].mean(), *ref_stats[:, 2:].mean(0))
    assert relative(torch.stack(stats[:4]), torch.stack(means)) < 1e-3


def test_results_repeat_bit_for_bit():
    z1, z2 = make_views(45, 20)
    grad = torch.tensor(1.0)
    first, second = (run(z1, z2, 0.1, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_one_pair_has_no_negatives():
    z1, z2 = make_views(1, 5)
    loss, _, _, grad_z, grad_tau = run(z1, z2, 0.5, torch.ones(2))
    assert not loss.any()
    assert not grad_z.any()
    assert grad_tau == 0


def test_no_pairs_launch_nothing():
    z = torch.empty(0, 8)
    tau = torch.tensor(0.5)
    with checked_memory() as launches:
        u, inv_norm = nt_xent.normalize(z, z, tau)
        loss, lse, stats = nt_xent.forward(u, tau, 0, 0, False, True)
        grad_z, _ = nt_xent.backward(loss, False, u, lse, loss, inv_norm, z, z, tau, 0, False)
    assert launches == []
    assert u.shape == (0, 16)
    assert stats.shape == (0, 4)
    assert grad_z.shape == (0, 8)
