"""Supervised contrastive loss by tiles: any rows may be positives of each other (Triton).

As nt_xent_forward.py and nt_xent_backward.py, for rows in any order and number: the softmax runs
over all rows but the row itself, and the positives of row i are the other rows with its id.
"""

import triton
import triton.language as tl

from .normalize import UNSPECIALIZED
from .nt_xent_backward import WEIGHT_SHIFT, _add_weighted
from .nt_xent_forward import _online
from .nt_xent_losses import LN_2
from .nt_xent_tiles import (
    LOG2_E,
    LOWEST,
    is_other,
    masked_key,
    needs_maximum,
    plain_key,
    query_tile,
    scores,
    share,
)


@triton.jit
def _positives(x, own, ids):
    """Σ x over the keys of the row's class, [BM]."""
    return tl.sum(tl.where(own[:, None] == ids[None, :], x, 0.0), axis=1)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def class_sums_kernel(
    u_ptr,  # [M, D_pad], float16 or float32
    temperature_ptr,  # [], float32
    ids_ptr,  # [M], int32
    partial_ptr,  # [3, SPLITS, R], float32: references, sums, positives
    row_offset, rows, total, padded,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM rows against one split of the M keys.

    Over j ≠ i: Σ exp2(x_ij - reference), with reference 0 or, for low temperatures, the maximum,
    and Σ x over the positives. Traffic as negatives_kernel, with three floats per row.
    """
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    first = tl.program_id(0) * BLOCK_M
    row = row_offset + first
    row_end = tl.minimum(row + BLOCK_M, row_offset + rows)
    begin, end, plain, lo, hi = share(row, row_end, total, split, splits, BLOCK_N)
    q = query_tile(u_ptr, row, row_end, padded, BLOCK_M, BLOCK_D, WHOLE, EVEN)

    r = first + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    out = partial_ptr + tl.cast(split, tl.int64) * rows + r
    own = tl.load(ids_ptr + row_offset + r, mask=r < rows, other=-1)
    sums = tl.zeros([BLOCK_M], tl.float32)
    positive = tl.zeros([BLOCK_M], tl.float32)
    if needs_maximum(temperature_ptr):
        top = tl.full([BLOCK_M], LOWEST, tl.float32)
        for t in range(begin, end):
            key = tl.where(
                t < plain, plain_key(t, lo, hi, BLOCK_N),
                masked_key(t, plain, lo, hi, total, BLOCK_N),
            )  # fmt: skip
            ids = tl.load(ids_ptr + key + n, mask=key + n < total, other=-2)
            x, _ = scores(
                u_ptr, q, row, row_end, key, total, padded, BLOCK_M, BLOCK_N, BLOCK_D,
                WHOLE, EVEN, True, PRECISION,
            )  # fmt: skip
            other = is_other(row, key, total, BLOCK_M, BLOCK_N)
            positive += _positives(tl.where(other, x, 0.0), own, ids)
            top, sums = _online(x, other, top, sums)
        tl.store(out, top, mask=r < rows)
    else:
        for t in range(begin, tl.minimum(end, plain)):
            key = plain_key(t, lo, hi, BLOCK_N)
            ids = tl.load(ids_ptr + key + n)
            x, _ = scores(
                u_ptr, q, row, row_end, key, total, padded, BLOCK_M, BLOCK_N, BLOCK_D,
                WHOLE, EVEN, False, PRECISION,
            )  # fmt: skip
            positive += _positives(x, own, ids)
            sums += tl.sum(tl.exp2(x), axis=1)
        for t in range(tl.maximum(begin, plain), end):
            key = masked_key(t, plain, lo, hi, total, BLOCK_N)
            ids = tl.load(ids_ptr + key + n, mask=key + n < total, other=-2)
            x, _ = scores(
                u_ptr, q, row, row_end, key, total, padded, BLOCK_M, BLOCK_N, BLOCK_D,
                WHOLE, EVEN, True, PRECISION,
            )  # fmt: skip
            other = is_other(row, key, total, BLOCK_M, BLOCK_N)
            positive += _positives(tl.where(other, x, 0.0), own, ids)
            sums += tl.sum(tl.where(other, tl.exp2(x), 0.0), axis=1)
        tl.store(out, tl.zeros([BLOCK_M], tl.float32), mask=r < rows)

    plane = tl.cast(splits, tl.int64) * rows
    tl.store(out + plane, sums, mask=r < rows)
    tl.store(out + 2 * plane, positive, mask=r < rows)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def class_losses_kernel(
    partial_ptr,  # [3, SPLITS, R], float32, from class_sums_kernel
    inverse_count_ptr,  # [M], float32
    loss_ptr,  # [R], float32
    lse_ptr,  # [R], float32, natural
    row_offset, rows, splits, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program: BR rows; loss_i = lse_i - mean of s over the positives, 0 without any."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < rows
    plane = tl.cast(splits, tl.int64) * rows
    top = tl.full([BLOCK_R], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    positive = tl.zeros([BLOCK_R], tl.float32)
    for split in range(splits):
        at = partial_ptr + split * tl.cast(rows, tl.int64) + r
        split_top = tl.load(at, mask=inside, other=LOWEST)
        new_top = tl.maximum(top, split_top)
        total *= tl.exp2(top - new_top)
        total += tl.load(at + plane, mask=inside, other=0.0) * tl.exp2(split_top - new_top)
        positive += tl.load(at + 2 * plane, mask=inside, other=0.0)
        top = new_top
    lse = (top + tl.log2(total)) * LN_2
    inverse = tl.load(inverse_count_ptr + row_offset + r, mask=inside, other=0.0)
    loss = tl.where(inverse > 0.0, lse - positive * inverse * LN_2, 0.0)
    tl.store(loss_ptr + r, loss, mask=inside)
    tl.store(lse_ptr + r, lse, mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def class_weights_kernel(
    grad_ptr,  # [M], float32, any stride
    scale_ptr,  # [], float32: max |grad|
    lse_ptr,  # [M], float32, natural
    inverse_count_ptr,  # [M], float32
    temperature_ptr,  # [], float32
    factor_ptr,  # [M], float32: w_i exp2(shift - y_i); for low temperatures y_i - shift
    weight_ptr,  # [M], float32: w_i = grad_i / scale, 0 without positives
    share_ptr,  # [M], float32: w_i / positives, times exp2(shift)
    total, grad_stride,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program: BR rows; what class_gradient_kernel multiplies by."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < total
    inverse = tl.load(inverse_count_ptr + r, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + r * grad_stride, mask=inside, other=0.0)
    scale = tl.load(scale_ptr)
    w = tl.where(inverse == 0.0, 0.0, tl.where(scale == 0.0, 0.0, grad / scale))
    y = tl.load(lse_ptr + r, mask=inside, other=0.0) * LOG2_E - WEIGHT_SHIFT
    factor = tl.where(w == 0.0, 0.0, w * tl.exp2(-y))
    factor = tl.where(needs_maximum(temperature_ptr), y, factor)
    tl.store(factor_ptr + r, factor, mask=inside)
    tl.store(weight_ptr + r, w, mask=inside)
    tl.store(share_ptr + r, w * inverse * tl.exp2(WEIGHT_SHIFT), mask=inside)


@triton.jit
def _less_shares(w, own, ids, share_i, share_j):
    """w, less what the two rows owe each other where they are positives, [BM, BN]."""
    positive = own[:, None] == ids[None, :]
    return w - tl.where(positive, share_i[:, None] + share_j[None, :], 0.0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def class_gradient_kernel(
    u_ptr,  # [M, D_pad], float16 or float32
    temperature_ptr,  # [], float32
    ids_ptr,  # [M], int32
    factor_ptr,  # [M], float32
    weight_ptr,  # [M], float32
    share_ptr,  # [M], float32
    gradient_ptr,  # [SPLITS, R, D_pad], float32
    row_offset, rows, total, padded,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM rows × BV features × one split of the keys; Σ_j W_ij û_j.

    W_ij = w_i p_ij + w_j p_ji, less w_i / positives_i + w_j / positives_j where j is a positive:
    the difference is taken before W meets the tensor cores. Traffic as gradient_kernel.
    """
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    first = tl.program_id(0) * BLOCK_M
    row = row_offset + first
    row_end = tl.minimum(row + BLOCK_M, row_offset + rows)
    begin, end, plain, lo, hi = share(row, row_end, total, split, splits, BLOCK_N)
    q = query_tile(u_ptr, row, row_end, padded, BLOCK_M, BLOCK_D, WHOLE, EVEN)

    r = first + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    v = tl.program_id(2) * BLOCK_V
    i = row_offset + r
    own = tl.load(ids_ptr + i, mask=r < rows, other=-1)
    f_i = tl.load(factor_ptr + i, mask=r < rows, other=0.0)
    share_i = tl.load(share_ptr + i, mask=r < rows, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if needs_maximum(temperature_ptr):
        w_i = tl.load(weight_ptr + i, mask=r < rows, other=0.0)
        for t in range(begin, end):
            key = tl.where(
                t < plain, plain_key(t, lo, hi, BLOCK_N),
                masked_key(t, plain, lo, hi, total, BLOCK_N),
            )  # fmt: skip
            j = key + n
            ids = tl.load(ids_ptr + j, mask=j < total, other=-2)
            f_j = tl.load(factor_ptr + j, mask=j < total, other=0.0)
            w_j = tl.load(weight_ptr + j, mask=j < total, other=0.0)
            share_j = tl.load(share_ptr + j, mask=j < total, other=0.0)
            x, keys = scores(
                u_ptr, q, row, row_end, key, total, padded, BLOCK_M, BLOCK_N, BLOCK_D,
                WHOLE, EVEN, True, PRECISION,
            )  # fmt: skip
            w = w_i[:, None] * tl.exp2(x - f_i[:, None]) + w_j[None, :] * tl.exp2(x - f_j[None, :])
            w = _less_shares(w, own, ids, share_i, share_j)
            w = tl.where(is_other(row, key, total, BLOCK_M, BLOCK_N), w, 0.0)
            acc = _add_weighted(
                acc, w, u_ptr, keys, key, total, v, padded, BLOCK_N, BLOCK_V,
                WHOLE, True, PRECISION,
            )  # fmt: skip
    else:
        for t in range(begin, tl.minimum(end, plain)):
            key = plain_key(t, lo, hi, BLOCK_N)
            ids = tl.load(ids_ptr + key + n)
            f_j = tl.load(factor_ptr + key + n)
            share_j = tl.load(share_ptr + key + n)
            x, keys = scores(
                u_ptr, q, row, row_end, key, total, padded, BLOCK_M, BLOCK_N, BLOCK_D,
                WHOLE, EVEN, False, PRECISION,
            )  # fmt: skip
            w = tl.exp2(x) * (f_i[:, None] + f_j[None, :])
            w = _less_shares(w, own, ids, share_i, share_j)
            acc = _add_weighted(
                acc, w, u_ptr, keys, key, total, v, padded, BLOCK_N, BLOCK_V,
                WHOLE, False, PRECISION,
            )  # fmt: skip
        for t in range(tl.maximum(begin, plain), end):
            key = masked_key(t, plain, lo, hi, total, BLOCK_N)
            j = key + n
            ids = tl.load(ids_ptr + j, mask=j < total, other=-2)
            f_j = tl.load(factor_ptr + j, mask=j < total, other=0.0)
            share_j = tl.load(share_ptr + j, mask=j < total, other=0.0)
            x, keys = scores(
                u_ptr, q, row, row_end, key, total, padded, BLOCK_M, BLOCK_N, BLOCK_D,
                WHOLE, EVEN, True, PRECISION,
            )  # fmt: skip
            w = _less_shares(tl.exp2(x) * (f_i[:, None] + f_j[None, :]), own, ids, share_i, share_j)
            w = tl.where(is_other(row, key, total, BLOCK_M, BLOCK_N), w, 0.0)
            acc = _add_weighted(
                acc, w, u_ptr, keys, key, total, v, padded, BLOCK_N, BLOCK_V,
                WHOLE, True, PRECISION,
            )  # fmt: skip

    d = v + tl.arange(0, BLOCK_V)
    out = gradient_ptr + (tl.cast(split, tl.int64) * rows + r)[:, None] * padded + d[None, :]
    tl.store(out, acc, mask=(r < rows)[:, None] & (d < padded)[None, :])


@triton.jit
def _unit_and_gradient(
    partial_ptr, z_ptr, row, d, inside, rows, dim, padded, splits, stride_n, stride_d, inv, k,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of features of u and of dL/du, [BR, BD]."""
    mask = inside[:, None] & (d < dim)[None, :]
    offset = row[:, None] * stride_n + d.to(tl.int64)[None, :] * stride_d
    u = tl.load(z_ptr + offset, mask=mask, other=0.0).to(tl.float32) * inv[:, None]
    g = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for split in range(splits):
        at = (split * tl.cast(rows, tl.int64) + row)[:, None] * padded + d[None, :]
        g += tl.load(partial_ptr + at, mask=mask, other=0.0)
    return u, k * g


@triton.jit(do_not_specialize=UNSPECIALIZED)
def finish_class_gradient_kernel(
    partial_ptr,  # [SPLITS, R, D_pad], float32, from class_gradient_kernel
    scale_ptr,  # [], float32
    inv_norm_ptr,  # [R], float32
    z_ptr,  # [R, D], any strides
    temperature_ptr,  # [], float32
    grad_z_ptr,  # [R, D]
    grad_temperature_ptr,  # [programs], float32
    rows, dim, padded, splits, stride_n, stride_d,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BR rows; dz_i = (G_i - u_i <u_i, G_i>) / |z_i|, and their part of dτ.

    Reads the partial sums and z twice (the second time from cache), writes dz once.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BR]
    inside = row < rows
    column = tl.arange(0, BLOCK_D)
    temperature = tl.load(temperature_ptr)
    k = tl.load(scale_ptr) * tl.exp2(-WEIGHT_SHIFT) / tl.sqrt(temperature * LOG2_E)
    inv = tl.load(inv_norm_ptr + row, mask=inside, other=1.0)
    radial = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, dim, BLOCK_D):
        u, g = _unit_and_gradient(
            partial_ptr, z_ptr, row, start + column, inside, rows, dim, padded, splits, stride_n,
            stride_d, inv, k, BLOCK_R, BLOCK_D,
        )  # fmt: skip
        radial += tl.sum(u * g, axis=1)
    tl.store(grad_temperature_ptr + tl.program_id(0), -0.5 / temperature * tl.sum(radial, axis=0))
    # A norm below the eps of torch.nn.functional.normalize is a constant: no projection.
    radial = tl.where(inv >= 1e12, 0.0, radial)
    for start in range(0, dim, BLOCK_D):
        d = start + column
        u, g = _unit_and_gradient(
            partial_ptr, z_ptr, row, d, inside, rows, dim, padded, splits, stride_n, stride_d, inv,
            k, BLOCK_R, BLOCK_D,
        )  # fmt: skip
        grad = (inv[:, None] * (g - radial[:, None] * u)).to(grad_z_ptr.dtype.element_ty)
        mask = inside[:, None] & (d < dim)[None, :]
        tl.store(grad_z_ptr + row[:, None] * dim + d[None, :], grad, mask=mask)
