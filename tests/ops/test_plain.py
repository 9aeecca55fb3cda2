"""The plain-torch paths against float64. On the CPU the extension otherwise hides them."""

import pytest
import torch

from simclr_fast import reference
from simclr_fast.losses.sup_con import _classes
from simclr_fast.ops import nt_xent, sup_con


class NTXent(torch.autograd.Function):
    """The op, computed by its plain-torch path."""

    @staticmethod
    def forward(ctx, z1, z2, temperature):
        out = nt_xent._loss(z1, z2, temperature, nt_xent.NONE, False, False)
        ctx.out = out
        ctx.save_for_backward(z1, z2, temperature)
        return out.loss

    @staticmethod
    def backward(ctx, grad):
        out, (z1, z2, temperature) = ctx.out, ctx.saved_tensors
        grad = grad.unflatten(0, (2, -1)).T.flatten()
        grad_z, grad_temperature = nt_xent._backward(
            *(grad, False, out.u, out.lse, out.row_loss, out.inv_norm),
            *(z1, z2, temperature, 0, False),
        )
        return *grad_z.chunk(2), grad_temperature


class SupCon(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, temperature, labels):
        classes = _classes(labels, temperature.dtype)
        u, inv_norm = sup_con._normalize(z, temperature)
        row_loss, lse = sup_con._row_loss(u, *classes, temperature, 0, len(z))
        ctx.save_for_backward(u, lse, *classes, inv_norm, z, temperature)
        return row_loss

    @staticmethod
    def backward(ctx, grad):
        grad_z, grad_temperature = sup_con._backward(grad, *ctx.saved_tensors, 0)
        return grad_z, grad_temperature, None


def run(function, tensors, upstream, dtype):
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad((out * upstream.to(dtype)).sum(), leaves)


def error(actual, wanted):
    return ((actual.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("temperature", [1e-6, 1e-4, 0.001, 0.01, 0.1, 1.0, 1e6])
@pytest.mark.parametrize(("n", "d"), [(6, 5), (61, 17), (300, 33)])
def test_plain_paths_have_at_most_twice_the_error_of_plain_torch(n, d, temperature):
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, n, d)
    labels, tau = torch.arange(2 * n) % (n // 2), torch.tensor(temperature)
    upstream = torch.rand(2 * n) + 0.5
    for ours, plain, tensors in (
        (NTXent.apply, reference.nt_xent, (z1, z2, tau)),
        (
            lambda z, t: SupCon.apply(z, t, labels),
            lambda z, t: reference.sup_con(z, labels, t),
            (torch.cat((z1, z2)), tau),
        ),
    ):
        exact = run(plain, tensors, upstream, torch.float64)
        same_dtype = run(plain, tensors, upstream, torch.float32)
        actual = run(ours, tensors, upstream, torch.float32)
        for a, p, e in zip(actual, same_dtype, exact, strict=True):
            assert error(a, e) <= 2 * error(p, e) + 5e-7
