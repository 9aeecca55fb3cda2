"""The native CPU kernels: instruction sets, threads, memory, and agreement with plain torch."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from instruction_sets import under_isa

from simclr_fast import nt_xent_loss, ops, reference
from simclr_fast.ops import nt_xent, nt_xent_plain

needs_extension = pytest.mark.skipif(not ops.has_extension(), reason="no native extension")


def error(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


def equals_the_reference():
    """For one process and for some of its rows."""
    torch.manual_seed(0)
    for n, d in ((3, 5), (70, 33), (260, 40), (260, 150)):
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
            for tau in (0.1, 0.005):
                z = [torch.randn(n, d, dtype=dtype).requires_grad_() for _ in range(2)]
                exact = [t.detach().double().requires_grad_() for t in z]
                loss, stats = nt_xent_loss(*z, tau, return_stats=True)
                wanted = reference.nt_xent(*exact, tau).mean()
                pairs = [(loss.detach(), wanted.detach())]
                grads = torch.autograd.grad(loss, z), torch.autograd.grad(wanted, exact)
                pairs += zip(*grads, strict=True)
                for actual, expected in pairs:
                    assert error(actual, expected) < tolerance / min(1, 10 * tau), (n, dtype, tau)
                assert 0 <= stats.accuracy <= 1


def bfloat16_is_close():
    """The error is at most twice that of the textbook's formula in bfloat16, and little more than
    that of rounding the result."""
    torch.manual_seed(0)
    for n, d in ((3, 5), (70, 33), (260, 40), (260, 150)):
        for tau in (0.1, 0.005):
            for noise, length in ((1, 1), (0.05, 1e-4)):
                z1 = torch.randn(n, d) + 3 * (noise < 1) * torch.randn(d)
                z2 = z1 + noise * torch.randn(n, d)
                z = [(length * t).bfloat16().requires_grad_() for t in (z1, z2)]
                exact = [t.detach().double().requires_grad_() for t in z]
                grad = torch.rand(2 * n)
                out, stats = nt_xent_loss(*z, tau, reduction="none", return_stats=True)
                wanted = reference.nt_xent(*exact, tau)
                u = torch.nn.functional.normalize(torch.cat(z), dim=1)
                s = (u @ u.T / tau).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
                other = (torch.arange(2 * n) + n) % (2 * n)
                textbook = torch.nn.functional.cross_entropy(s, other, reduction="none")
                case = (n, d, tau, noise)
                assert out.dtype == torch.float32
                assert error(out, wanted) <= max(2 * error(textbook, wanted), 1e-6), case
                expected = torch.autograd.grad((wanted * grad).sum(), exact)
                actual = torch.autograd.grad((out * grad).sum(), z)
                plain = torch.autograd.grad((textbook * grad).sum(), z)
                for a, b, p in zip(actual, expected, plain, strict=True):
                    assert a.dtype == torch.bfloat16
                    assert error(a, b) <= 2 * error(p, b), case
                    assert error(a, b) <= 4e-3, case
                assert 0 <= stats.accuracy <= 1
    z = torch.randn(40, 20).bfloat16().requires_grad_()
    z.data[3, 4] = torch.inf
    assert nt_xent_loss(z, z, 0.1, reduction="none").isnan().all()
    _, stats = nt_xent_loss(torch.ones(6, 20).bfloat16(), None, 0.1, return_stats=True)
    assert stats.accuracy == 0, "equal rows must tie"


# Peak memory of a step beyond what was resident before it, in MB.
MEMORY = """
import re, torch
from simclr_fast import nt_xent_loss

