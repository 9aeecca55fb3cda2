"""NT-Xent on the GPU: losses and gradients of normalised views, in O(M D) memory (Triton).

The arrays over rows are interleaved: rows 2k and 2k+1 are the two views of pair k. Nothing here
reads a value back to the host; every buffer is torch.empty and every float is summed in a fixed
order, so results repeat bit for bit and the calls can be captured in a CUDA graph.
"""

import math
from functools import partial

import torch
import triton
from torch import Tensor

from .normalize import normalize, padded_dim, row_blocks
from .nt_xent_autotune import tuned
from .nt_xent_backward import finish_gradient_kernel, gradient_kernel, weights_kernel
from .nt_xent_configs import VALUE_BLOCK, Plan, dot_precision, plan_for
from .nt_xent_forward import moments_kernel, negatives_kernel, symmetric_kernel
from .nt_xent_losses import losses_kernel, statistics_kernel

__all__ = ["backward", "forward", "normalize", "padded_dim"]

WEIGHTS_BLOCK = 512
SLOT_BLOCK = 32


def _floats(device: torch.device, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)


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
        row_offset, rows: even.
        decoupled: the positive is left out of the denominator.
        statistics: whether to fill `stats`.

    Returns:
        loss: [rows], float32, softplus(log Σ_negatives exp(s_ij) - s_i,p(i)), without the softplus
            if decoupled.
        lse: [rows], float32, loss + s_i,p(i): the logarithm of the denominator.
        stats: [rows, 4], float32 ([0, 4] without statistics): whether the positive is above all
            negatives of the other view, entropy in nats over the other view's rows, then both
            over all rows.
    """
    total, padded = u_all.shape
    device = u_all.device
    loss, lse = _floats(device, rows), _floats(device, rows)
    stats = _floats(device, rows if statistics else 0, 4)
    if rows == 0:
        return loss, lse, stats
    block_r, block_d = row_blocks(padded)
    row_grid = (triton.cdiv(rows, block_r),)
    with torch.cuda.device_of(u_all):
        if statistics:
            config, splits, _ = plan_for("moments", u_all, rows)
            moments = _floats(device, 6, splits, rows)
            moments_kernel[(triton.cdiv(rows // 2, config.block_m), splits, 4)](
                u_all, temperature, moments, row_offset, rows, total, padded,
                config.block_m, config.block_n,
                **config.options(padded, dot_precision(u_all.dtype)),
            )  # fmt: skip
            statistics_kernel[row_grid](
                u_all, moments, loss, lse, stats, row_offset, rows, padded, splits,
                DECOUPLED=decoupled, BLOCK_R=block_r, BLOCK_D=block_d,
            )  # fmt: skip
            return loss, lse, stats

        tiles = partial(_negatives, u_all, temperature, row_offset, rows)
        sums, tops = tiles(tuned("forward", plan_for("forward", u_all, rows), u_all, rows, tiles))
        losses_kernel[row_grid](
            u_all, temperature, sums, tops, loss, lse, row_offset, rows, padded,
            len(sums), len(tops),
            DECOUPLED=decoupled, BLOCK_R=block_r, BLOCK_D=block_d, BLOCK_S=SLOT_BLOCK,
        )  # fmt: skip
    return loss, lse, stats


def _negatives(
    u_all: Tensor, temperature: Tensor, row_offset: int, rows: int, plan: Plan
) -> tuple[Tensor, Tensor]:
    """Partial sums over each row's negatives, [slots, rows], and maxima, [splits, rows]."""
    config, splits, symmetric = plan
    (total, padded), device = u_all.shape, u_all.device
    options = config.options(padded, dot_precision(u_all.dtype))
    tiles = triton.cdiv(rows, config.block_m)
    slots = splits + tiles // 2 if symmetric else splits
    sums, tops = _floats(device, slots, rows), _floats(device, splits, rows)
    if symmetric:
        symmetric_kernel[(tiles, splits)](
            u_all, temperature, sums, tops, total, padded, config.block_m, **options
        )
    else:
        negatives_kernel[(tiles, splits)](
            u_all, temperature, sums, tops, row_offset, rows, total, padded,
            config.block_m, config.block_n, **options,
        )  # fmt: skip
    return sums, tops


def _weighted_sums(
    u_all: Tensor,
    temperature: Tensor,
    factor: Tensor,
    weight: Tensor,
    row_offset: int,
    rows: int,
    plan: Plan,
) -> Tensor:
    """Partial Σ_j W_ij û_j, [splits, rows, D_pad]."""
    config, splits, _ = plan
    total, padded = u_all.shape
    block_v = config.block_d if config.block_d >= padded else VALUE_BLOCK
    sums = _floats(u_all.device, splits, rows, padded)
    grid = (triton.cdiv(rows, config.block_m), splits, triton.cdiv(padded, block_v))
    gradient_kernel[grid](
        u_all, temperature, factor, weight, sums, row_offset, rows, total, padded,
        config.block_m, config.block_n, BLOCK_V=block_v,
        **config.options(padded, dot_precision(u_all.dtype)),
    )  # fmt: skip
    return sums


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
) -> tuple[Tensor, Tensor]:
    """Gradients of Σ_i grad_i loss_i, over all ranks' rows i, to this rank's z and to τ.

    Args:
        grad: [M], float32, any stride; or [], the same for all rows: faster. mean: divided by M.
        u_all: [M, D_pad]; lse_all: [M], float32; contiguous.
        loss, inv_norm: [R], float32, of this rank's rows.
        z1, z2: what `normalize` took on this rank.
        temperature: [], float32.
        row_offset: first of this rank's rows. decoupled: as in `forward`.

    Returns:
        grad_z: [R, D], z's dtype, view-major: first the R/2 rows of view 1.
        grad_temperature: [], float32, this rank's rows' part.
    """
    if z2 is None:
        z1, z2 = z1.chunk(2)
    total, padded = u_all.shape
    rows, dim, device = inv_norm.numel(), z1.size(1), u_all.device
    grad_z = torch.empty((rows, dim), dtype=z1.dtype, device=device)
    if rows == 0:
        return grad_z, torch.zeros((), dtype=torch.float32, device=device)
    block_p, block_d = row_blocks(padded)
    programs = triton.cdiv(rows // 2, block_p)
    factor, weight = _floats(device, total), _floats(device, total)
    grad_temperature = _floats(device, programs)
    with torch.cuda.device_of(u_all):
        stride = grad.stride(0) if grad.dim() else 0
        scale = torch.linalg.vector_norm(grad, math.inf) if grad.dim() else grad
        weights_kernel[(triton.cdiv(total, WEIGHTS_BLOCK),)](
            grad, scale, lse_all, temperature, factor, weight, total, stride,
            BLOCK_R=WEIGHTS_BLOCK,
        )  # fmt: skip
        tiles = partial(_weighted_sums, u_all, temperature, factor, weight, row_offset, rows)
        sums = tiles(tuned("gradient", plan_for("gradient", u_all, rows), u_all, rows, tiles))
        finish_gradient_kernel[(programs,)](
            sums, grad, scale, loss, inv_norm, z1, z2, temperature, grad_z,
            grad_temperature, 1 / total if mean else 1.0, row_offset, rows, dim, padded, len(sums),
            stride, *z1.stride(), *z2.stride(),
            DECOUPLED=decoupled, BLOCK_P=block_p, BLOCK_D=block_d,
        )  # fmt: skip
    return grad_z, grad_temperature.sum()
