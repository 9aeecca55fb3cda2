"""The loss against a queue of keys, and the queue, against the float64 reference."""

import math

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simclr_fast import ops, reference
from simclr_fast.losses import KeyQueue, queue_loss
from simclr_fast.ops import queue as module


def case(rows, size, dim, dtype=torch.float64, noise=1.0):
    """Rows, their keys at a distance of `noise`, and a queue of unit vectors."""
    generator = torch.Generator().manual_seed(rows + size)
    z, away = torch.randn(2, rows, dim, dtype=torch.float64, generator=generator)
    others = torch.randn(size, dim, dtype=torch.float64, generator=generator)
    return z.to(dtype), (z + noise * away).to(dtype), normalize(others).to(dtype)


def gradients(function, z, keys, others, temperature, weights):
    """Rows, and the gradients of their weighted sum to z and temperature."""
    z = z.detach().requires_grad_()
    wide = torch.promote_types(z.dtype, torch.float32)
    tau = torch.tensor(temperature, dtype=wide, requires_grad=True)
    rows = function(z, keys, others, tau)
    grads = torch.autograd.grad((rows * weights.to(rows.dtype)).sum(), (z, tau))
    return rows.detach(), *grads


def ours(z, keys, others, temperature):
    return queue_loss(z, keys, others, temperature, reduction="none")


def relative(actual, expected):
    difference = actual.double() - expected.double()
    if not difference.isfinite().all():
        return math.inf
    return difference.norm().item() / (expected.double().norm().item() or 1.0)


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    if request.param == "many tiles":
        monkeypatch.setattr(module, "BLOCK_ROWS", 7)
        monkeypatch.setattr(module, "_TILE_KEYS", 10)


@pytest.mark.parametrize(("rows", "size", "dim"), [(1, 1, 3), (9, 31, 8), (37, 20, 5)], ids=str)
@pytest.mark.parametrize("temperature", [0.005, 0.2, 10.0])
def test_float64_losses_and_gradients_equal_the_reference(rows, size, dim, temperature, tiles):
    given = case(rows, size, dim)
    weights = torch.randn(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = gradients(ours, *given, temperature, weights)
    exact = gradients(reference.queue, *given, temperature, weights)
    for actual, wanted in zip(found, exact, strict=True):
        atol = 1e-13 * (1 + wanted.abs().max().item()) / min(1, temperature)
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=atol)


@pytest.mark.parametrize("noise", [1.0, 0.02], ids=["spread", "aligned"])
@pytest.mark.parametrize("temperature", [0.005, 0.05, 0.5])
def test_float32_is_no_worse_than_plain_torch(temperature, noise):
    given = case(83, 517, 48, torch.float32, noise)
    weights = torch.linspace(-1, 2, 83)
    wide = [x.double() for x in given]
    exact = gradients(reference.queue, *wide, temperature, weights.double())
    same_dtype = gradients(reference.queue, *given, temperature, weights)
    floor = 4 * torch.finfo(torch.float32).eps * (1 + 0.1 / temperature)
    for actual, wanted, textbook in zip(
        gradients(ours, *given, temperature, weights), exact, same_dtype, strict=True
    ):
        assert relative(actual, wanted) <= 2 * relative(textbook, wanted) + floor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_inputs_lose_only_their_rounding(dtype):
    z, keys, _ = case(30, 90, 24, dtype)
    others = case(30, 90, 24, torch.float32)[2]
    weights = torch.full((30,), 0.3)
    rows, grad, _ = gradients(ours, z, keys, others, 0.2, weights)
    wide = z.double(), keys.double(), others.double()
    expected, exact, _ = gradients(reference.queue, *wide, 0.2, weights)
    assert (rows.dtype, grad.dtype) == (torch.float32, dtype)
    assert relative(rows, expected) < 1e-6
    assert relative(grad, exact) <= 1.01 * relative(exact.to(dtype), exact) + 1e-6


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(reduction):
    z, keys, others = case(6, 9, 4)
    z.requires_grad_()
    loss = queue_loss(z, keys, others, 0.3, reduction=reduction)
    wanted = getattr(reference.queue(z, keys, others, 0.3), reduction)()
    torch.testing.assert_close(loss, wanted)
    (grad,) = torch.autograd.grad(2 * loss, z)
    torch.testing.assert_close(grad, torch.autograd.grad(2 * wanted, z)[0])


