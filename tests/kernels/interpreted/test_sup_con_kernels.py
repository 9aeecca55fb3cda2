"""The supervised loss's Triton kernels against float64: losses, gradients, memory accesses."""

import math

import pytest
import torch
from kernel_memory import checked_memory, seeded

from simclr_fast import reference
from simclr_fast.kernels import nt_xent_configs, sup_con
from simclr_fast.losses.sup_con import _classes
from simclr_fast.ops import nt_xent
from simclr_fast.ops import sup_con as sup_con_ops


def batch(rows, dim, classes, dtype, noise=1.0):
    generator = seeded(rows)
    labels = torch.randint(classes, (rows,), generator=generator)
    z = torch.randn(classes, dim, generator=generator)[labels]
    z = z + noise * torch.randn(rows, dim, generator=generator)
    labels[-1] = classes
    return z.to(dtype), labels


def exact(z, labels, temperature, grad):
    z = z.double().requires_grad_()
    tau = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    rows = reference.sup_con(z, labels, tau)
    return rows.detach(), *torch.autograd.grad((rows * grad).sum(), (z, tau))


def relative(value, expected):
    return float((value.double() - expected).norm() / expected.norm().clamp_min(1e-30))


# Ragged and whole tiles; padding and blocks of features; one class, and hardly any positives.
@pytest.mark.parametrize(
    ("rows", "dim", "classes", "temperature", "dtype"),
    [
        (64, 64, 5, 0.1, torch.float32),
        (67, 24, 3, 0.1, torch.float16),
        (67, 24, 30, 0.01, torch.float32),
        (33, 24, 1, 0.2, torch.bfloat16),
        (19, 192, 4, 0.07, torch.float16),
        (9, 300, 2, 0.2, torch.float32),
        (1, 3, 1, 0.2, torch.float32),
        (40, 16, 6, 0.002, torch.float32),
    ],
    ids=str,
)
def test_loss_and_gradients_match_float64(rows, dim, classes, temperature, dtype, monkeypatch):
    monkeypatch.setattr(nt_xent, "on_triton", lambda tensor: True)
    z, labels = batch(rows, dim, classes, dtype)
    tau, grad = torch.tensor(temperature), torch.rand(rows)
    by_class = _classes(labels, torch.float32)
    with checked_memory() as launches:
        u, inv_norm = sup_con_ops._normalize(z, tau)
        forward = u, *by_class, tau, 0, rows
        loss, lse = sup_con_ops._row_loss(*forward)
        backward = grad, u, lse, *by_class, inv_norm, z, tau, 0
        grad_z, grad_tau = sup_con_ops._backward(*backward)
    assert "finish_class_gradient_kernel" in launches
    wanted, exact_z, exact_tau = exact(z, labels, temperature, grad)
    tolerance = (3e-6 if dtype == torch.float32 else 1e-3) * max(1, 0.1 / temperature)
    assert relative(loss, wanted) < tolerance
    if exact_z.norm() > 0:
        assert relative(grad_z, exact_z) < (tolerance if dtype != torch.bfloat16 else 6e-3)
        assert relative(grad_tau, exact_tau) < 5 * tolerance
    else:
        assert not grad_z.any()
    fakes = *sup_con_ops._normalize_shapes(z, tau), *sup_con_ops._row_loss_shapes(*forward)
    fakes += sup_con_ops._backward_shapes(*backward)
    for made, fake in zip((u, inv_norm, loss, lse, grad_z, grad_tau), fakes, strict=True):
        assert (made.shape, made.dtype, made.stride()) == (fake.shape, fake.dtype, fake.stride())


@pytest.mark.parametrize(("blocks", "splits"), [((32, 64), 3), ((64, 16), 5)], ids=str)
def test_ranks_and_splits_equal_one_process(blocks, splits, monkeypatch):
    def forced(kernel, u_all, rows):
        plan = nt_xent_configs.plan_for(kernel, u_all, rows)
        # With eight warps and 16 keys ptxas 12.8 computes wrong addresses for sm_90: see sass.py.
        config = plan.config._replace(block_m=blocks[0], block_n=blocks[1], warps=4)
        return plan._replace(config=config, splits=splits)

    monkeypatch.setattr(sup_con, "plan_for", forced)
    z, labels = batch(101, 20, 4, torch.float32)
    tau, grad = torch.tensor(0.15), torch.randn(101, generator=seeded(3))
    by_class = _classes(labels, torch.float32)
    wanted, exact_z, exact_tau = exact(z, labels, 0.15, grad)
    parts = [(0, 33), (33, 34), (34, 101)]
    local = [sup_con.normalize(z[a:b], tau) for a, b in parts]
    u_all = torch.cat([u for u, _ in local])
    rows = [sup_con.forward(u_all, *by_class, tau, a, b - a) for a, b in parts]
    assert relative(torch.cat([loss for loss, _ in rows]), wanted) < 2e-6
    lse_all, total_tau = torch.cat([lse for _, lse in rows]), 0.0
    for (a, b), (_, inv_norm) in zip(parts, local, strict=True):
        grad_z, grad_tau = sup_con.backward(
            grad, u_all, lse_all, *by_class, inv_norm, z[a:b], tau, a
        )
        assert relative(grad_z, exact_z[a:b]) < 3e-6
        total_tau += float(grad_tau)
    assert math.isclose(total_tau, exact_tau, rel_tol=1e-4)


def test_aligned_views_keep_a_precise_gradient():
    z, labels = batch(60, 32, 6, torch.float32, noise=0.02)
    tau, by_class = torch.tensor(0.1), _classes(labels, torch.float32)
    u, inv_norm = sup_con.normalize(z, tau)
    _, lse = sup_con.forward(u, *by_class, tau, 0, 60)
    grad_z, _ = sup_con.backward(torch.ones(60), u, lse, *by_class, inv_norm, z, tau, 0)
    assert relative(grad_z, exact(z, labels, 0.1, torch.ones(60))[1]) < 1e-4


def test_a_zero_row_behaves_as_normalize():
    z, labels = batch(20, 8, 3, torch.float32)
    z[4] = 0
    tau, by_class = torch.tensor(0.3), _classes(labels, torch.float32)
    u, inv_norm = sup_con.normalize(z, tau)
    loss, lse = sup_con.forward(u, *by_class, tau, 0, 20)
    grad_z, _ = sup_con.backward(torch.ones(20), u, lse, *by_class, inv_norm, z, tau, 0)
    wanted, exact_z, _ = exact(z, labels, 0.3, torch.ones(20))
    assert relative(loss, wanted) < 1e-6
    assert relative(grad_z[4], exact_z[4]) < 1e-5
    kept = torch.arange(20) != 4
    assert relative(grad_z[kept], exact_z[kept]) < 1e-5
