"""The gradients of NT-Xent and of the supervised loss: weights, tiles, and back to z (Triton)."""

import triton
import triton.language as tl

from .normalize import UNSPECIALIZED
from .nt_xent_forward import WEIGHT_SHIFT, gradient_factor
from .nt_xent_tiles import (
    LOG2_E,
    LOW_PASS,
    LOWEST,
    PASSES,
    PLAIN_PASS,
    add_up,
    exclude,
    key_of,
    load_rows,
    needs_maximum,
    part_of_pass,
    query_tile,
    reset,
    scores,
    share,
)


@triton.jit
def row_terms(factor_ptr, weight_ptr, ids_ptr, share_ptr, i, end, MASKED: tl.constexpr):
    """Factor, weight, class and share of rows i. Without their tensors the weight is 1, and class
    and share are not used."""
    inside = (i < end) | (not MASKED)
    factor = tl.load(factor_ptr + i, mask=inside, other=0.0)
    weight = tl.full(i.shape, 1.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + i, mask=inside, other=0.0)
    ids, class_share = i, factor
    if ids_ptr is not None:
        ids = tl.load(ids_ptr + i, mask=inside, other=-1)
        class_share = tl.load(share_ptr + i, mask=inside, other=0.0)
    return factor, weight, ids, class_share


