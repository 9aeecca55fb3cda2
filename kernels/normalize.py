"""L2-normalise, scale, cast, pad and interleave two views in one pass (Triton)."""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# A program of the row-wise kernels holds at least so many elements.
BLOCK_ELEMENTS = 2048
# Kernel arguments that change with the batch. Triton would compile one variant for multiples of 16
# and one for other values. It would turn an integer equal to 1 into a constant, which lacks the
# methods of a tensor. No address of a wide load depends on these, so variants would gain nothing.
UNSPECIALIZED = (
    "row_offset",
    "rows",
    "total",
    "slots",
    "other_slots",
    "splits",
    "parts",
    "loss_stride",
    "lse_stride",
    "stats_row_stride",
    "stats_stride",
    "grad_stride",
    "grad_ptr",
    "scale_ptr",
    "temperature_ptr",
)


@triton.jit
def _normalize_view(
    z_ptr,
    temperature_ptr,
    u_ptr,
    inv_norm_ptr,
    rows,
    dim,
    stride_n,
    stride_d,
    VIEW: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BP]
    d = tl.arange(0, BLOCK_D)  # [BD]
    inside = 2 * pair + VIEW < rows
    offset = pair[:, None] * stride_n + d.to(tl.int64)[None, :] * stride_d
    z = tl.load(z_ptr + offset, mask=inside[:, None] & (d < dim)[None, :], other=0.0)
    z = z.to(tl.float32)

    # 1e-12 is the eps of torch.nn.functional.normalize. A maximum with it would drop a NaN.
    norm = tl.sqrt_rn(tl.sum(z * z, axis=1))
    inv_norm = tl.where(norm < 1e-12, 1e12, tl.div_rn(1.0, norm))
    tl.store(inv_norm_ptr + pair * 2 + VIEW, inv_norm, mask=inside)
    # A row of infinite norm becomes NaN, not zeros.
    scale = tl.where(inv_norm == 0.0, float("nan"), inv_norm)
    scale *= tl.sqrt_rn(tl.div_rn(1.4426950408889634, tl.load(temperature_ptr)))
    # Zeros in the padding, whatever the scale.
    u = tl.where((d < dim)[None, :], z * scale[:, None], 0.0).to(u_ptr.dtype.element_ty)
    out = u_ptr + (pair * 2 + VIEW)[:, None] * PADDED + d[None, :]
    tl.store(out, u, mask=inside[:, None] & (d < PADDED)[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def normalize_kernel(
    z1_ptr,  # [N, D], any strides
    z2_ptr,  # [N, D], any strides
    temperature_ptr,  # [], float32
    u_ptr,  # [ROWS, D_pad], float16 or float32
    inv_norm_ptr,  # [ROWS], float32
    rows,
    dim,
    stride_1n,
    stride_1d,
    stride_2n,
    stride_2d,
    PADDED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_P pairs; û = z / max(|z|, 1e-12) · sqrt(log2(e) / temperature).

    Row k of view v becomes row 2k + v. Reads z once and writes û once.
    """
    _normalize_view(
        z1_ptr,
        temperature_ptr,
        u_ptr,
        inv_norm_ptr,
        rows=rows,
        dim=dim,
        stride_n=stride_1n,
        stride_d=stride_1d,
        VIEW=0,
        PADDED=PADDED,
        BLOCK_P=BLOCK_P,
        BLOCK_D=BLOCK_D,
    )
    _normalize_view(
        z2_ptr,
        temperature_ptr,
        u_ptr,
        inv_norm_ptr,
        rows=rows,
        dim=dim,
        stride_n=stride_2n,
        stride_d=stride_2d,
        VIEW=1,
        PADDED=PADDED,
        BLOCK_P=BLOCK_P,
        BLOCK_D=BLOCK_D,
    )


# At small batches a step takes as long as its Python code. triton.cdiv and next_power_of_2, which
# kernels may call too, take a microsecond each on the host.
def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@cache
def padded_dim(dim: int) -> int:
    """Columns of û: a power of two from 16 up to 64, then a multiple of 64."""
    return max(16, triton.next_power_of_2(dim)) if dim <= 64 else cdiv(dim, 64) * 64


class RowBlocks(NamedTuple):
    """What a program of a row-wise kernel holds: rows or pairs of rows, columns, and warps."""

    rows: int
    columns: int
    warps: int

    @property
    def registers(self) -> int:
        """The most that a thread may take: no more than leave room for two programs.

        Without a limit, ptxas chooses one for more programs at a time, and then spills a few.
        """
        return min(128, 1024 // self.warps)


@cache
def row_blocks(padded: int, parts: int = 1) -> RowBlocks:
    """Blocks of whole rows, so that each value is read once.

    parts: divides the rows. Kernels that hold several values per column would spill with more rows.
    """
    columns = triton.next_power_of_2(padded)
    warps = min(max(columns // 512, 4), 16)
    return RowBlocks(max(BLOCK_ELEMENTS // columns // parts, 1), columns, warps)


# The parts of row_blocks for normalize_kernel.
NORMALIZE_PARTS = 2


def finish_parts(dtype: torch.dtype) -> int:
    """The parts of row_blocks for the kernels that finish a gradient, for z of a dtype.

    ptxas for sm_100 spills in float32 with as many rows as in float16.
    """
    return 4 if dtype == torch.float32 else 2


def normalize(z1: Tensor, z2: Tensor | None, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """û and 1/max(|z|, 1e-12) of two views, rows interleaved.

    Args:
        z1, z2: [N, D] each, any strides, float16, bfloat16 or float32; or z2 None and z1 [2N, D].
        temperature: [], float32, on the same device; never read by the host.

    Returns:
        u: [2N, padded_dim(D)], float16 (float32 for float32 z), scaled by sqrt(log2 e / τ).
        inv_norm: [2N], float32.
    """
    if z2 is None:
        z1, z2 = z1.chunk(2)
    return _launch(z1, z2, temperature, 2 * z1.size(0))


def normalize_rows(z: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """`normalize` of one tensor [M, D] of any number of rows, in its own order."""
    return _launch(z[::2], z[1::2], temperature, z.size(0))


def _launch(z1: Tensor, z2: Tensor, temperature: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    pairs, dim = z1.shape
    padded = padded_dim(dim)
    dtype = torch.float32 if z1.dtype == torch.float32 else torch.float16
    u = z1.new_empty((rows, padded), dtype=dtype)
    inv_norm = temperature.new_empty(rows)
    if pairs == 0:
        return u, inv_norm
    blocks = row_blocks(padded, NORMALIZE_PARTS)
    with torch.cuda.device_of(z1):
        normalize_kernel[(cdiv(pairs, blocks.rows),)](
            z1,
            z2,
            temperature,
            u,
            inv_norm,
            rows,
            dim,
            *z1.stride(),
            *z2.stride(),
            PADDED=padded,
            BLOCK_P=blocks.rows,
            BLOCK_D=blocks.columns,
            num_warps=blocks.warps,
        )
    return u, inv_norm
