"""NT-Xent on the GPU: losses and gradients of normalised views, in O(M D) memory (Triton).

The arrays over rows are interleaved: rows 2k and 2k+1 are the two views of pair k. Nothing here
reads a value back to the host; every buffer begins empty and every float is summed in a fixed
order, so results repeat bit for bit and the calls can be captured in a CUDA graph.

The kernels of the usual step get their run-time arguments by position, as their signatures list
them. Names would take the host two microseconds more per launch.
"""

from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from .normalize import cdiv, finish_parts, normalize, padded_dim, row_blocks
from .nt_xent_autotune import tuned
from .nt_xent_backward import (
    finish_gradient_kernel,
    gradient_kernel,
    weight_tiles_kernel,
    weights_kernel,
)
from .nt_xent_configs import Plan, chunk_rows, dot_precision, plan_for
from .nt_xent_forward import (
    SCALARS,
    losses_kernel,
    mean_statistics_kernel,
    negatives_kernel,
    statistics_parts_kernel,
    symmetric_kernel,
)

__all__ = [
    "Losses",
    "backward",
    "forward",
    "losses",
    "mean_statistics",
    "normalize",
    "padded_dim",
]

# Rows of a program of the kernels that read a few floats per row.
WEIGHTS_BLOCK = 512
# Slots of partial results that a program adds at a time, and elements of them that it may hold.
# With more elements ptxas spills in the kernel with statistics.
SLOT_BLOCK, SLOT_ELEMENTS = 32, 1024
# Rows of a program that adds up statistics.
PART_ROWS = 256


class Losses(NamedTuple):
    """The results of `losses`, float32.

    loss, lse, factor: one value per row. stats: [rows, 4], or [0, 4] without statistics.
    reduced: [].
    """

    loss: Tensor
    lse: Tensor
    stats: Tensor
    factor: Tensor
    reduced: Tensor


class RowWeights(NamedTuple):
    """What the gradient's tile kernels read for each row: [M] each, float32, ids int32."""

    factor: Tensor
    weight: Tensor | None = None
    ids: Tensor | None = None
    share: Tensor | None = None