@triton.jit
def pair_weights(
    x,
    f_i,
    f_j,
    w_i,
    w_j,
    ids_i,
    ids_j,
    share_i,
    share_j,
    MASKED: tl.constexpr,
    LOW: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """2^shift W_ij, [BM, BN]: the weight of û_j in the gradient of û_i.

    W_ij = exp2(x_ij) (f_i + f_j), one exponential per pair. For low temperatures (LOW):
    W_ij = w_i exp2(x_ij - f_i) + w_j exp2(x_ij - f_j). With classes, share_i + share_j is
    subtracted from the weights of positives. For aligned views the difference is small. It is taken
    here, in float32, before W is rounded for the tensor cores.
    """
    if LOW:
        w = w_i[:, None] * tl.exp2(x - f_i[:, None]) + w_j[None, :] * tl.exp2(x - f_j[None, :])
    else:
        w = tl.exp2(x) * (f_i[:, None] + f_j[None, :])
    if CLASSES:
        positive = ids_i[:, None] == ids_j[None, :]
        w -= tl.where(positive, share_i[:, None] + share_j[None, :], 0.0)
    if MASKED:
        w = tl.where(x == LOWEST, 0.0, w)
    return w


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gradient_kernel(
    u_ptr,  # [M, D_pad], float16 or float32
    temperature_ptr,  # [], float32
    factor_ptr,  # [M], float32, of gradient_factor
    weight_ptr,  # [M], float32: w_i; None: all are 1
    ids_ptr,  # [M], int32: classes; None: pairs
    share_ptr,  # [M], float32: w_i / positives of i, times 2^shift; None without classes
    sums_ptr,  # [SPLITS, R, D_pad], float32
    counter_ptr,  # [], int32, becomes 0
    row_offset,
    rows,
    total,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BM rows against one split of the keys; Σ_j W_ij û_j over all features.

    j runs over the negatives; with classes over all other rows. W is symmetric, so this one pass
    over the rows is the whole gradient: loss_i and loss_j depend on x_ij by one exponential. Reads
    M / SPLITS rows of û from L2 and writes the tile of partial sums once.
    """
    CLASSES: tl.constexpr = ids_ptr is not None
    # A row's whole pair is excluded, rows with the same i >> 1; with classes only the row itself.
    SHIFT: tl.constexpr = 0 if CLASSES else 1
    # The pass for low temperatures needs the most registers and is rare. With large tiles it loads
    # none ahead, and reads again what it could keep. Triton 3.6 spills otherwise, and copies the
    # tiles of the other passes in narrow pieces.
    LARGE: tl.constexpr = BLOCK_M * BLOCK_N > 64 * 128
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    first = tl.program_id(0) * BLOCK_M
    row = row_offset + first
    row_end = tl.minimum(row + BLOCK_M, row_offset + rows)
    begin, end, plain, lo, hi = share(row, row_end, total, split, splits, BLOCK_N)
    q = query_tile(u_ptr, row, row_end, PADDED, BLOCK_M, BLOCK_D)
    reset(counter_ptr)

    i = row + tl.arange(0, BLOCK_M)
    f_i, w_i, ids_i, share_i = row_terms(
        factor_ptr, weight_ptr, ids_ptr, share_ptr, i, row_end, MASKED=True
    )
    low = needs_maximum(temperature_ptr)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for PASS in tl.static_range(PASSES):
        first_tile, last_tile = part_of_pass(PASS, low, begin, end, plain)
        for t in tl.range(
            first_tile,
            last_tile,
            num_stages=1 if PASS == LOW_PASS and LARGE else None,
            disable_licm=PASS == LOW_PASS and LARGE,
        ):
            key = key_of(PASS, t, plain, lo, hi, total, BLOCK_N)
            j = key + tl.arange(0, BLOCK_N)
            if PASS == LOW_PASS and LARGE:
                f_i, w_i, ids_i, share_i = row_terms(
                    factor_ptr, weight_ptr, ids_ptr, share_ptr, i, row_end, MASKED=True
                )
            f_j, w_j, ids_j, share_j = row_terms(
                factor_ptr, weight_ptr, ids_ptr, share_ptr, j, total, MASKED=PASS != PLAIN_PASS
            )
            x, keys = scores(
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
            if PASS != PLAIN_PASS:
                x = exclude(x, i >> SHIFT, j >> SHIFT, tl.cdiv(total, SHIFT + 1))
            w = pair_weights(
                x,
                f_i=f_i,
                f_j=f_j,
                w_i=w_i,
                w_j=w_j,
                ids_i=ids_i,
                ids_j=ids_j,
                share_i=share_i,
                share_j=share_j,
                MASKED=PASS != PLAIN_PASS,
                LOW=PASS == LOW_PASS,
                CLASSES=CLASSES,
            )
            if BLOCK_D >= PADDED:
                values = keys
            else:
                values = load_rows(
                    u_ptr, key, total, 0, PADDED, BLOCK_N, BLOCK_V, PASS != PLAIN_PASS
                )
            acc = tl.dot(w.to(values.dtype), values, acc, input_precision=PRECISION)

    r = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_V)
    out = sums_ptr + (tl.cast(split, tl.int64) * rows + r)[:, None] * PADDED + d[None, :]
    tl.store(out, acc, mask=(r < rows)[:, None] & (d < PADDED)[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def weight_tiles_kernel(
    u_ptr,  # [M, D_pad], float16 or float32
    temperature_ptr,  # [], float32
    factor_ptr,  # as in gradient_kernel
    weight_ptr,
    ids_ptr,
    share_ptr,
    tiles_ptr,  # [R, M], û's dtype
    counter_ptr,  # [], int32, becomes 0
    row_offset,
    rows,
    total,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: a tile of W, BM rows × BN keys. A matrix product with û follows.

    For more features than gradient_kernel can hold. Reads BM + BN rows of û from L2 and writes the
    tile once.
    """
    CLASSES: tl.constexpr = ids_ptr is not None
    SHIFT: tl.constexpr = 0 if CLASSES else 1
    key = tl.program_id(0) * BLOCK_N
    first = tl.program_id(1) * BLOCK_M
    row = row_offset + first
    row_end = tl.minimum(row + BLOCK_M, row_offset + rows)
    reset(counter_ptr)
    i = row + tl.arange(0, BLOCK_M)
    j = key + tl.arange(0, BLOCK_N)
    x, _ = scores(
        u_ptr,
        queries=query_tile(u_ptr, row, row_end, PADDED, BLOCK_M, BLOCK_D),
        row=row,
        row_end=row_end,
        key=key,
        key_end=total,
        PADDED=PADDED,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_D=BLOCK_D,
        PRECISION=PRECISION,
        MASKED=True,
    )
    x = exclude(x, i >> SHIFT, j >> SHIFT, tl.cdiv(total, SHIFT + 1))
    f_i, w_i, ids_i, share_i = row_terms(
        factor_ptr, weight_ptr, ids_ptr, share_ptr, i, row_end, MASKED=True
    )
    f_j, w_j, ids_j, share_j = row_terms(
        factor_ptr, weight_ptr, ids_ptr, share_ptr, j, total, MASKED=True
    )
    if needs_maximum(temperature_ptr):
        w = pair_weights(
            x, f_i, f_j, w_i, w_j, ids_i, ids_j, share_i, share_j,
            MASKED=True, LOW=True, CLASSES=CLASSES,
        )  # fmt: skip
    else:
        w = pair_weights(
            x, f_i, f_j, w_i, w_j, ids_i, ids_j, share_i, share_j,
            MASKED=True, LOW=False, CLASSES=CLASSES,
        )  # fmt: skip
    r = first + tl.arange(0, BLOCK_M)
    out = tiles_ptr + r.to(tl.int64)[:, None] * total + j[None, :]
    mask = (r < rows)[:, None] & (j < total)[None, :]
    tl.store(out, w.to(tiles_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def weights_kernel(
    grad_ptr,  # [M], float32, any stride
    lse_ptr,  # [M], float32, natural
    inverse_count_ptr,  # [M], float32: 1 / positives, 0 without; None without classes
    temperature_ptr,  # [], float32
    factor_ptr,  # [M], float32
    weight_ptr,  # [M], float32
    share_ptr,  # [M], float32; None without classes
    scale_ptr,  # [], float32: max |grad|
    total,
    grad_stride,
    BLOCK_R: tl.constexpr,
):
    """One program: BR rows; w_i = grad_i / max |grad|, and factor and share for gradient_kernel.

    With classes w_i is 0 for rows without positives. Each program computes the maximum itself: it
    reads grad [M] from L2, which is cheaper than one more launch. Writes 2 floats per row, 3 with
    classes.
    """
    n = tl.arange(0, BLOCK_R)
    largest = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, total, BLOCK_R):
        r = (first + n).to(tl.int64)
        grad = tl.load(grad_ptr + r * grad_stride, mask=r < total, other=0.0)
        largest = tl.maximum(largest, tl.abs(grad))
    scale = tl.max(largest, axis=0)
    tl.store(scale_ptr, scale, mask=tl.program_id(0) == 0)

    r = tl.program_id(0).to(tl.int64) * BLOCK_R + n
    inside = r < total
    grad = tl.load(grad_ptr + r * grad_stride, mask=inside, other=0.0)
    weight = tl.where(scale == 0.0, grad, grad / scale)
    if inverse_count_ptr is not None:
        inverse = tl.load(inverse_count_ptr + r, mask=inside, other=0.0)
        weight = tl.where(inverse == 0.0, 0.0, weight)
        tl.store(share_ptr + r, weight * inverse * tl.exp2(WEIGHT_SHIFT), mask=inside)
    lse = tl.load(lse_ptr + r, mask=inside, other=0.0)
    factor = gradient_factor(lse, weight, needs_maximum(temperature_ptr))
    tl.store(factor_ptr + r, factor, mask=inside)
    tl.store(weight_ptr + r, weight, mask=inside)


@triton.jit
def _one_minus_exp(loss):
    """1 - exp(-loss) to float32 relative accuracy: the negatives' share of a row's softmax."""
    series = 1.0 - loss / 9.0
    for k in tl.static_range(8, 1, -1):
        series = 1.0 - loss / k * series
    return tl.where(loss < 0.5, loss * series, 1.0 - tl.exp(-loss))


@triton.jit
def unit_rows(z_ptr, row, d, inside, dim, stride_n, stride_d, inv_norm):
    """The rows of u = z / |z|, [BR, BD], float32."""
    offset = row[:, None] * stride_n + d.to(tl.int64)[None, :] * stride_d
    z = tl.load(z_ptr + offset, mask=inside[:, None] & (d < dim)[None, :], other=0.0)
    return z.to(tl.float32) * inv_norm[:, None]


@triton.jit
def sum_splits(
    sums_ptr,
    row,
    d,
    inside,
    rows,
    dim,
    splits,
    PADDED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sum over the splits, in their order, [BR, BD]."""
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for split in range(splits):
        at = sums_ptr + (split * tl.cast(rows, tl.int64) + row)[:, None] * PADDED + d[None, :]
        total += tl.load(at, mask=inside[:, None] & (d < dim)[None, :], other=0.0)
    return total


@triton.jit(do_not_specialize=UNSPECIALIZED)
def finish_gradient_kernel(
    sums_ptr,  # [SPLITS, R, D_pad], float32, from gradient_kernel
    grad_ptr,  # [M], float32, any stride
    scale_ptr,  # [], float32: max |grad|
    loss_ptr,  # [R], float32
    inv_norm_ptr,  # [R], float32
    z1_ptr,  # [N, D], any strides
    z2_ptr,  # [N, D], any strides
    temperature_ptr,  # [], float32
    grad_z_ptr,  # [R, D], view-major
    part_ptr,  # [programs], float32
    counter_ptr,  # [], int32, 0
    grad_temperature_ptr,  # [], float32
    grad_scale,  # float32: multiplies grad
    row_offset,
    rows,
    dim,
    splits,
    grad_stride,
    stride_1n,
    stride_1d,
    stride_2n,
    stride_2d,
    PADDED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BP pairs; adds the positives, and goes from u to z and to the temperature.

        G_i  = k Σ_j W_ij û_j + v (u_p(i) - u_i)     with v = W_i,p(i) / τ
        dz_i = (G_i - u_i <u_i, G_i>) / |z_i|

    The derivative has v u_p(i). The projection removes multiples of u_i, so v u_i may be
    subtracted: for aligned views the difference keeps its digits.
    Reads the partial sums and z once, writes dz once.
    """
    pairs = rows // 2
    pair = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BP]
    d = tl.arange(0, BLOCK_D)  # [BD]
    inside = pair < pairs
    row = 2 * pair
    temperature = tl.load(temperature_ptr)
    grad = grad_ptr + (row_offset + row) * grad_stride
    v_1 = tl.load(grad, mask=inside, other=0.0)
    v_2 = tl.load(grad + grad_stride, mask=inside, other=0.0)
    if not DECOUPLED:
        v_1 *= _one_minus_exp(tl.load(loss_ptr + row, mask=inside, other=0.0))
        v_2 *= _one_minus_exp(tl.load(loss_ptr + row + 1, mask=inside, other=0.0))
    v = -(v_1 + v_2) * grad_scale / temperature
    k = tl.load(scale_ptr) * grad_scale * tl.exp2(-WEIGHT_SHIFT) / tl.sqrt(temperature * LOG2_E)
    inv_1 = tl.load(inv_norm_ptr + row, mask=inside, other=1.0)
    inv_2 = tl.load(inv_norm_ptr + row + 1, mask=inside, other=1.0)

    u_1 = unit_rows(z1_ptr, pair, d, inside, dim, stride_1n, stride_1d, inv_1)
    u_2 = unit_rows(z2_ptr, pair, d, inside, dim, stride_2n, stride_2d, inv_2)
    g_1 = sum_splits(sums_ptr, row, d, inside, rows, dim, splits, PADDED, BLOCK_P, BLOCK_D)
    g_2 = sum_splits(sums_ptr, row + 1, d, inside, rows, dim, splits, PADDED, BLOCK_P, BLOCK_D)
    g_1 = k * g_1 + v[:, None] * (u_2 - u_1)
    g_2 = k * g_2 + v[:, None] * (u_1 - u_2)
    radial_1 = tl.sum(u_1 * g_1, axis=1)
    radial_2 = tl.sum(u_2 * g_2, axis=1)
    # G_i lacks v u_i, so <u_i, dL/du_i> = <u_i, G_i> + v |u_i|².
    squares = tl.sum(u_1 * u_1 + u_2 * u_2, axis=1)
    total = tl.sum(tl.where(inside, radial_1 + radial_2 + v * squares, 0.0), axis=0)

    # Below the eps of torch.nn.functional.normalize the norm is a constant: no projection.
    radial_1 = tl.where(inv_1 >= 1e12, -v, radial_1)
    radial_2 = tl.where(inv_2 >= 1e12, -v, radial_2)
    dz_1 = inv_1[:, None] * (g_1 - radial_1[:, None] * u_1)
    dz_2 = inv_2[:, None] * (g_2 - radial_2[:, None] * u_2)
    dtype = grad_z_ptr.dtype.element_ty
    mask = inside[:, None] & (d < dim)[None, :]
    out = grad_z_ptr + pair[:, None] * dim + d[None, :]
    tl.store(out, dz_1.to(dtype), mask=mask)
    tl.store(out + tl.cast(pairs, tl.int64) * dim, dz_2.to(dtype), mask=mask)
    add_up(total, part_ptr, counter_ptr, grad_temperature_ptr, -0.5 / temperature, 1024)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def finish_class_gradient_kernel(
    sums_ptr,  # [SPLITS, R, D_pad], float32, from gradient_kernel
    scale_ptr,  # [], float32: max |grad|
    inv_norm_ptr,  # [R], float32
    z_ptr,  # [R, D], any strides
    temperature_ptr,  # [], float32
    grad_z_ptr,  # [R, D]
    part_ptr,  # [programs], float32
    counter_ptr,  # [], int32, 0
    grad_temperature_ptr,  # [], float32
    rows,
    dim,
    splits,
    stride_n,
    stride_d,
    PADDED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BR rows; dz_i = (G_i - u_i <u_i, G_i>) / |z_i|, and their part of dτ.

    G_i = k Σ_j W_ij û_j, where j also runs over the positives. Reads the partial sums and z once,
    writes dz once.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BR]
    d = tl.arange(0, BLOCK_D)  # [BD]
    inside = row < rows
    temperature = tl.load(temperature_ptr)
    k = tl.load(scale_ptr) * tl.exp2(-WEIGHT_SHIFT) / tl.sqrt(temperature * LOG2_E)
    inv = tl.load(inv_norm_ptr + row, mask=inside, other=1.0)
    u = unit_rows(z_ptr, row, d, inside, dim, stride_n, stride_d, inv)
    g = k * sum_splits(sums_ptr, row, d, inside, rows, dim, splits, PADDED, BLOCK_R, BLOCK_D)
    radial = tl.sum(u * g, axis=1)
    total = tl.sum(radial, axis=0)
    # Below the eps of torch.nn.functional.normalize the norm is a constant: no projection.
    radial = tl.where(inv >= 1e12, 0.0, radial)
    dz = inv[:, None] * (g - radial[:, None] * u)
    mask = inside[:, None] & (d < dim)[None, :]
    out = grad_z_ptr + row[:, None] * dim + d[None, :]
    tl.store(out, dz.to(grad_z_ptr.dtype.element_ty), mask=mask)
    add_up(total, part_ptr, counter_ptr, grad_temperature_ptr, -0.5 / temperature, 1024)
