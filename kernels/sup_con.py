"""Supervised contrastive loss on the GPU, in O(M D) memory (Triton); as nt_xent.py.

Rows come in any order and number; ids [M], int32, are equal within a class, and inverse_count [M],
float32, is 1 / (a row's positives), 0 without any.
"""

import math

import torch
import triton
from torch import Tensor

from .normalize import normalize_rows, row_blocks
from .nt_xent import WEIGHTS_BLOCK, _floats
from .nt_xent_configs import VALUE_BLOCK, dot_precision, plan_for
from .sup_con_tiles import (
    class_gradient_kernel,
    class_losses_kernel,
    class_sums_kernel,
    class_weights_kernel,
    finish_class_gradient_kernel,
)

__all__ = ["backward", "forward", "normalize"]

normalize = normalize_rows


def forward(
    u_all: Tensor,
    ids: Tensor,
    inverse_count: Tensor,
    temperature: Tensor,
    row_offset: int,
    rows: int,
) -> tuple[Tensor, Tensor]:
    """Losses and log Σ_{j≠i} exp(s_ij), [rows] float32 each, of rows row_offset.. of û [M, D_pad].

    loss_i = lse_i - mean of s_ij over the positives j, 0 without any.
    """
    total, padded = u_all.shape
    config, splits, _ = plan_for("class_sums", u_all, rows)
    partial = _floats(u_all.device, 3, splits, rows)
    loss, lse = _floats(u_all.device, rows), _floats(u_all.device, rows)
    with torch.cuda.device_of(u_all):
        class_sums_kernel[(triton.cdiv(rows, config.block_m), splits)](
            u_all, temperature, ids, partial, row_offset, rows, total, padded,
            config.block_m, config.block_n, **config.options(padded, dot_precision(u_all.dtype)),
        )  # fmt: skip
        class_losses_kernel[(triton.cdiv(rows, WEIGHTS_BLOCK),)](
            partial, inverse_count, loss, lse, row_offset, rows, splits, BLOCK_R=WEIGHTS_BLOCK
        )
    return loss, lse


def backward(
    grad: Tensor,
    u_all: Tensor,
    lse_all: Tensor,
    ids: Tensor,
    inverse_count: Tensor,
    inv_norm: Tensor,
    z: Tensor,
    temperature: Tensor,
    row_offset: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of Σ_i grad_i loss_i over all ranks' rows: to this rank's z [R, D], and to τ [].

    grad: [M], float32, any stride; lse_all: [M]; inv_norm: [R]; temperature: []; all float32.
    """
    total, padded = u_all.shape
    (rows, dim), device = z.shape, u_all.device
    grad_z = torch.empty((rows, dim), dtype=z.dtype, device=device)
    config, splits, _ = plan_for("class_gradient", u_all, rows)
    block_v = config.block_d if config.block_d >= padded else VALUE_BLOCK
    block_r, block_d = row_blocks(padded)
    programs = triton.cdiv(rows, block_r)
    factor, weight, share = (_floats(device, total) for _ in range(3))
    partial, grad_temperature = _floats(device, splits, rows, padded), _floats(device, programs)
    with torch.cuda.device_of(u_all):
        scale = torch.linalg.vector_norm(grad, math.inf)
        class_weights_kernel[(triton.cdiv(total, WEIGHTS_BLOCK),)](
            grad, scale, lse_all, inverse_count, temperature, factor, weight, share, total,
            grad.stride(0), BLOCK_R=WEIGHTS_BLOCK,
        )  # fmt: skip
        grid = (triton.cdiv(rows, config.block_m), splits, triton.cdiv(padded, block_v))
        class_gradient_kernel[grid](
            u_all, temperature, ids, factor, weight, share, partial, row_offset, rows, total,
            padded, config.block_m, config.block_n, BLOCK_V=block_v,
            **config.options(padded, dot_precision(u_all.dtype)),
        )  # fmt: skip
        finish_class_gradient_kernel[(programs,)](
            partial, scale, inv_norm, z, temperature, grad_z, grad_temperature, rows, dim, padded,
            splits, *z.stride(), BLOCK_R=block_r, BLOCK_D=block_d,
        )  # fmt: skip
    return grad_z, grad_temperature.sum()
