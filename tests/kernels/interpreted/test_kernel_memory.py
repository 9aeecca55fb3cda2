"""What the memory checker sees, which needs the interpreter, and offsets beyond 32 bits."""

import os
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_memory import MemoryFault, checked_memory

from simclr_fast.augment.params import Augmentation, draw_params
from simclr_fast.augment.views import pack_params
from simclr_fast.kernels import augment, norm_act, nt_xent, nt_xent_backward, nt_xent_forward
from simclr_fast.kernels.nt_xent_configs import Config, Plan

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the interpreter alone sees memory accesses", allow_module_level=True)


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
    per_row, loss, lse, factor = torch.empty(total), *torch.empty(3, rows)
    partial, sums = torch.empty(2, 2, rows), torch.empty(1, rows, padded)
    counter, reduced = torch.zeros((), dtype=torch.int32), torch.empty(())
    tau = torch.tensor(0.5)
    config = Config(64, 64, 64, 4, 2)
    tile_arguments = {
        "u_ptr": u_all,
        "temperature_ptr": tau,
        "counter_ptr": counter,
        "row_offset": first,
        "rows": rows,
        "total": total,
        "BLOCK_N": config.block_n,
        **config.options(padded, "ieee"),
    }
    weights = {"factor_ptr": per_row, "weight_ptr": per_row, "ids_ptr": None, "share_ptr": None}
    monkeypatch.setattr(nt_xent_forward, "share", _last_tile)
    monkeypatch.setattr(nt_xent_backward, "share", _last_tile)
    wide = torch.empty((1 << 31) + 16, dtype=torch.float16).as_strided((3, 16), (1 << 30, 1))
    with checked_memory(dry=True) as launches:
        nt_xent_forward.negatives_kernel[(1, 1, 4)](
            partial_ptr=partial, positive_ptr=loss, STATISTICS=False, **tile_arguments
        )
        nt_xent_backward.gradient_kernel[(1, 1)](
            sums_ptr=sums, BLOCK_V=64, **weights, **tile_arguments
        )
        nt_xent_backward.weight_tiles_kernel[(1, 1)](
            tiles_ptr=torch.empty(rows, total, dtype=torch.float16), **weights, **tile_arguments
        )
        nt_xent_forward.losses_kernel[(1,)](
            u_ptr=u_all,
            temperature_ptr=tau,
            partial_ptr=partial,
            positive_ptr=loss,
            loss_ptr=loss,
            lse_ptr=lse,
            factor_ptr=factor,
            stats_ptr=loss,
            part_ptr=torch.empty(1),
            counter_ptr=counter,
            reduced_ptr=reduced,
            loss_scale=1.0,
            row_offset=first,
            rows=rows,
            slots=2,
            other_slots=2,
            PADDED=padded,
            DECOUPLED=False,
            STATISTICS=False,
            BLOCK_R=64,
            BLOCK_D=64,
            BLOCK_S=2,
        )
        nt_xent.normalize(wide, wide, tau)
    assert len(launches) == 5


def test_activations_beyond_32_bits():
    """Three rows of 2³⁰ elements, the last a program's; only addresses are computed."""
    x, y = (torch.empty((1 << 31) + 16, dtype=torch.float16) for _ in range(2))
    channels, nothing = torch.ones(3), [None] * 6
    with checked_memory(dry=True) as launches:
        norm_act.norm_act_kernel[(1,)](
            *(x, None, y, channels, channels, *nothing),
            *(3, (1 << 30) // 16, 3),
            LAST=False,
            RELU=True,
            COLUMN_UNIT=16,
            BLOCK_R=4,
            BLOCK_C=16,
        )
    assert launches == ["norm_act_kernel"]


@pytest.mark.parametrize("wide", ["image", "channel", "row", "column"])
def test_views_beyond_32_bits(wide):
    """Views whose elements along one axis are 2³⁰ elements apart; only addresses are computed."""
    size = 4
    aug = Augmentation(size)
    params = draw_params(aug, 0, 0, np.arange(4), 0, np.tile([[8, 9]], (4, 1)))
    # The blur writes the third view, the colour kernel the others.
    params.sigma = np.array([0, 0, 0.5, 0], np.float32)
    given = [torch.from_numpy(array) for array in pack_params(params)]
    strides = {"image": 48, "channel": 16, "row": 4, "column": 1} | {wide: 1 << 30}
    shape = (4, 3, size, size)
    last = sum((n - 1) * stride for n, stride in zip(shape, strides.values(), strict=True))
    out = torch.empty(last + 1, dtype=torch.float16).as_strided(shape, tuple(strides.values()))
    crops = torch.zeros(4, size, size, 3, dtype=torch.uint8)
    with checked_memory(dry=True) as launches:
        augment.augment_crops(crops, *given, torch.ones(6), True, False, 1, out)
    assert launches == ["mean_kernel", "color_kernel", "blur_kernel", "blur_kernel"]


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


@triton.jit
def _adding_kernel(x_ptr, part_ptr, counter_ptr, out_ptr, WAITS: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    tl.store(part_ptr + program, tl.load(x_ptr + program))
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    if before == (tl.num_programs(0) - 1 if WAITS else 1):
        i = tl.arange(0, BLOCK)
        tl.store(out_ptr, tl.sum(tl.load(part_ptr + i, mask=i < 4, other=0.0), axis=0))


@pytest.mark.parametrize("waits", [True, False])
def test_only_the_last_program_may_read_what_the_others_wrote(waits):
    x, part, out = torch.arange(4.0), torch.zeros(4), torch.zeros(())
    counter = torch.zeros((), dtype=torch.int32)
    expected = nullcontext() if waits else pytest.raises(MemoryFault, match="both read and written")
    with expected, checked_memory():
        _adding_kernel[(4,)](x, part, counter, out, WAITS=waits, BLOCK=4)
    assert (out == 6) == waits


def test_the_checker_finds_an_undersized_buffer(monkeypatch):
    # T = 4 tiles of 32 rows: one chunk's slot and two others. One plane of two slots is given.
    plan = Plan(Config(32, 32, 16, 4, 2), 1, symmetric=True)
    monkeypatch.setattr(nt_xent, "plan_for", lambda *_: plan)
    tau = torch.tensor(0.2)
    u, _ = nt_xent.normalize(torch.ones(64, 16), torch.ones(64, 16), tau)
    floats = nt_xent.floats

    def short(device, *shape):
        return floats(device, 1, 2, shape[2]) if len(shape) == 3 else floats(device, *shape)

    monkeypatch.setattr(nt_xent, "floats", short)
    with pytest.raises((MemoryFault, triton.runtime.errors.InterpreterError)), checked_memory():
        nt_xent.forward(u, tau, 0, len(u), False, False)
