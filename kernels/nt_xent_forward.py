"""Σ exp over the negatives of each row, by tiles (Triton)."""

import triton
import triton.language as tl

from .normalize import UNSPECIALIZED
from .nt_xent_tiles import (
    EXPONENT_LIMIT,
    LOWEST,
    is_negative,
    is_other,
    masked_key,
    needs_maximum,
    plain_key,
    query_tile,
    scores,
    share,
)


@triton.jit
def _online(x, negative, top, total):
    """Running maximum and sum of exp2(x - maximum) over the negatives of each row."""
    x = tl.where(negative, x, float("-inf"))
    new_top = tl.maximum(top, tl.max(x, axis=1))
    total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(x - new_top[:, None]), axis=1)
    return new_top, total


@triton.jit(do_not_specialize=UNSPECIALIZED)
def negatives_kernel(
    u_ptr,  # [M, D_pad], float16 or float32
    temperature_ptr,  # [], float32
    sum_ptr,  # [SPLITS, R], float32
    top_ptr,  # [SPLITS, R], float32, written for low temperatures only
    row_offset, rows, total, padded,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM rows against one split of the M keys; Σ exp2(x_ij) over the negatives.

    Reads the row tile once and M / SPLITS rows of û from L2, writes one float32 per row.
    """
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    first = tl.program_id(0) * BLOCK_M
    row = row_offset + first
    row_end = tl.minimum(row + BLOCK_M, row_offset + rows)
    begin, end, plain, lo, hi = share(row, row_end, total, split, splits, BLOCK_N)
    q = query_tile(u_ptr, row, row_end, padded, BLOCK_M, BLOCK_D, WHOLE, EVEN)

    r = first + tl.arange(0, BLOCK_M)
    out = tl.cast(split, tl.int64) * rows + r
    sums = tl.zeros([BLOCK_M], tl.float32)
    if needs_maximum(temperature_ptr):
        top = tl.full([BLOCK_M], LOWEST, tl.float32)
        for t in range(begin, end):
            # Past the unmasked sequence masked_key takes over; the mask holds for both.
            key = tl.where(
                t < plain, plain_key(t, lo, hi, BLOCK_N),
                masked_key(t, plain, lo, hi, total, BLOCK_N),
            )  # fmt: skip
            x, _ = scores(
                u_ptr, q, row, row_end, key, total, padded, BLOCK_M, BLOCK_N, BLOCK_D,
                WHOLE, EVEN, True, PRECISION,
            )  # fmt: skip
            top, sums = _online(x, is_negative(row, key, total, BLOCK_M, BLOCK_N), top, sums)
        tl.store(top_ptr + out, top, mask=r < rows)
    else:
        for t in range(begin, tl.minimum(end, plain)):
            key = plain_key(t, lo, hi, BLOCK_N)
            x, _ = scores(
                u_ptr, q, row, row_end, key, total, padded, BLOCK_M, BLOCK_N, BLOCK_D,
                WHOLE, EVEN, False, PRECISION,
            )  # fmt: skip
            sums += tl.sum(tl.exp2(x), axis=1)
        for t in range(tl.maximum(begin, plain), end):
            key = masked_key(t, plain, lo, hi, total, BLOCK_N)
            x, _ = scores(
                u_ptr, q, row, row_end, key, total, padded, BLOCK_M, BLOCK_N, BLOCK_D,
                WHOLE, EVEN, True, PRECISION,
            )  # fmt: skip
            negative = is_negative(row, key, total, BLOCK_M, BLOCK_N)
            sums += tl.sum(tl.where(negative, tl.exp2(x), 0.0), axis=1)
    tl.store(sum_ptr + out, sums, mask=r < rows)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def symmetric_kernel(
    u_ptr,  # [M, D_pad], float16 or float32
    temperature_ptr,  # [], float32
    sum_ptr,  # [CHUNKS + T // 2, M], float32
    top_ptr,  # as sum_ptr, written for low temperatures only
    total, padded, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: row tile I against key tiles I + b (mod T), one chunk of b in 0 .. T // 2.

    Each pair of tiles is visited once: its row sums are Σ exp2(x_ij) for I, its column sums for J.
    Row sums go to slot (chunk, I), column sums to slot (CHUNKS + b - 1, J): each is written once.
    Half the dots and exponentials of negatives_kernel for T / 2 more floats per row. M = T · BM.
    """
    tile = tl.program_id(0)
    tiles = tl.num_programs(0)
    chunk = tl.program_id(1)
    chunks = tl.num_programs(1)
    row = tile * BLOCK_M
    row_end = tl.minimum(row + BLOCK_M, total)
    r = tl.arange(0, BLOCK_M)
    q = query_tile(u_ptr, row, row_end, padded, BLOCK_M, BLOCK_D, WHOLE, EVEN)

    out = chunk.to(tl.int64) * total + row + r
    sums = tl.zeros([BLOCK_M], tl.float32)
    if needs_maximum(temperature_ptr):
        # The maximum of a column is not known here: all tiles of the row, split over the chunks.
        top = tl.full([BLOCK_M], LOWEST, tl.float32)
        begin = tiles * chunk // chunks
        end = tiles * (chunk + 1) // chunks
        for t in range(begin, end):
            key = t * BLOCK_M
            x, _ = scores(
                u_ptr, q, row, row_end, key, total, padded, BLOCK_M, BLOCK_M, BLOCK_D,
                WHOLE, EVEN, True, PRECISION,
            )  # fmt: skip
            top, sums = _online(x, is_negative(row, key, total, BLOCK_M, BLOCK_M), top, sums)
        tl.store(top_ptr + out, top)
    else:
        half = tiles // 2
        # With T even, b = T / 2 meets each pair of tiles from both sides: the second one counts 0.
        repeated = (2 * half == tiles) & (tile >= half)
        length = tl.cdiv(half + 1, chunks)
        begin = chunk * length
        end = tl.minimum(begin + length, half + tl.where(repeated, 0, 1))
        for b in range(tl.maximum(begin, 1), end):
            key_tile = tile + b
            key_tile -= tl.where(key_tile >= tiles, tiles, 0)
            key = key_tile * BLOCK_M
            x, _ = scores(
                u_ptr, q, row, row_end, key, total, padded, BLOCK_M, BLOCK_M, BLOCK_D,
                WHOLE, EVEN, False, PRECISION,
            )  # fmt: skip
            p = tl.exp2(x)
            sums += tl.sum(p, axis=1)
            slot = sum_ptr + (chunks + b - 1).to(tl.int64) * total + key
            tl.store(slot + r, tl.sum(p, axis=0))
        if repeated & (chunk == 0):
            slot = sum_ptr + (chunks + half - 1).to(tl.int64) * total + row - half * BLOCK_M
            tl.store(slot + r, tl.zeros([BLOCK_M], tl.float32))
        if begin == 0:
            x, _ = scores(
                u_ptr, q, row, row_end, row, total, padded, BLOCK_M, BLOCK_M, BLOCK_D,
                WHOLE, EVEN, True, PRECISION,
            )  # fmt: skip
            negative = is_negative(row, row, total, BLOCK_M, BLOCK_M)
            sums += tl.sum(tl.where(negative, tl.exp2(x), 0.0), axis=1)
    tl.store(sum_ptr + out, sums)


@triton.jit
def _moments(x, top, total, moment):
    """Running maximum of x, Σ exp2(x) and Σ x exp2(x)."""
    p = tl.exp2(x)
    top = tl.maximum(top, tl.max(x, axis=1))
    return top, total + tl.sum(p, axis=1), moment + tl.sum(p * x, axis=1)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def moments_kernel(
    u_ptr,  # [M, D_pad], float16 or float32
    temperature_ptr,  # [], float32
    partial_ptr,  # [2, 3, SPLITS, R], float32: other view, own view; maxima, sums, moments
    row_offset, rows, total, padded,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM rows of one view against one split of one view's M / 2 keys.

    Over the negatives: the maximum of x, Σ exp2(x - max) and Σ (x - max) exp2(x - max). A tile of
    one view's rows and one view's keys needs no mask of views. Reads the row tile once and
    M / 2 / SPLITS rows of û from L2, writes three floats per row.
    """
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    view = tl.program_id(2) // 2
    own = tl.program_id(2) % 2
    key_view = view ^ (1 - own)
    first = tl.program_id(0) * BLOCK_M
    pair = row_offset // 2 + first
    pair_end = tl.minimum(pair + BLOCK_M, (row_offset + rows) // 2)
    pairs = total // 2
    begin, end, plain, lo, hi = share(pair, pair_end, pairs, split, splits, BLOCK_N)
    row = 2 * pair + view
    row_end = 2 * pair_end
    q = query_tile(u_ptr, row, row_end, padded, BLOCK_M, BLOCK_D, WHOLE, EVEN, 2)

    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    moment = tl.zeros([BLOCK_M], tl.float32)
    if needs_maximum(temperature_ptr):
        for t in range(begin, end):
            key = tl.where(
                t < plain, plain_key(t, lo, hi, BLOCK_N),
                masked_key(t, plain, lo, hi, pairs, BLOCK_N),
            )  # fmt: skip
            x, _ = scores(
                u_ptr, q, row, row_end, 2 * key + key_view, total, padded, BLOCK_M, BLOCK_N,
                BLOCK_D, WHOLE, EVEN, True, PRECISION, 2,
            )  # fmt: skip
            negative = is_other(pair, key, pairs, BLOCK_M, BLOCK_N)
            new_top = tl.maximum(top, tl.max(tl.where(negative, x, LOWEST), axis=1))
            x = tl.where(negative, x - new_top[:, None], LOWEST)
            p = tl.exp2(x)
            scale = tl.exp2(top - new_top)
            moment = scale * (moment + (top - new_top) * sums) + tl.sum(p * x, axis=1)
            sums = scale * sums + tl.sum(p, axis=1)
            top = new_top
    else:
        for t in range(begin, tl.minimum(end, plain)):
            key = plain_key(t, lo, hi, BLOCK_N)
            x, _ = scores(
                u_ptr, q, row, row_end, 2 * key + key_view, total, padded, BLOCK_M, BLOCK_N,
                BLOCK_D, WHOLE, EVEN, False, PRECISION, 2,
            )  # fmt: skip
            top, sums, moment = _moments(x, top, sums, moment)
        for t in range(tl.maximum(begin, plain), end):
            key = masked_key(t, plain, lo, hi, pairs, BLOCK_N)
            x, _ = scores(
                u_ptr, q, row, row_end, 2 * key + key_view, total, padded, BLOCK_M, BLOCK_N,
                BLOCK_D, WHOLE, EVEN, True, PRECISION, 2,
            )  # fmt: skip
            x = tl.where(is_other(pair, key, pairs, BLOCK_M, BLOCK_N), x, LOWEST)
            top, sums, moment = _moments(x, top, sums, moment)
        # Without any negative the maximum is LOWEST, and both sums are 0.
        scale = tl.exp2(-tl.maximum(top, -EXPONENT_LIMIT - 1.0))
        moment = scale * (moment - tl.where(sums > 0.0, top, 0.0) * sums)
        sums *= scale

    r = first + tl.arange(0, BLOCK_M)
    inside = 2 * r < rows
    plane = tl.cast(splits, tl.int64) * rows
    out = partial_ptr + 3 * own * plane + tl.cast(split, tl.int64) * rows + 2 * r + view
    tl.store(out, top, mask=inside)
    tl.store(out + plane, sums, mask=inside)
    tl.store(out + 2 * plane, moment, mask=inside)
