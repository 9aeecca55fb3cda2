"""What the memory checker sees in the interpreter; run by test_nt_xent_triton.py."""

import pytest
import torch
import triton
import triton.language as tl
from kernel_memory import MemoryFault, checked_memory

from simclr_fast.kernels import nt_xent, nt_xent_backward, nt_xent_forward, nt_xent_losses
from simclr_fast.kernels.nt_xent_configs import Config, Plan


@triton.jit
def _last_tile(row, row_end, total, split, splits, BLOCK_N: tl.constexpr):
    tiles = total // BLOCK_N
    return tiles - 1, tiles, tiles - 1, tiles - 1, tiles


def test_offsets_beyond_32_bits(monkeypatch):
    """Rows further than 2³¹ elements into û and z; only addresses are computed."""
    rows, padded = 64, 64
    total = (1 << 31) // padded + 256
    first = total - rows
    u_all = torch.empty(total, padded, dtype=torch.float16)
    per_row, out = torch.empty(total), torch.empty(4, rows)
    partial = torch.empty(1, rows, padded)
    tau = torch.tensor(0.5)
    options = Config(64, 64, 64, 4, 2).options(padded, "ieee")
    monkeypatch.setattr(nt_xent_forward, "share", _last_tile)
    monkeypatch.setattr(nt_xent_backward, "share", _last_tile)
    wide = torch.empty((1 << 31) + 16, dtype=torch.float16).as_strided((3, 16), (1 << 30, 1))
    with checked_memory(dry=True) as launches:
        nt_xent_forward.negatives_kernel[(1, 1)](
            u_all, tau, out[0], out[1], first, rows, total, padded, 64, 64, **options
        )
        nt_xent_backward.gradient_kernel[(1, 1, 1)](
            u_all, tau, per_row, per_row, partial, first, rows, total, padded, 64, 64,
            BLOCK_V=64, **options,
        )  # fmt: skip
        nt_xent_losses.losses_kernel[(1,)](
            u_all, tau, out[0], out[1], out[2], out[3], first, rows, padded,
            1, 1, DECOUPLED=False, BLOCK_R=64, BLOCK_D=64, BLOCK_S=2,
        )  # fmt: skip
        nt_xent.normalize(wide, wide, tau)
    assert len(launches) == 4


@triton.jit
def _faulty_kernel(x_ptr, out_ptr, n, FAULT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bound = n + 1 if FAULT == "load" else n
    x = tl.load(x_ptr + i, mask=i < bound, other=0.0)
    if FAULT == "lanes":
        i = i // 2
    if FAULT == "programs":
        i = tl.arange(0, BLOCK)
    if FAULT == "store":
        i += 1
    if FAULT == "race":
        x += tl.load(out_ptr + (i + BLOCK) % n, mask=i < n, other=0.0)
    tl.store(out_ptr + i, x, mask=(i < n) | (FAULT == "store"))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("load", "load of 1 elements out of bounds"),
        ("store", "out of bounds"),
        ("lanes", "written twice"),
        ("programs", "written twice"),
        ("race", "both read and written"),
    ],
)
def test_the_checker_finds_planted_faults(fault, message):
    x, out = torch.ones(30), torch.zeros(30)
    with (
        pytest.raises((MemoryFault, triton.runtime.errors.InterpreterError), match=message),
        checked_memory(),
    ):
        _faulty_kernel[(4,)](x, out, 30, FAULT=fault, BLOCK=8)


def test_the_checker_passes_a_sound_kernel():
    x, out = torch.ones(30), torch.zeros(30)
    with checked_memory():
        _faulty_kernel[(4,)](x, out, 30, FAULT="", BLOCK=8)
    assert torch.equal(out, x)


def test_the_checker_finds_an_undersized_buffer(monkeypatch):
    # T = 4 tiles of 32 rows: three slots, of which only two are given.
    plan = Plan(Config(32, 32, 16, 4, 2), 1, symmetric=True)
    monkeypatch.setattr(nt_xent, "plan_for", lambda *_: plan)
    tau = torch.tensor(0.2)
    u, _ = nt_xent.normalize(torch.ones(64, 16), torch.ones(64, 16), tau)
    floats = nt_xent._floats
    monkeypatch.setattr(nt_xent, "_floats", lambda device, n, *s: floats(device, n - (n == 3), *s))
    with pytest.raises((MemoryFault, triton.runtime.errors.InterpreterError)), checked_memory():
        nt_xent.forward(u, tau, 0, len(u), False, False)
