"""Σ_j W_ij û_j over the negatives of each row, by tiles, in one pass (Triton)."""

import triton
import triton.language as tl

from .nt_xent_tiles import (
    is_negative,
    load_rows,
    masked_key,
    needs_maximum,
    plain_key,
    query_tile,
    scores,
    share,
)


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


@triton.jit
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
    out = gradient_ptr + (split.to(tl.int64) * rows + r)[:, None] * padded + d[None, :]
    tl.store(out, acc, mask=(r < rows)[:, None] & (d < padded)[None, :])