def resident(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1e3

def step(n):
    z = [torch.randn(n, 128, requires_grad=True) for _ in range(2)]
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = resident("VmRSS")
    nt_xent_loss(*z, 0.1).backward()
    return resident("VmHWM") - before

step(64)
print(*(step(n) for n in (2048, 4096)))
"""


@needs_extension
@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set off x86-64")
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512"])
def test_every_instruction_set_equals_the_reference(isa):
    under_isa(isa, equals_the_reference, threads=2)


@needs_extension
@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set off x86-64")
@pytest.mark.parametrize("isa", ["avx512_bf16", "amx"])
def test_bfloat16_under_every_instruction_set(isa):
    under_isa(isa, bfloat16_is_close, threads=2)


@needs_extension
@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_memory_grows_linearly_with_the_batch():
    command = [sys.executable, "-c", MEMORY]
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), env.get("PYTHONPATH")]))
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    half, full = map(float, result.stdout.split())
    assert half > 2048 * 128 * 4 / 1e6, "less than one matrix of gradients is no measurement"
    assert full <= 32, result.stdout
    assert full <= 2.1 * half + 2, result.stdout


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.005])
@pytest.mark.parametrize("n", [70, 700])
def test_same_bits_for_any_number_of_threads(dtype, temperature, n):
    torch.manual_seed(0)
    z = [torch.randn(n, 40, dtype=dtype).requires_grad_() for _ in range(2)]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            loss, stats = nt_xent_loss(*z, temperature, reduction="none", return_stats=True)
            results.append([loss, *stats, *torch.autograd.grad(loss.sum(), z)])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            assert torch.equal(actual, expected)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [0.2, 0.006])
@pytest.mark.parametrize(
    ("offset", "rows", "total"), [(0, 130, 130), (0, 2, 900), (6, 50, 900), (300, 600, 900)]
)
@pytest.mark.parametrize("decoupled", [False, True])
def test_native_and_plain_ops_agree(dtype, temperature, offset, rows, total, decoupled):
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, total // 2, 37, dtype=dtype)
    tau = torch.tensor(temperature, dtype=dtype)
    eps = torch.finfo(dtype).eps / temperature
    close = {"rtol": 30 * eps, "atol": 30 * eps}
    u, inv_norm = nt_xent.normalize(z1, z2, tau)
    torch.testing.assert_close((u, inv_norm), nt_xent_plain.normalize(z1, z2, tau))
    native = nt_xent.row_loss(u, tau, offset, rows, decoupled, True)
    plain = nt_xent_plain.forward(u, tau, offset, rows, decoupled, True)
    for actual, expected in zip(native, plain, strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, **close)
    _, lse, _ = nt_xent_plain.forward(u, tau, 0, total, decoupled, False)
    own = slice(offset // 2, (offset + rows) // 2)
    local = plain[0], inv_norm[offset : offset + rows], z1[own], z2[own], tau, offset, decoupled
    one = torch.tensor(0.3, dtype=dtype)
    for grad in (torch.rand(total, dtype=dtype), one.expand(total), one):
        native = nt_xent.backward(grad, decoupled, u, lse, *local)
        plain_grads = nt_xent_plain.backward(grad, decoupled, u, lse, *local)
        for actual, expected in zip(native, plain_grads, strict=True):
            scale = {"rtol": 30 * eps, "atol": 30 * eps * expected.abs().max().item()}
            torch.testing.assert_close(actual, expected, **scale)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.005])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize(("n", "d"), [(2, 3), (5, 7), (100, 50), (257, 129), (600, 301)])
def test_a_small_batch_keeps_its_exponentials(n, d, decoupled, temperature, dtype):
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, n, d, dtype=dtype)
    tau, grad = torch.tensor(temperature, dtype=dtype), torch.rand(2 * n, dtype=dtype)
    _, loss, lse, _, u, inv_norm, kept = nt_xent.loss(
        z1, z2, tau, nt_xent.NONE, decoupled, False, True
    )
    assert 0 < kept.numel() < 4 * u.numel() + 10_000
    local = u, lse, loss, inv_norm, z1, z2, tau, 0, decoupled
    expected = nt_xent.backward(grad, False, *local)
    actual = nt_xent.backward(grad, False, *local, kept)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    if temperature == 0.1:
        other, _ = nt_xent.backward(grad, False, *local, 2 * kept)
        assert not torch.equal(other, actual[0])


@needs_extension
def test_only_a_small_batch_that_needs_gradients_keeps():
    small, large, tau = torch.randn(8, 4), torch.randn(9, 4), torch.tensor(0.1)
    kept = [
        nt_xent.loss(z, z, tau, nt_xent.MEAN, False, False, keep)[-1].numel()
        for z, keep in ((small, True), (small, False), (large, True))
    ]
    assert kept[0] > 0
    assert kept[1:] == [0, 0]


@needs_extension
def test_ops_refuse_arguments_that_do_not_fit():
    z, tau = torch.ones(4, 3), torch.tensor(0.5)
    u, inv_norm = nt_xent.normalize(z, z, tau)
    with pytest.raises(RuntimeError, match="pairs of u_all's rows"):
        nt_xent.row_loss(u, tau, 1, 4, False, False)
    with pytest.raises(RuntimeError, match="pairs of u_all's rows"):
        nt_xent.row_loss(u, tau, 6, 4, False, False)
    with pytest.raises(RuntimeError, match="do not belong together"):
        nt_xent.backward(inv_norm, False, u, inv_norm, inv_norm[:4], inv_norm, z, z, tau, 0, False)
    loss, lse = torch.ones(8), torch.ones(8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="kept does not belong"):
        nt_xent.backward(loss, False, u, lse, loss, loss, z, z, tau, 0, False, torch.ones(5))
    with pytest.raises(RuntimeError, match="0-dim CPU tensor"):
        nt_xent.row_loss(u, torch.ones(2), 0, 8, False, False)
