"""NT-Xent on the CPU against the float64 reference: values, gradients, dtypes, contract, errors."""

import contextlib
import itertools
import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from simclr_fast import NTXentLoss, nt_xent_loss, ops, reference
from simclr_fast.ops import nt_xent, nt_xent_plain

# One pair; fewer rows than any tile; odd rows and features; several blocks of either.
SHAPES = [(1, 1), (1, 7), (2, 3), (5, 16), (37, 20), (131, 129), (300, 64)]
SHAPE_IDS = [f"N{n}-D{d}" for n, d in SHAPES]
FLOATS = [torch.float64, torch.float32]
HALVES = [torch.float16, torch.bfloat16]


def views(n, d, dtype=torch.float64, noise=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z1 = torch.randn(n, d, generator=generator, dtype=torch.float64)
    z2 = noise * torch.randn(n, d, generator=generator, dtype=torch.float64) + (1 - noise) * z1
    return z1.to(dtype), z2.to(dtype)


def relative(actual, expected):
    """L2 error relative to the expected norm, in float64; infinite if anything is not finite."""
    difference = actual.double() - expected.double()
    if not difference.isfinite().all():
        return math.inf
    return difference.norm().item() / (expected.double().norm().item() or 1.0)


def gradients(function, z1, z2, temperature, dtype, weights=None):
    """Output and the gradients of its weighted sum to fresh leaves: z1, z2, temperature."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [z.detach().to(dtype).requires_grad_() for z in (z1, z2)]
    leaves.append(torch.tensor(temperature, dtype=wide, requires_grad=True))
    out = function(*leaves)
    weights = torch.ones_like(out) if weights is None else weights.to(out.dtype)
    return out.detach(), torch.autograd.grad((out * weights).sum(), leaves)


def our_rows(z1, z2, temperature):
    return nt_xent_loss(z1, z2, temperature, reduction="none")


@pytest.mark.parametrize(("n", "d"), SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("temperature", [0.05, 0.5, 100.0])
def test_float64_losses_and_gradients_equal_the_reference(n, d, temperature):
    z1, z2 = views(n, d)
    weights = torch.randn(2 * n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, grads = gradients(our_rows, z1, z2, temperature, torch.float64, weights)
    expected, exact = gradients(reference.nt_xent, z1, z2, temperature, torch.float64, weights)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    for actual, wanted in zip(grads, exact, strict=True):
        atol = 1e-13 * (1 + wanted.abs().max().item())
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=atol)


@pytest.mark.parametrize("temperature", [0.001, 0.005, 0.013, 0.03, 0.1, 0.5, 10.0, 100.0])
@pytest.mark.parametrize("noise", [1.0, 0.01, 2.0], ids=["unrelated", "aligned", "opposite"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_at_any_temperature(temperature, noise, dtype):
    z1, z2 = views(150, 48, torch.float32, noise)
    ours, grads = gradients(our_rows, z1, z2, temperature, dtype)
    expected, exact = gradients(reference.nt_xent, z1, z2, temperature, torch.float64)
    plain, plain_grads = gradients(reference.nt_xent, z1, z2, temperature, dtype)
    # A logit is up to 1/temperature, so its last bit moves exp() by eps/temperature.
    # In float64 the reference rounds as much as we do.
    ulps = 64 if dtype == torch.float64 else 4
    floor = ulps * torch.finfo(dtype).eps * (1 + 0.1 / temperature)
    assert relative(ours, expected) <= 2 * relative(plain, expected) + floor
    for actual, wanted, same_dtype in zip(grads, exact, plain_grads, strict=True):
        if wanted.norm() > 1e-30:  # below it float32 gradients are subnormal
            assert relative(actual, wanted) <= 2 * relative(same_dtype, wanted) + floor


@pytest.mark.parametrize(("temperature", "tolerance"), [(0.1, 1e-6), (0.01, 1e-5)])
@pytest.mark.parametrize("noise", [1.0, 0.1, 0.02], ids=["unrelated", "close", "aligned"])
def test_float32_gradient_accuracy(temperature, tolerance, noise):
    z1, z2 = views(512, 128, torch.float32, noise)
    _, ours = gradients(our_rows, z1, z2, temperature, torch.float32)
    _, exact = gradients(reference.nt_xent, z1, z2, temperature, torch.float64)
    assert relative(torch.cat(ours[:2]), torch.cat(exact[:2])) <= tolerance


@pytest.mark.parametrize("noise", [1.0, 0.05], ids=["unrelated", "aligned"])
@pytest.mark.parametrize("temperature", [0.005, 0.1, 2.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_decoupled_loss_equals_the_reference(dtype, temperature, noise):
    z1, z2 = views(67, 24, torch.float32, noise)
    weights = torch.randn(134, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def ours(*z):
        return nt_xent_loss(*z, reduction="none", decoupled=True)

    def exact(*z):
        return reference.nt_xent(*z, decoupled=True)

    loss, grads = gradients(ours, z1, z2, temperature, dtype, weights)
    expected, wanted = gradients(exact, z1, z2, temperature, torch.float64, weights)
    plain, plain_grads = gradients(exact, z1, z2, temperature, dtype, weights)
    ulps = 64 if dtype == torch.float64 else 4
    floor = ulps * torch.finfo(dtype).eps * (1 + 0.1 / temperature)
    assert relative(loss, expected) <= 2 * relative(plain, expected) + floor
    for actual, grad, same_dtype in zip(grads, wanted, plain_grads, strict=True):
        assert relative(actual, grad) <= 2 * relative(same_dtype, grad) + floor
    mean, stats = NTXentLoss(temperature, decoupled=True)(
        z1.to(dtype), z2.to(dtype), return_stats=True
    )
    assert abs(mean - loss.mean()) < 1e-5
    _, coupled = nt_xent_loss(z1.to(dtype), z2.to(dtype), temperature, return_stats=True)
    torch.testing.assert_close(tuple(stats), tuple(coupled), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_16_bit_inputs_lose_only_their_rounding(dtype):
    z1, z2 = views(100, 33, dtype)
    weights = torch.full((200,), 0.3)
    loss, grads = gradients(our_rows, z1, z2, 0.2, dtype, weights)
    expected, exact = gradients(reference.nt_xent, z1, z2, 0.2, torch.float64, weights)
    assert loss.dtype == torch.float32
    assert relative(loss, expected) < 1e-6
    for actual, wanted in zip(grads[:2], exact[:2], strict=True):
        assert actual.dtype == dtype
        # The only error is the rounding of the result.
        assert relative(actual, wanted) <= relative(wanted.to(dtype), wanted) * 1.01 + 1e-6


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_tensor_equals_two(reduction):
    z1, z2 = views(21, 9)
    z = torch.cat((z1, z2)).requires_grad_()
    one = nt_xent_loss(z, temperature=0.3, reduction=reduction)
    assert torch.equal(one, nt_xent_loss(z1, z2, 0.3, reduction=reduction))
    (grad,) = torch.autograd.grad(one.sum() * 2, z)
    exact = gradients(reference.nt_xent, z1, z2, 0.3, torch.float64)[1][:2]
    torch.testing.assert_close(grad, (2 / 42 if reduction == "mean" else 2) * torch.cat(exact))


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "offset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides_give_the_same_loss(layout, dtype):
    base = torch.randn(40, 60, generator=torch.Generator().manual_seed(0)).to(dtype)
    z1 = {
        "transposed": base.T[:30],
        "strided": base[:30, ::3],
        "expanded": base[:1, :20].expand(30, 20),
        "offset": base[3:33, 1:18],
    }[layout]
    z2 = torch.randn(z1.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = torch.autograd.grad(nt_xent_loss(z1.requires_grad_(), z2, 0.2), z1)[0]
    packed = z1.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    wanted = torch.autograd.grad(nt_xent_loss(packed, z2, 0.2), packed)[0]
    assert torch.equal(nt_xent_loss(z1, z2, 0.2), nt_xent_loss(packed, z2, 0.2))
    assert torch.equal(ours, wanted)


@pytest.mark.parametrize("dtype", FLOATS + HALVES, ids=str)
def test_zero_rows_behave_as_normalize(dtype):
    z1, z2 = views(6, 5, dtype)
    z1[2] = 0
    ours, grads = gradients(our_rows, z1, z2, 0.5, dtype)
    expected, exact = gradients(reference.nt_xent, z1, z2, 0.5, torch.float64)
    assert relative(ours, expected) < (1e-12 if dtype == torch.float64 else 1e-6)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 5e-3)
    kept = [0, 1, 3, 4, 5]
    assert relative(grads[0][kept], exact[0][kept]) < tolerance
    # About 1e12, which in float16 overflows to infinity, as normalize in float32 and a cast do.
    if dtype == torch.float16:
        assert torch.equal(grads[0][2], exact[0][2].half())
    else:
        assert relative(grads[0][2], exact[0][2]) < tolerance


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 0.002])
def test_nan_or_infinity_makes_the_loss_nan(bad, dtype, temperature):
    z1, z2 = views(40, 8, dtype)
    z2[17, 3] = bad
    loss, grads = gradients(our_rows, z1, z2, temperature, dtype)
    assert loss.isnan().all()
    assert grads[0].isnan().all()
    assert grads[1].isnan().all()


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e15, 1e30])
def test_embeddings_of_any_length_equal_the_reference(scale):
    z1, z2 = (scale * z for z in views(20, 8, torch.float32))
    # Below the eps of normalize, 1e-12, the rows shrink and every similarity goes to 0.
    expected = reference.nt_xent(z1.double(), z2.double()).mean()
    assert abs(nt_xent_loss(z1, z2) - expected) < 1e-6


def test_a_single_pair_has_loss_0():
    z1, z2 = (z.requires_grad_() for z in views(1, 4, torch.float32))
    loss, stats = nt_xent_loss(z1, z2, 0.1, return_stats=True)
    loss.backward()
    assert loss == 0
    assert not z1.grad.any()
    assert not z2.grad.any()
    assert stats.contrastive_accuracy == stats.accuracy == 1
    assert stats.entropy == 0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dim", [4, 33])
def test_a_single_pair_has_no_negative_similarity(dim, dtype):
    """Also where rounding leaves something of the negatives' sum."""
    for seed in range(20):
        torch.manual_seed(seed)
        z1, z2 = torch.randn(2, 1, dim).to(dtype)
        _, stats = nt_xent_loss(z1, z2, 0.1, return_stats=True)
        assert stats.negative_similarity.isnan()
        assert stats.positive_similarity.isfinite()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("n", "noise"), [(3, 0.5), (40, 0.5), (190, 0.8), (190, 1.0)])
