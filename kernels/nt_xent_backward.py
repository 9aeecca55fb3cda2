"""The gradient of NT-Xent: weights, one pass of tiles, and the way back to z and τ (Triton)."""

import triton
import triton.language as tl

from .normalize import UNSPECIALIZED
from .nt_xent_tiles import (
    LOG2_E,
    is_negative,
    load_rows,
    masked_key,
    needs_maximum,
    plain_key,
    query_tile,
    scores,
    share,
)

# W in [0, 2] is rounded to float16 for the tensor cores; this many binades keep 1e-8 normal.
WEIGHT_SHIFT = tl.constexpr(14.0)


@triton.jit
def _add_weighted(
    acc, w, u_ptr, keys, key, key_end, column, padded,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    WHOLE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + W û over BV features; a WHOLE tile of keys already holds them."""
    if WHOLE:
        values = keys
    else:
        values = load_rows(u_ptr, key, key_end, column, padded, BLOCK_N, BLOCK_V, MASKED, True)
    return tl.dot(w.to(values.dtype), values, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def gradient_kernel(
    u_ptr,  # [M, D_pad], float16 or float32
    temperature_ptr,  # [], float32
    factor_ptr,  # [M], float32: w_i exp2(shift - y_i); for low temperatures y_i - shift
    weight_ptr,  # [M], float32: w_i
    gradient_ptr,  # [SPLITS, R, D_pad], float32
    row_offset, rows, total, padded,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM rows × BV features × one split of the keys; Σ_j W_ij û_j over the negatives.

    W_ij = exp2(x_ij) (f_i + f_j), so one exponential serves both directions and W is symmetric:
    this one row pass is the whole gradient. Reads M / SPLITS rows of û from L2 and writes the
    tile of partial sums once.
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
    f_i = tl.load(factor_ptr + row_offset + r, mask=r < rows, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if needs_maximum(temperature_ptr):
        w_i = tl.load(weight_ptr + row_offset + r, mask=r < rows, other=0.0)
        for t in range(begin, end):
            key = tl.where(
                t < plain, plain_key(t, lo, hi, BLOCK_N),
                masked_key(t, plain, lo, hi, total, BLOCK_N),
            )  # fmt: skip
            f_j = tl.load(factor_ptr + key + n, mask=key + n < total, other=0.0)
            w_j = tl.load(weight_ptr + key + n, mask=key + n < total, other=0.0)
            x, keys = scores(
                u_ptr, q, row, row_end, key, total, padded, BLOCK_M, BLOCK_N, BLOCK_D,
                WHOLE, EVEN, True, PRECISION,
            )  # fmt: skip
            x = tl.where(is_negative(row, key, total, BLOCK_M, BLOCK_N), x, float("-inf"))
            w = w_i[:, None] * tl.exp2(x - f_i[:, None]) + w_j[None, :] * tl.exp2(x - f_j[None, :])
            acc = _add_weighted(
                acc, w, u_ptr, keys, key, total, v, padded, BLOCK_N, BLOCK_V,
                WHOLE, True, PRECISION,
            )  # fmt: skip
    else:
        for t in range(begin, tl.minimum(end, plain)):
            key = plain_key(t, lo, hi, BLOCK_N)
            f_j = tl.load(factor_ptr + key + n)
            x, keys = scores(
                u_ptr, q, row, row_end, key, total, padded, BLOCK_M, BLOCK_N, BLOCK_D,
                WHOLE, EVEN, False, PRECISION,
            )  # fmt: skip
            w = tl.exp2(x) * (f_i[:, None] + f_j[None, :])
            acc = _add_weighted(
                acc, w, u_ptr, keys, key, total, v, padded, BLOCK_N, BLOCK_V,
                WHOLE, False, PRECISION,
            )  # fmt: skip
        for t in range(tl.maximum(begin, plain), end):
            key = masked_key(t, plain, lo, hi, total, BLOCK_N)
            f_j = tl.load(factor_ptr + key + n, mask=key + n < total, other=0.0)
            x, keys = scores(
                u_ptr, q, row, row_end, key, total, padded, BLOCK_M, BLOCK_N, BLOCK_D,
                WHOLE, EVEN, True, PRECISION,
            )  # fmt: skip
            w = tl.exp2(x) * (f_i[:, None] + f_j[None, :])
            w = tl.where(is_negative(row, key, total, BLOCK_M, BLOCK_N), w, 0.0)
            acc = _add_weighted(
                acc, w, u_ptr, keys, key, total, v, padded, BLOCK_N, BLOCK_V,
                WHOLE, True, PRECISION,
            )  # fmt: skip

    d = v + tl.arange(0, BLOCK_V)
    out = gradient_ptr + (tl.cast(split, tl.int64) * rows + r)[:, None] * padded + d[None, :]
    tl.store(out, acc, mask=(r < rows)[:, None] & (d < padded)[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def weights_kernel(
    grad_ptr,  # [M], float32, any stride
    scale_ptr,  # [], float32: max |grad|, or grad itself if all are equal
    lse_ptr,  # [M], float32, natural
    temperature_ptr,  # [], float32
    factor_ptr,  # [M], float32
    weight_ptr,  # [M], float32
    total, grad_stride,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program: BR rows; w_i = grad_i / scale and the factor that gradient_kernel multiplies by.

    factor_i = w_i exp2(shift - y_i) with y = lse log2(e); for low temperatures y_i - shift.
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < total
    grad = tl.load(grad_ptr + r * grad_stride, mask=inside, other=0.0)
    scale = tl.load(scale_ptr)
    w = tl.where(scale == 0.0, 0.0, grad / scale)
    y = tl.load(lse_ptr + r, mask=inside, other=0.0) * LOG2_E - WEIGHT_SHIFT
    factor = tl.where(needs_maximum(temperature_ptr), y, w * tl.exp2(-y))
    tl.store(factor_ptr + r, factor, mask=inside)
    tl.store(weight_ptr + r, w, mask=inside)


@triton.jit
def _one_minus_exp(loss):
    """1 - exp(-loss) to float32 relative accuracy: the negatives' share of a row's softmax."""
    series = 1.0 - loss / 9.0
    for k in tl.static_range(8, 1, -1):
        series = 1.0 - loss / k * series
    return tl.where(loss < 0.5, loss * series, 1.0 - tl.exp(-loss))


@triton.jit
def _unit_block(z_ptr, pair, d, inside, dim, stride_n, stride_d, inv_norm):
    """u over a block of features, [BP, BD], float32."""
    offset = pair[:, None] * stride_n + d.to(tl.int64)[None, :] * stride_d
    z = tl.load(z_ptr + offset, mask=inside[:, None] & (d < dim)[None, :], other=0.0)
    return z.to(tl.float32) * inv_norm[:, None]


@triton.jit
def _partial_block(
    partial_ptr, row, d, inside, rows, dim, padded, splits,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum over the splits, in their order, [BP, BD]."""
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for split in range(splits):
        offset = (split * tl.cast(rows, tl.int64) + row)[:, None] * padded + d[None, :]
        mask = inside[:, None] & (d < dim)[None, :]
        total += tl.load(partial_ptr + offset, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=UNSPECIALIZED)
def finish_gradient_kernel(
    partial_ptr,  # [SPLITS, R, D_pad], float32, from gradient_kernel
    grad_ptr,  # [M], float32, any stride
    scale_ptr,  # [], float32
    loss_ptr,  # [R], float32
    inv_norm_ptr,  # [R], float32
    z1_ptr,  # [N, D], any strides
    z2_ptr,  # [N, D], any strides
    temperature_ptr,  # [], float32
    grad_z_ptr,  # [R, D], view-major
    grad_temperature_ptr,  # [programs], float32
    grad_scale,  # float32: multiplies grad
    row_offset, rows, dim, padded, splits, grad_stride,
    stride_1n, stride_1d, stride_2n, stride_2d,
    DECOUPLED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BP pairs; adds the positives, and goes from u to z and to the temperature.

    G_i = k Σ_j W_ij û_j + v (u_p(i) - u_i) with v = W_i,p(i) / τ, and
    dz_i = (G_i - u_i <u_i, G_i>) / |z_i|: the projection drops the added u_i, and the difference
    keeps its digits when the views are aligned.
    Reads the partial sums and z twice (the second time from cache), writes dz once.
    """
    pairs = rows // 2
    pair = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)  # [BP]
    inside = pair < pairs
    row = 2 * pair
    column = tl.arange(0, BLOCK_D)
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

    radial_1 = tl.zeros([BLOCK_P], tl.float32)
    radial_2 = tl.zeros([BLOCK_P], tl.float32)
    squares = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = start + column
        u_1 = _unit_block(z1_ptr, pair, d, inside, dim, stride_1n, stride_1d, inv_1)
        u_2 = _unit_block(z2_ptr, pair, d, inside, dim, stride_2n, stride_2d, inv_2)
        g_1 = _partial_block(
            partial_ptr, row, d, inside, rows, dim, padded, splits, BLOCK_P, BLOCK_D
        )
        g_2 = _partial_block(
            partial_ptr, row + 1, d, inside, rows, dim, padded, splits, BLOCK_P, BLOCK_D
        )
        radial_1 += tl.sum(u_1 * (k * g_1 + v[:, None] * (u_2 - u_1)), axis=1)
        radial_2 += tl.sum(u_2 * (k * g_2 + v[:, None] * (u_1 - u_2)), axis=1)
        squares += tl.sum(u_1 * u_1 + u_2 * u_2, axis=1)

    # <u_i, dL/du_i> includes the v u_i that G_i leaves out.
    total = tl.sum(radial_1 + radial_2 + v * squares, axis=0)
    tl.store(grad_temperature_ptr + tl.program_id(0), -0.5 / temperature * total)

    # A norm below the eps of torch.nn.functional.normalize is a constant: no projection.
    radial_1 = tl.where(inv_1 >= 1e12, -v, radial_1)
    radial_2 = tl.where(inv_2 >= 1e12, -v, radial_2)
    out = grad_z_ptr + pair[:, None] * dim
    for start in range(0, dim, BLOCK_D):
        d = start + column
        mask = inside[:, None] & (d < dim)[None, :]
        u_1 = _unit_block(z1_ptr, pair, d, inside, dim, stride_1n, stride_1d, inv_1)
        u_2 = _unit_block(z2_ptr, pair, d, inside, dim, stride_2n, stride_2d, inv_2)
        g_1 = _partial_block(
            partial_ptr, row, d, inside, rows, dim, padded, splits, BLOCK_P, BLOCK_D
        )
        g_2 = _partial_block(
            partial_ptr, row + 1, d, inside, rows, dim, padded, splits, BLOCK_P, BLOCK_D
        )
        g_1 = k * g_1 + v[:, None] * (u_2 - u_1) - radial_1[:, None] * u_1
        g_2 = k * g_2 + v[:, None] * (u_1 - u_2) - radial_2[:, None] * u_2
        dtype = grad_z_ptr.dtype.element_ty
        tl.store(out + d[None, :], (inv_1[:, None] * g_1).to(dtype), mask=mask)
        second = out + tl.cast(pairs, tl.int64) * dim + d[None, :]
        tl.store(second, (inv_2[:, None] * g_2).to(dtype), mask=mask)
