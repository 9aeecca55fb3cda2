"""Σ exp over the negatives of each row, by tiles (Triton)."""

import triton
import triton.language as tl

from .nt_xent_tiles import (
    LOWEST,
    is_negative,
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


@triton.jit
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
    out = split.to(tl.int64) * rows + r
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


@triton.jit
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
def _online_moments(p, d, chosen, shift, total, moment):
    """Σ exp2(d) and Σ d exp2(d), d = x - maximum, after the maximum rose by -shift."""
    scale = tl.exp2(shift)
    moment = scale * (moment + shift * total) + tl.sum(tl.where(chosen, p * d, 0.0), axis=1)
    return scale * total + tl.sum(tl.where(chosen, p, 0.0), axis=1), moment


@triton.jit
def moments_kernel(
    u_ptr,  # [M, D_pad], float16 or float32
    partial_ptr,  # [2, 3, SPLITS, R], float32: other view, own view; maxima, sums, moments
    row_offset, rows, total, padded,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM rows against one split of the M keys; what the losses and statistics need.

    Over the negatives of the other view and of the row's own: the maximum of x, Σ exp2(x - max)
    and Σ (x - max) exp2(x - max). Traffic as negatives_kernel, with six floats per row.
    """
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    first = tl.program_id(0) * BLOCK_M
    row = row_offset + first
    row_end = tl.minimum(row + BLOCK_M, row_offset + rows)
    tiles = tl.cdiv(total, BLOCK_N)
    q = query_tile(u_ptr, row, row_end, padded, BLOCK_M, BLOCK_D, WHOLE, EVEN)

    r = first + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    top_o = tl.full([BLOCK_M], LOWEST, tl.float32)
    top_s = tl.full([BLOCK_M], LOWEST, tl.float32)
    sum_o = tl.zeros([BLOCK_M], tl.float32)
    sum_s = tl.zeros([BLOCK_M], tl.float32)
    moment_o = tl.zeros([BLOCK_M], tl.float32)
    moment_s = tl.zeros([BLOCK_M], tl.float32)
    for t in range(tiles * split // splits, tiles * (split + 1) // splits):
        key = t * BLOCK_N
        x, _ = scores(
            u_ptr, q, row, row_end, key, total, padded, BLOCK_M, BLOCK_N, BLOCK_D,
            WHOLE, EVEN, True, PRECISION,
        )  # fmt: skip
        negative = is_negative(row, key, total, BLOCK_M, BLOCK_N)
        other = (((row_offset + r)[:, None] ^ (key + n)[None, :]) & 1) == 1
        new_o = tl.maximum(top_o, tl.max(tl.where(negative & other, x, float("-inf")), axis=1))
        new_s = tl.maximum(top_s, tl.max(tl.where(negative & ~other, x, float("-inf")), axis=1))
        d = tl.where(negative, x - tl.where(other, new_o[:, None], new_s[:, None]), 0.0)
        p = tl.where(negative, tl.exp2(d), 0.0)
        sum_o, moment_o = _online_moments(p, d, other, top_o - new_o, sum_o, moment_o)
        sum_s, moment_s = _online_moments(p, d, ~other, top_s - new_s, sum_s, moment_s)
        top_o = new_o
        top_s = new_s

    plane = splits.to(tl.int64) * rows
    out = partial_ptr + split.to(tl.int64) * rows + r
    inside = r < rows
    tl.store(out, top_o, mask=inside)
    tl.store(out + plane, sum_o, mask=inside)
    tl.store(out + 2 * plane, moment_o, mask=inside)
    tl.store(out + 3 * plane, top_s, mask=inside)
    tl.store(out + 4 * plane, sum_s, mask=inside)
    tl.store(out + 5 * plane, moment_s, mask=inside)