@cache
def slot_block(rows: int) -> int:
    """Slots that a program of some rows, a power of two, adds at a time."""
    return min(SLOT_BLOCK, SLOT_ELEMENTS // rows)


def floats(temperature: Tensor, *shape: int) -> Tensor:
    """Empty, float32, where the temperature is. torch.empty would take the host longer."""
    return temperature.new_empty(shape)


def make_counter(temperature: Tensor) -> Tensor:
    """The counter of `add_up`. The tile kernel before it sets it to 0."""
    return temperature.new_empty((), dtype=torch.int32)


def forward(
    u_all: Tensor,
    temperature: Tensor,
    row_offset: int,
    rows: int,
    decoupled: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of `rows` rows from `row_offset` on, against all rows.

    Args:
        u_all: [M, D_pad], from `normalize` (of all ranks, concatenated), contiguous.
        temperature: [], float32, on the same device; any value from 0.001 to 100.
        row_offset, rows: even numbers.
        decoupled: leave the positive out of the denominator.
        statistics: whether to fill `stats`.

    Returns:
        loss: [rows], float32, softplus(log Σ_negatives exp(s_ij) - s_i,p(i)), without the softplus
            if decoupled.
        lse: [rows], float32, loss + s_i,p(i): the logarithm of the denominator.
        stats: [rows, 4], float32 ([0, 4] without statistics). Columns 0 and 1 are for the rows of
            the other view: whether the positive is above all negatives, and the entropy in nats.
            Columns 2 and 3 are the same for all rows.
    """
    made = losses(u_all, temperature, row_offset, rows, decoupled, statistics)
    return made.loss, made.lse, made.stats


def losses(
    u_all: Tensor,
    temperature: Tensor,
    row_offset: int,
    rows: int,
    decoupled: bool,
    statistics: bool,
    mean: bool = False,
) -> Losses:
    """`forward`, with two more results of the same launches.

    reduced: [], float32, the sum of the rows' losses, or with `mean` their mean.
    factor: [rows], float32, for `backward` if all rows have the same upstream gradient.
    """
    padded = u_all.size(1)
    made = Losses(
        loss=floats(temperature, rows),
        lse=floats(temperature, rows),
        stats=floats(temperature, rows if statistics else 0, 4),
        factor=floats(temperature, rows),
        reduced=floats(temperature),
    )
    if rows == 0:
        made.reduced.zero_()
        return made
    blocks = row_blocks(padded)
    programs = cdiv(rows, blocks.rows)
    counter = make_counter(temperature)
    with torch.cuda.device_of(u_all):
        tiles = partial(_tile_sums, u_all, temperature, counter, row_offset, rows, statistics)
        kind = "moments" if statistics else "forward"
        plan = plan_for(kind, u_all, rows)
        sums, positive, other_slots = tiles(tuned(kind, plan, u_all, rows, tiles))
        part = floats(temperature, programs)
        loss_scale = 1.0 / rows if mean else 1.0
        losses_kernel[(programs,)](
            u_all,
            temperature,
            sums,
            positive,
            made.loss,
            made.lse,
            made.factor,
            made.stats,
            part,
            counter,
            made.reduced,
            loss_scale,
            row_offset,
            rows,
            sums.size(1),
            other_slots,
            PADDED=padded,
            DECOUPLED=decoupled,
            STATISTICS=statistics,
            BLOCK_R=blocks.rows,
            BLOCK_D=blocks.columns,
            BLOCK_S=slot_block(blocks.rows),
            num_warps=blocks.warps,
        )
    return made


def mean_statistics(
    loss: Tensor, lse: Tensor, stats: Tensor, u: Tensor, temperature: Tensor
) -> Tensor:
    """The six values of `NTXentStats`, [6], float32: means over the rows.

    Args:
        loss, lse: [M], float32, any stride; stats: [M, 4], of `forward`, of all ranks' rows.
        u: [M, D_pad]; temperature: [], float32.
    """
    rows, padded = u.shape
    blocks = row_blocks(padded)
    count = cdiv(rows, PART_ROWS)
    parts = floats(temperature, count, padded + SCALARS.value)
    means = floats(temperature, 6)
    with torch.cuda.device_of(u):
        statistics_parts_kernel[(count,)](
            u,
            loss,
            lse,
            stats,
            parts,
            rows,
            loss.stride(0),
            lse.stride(0),
            *stats.stride(),
            PADDED=padded,
            ROWS=PART_ROWS,
            BLOCK_R=blocks.rows,
            BLOCK_D=blocks.columns,
            num_warps=blocks.warps,
        )
        mean_statistics_kernel[(1,)](
            parts,
            temperature,
            means,
            rows,
            count,
            PADDED=padded,
            BLOCK_D=blocks.columns,
            num_warps=blocks.warps,
        )
    return means


def _tile_sums(
    u_all: Tensor,
    temperature: Tensor,
    counter: Tensor,
    row_offset: int,
    rows: int,
    statistics: bool,
    plan: Plan,
) -> tuple[Tensor, Tensor, int]:
    """Partial results over each row's negatives, for `losses_kernel`.

    Returns:
        The partial results: [2, slots, rows], or [3, slots, rows] with statistics.
        The positives' x: [rows]; without statistics any tensor.
        The number of slots that are for the other view; without statistics, of all slots.
    """
    config, splits, symmetric = plan
    total, padded = u_all.shape
    half = total // config.block_m // 2
    if symmetric:
        slots = (2 if statistics else 1) * splits + half
        other_slots = splits + (half + 1) // 2
    else:
        slots, other_slots = 2 * splits, splits
    sums = floats(temperature, 3 if statistics else 2, slots, rows)
    # Without statistics nothing reads or writes it.
    positive = floats(temperature, rows) if statistics else sums
    tensors = u_all, temperature, sums, positive, counter
    options = config.options(padded, dot_precision(u_all.dtype))
    if symmetric:
        symmetric_kernel[(2 * half, splits)](*tensors, total, STATISTICS=statistics, **options)
    else:
        negatives_kernel[(cdiv(rows // 2, config.block_m), splits, 4)](
            *tensors,
            row_offset,
            rows,
            total,
            BLOCK_N=config.block_n,
            STATISTICS=statistics,
            **options,
        )
    return sums, positive, other_slots if statistics else slots


def weighted_sums(
    u_all: Tensor,
    temperature: Tensor,
    weights: RowWeights,
    counter: Tensor,
    row_offset: int,
    rows: int,
    plan: Plan,
) -> Tensor:
    """Partial Σ_j W_ij û_j, [splits, rows, D_pad], float32."""
    config, splits, _ = plan
    total, padded = u_all.shape
    tensors = u_all, temperature, *weights
    options = config.options(padded, dot_precision(u_all.dtype))
    sums = floats(temperature, splits, rows, padded)
    if config.holds_gradient(padded):
        gradient_kernel[(cdiv(rows, config.block_m), splits)](
            *tensors,
            sums,
            counter,
            row_offset,
            rows,
            total,
            BLOCK_N=config.block_n,
            BLOCK_V=row_blocks(padded).columns,
            **options,
        )
        return sums
    # W of some rows at a time, then a matrix product: no score is computed twice.
    for first in range(0, rows, chunk_rows(u_all)):
        out = sums[0, first : first + chunk_rows(u_all)]
        tiles = u_all.new_empty((len(out), total))
        grid = (cdiv(total, config.block_n), cdiv(len(out), config.block_m))
        weight_tiles_kernel[grid](
            *tensors,
            tiles,
            counter,
            row_offset + first,
            len(out),
            total,
            BLOCK_N=config.block_n,
            **options,
        )
        _product(tiles, u_all, out)
    return sums


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b in float32; W's sums would overflow float16."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == torch.float32:
            torch.mm(a, b, out=out)
        elif a.device.type == "cuda":
            torch.mm(a, b, out_dtype=torch.float32, out=out)
        else:
            # The interpreter's tensors are on the CPU, which has no product with a wider result.
            torch.mm(a.float(), b.float(), out=out)


def row_weights(
    grad: Tensor,
    lse_all: Tensor,
    temperature: Tensor,
    ids: Tensor | None = None,
    inverse_count: Tensor | None = None,
) -> tuple[RowWeights, Tensor]:
    """`RowWeights` for an upstream gradient of each row, [M]; and max |grad|, []."""
    total = lse_all.numel()
    weights = RowWeights(
        factor=floats(temperature, total),
        weight=floats(temperature, total),
        ids=ids,
        share=None if ids is None else floats(temperature, total),
    )
    scale = floats(temperature)
    weights_kernel[(cdiv(total, WEIGHTS_BLOCK),)](
        grad_ptr=grad,
        lse_ptr=lse_all,
        inverse_count_ptr=inverse_count,
        temperature_ptr=temperature,
        factor_ptr=weights.factor,
        weight_ptr=weights.weight,
        share_ptr=weights.share,
        scale_ptr=scale,
        total=total,
        grad_stride=grad.stride(0) if grad.dim() else 0,
        BLOCK_R=WEIGHTS_BLOCK,
    )
    return weights, scale


def backward(
    grad: Tensor,
    mean: bool,
    u_all: Tensor,
    lse_all: Tensor,
    loss: Tensor,
    inv_norm: Tensor,
    z1: Tensor,
    z2: Tensor | None,
    temperature: Tensor,
    row_offset: int,
    decoupled: bool,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of Σ_i grad_i loss_i, over all ranks' rows i, to this rank's z and to τ.

    Args:
        grad: [M], float32, any stride; or [], the same for all rows, which is faster.
        mean: divide grad by M.
        u_all: [M, D_pad]; lse_all: [M], float32; contiguous.
        loss, inv_norm: [R], float32, of this rank's rows.
        z1, z2: what `normalize` took on this rank.
        temperature: [], float32.
        row_offset: first of this rank's rows. decoupled: as in `forward`.
        factor: [M], that of `losses` for all rows. It saves a launch if grad is []. None or empty
            if unknown.

    Returns:
        grad_z: [R, D], z's dtype, view-major: first the R/2 rows of view 1.
        grad_temperature: [], float32: the part of this rank's rows.
    """
    if z2 is None:
        z1, z2 = z1.chunk(2)
    total, padded = u_all.shape
    rows, dim = inv_norm.numel(), z1.size(1)
    grad_z = z1.new_empty((rows, dim))
    if rows == 0:
        return grad_z, torch.zeros_like(temperature)
    blocks = row_blocks(padded, finish_parts(z1.dtype))
    programs = cdiv(rows // 2, blocks.rows)
    counter, grad_temperature = make_counter(temperature), floats(temperature)
    with torch.cuda.device_of(u_all):
        if grad.dim() == 0 and factor is not None and factor.numel():
            weights, scale = RowWeights(factor), grad
        else:
            weights, scale = row_weights(grad, lse_all, temperature)
        tiles = partial(weighted_sums, u_all, temperature, weights, counter, row_offset, rows)
        sums = tiles(tuned("gradient", plan_for("gradient", u_all, rows), u_all, rows, tiles))
        part = floats(temperature, programs)
        grad_scale = 1 / total if mean else 1.0
        finish_gradient_kernel[(programs,)](
            sums,
            grad,
            scale,
            loss,
            inv_norm,
            z1,
            z2,
            temperature,
            grad_z,
            part,
            counter,
            grad_temperature,
            grad_scale,
            row_offset,
            rows,
            dim,
            len(sums),
            grad.stride(0) if grad.dim() else 0,
            *z1.stride(),
            *z2.stride(),
            PADDED=padded,
            DECOUPLED=decoupled,
            BLOCK_P=blocks.rows,
            BLOCK_D=blocks.columns,
            num_warps=blocks.warps,
            maxnreg=blocks.registers,
        )
    return grad_z, grad_temperature