@pytest.mark.parametrize("temperature", [0.3, 0.005])
def test_statistics_equal_the_reference(dtype, n, noise, temperature):
    z1, z2 = views(n, 24, dtype, noise)
    loss, stats = nt_xent_loss(z1, z2, temperature, return_stats=True)
    u1, u2 = (torch.nn.functional.normalize(z.double(), dim=1) for z in (z1, z2))
    u = torch.cat((u1, u2))
    cosine = u @ u.T
    contrastive = u1 @ u2.T / temperature
    every = (cosine / temperature).fill_diagonal_(-math.inf)

    def entropy(logits):
        p = logits.softmax(1)
        return -(p * p.clamp_min(1e-300).log()).sum(1).mean()

    positive = (u1 * u2).sum(1).mean()
    expected = [
        (contrastive.argmax(1) == torch.arange(n)).double().mean(),
        entropy(contrastive),
        (every.argmax(1) == torch.arange(2 * n).roll(n)).double().mean(),
        entropy(every),
        positive,
        (cosine.sum() - 2 * n - 2 * n * positive) / (2 * n * (2 * n - 2)),
    ]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6 + 1e-7 / temperature
    for name, actual, wanted in zip(stats._fields, stats, expected, strict=True):
        assert abs(actual - wanted) < tolerance, name
        assert actual.dtype == dtype
        assert not actual.requires_grad
    torch.testing.assert_close(loss, nt_xent_loss(z1, z2, temperature))


