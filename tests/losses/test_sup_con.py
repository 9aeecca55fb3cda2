"""Supervised and multi-view contrastive losses against the float64 reference."""

import math

import pytest
import torch

from simclr_fast import multi_view_nt_xent_loss, nt_xent_loss, ops, reference, sup_con_loss
from simclr_fast.losses.sup_con import _classes
from simclr_fast.ops import sup_con_plain as plain

FLOATS = [torch.float64, torch.float32]


def batch(rows, dim, classes, dtype=torch.float64, noise=1.0):
    """Rows around a center per class; the last row is alone in its class."""
    generator = torch.Generator().manual_seed(rows)
    labels = torch.randint(classes, (rows,), generator=generator)
    centers = torch.randn(classes, dim, generator=generator, dtype=torch.float64)
    z = centers[labels] + noise * torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    labels[-1] = classes
    return z.to(dtype), 7 * labels - 20


def relative(actual, expected):
    difference = actual.double() - expected.double()
    if not difference.isfinite().all():
        return math.inf
    return difference.norm().item() / (expected.double().norm().item() or 1.0)


def gradients(function, z, labels, temperature, dtype, weights=None):
    """Rows, and the gradients of their weighted sum to z and temperature."""
    z = z.detach().to(dtype).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    tau = torch.tensor(temperature, dtype=wide, requires_grad=True)
    rows = function(z, labels, tau)
    weights = torch.ones_like(rows) if weights is None else weights.to(rows.dtype)
    return rows.detach(), *torch.autograd.grad((rows * weights).sum(), (z, tau))


def ours(z, labels, temperature):
    return sup_con_loss(z, labels, temperature, reduction="none")


@pytest.mark.parametrize(
    ("rows", "dim", "classes"),
    [(1, 3, 1), (2, 1, 1), (3, 8, 1), (37, 20, 5), (131, 33, 3), (400, 64, 150), (401, 40, 2)],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.005, 0.1, 10.0])
def test_float64_losses_and_gradients_equal_the_reference(rows, dim, classes, temperature):
    z, labels = batch(rows, dim, classes)
    weights = torch.randn(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = gradients(ours, z, labels, temperature, torch.float64, weights)
    exact = gradients(reference.sup_con, z, labels, temperature, torch.float64, weights)
    for actual, wanted in zip(results, exact, strict=True):
        atol = 1e-13 * (1 + wanted.abs().max().item()) / min(1, temperature)
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=atol)


@pytest.mark.parametrize("noise", [1.0, 0.02], ids=["spread", "aligned"])
@pytest.mark.parametrize("temperature", [0.005, 0.05, 0.5])
@pytest.mark.parametrize("classes", [3, 60])
def test_float32_is_no_worse_than_plain_torch(classes, temperature, noise):
    z, labels = batch(211, 48, classes, torch.float32, noise)
    results = gradients(ours, z, labels, temperature, torch.float32)
    exact = gradients(reference.sup_con, z, labels, temperature, torch.float64)
    textbook = gradients(reference.sup_con, z, labels, temperature, torch.float32)
    # The last bit of a logit, which is up to 1 / temperature, moves exp() by that much.
    floor = 4 * torch.finfo(torch.float32).eps * (1 + 0.1 / temperature)
    for actual, wanted, same_dtype in zip(results, exact, textbook, strict=True):
        assert relative(actual, wanted) <= 2 * relative(same_dtype, wanted) + floor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_inputs_lose_only_their_rounding(dtype):
    z, labels = batch(90, 24, 7, dtype)
    rows, grad, _ = gradients(ours, z, labels, 0.2, dtype, torch.full((90,), 0.3))
    expected, exact, _ = gradients(
        reference.sup_con, z, labels, 0.2, torch.float64, torch.full((90,), 0.3)
    )
    assert rows.dtype == torch.float32
    assert grad.dtype == dtype
    assert relative(rows, expected) < 1e-6
    assert relative(grad, exact) <= 1.01 * relative(exact.to(dtype), exact) + 1e-6


def test_two_views_are_nt_xent():
    z1, z2 = torch.randn(2, 31, 12, dtype=torch.float64)
    labels = torch.arange(31).repeat(2)
    wanted = nt_xent_loss(z1, z2, 0.2)
    torch.testing.assert_close(sup_con_loss(torch.cat((z1, z2)), labels, 0.2), wanted)
    assert torch.equal(multi_view_nt_xent_loss([z1, z2], temperature=0.2), wanted)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_many_views_equal_the_reference(reduction):
    views = torch.randn(4, 9, 6, dtype=torch.float64).requires_grad_()
    loss = multi_view_nt_xent_loss(list(views), temperature=0.3, reduction=reduction)
    stacked = multi_view_nt_xent_loss(views.flatten(0, 1), 4, 0.3, reduction=reduction)
    assert torch.equal(loss, stacked)
    rows = reference.sup_con(views.flatten(0, 1), torch.arange(9).repeat(4), 0.3)
    wanted = rows if reduction == "none" else getattr(rows, reduction)()
    torch.testing.assert_close(loss, wanted)
    (grad,) = torch.autograd.grad(2 * loss.sum(), views)
    torch.testing.assert_close(grad, torch.autograd.grad(2 * wanted.sum(), views)[0])


