"""Supervised contrastive loss on the GPU, in O(M D) memory (Triton). It is built like nt_xent.py.

Rows come in any order and number. ids [M], int32, are equal within a class. inverse_count [M],
float32, is 1 / (number of the row's positives), or 0 without positives. The positives of a row are
the other rows of its class. Its softmax runs over all other rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .normalize import UNSPECIALIZED, cdiv, finish_parts, normalize_rows, row_blocks
from .nt_xent import WEIGHTS_BLOCK, floats, make_counter, row_weights, weighted_sums
from .nt_xent_backward import finish_class_gradient_kernel
from .nt_xent_configs import dot_precision, plan_for
from .nt_xent_forward import merge, sums_along
from .nt_xent_tiles import (
    LN_2,
    LOW_PASS,
    LOWEST,
    PASSES,
    PLAIN_PASS,
    exclude,
    key_of,
    needs_maximum,
    part_of_pass,
    query_tile,
    scores,
    share,
)

__all__ = ["backward", "forward", "normalize"]

normalize = normalize_rows


@triton.jit(do_not_specialize=UNSPECIALIZED)
def class_sums_kernel(
    u_ptr,  # [M, D_pad], float16 or float32
    temperature_ptr,  # [], float32
    ids_ptr,  # [M], int32
    partial_ptr,  # [3, SPLITS, R], float32: references, sums, positives
    row_offset,
    rows,
    total,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BM rows against one split of the M keys.

    Σ exp2(x_ij - reference) over j ≠ i, where the reference is 0, or the maximum for low
    temperatures; and Σ x_ij over the positives. Reads the row tile once and M / SPLITS rows of û
    from L2, writes three floats per row.
    """
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    first = tl.program_id(0) * BLOCK_M
    row = row_offset + first
    row_end = tl.minimum(row + BLOCK_M, row_offset + rows)
    begin, end, plain, lo, hi = share(row, row_end, total, split, splits, BLOCK_N)
    q = query_tile(u_ptr, row, row_end, PADDED, BLOCK_M, BLOCK_D)

    r = first + tl.arange(0, BLOCK_M)
    i = row_offset + r
    own = tl.load(ids_ptr + i, mask=r < rows, other=-1)
    low = needs_maximum(temperature_ptr)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    positive = tl.zeros([BLOCK_M], tl.float32)
    for PASS in tl.static_range(PASSES):
        first_tile, last_tile = part_of_pass(PASS, low, begin, end, plain)
        for t in range(first_tile, last_tile):
            key = key_of(PASS, t, plain, lo, hi, total, BLOCK_N)
            j = key + tl.arange(0, BLOCK_N)
            ids = tl.load(ids_ptr + j, mask=(j < total) | (PASS == PLAIN_PASS), other=-2)
            x, _ = scores(
                u_ptr,
                queries=q,
                row=row,
                row_end=row_end,
                key=key,
                key_end=total,
                PADDED=PADDED,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                BLOCK_D=BLOCK_D,
                PRECISION=PRECISION,
                MASKED=PASS != PLAIN_PASS,
            )
            same = own[:, None] == ids[None, :]
            if PASS != PLAIN_PASS:
                same &= i[:, None] != j[None, :]
                x = exclude(x, i, j, total)
            positive += tl.sum(tl.where(same, x, 0.0), axis=1)
            t_top, t_sums, _ = sums_along(x, 1, PASS == LOW_PASS, False)
            top, sums, _ = merge(top, sums, sums, t_top, t_sums, t_sums, PASS == LOW_PASS, False)

    plane = splits * tl.cast(rows, tl.int64)
    out = partial_ptr + tl.cast(split, tl.int64) * rows + r
    tl.store(out, tl.where(low, top, 0.0), mask=r < rows)
    tl.store(out + plane, sums, mask=r < rows)
    tl.store(out + 2 * plane, positive, mask=r < rows)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def class_losses_kernel(
    partial_ptr,  # [3, SPLITS, R], float32, from class_sums_kernel
    inverse_count_ptr,  # [M], float32
    loss_ptr,  # [R], float32
    lse_ptr,  # [R], float32, natural
    row_offset,
    rows,
    splits,
    BLOCK_R: tl.constexpr,
):
    """One program: BR rows; loss_i = lse_i - mean of s_ij over the positives j; 0 without any.

    Reads three floats per split and row, writes two per row.
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < rows
    plane = splits * tl.cast(rows, tl.int64)
    top = tl.full([BLOCK_R], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    positive = tl.zeros([BLOCK_R], tl.float32)
    for split in range(splits):
        at = partial_ptr + split * tl.cast(rows, tl.int64) + r
        t = tl.load(at, mask=inside, other=LOWEST)
        sums = tl.load(at + plane, mask=inside, other=0.0)
        top, total, _ = merge(top, total, total, t, sums, sums, True, False)
        positive += tl.load(at + 2 * plane, mask=inside, other=0.0)
    lse = (top + tl.log2(total)) * LN_2
    inverse = tl.load(inverse_count_ptr + row_offset + r, mask=inside, other=0.0)
    loss = tl.where(inverse > 0.0, lse - positive * inverse * LN_2, 0.0)
    tl.store(loss_ptr + r, loss, mask=inside)
    tl.store(lse_ptr + r, lse, mask=inside)


def forward(
    u_all: Tensor,
    ids: Tensor,
    inverse_count: Tensor,
    temperature: Tensor,
    row_offset: int,
    rows: int,
) -> tuple[Tensor, Tensor]:
    """Losses of `rows` rows from `row_offset` on, against all rows of û [M, D_pad].

    Returns:
        loss: [rows], float32, lse_i - mean of s_ij over the positives j; 0 without positives.
        lse: [rows], float32, log Σ_{j≠i} exp(s_ij).
    """
    total, padded = u_all.shape
    config, splits, _ = plan_for("class_sums", u_all, rows)
    sums = floats(temperature, 3, splits, rows)
    loss, lse = floats(temperature, rows), floats(temperature, rows)
    if rows == 0:
        return loss, lse
    with torch.cuda.device_of(u_all):
        class_sums_kernel[(cdiv(rows, config.block_m), splits)](
            u_ptr=u_all,
            temperature_ptr=temperature,
            ids_ptr=ids,
            partial_ptr=sums,
            row_offset=row_offset,
            rows=rows,
            total=total,
            BLOCK_N=config.block_n,
            **config.options(padded, dot_precision(u_all.dtype)),
        )
        class_losses_kernel[(cdiv(rows, WEIGHTS_BLOCK),)](
            partial_ptr=sums,
            inverse_count_ptr=inverse_count,
            loss_ptr=loss,
            lse_ptr=lse,
            row_offset=row_offset,
            rows=rows,
            splits=splits,
            BLOCK_R=WEIGHTS_BLOCK,
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
    padded = u_all.size(1)
    rows, dim = z.shape
    grad_z = z.new_empty((rows, dim))
    if rows == 0:
        return grad_z, torch.zeros_like(temperature)
    blocks = row_blocks(padded, finish_parts(z.dtype))
    programs = cdiv(rows, blocks.rows)
    counter, grad_temperature = make_counter(temperature), floats(temperature)
    with torch.cuda.device_of(u_all):
        weights, scale = row_weights(grad, lse_all, temperature, ids, inverse_count)
        plan = plan_for("class_gradient", u_all, rows)
        sums = weighted_sums(u_all, temperature, weights, counter, row_offset, rows, plan)
        finish_class_gradient_kernel[(programs,)](
            sums_ptr=sums,
            scale_ptr=scale,
            inv_norm_ptr=inv_norm,
            z_ptr=z,
            temperature_ptr=temperature,
            grad_z_ptr=grad_z,
            part_ptr=floats(temperature, programs),
            counter_ptr=counter,
            grad_temperature_ptr=grad_temperature,
            rows=rows,
            dim=dim,
            splits=len(sums),
            stride_n=z.stride(0),
            stride_d=z.stride(1),
            PADDED=padded,
            BLOCK_R=blocks.rows,
            BLOCK_D=blocks.columns,
            num_warps=blocks.warps,
            maxnreg=blocks.registers,
        )
    return grad_z, grad_temperature