def test_autocast_keeps_float32():
    z1, z2 = views(30, 16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nt_xent_loss(z1, z2, 0.2)
        half = nt_xent_loss(z1.bfloat16(), z2.bfloat16(), 0.2)
    assert torch.equal(loss, nt_xent_loss(z1, z2, 0.2))
    assert half.dtype == torch.float32


def test_temperature_tensor_equals_number():
    z1, z2 = views(30, 16, torch.float32)
    for dtype in FLOATS:
        temperature = torch.tensor(0.2, dtype=dtype)
        assert torch.equal(nt_xent_loss(z1, z2, temperature), nt_xent_loss(z1, z2, 0.2))


def test_only_inputs_that_require_it_get_a_gradient():
    z1, z2 = views(12, 5)
    z2.requires_grad_()
    nt_xent_loss(z1, z2, torch.tensor(0.4)).backward()
    assert z1.grad is None
    assert z2.grad is not None
    with torch.no_grad():
        assert nt_xent_loss(z1, z2).grad_fn is None


def test_gradcheck_passes():
    z1, z2 = (z.requires_grad_() for z in views(4, 3))
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: nt_xent_loss(*x).mul(3), (z1, z2, temperature))


def test_double_backward_is_refused():
    z1, z2 = views(4, 3)
    z1.requires_grad_()
    (grad,) = torch.autograd.grad(nt_xent_loss(z1, z2), z1, create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("two", [True, False])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16], ids=str)