def test_the_textbook_form_gives_the_same():
    """MoCo's: cross-entropy of [positive, negatives] with the class 0."""
    z, keys, others = case(6, 9, 4)
    u, k = normalize(z), normalize(keys)
    logits = torch.cat([(u * k).sum(1, keepdim=True), u @ others.T], 1) / 0.2
    wanted = torch.nn.functional.cross_entropy(logits, torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(queue_loss(z, keys, others), wanted)


def test_equal_similarities_give_the_chance_level():
    one = torch.ones(4, 3, dtype=torch.float64)
    loss = queue_loss(one, one, normalize(torch.ones(7, 3, dtype=torch.float64)))
    assert loss.item() == pytest.approx(math.log(8))


def test_a_zero_row_is_finite_and_nan_stays_nan():
    z, keys, others = case(8, 12, 6, torch.float32)
    z[4] = 0
    weights = torch.ones(8)
    rows, grad, _ = gradients(ours, z, keys, others, 0.3, weights)
    wide = z.double(), keys.double(), others.double()
    expected, exact, _ = gradients(reference.queue, *wide, 0.3, weights)
    assert relative(rows, expected) < 1e-6
    for own in (torch.arange(8) != 4, torch.arange(8) == 4):
        assert relative(grad[own], exact[own]) < 1e-5
    z[5, 0] = math.nan
    assert queue_loss(z, keys, others).isnan()


class Largest(TorchDispatchMode):
    """The most numbers in one tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


def test_the_logits_exist_one_tile_at_a_time(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ROWS", 16)
    monkeypatch.setattr(module, "_TILE_KEYS", 32)
    z, keys, others = case(64, 320, 4, torch.float32)
    tau = torch.tensor(0.2)
    with Largest() as largest:
        # The kernels themselves: a mode sees an op as one operation.
        row_loss, lse = module._row_loss(z, keys, others, tau)
        module._backward(torch.ones(64), z, keys, others, tau, row_loss, lse)
    assert largest.numel == 16 * 32


def test_opcheck_passes_and_it_compiles_to_one_graph():
    z, keys, others = case(7, 5, 4, torch.float32)
    tau = torch.tensor(0.5)
    torch.library.opcheck(ops.queue.row_loss, (z, keys, others, tau))
    found = ops.queue.row_loss(z, keys, others, tau)
    torch.library.opcheck(ops.queue.backward, (torch.rand(7), z, keys, others, tau, *found))

    def step(z):
        return queue_loss(z, keys, others, 0.2) * 2

    z.requires_grad_()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    wanted, loss = step(z), compiled(z)
    assert torch.equal(loss, wanted)
    assert torch.equal(*(torch.autograd.grad(x, z)[0] for x in (loss, wanted)))


def test_the_queue_holds_the_newest_keys():
    torch.manual_seed(3)
    queue = KeyQueue(7, 4)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(7))
    expected = list(queue.keys.clone())
    for count in (3, 3, 0, 3, 7, 9):
        keys = torch.randn(count, 4)
        queue.push(keys)
        expected = [*expected, *normalize(keys)][-7:]
        assert torch.equal(torch.stack(expected), queue.keys.roll(-queue.oldest, 0))
    torch.manual_seed(4)
    copy = KeyQueue(7, 4)
    copy.load_state_dict(queue.state_dict())
    more = torch.randn(2, 4)
    for each in (queue, copy):
        each.push(more)
    assert torch.equal(queue.keys, copy.keys)


def test_a_push_before_the_backward_is_an_error():
    queue = KeyQueue(7, 4)
    z, keys = torch.randn(2, 3, 4)
    loss = queue_loss(z.requires_grad_(), keys, queue)
    queue.push(keys)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


Z = torch.ones(6, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: queue_loss(Z, Z[:5], Z), ValueError, r"z's shape \[6, 3\], got \[5, 3\]"),
        (lambda: queue_loss(Z, Z, Z[:, :2]), ValueError, r"\[K, 3\] as z, got \[6, 2\]"),
        (lambda: queue_loss(Z, Z, Z[:0]), ValueError, r"queue must have shape .* got \[0, 3\]"),
        (lambda: queue_loss(Z[:0], Z[:0], Z), ValueError, r"z must have shape .* got \[0, 3\]"),
        (lambda: queue_loss(Z, Z.to("meta"), Z), ValueError, "keys must be on z's device, cpu"),
        (lambda: queue_loss(Z, Z.clone().requires_grad_(), Z), ValueError, "keys gets no gradient"),
        (lambda: queue_loss(Z, Z, Z, 0.0), ValueError, "positive finite number, got 0.0"),
        (lambda: queue_loss(Z, Z, Z, reduction="avg"), ValueError, "reduction must be"),
        (lambda: queue_loss(Z, Z, [Z]), TypeError, "queue must be a tensor, got list"),
        (lambda: KeyQueue(0, 3), ValueError, "size must be at least 1, got 0"),
        (lambda: KeyQueue(4, 3).push(Z[:, :2]), ValueError, r"\[n, 3\], got \[6, 2\]"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