def test_rows_without_positives_count_zero():
    z = torch.randn(8, 5, requires_grad=True)
    loss = sup_con_loss(z, torch.arange(8))
    loss.backward()
    assert loss == 0
    assert not z.grad.any()


def test_a_zero_row_is_finite_and_nan_stays_nan():
    z, labels = batch(20, 6, 3, torch.float32)
    z[4] = 0
    rows, grad, _ = gradients(ours, z, labels, 0.3, torch.float32)
    expected, exact, _ = gradients(reference.sup_con, z, labels, 0.3, torch.float64)
    kept = torch.arange(20) != 4
    assert relative(rows, expected) < 1e-6
    assert relative(grad[kept], exact[kept]) < 1e-5
    assert relative(grad[4], exact[4]) < 1e-5
    z[5, 0] = math.nan
    assert sup_con_loss(z, labels).isnan()


@pytest.mark.skipif(not ops.has_extension(), reason="no native extension")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("temperature", [0.2, 0.006])
@pytest.mark.parametrize(
    ("offset", "rows", "total"), [(0, 201, 201), (7, 50, 601), (300, 301, 601)]
)
def test_native_and_plain_ops_agree(dtype, temperature, offset, rows, total):
    z, labels = batch(total, 19, 4, dtype)
    tau = torch.tensor(temperature, dtype=dtype)
    close = (
        {"rtol": 1e-10, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    )
    u, inv_norm = ops.sup_con.normalize(z, tau)
    torch.testing.assert_close((u, inv_norm), plain.normalize(z, tau))
    classes = _classes(labels, dtype)
    native = ops.sup_con.row_loss(u, *classes, tau, offset, rows)
    torch.testing.assert_close(native, plain.forward(u, *classes, tau, offset, rows), **close)
    _, lse = plain.forward(u, *classes, tau, 0, total)
    own = slice(offset, offset + rows)
    arguments = torch.rand(total, dtype=dtype), u, lse, *classes, inv_norm[own], z[own], tau, offset
    native, wanted = ops.sup_con.backward(*arguments), plain.backward(*arguments)
    assert relative(native[0], wanted[0]) < close["rtol"]
    assert relative(native[1], wanted[1]) < close["rtol"]


@pytest.mark.skipif(not ops.has_extension(), reason="no native extension")
def test_same_bits_for_any_number_of_threads():
    z, labels = batch(501, 40, 6, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(gradients(ours, z, labels, 0.1, torch.float32))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_opcheck_passes_and_it_compiles_to_one_graph():
    z, labels = batch(7, 5, 2, torch.float32)
    tau = torch.tensor(0.5)
    torch.library.opcheck(ops.sup_con.normalize, (z, tau))
    u, inv_norm = ops.sup_con.normalize(z, tau)
    classes = _classes(labels, torch.float32)
    torch.library.opcheck(ops.sup_con.row_loss, (u, *classes, tau, 1, 4))
    _, lse = ops.sup_con.row_loss(u, *classes, tau, 0, 7)
    backward = torch.rand(7), u, lse, *classes, inv_norm, z, tau, 0
    torch.library.opcheck(ops.sup_con.backward, backward)

    def step(z, labels):
        return sup_con_loss(z, labels, 0.2) * 2

    z.requires_grad_()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    wanted, loss = step(z, labels), compiled(z, labels)
    assert torch.equal(loss, wanted)
    assert torch.equal(*(torch.autograd.grad(x, z)[0] for x in (loss, wanted)))


def test_double_backward_is_refused():
    z = torch.randn(6, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(sup_con_loss(z, torch.arange(6) // 2), z, create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        grad.sum().backward()


Z, Y = torch.ones(6, 3), torch.arange(6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sup_con_loss(Z, [0] * 6), TypeError, "labels must be a tensor, got list"),
        (lambda: sup_con_loss(Z, Y[:5]), ValueError, r"per row of z \[6, 3\], got shape \[5\]"),
        (lambda: sup_con_loss(Z, Y[:, None]), ValueError, r"got shape \[6, 1\]"),
        (lambda: sup_con_loss(Z, Y.float()), TypeError, "integers, got torch.float32"),
        (lambda: sup_con_loss(Z, Y.to("meta")), ValueError, "z's device, cpu, got meta"),
        (lambda: sup_con_loss(Z[0], Y), ValueError, r"z must have shape .* got \[3\]"),
        (lambda: sup_con_loss(Z, Y, 0.0), ValueError, "positive finite number, got 0.0"),
        (lambda: sup_con_loss(Z, Y, reduction="avg"), ValueError, "reduction must be"),
        (lambda: multi_view_nt_xent_loss(Z), ValueError, "n_views must be .* got None"),
        (lambda: multi_view_nt_xent_loss(Z, 4), ValueError, "n_views=4 views, got 6 rows"),
        (lambda: multi_view_nt_xent_loss([Z]), ValueError, "at least two views, got 1"),
        (lambda: multi_view_nt_xent_loss([Z, Z], 3), ValueError, "n_views is 3, but views has 2"),
        (lambda: multi_view_nt_xent_loss([Z, Z[:2]]), ValueError, "views must have one shape"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