def test_opcheck_passes(two, dtype):
    z1, z2 = views(6, 5, dtype)
    z2 = z2 if two else None
    temperature = torch.tensor(0.5, dtype=torch.promote_types(dtype, torch.float32))
    u, inv_norm = ops.nt_xent.normalize(z1, z2, temperature)
    rows = u, temperature, 2, 4, False, True
    loss, _, _ = ops.nt_xent.row_loss(*rows)
    lse = torch.ones_like(u[:, 0], dtype=torch.float64)
    grad = torch.ones((), dtype=u.dtype)
    torch.library.opcheck(ops.nt_xent.normalize, (z1, z2, temperature))
    torch.library.opcheck(ops.nt_xent.row_loss, rows)
    local = (z1[1:3], z2[1:3]) if two else (z1[1:5], None)
    backward = grad, True, u, lse, loss, inv_norm[2:6], *local, temperature, 2, False
    torch.library.opcheck(ops.nt_xent.backward, backward)
    leaves = [None if z is None else z.requires_grad_() for z in (z1, z2, temperature)]
    for reduction in (ops.nt_xent.NONE, ops.nt_xent.MEAN):
        torch.library.opcheck(ops.nt_xent.loss, (*leaves, reduction, False, True))
    # What is kept has gaps, so its values are not compared.
    metadata = ("test_schema", "test_faketensor")
    keep = (*leaves, ops.nt_xent.MEAN, False, True, True)
    torch.library.opcheck(ops.nt_xent.loss, keep, test_utils=metadata)


def test_compiles_to_one_graph():
    def step(z1, z2, temperature):
        loss, stats = nt_xent_loss(z1, z2, temperature, return_stats=True)
        return loss * 2, stats.contrastive_accuracy

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (6, 11):
        results = []
        for function in (step, compiled):
            leaves = [z.requires_grad_() for z in views(n, 5, torch.float32)]
            leaves.append(torch.tensor(0.3, requires_grad=True))
            loss, _ = function(*leaves)
            results.append((loss, *torch.autograd.grad(loss, leaves)))
        for eager, graph in zip(*results, strict=True):
            assert torch.equal(eager, graph)


def test_the_module_equals_the_function():
    z1, z2 = views(9, 4, torch.float32)
    assert torch.equal(NTXentLoss(0.1)(z1, z2), nt_xent_loss(z1, z2, 0.1))
    loss = NTXentLoss(0.1, learnable=True, reduction="sum")
    value, stats = loss(torch.cat((z1, z2)), return_stats=True)
    value.backward()
    torch.testing.assert_close(value, nt_xent_loss(z1, z2, 0.1, reduction="sum"))
    _, exact = gradients(reference.nt_xent, z1, z2, 0.1, torch.float64)
    assert abs(loss.log_temperature.grad - 0.1 * exact[2]) < 1e-4
    assert [name for name, _ in loss.named_parameters()] == ["log_temperature"]
    assert 0 <= stats.accuracy <= 1
    assert "temperature=0.1," in repr(loss)
    with torch.no_grad():
        loss.log_temperature.fill_(math.log(0.25))
    assert "temperature=0.25," in repr(loss)
    with torch.device("meta"):
        assert "temperature=0.1," in repr(NTXentLoss(0.1, learnable=True))


Z = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Z[0], Z[0]), ValueError, r"z1 must have shape .* got \[3\]"),
        ((Z[:0], Z[:0]), ValueError, r"z1 must have shape .* got \[0, 3\]"),
        ((Z[:, :0], Z[:, :0]), ValueError, r"z1 must have shape .* got \[4, 0\]"),
        ((Z, Z[:2]), ValueError, r"same shape, got .*4, 3.* and .*2, 3"),
        ((Z, Z.double()), ValueError, r"same dtype, got torch.float32 and torch.float64"),
        ((Z, Z.to("meta")), ValueError, r"same device, got cpu and meta"),
        ((Z.int(), Z.int()), TypeError, r"z1 must be float16.* got torch.int32"),
        ((Z, [1.0]), TypeError, r"z2 must be a tensor, got list"),
        ((Z[:3],), ValueError, r"even number of rows, got \[3, 3\]"),
        ((Z, Z, 0.0), ValueError, r"temperature must be a positive finite number, got 0.0"),
        ((Z, Z, -1), ValueError, r"got -1"),
        ((Z, Z, math.nan), ValueError, r"got nan"),
        ((Z, Z, math.inf), ValueError, r"got inf"),
        ((Z, Z, torch.tensor(-2.0)), ValueError, r"got -2"),
        ((Z, Z, torch.ones(1)), ValueError, r"must be 0-dim .* got shape \[1\]"),
        ((Z, Z, torch.tensor(1)), ValueError, r"floating dtype, .* torch.int64"),
        ((Z, Z, "0.5"), ValueError, r"got '0.5'"),
        ((Z, Z, 1e-40), ValueError, r"temperature must be from 1e-06 to 1e\+06, got 1e-40"),
        ((Z, Z, 2e6), ValueError, r"from 1e-06 to 1e\+06, got 2000000"),
        ((Z, Z, np.float32(-1)), ValueError, r"positive finite number, got .*-1.0"),
        ((Z, Z, torch.tensor(1e-40, dtype=torch.float64)), ValueError, r"got 1e-40"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        nt_xent_loss(*arguments)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int64, int])
def test_temperatures_may_be_numpy_numbers(kind):
    z1, z2 = views(4, 3, torch.float32)
    for temperature in (kind(2), np.asarray(kind(2))[()]):
        assert torch.equal(nt_xent_loss(z1, z2, temperature), nt_xent_loss(z1, z2, 2.0))
        assert torch.equal(NTXentLoss(temperature)(z1, z2), nt_xent_loss(z1, z2, 2.0))


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_the_smallest_and_largest_temperature_equal_the_reference(temperature):
    z1, z2 = views(60, 16, torch.float32)
    ours, grads = gradients(our_rows, z1, z2, temperature, torch.float32)
    expected, exact = gradients(reference.nt_xent, z1, z2, temperature, torch.float64)
    assert relative(ours, expected) < 1e-6
    for actual, wanted in zip(grads, exact, strict=True):
        assert relative(actual, wanted) < 1e-6


def meta_device():
    return torch.device("meta")


def fake_tensors():
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.mark.parametrize("mode", [meta_device, fake_tensors, torch.inference_mode])
def test_a_temperature_does_not_remember_where_it_was_first_used(mode):
    z1, z2 = views(4, 3, torch.float32)
    temperature = {meta_device: 0.3125, fake_tensors: 0.3126}.get(mode, 0.3127)
    with mode():
        try:
            nt_xent_loss(z1, z2, temperature)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            print("refused there:", error)
    expected = nt_xent_loss(z1, z2, torch.tensor(temperature))
    loss = nt_xent_loss(z1.requires_grad_(), z2, temperature)
    loss.backward()
    assert type(loss) is torch.Tensor
    assert torch.equal(loss, expected)


def test_a_temperature_does_not_remember_a_transform():
    z1, z2 = views(4, 3, torch.float32)
    with contextlib.suppress(RuntimeError):  # no support for torch.func
        torch.func.grad(lambda z: nt_xent_loss(z, z2, 0.3128))(z1)
    assert torch.equal(nt_xent_loss(z1, z2, 0.3128), nt_xent_loss(z1, z2, torch.tensor(0.3128)))


def test_a_single_pair_has_outputs_of_their_own():
    """For one pair the two orders of rows are the same, but outputs must not share memory."""
    z1, z2, temperature = *views(1, 3), torch.ones((), dtype=torch.float64)
    for reduction in (nt_xent.NONE, nt_xent.MEAN, nt_xent.SUM):
        out = nt_xent._loss(z1, z2, temperature, reduction, False, True)
        memory = [tensor.untyped_storage().data_ptr() for tensor in out if tensor.numel()]
        assert len(set(memory)) == len(memory)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_ops_accept_no_rows(plain, dtype):
    """As a rank without rows calls them."""
    z, wide = torch.empty(0, 3, dtype=dtype), torch.promote_types(dtype, torch.float32)
    temperature, u_all = torch.tensor(0.5, dtype=wide), torch.randn(4, 3, dtype=wide)
    normalize = nt_xent._normalize if plain else nt_xent.normalize
    row_loss = nt_xent._row_loss if plain else nt_xent.row_loss
    backward = nt_xent._backward if plain else nt_xent.backward
    u, inv_norm = normalize(z, z, temperature)
    assert (u.shape, inv_norm.shape) == ((0, 3), (0,))
    loss, lse, stats = row_loss(u_all, temperature, 4, 0, False, True)
    assert (loss.shape, lse.shape, stats.shape) == ((0,), (0,), (0, 4))
    lse_all = torch.ones(4, dtype=torch.float64)
    grad = torch.ones((), dtype=wide)
    grad_z, grad_temperature = backward(
        grad, True, u_all, lse_all, loss, inv_norm, z, z, temperature, 4, False
    )
    assert (grad_z.shape, grad_z.dtype) == ((0, 3), dtype)
    assert grad_temperature == 0


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match=r"reduction must be .* got 'avg'"):
        nt_xent_loss(Z, Z, reduction="avg")
    with pytest.raises(ValueError, match="at least two pairs"):
        nt_xent_loss(Z[:2], decoupled=True)
    with pytest.raises(ValueError, match="temperature must be a positive finite number, got 0"):
        NTXentLoss(0)
    with pytest.raises(ValueError, match="gather_distributed must be True, got False"):
        NTXentLoss(group=object())
    with pytest.raises(RuntimeError, match="init_process_group"):
        NTXentLoss(gather_distributed=True)(Z, Z)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.001, 0.1])
def test_a_tie_for_the_first_place_counts_as_wrong(dtype, temperature):
    """A collapsed encoder: all rows equal. Its accuracy must not be 1."""
    for pairs, dim in itertools.product((2, 3, 40), (1, 2, 7, 16, 33, 100, 128)):
        row = torch.randn(1, dim, generator=torch.Generator().manual_seed(dim)).to(dtype)
        z = row.repeat(2 * pairs, 1)
        _, stats = nt_xent_loss(z, None, temperature, return_stats=True)
        assert (stats.contrastive_accuracy, stats.accuracy) == (0, 0), (pairs, dim)
        tau = torch.tensor(temperature, dtype=nt_xent_plain.statistics_dtype(dtype))
        u, _ = nt_xent_plain.normalize(z, None, tau)
        *_, rows = nt_xent_plain.forward(u, tau, 0, len(u), False, True)
        assert not rows[:, [0, 2]].any(), (pairs, dim)
