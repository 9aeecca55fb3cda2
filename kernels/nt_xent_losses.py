"""From sums over the negatives to losses and statistics, row by row (Triton).

Arrays over rows are interleaved: the positive of row i is row i ^ 1.
"""

import triton
import triton.language as tl

from .normalize import UNSPECIALIZED
from .nt_xent_tiles import LOWEST, needs_maximum

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), to float32 relative accuracy for negative x too."""
    t = tl.exp(-tl.abs(x))
    # log(1 + t) = 2 artanh(y), y = t / (2 + t) <= 1/3.
    y = t / (2.0 + t)
    z = y * y
    series = 1.0 / 15.0
    for odd in tl.static_range(13, 0, -2):
        series = series * z + 1.0 / odd
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + 2.0 * y * series


@triton.jit
def _log2_add(a, b):
    top = tl.maximum(a, b)
    return top + tl.log2(tl.exp2(a - top) + tl.exp2(b - top))


@triton.jit
def _merge(top_ptr, sum_ptr, rows, r, slots, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr):
    """Each row's maximum and sum of exp2(x - maximum) over its slots."""
    s = tl.arange(0, BLOCK_S)
    top = tl.full([BLOCK_R], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for first in range(0, slots, BLOCK_S):
        offset = (first + s).to(tl.int64)[:, None] * rows + r[None, :]
        mask = ((first + s) < slots)[:, None] & (r < rows)[None, :]
        tops = tl.load(top_ptr + offset, mask=mask, other=LOWEST)
        sums = tl.load(sum_ptr + offset, mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        total *= tl.exp2(top - new_top)
        total += tl.sum(sums * tl.exp2(tops - new_top[None, :]), axis=0)
        top = new_top
    return top, total


@triton.jit
def _positive(u_ptr, row, inside, padded, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """x_i,p(i) of each row, float32."""
    column = tl.arange(0, BLOCK_D)
    own = u_ptr + row[:, None] * padded
    partner = u_ptr + (row ^ 1)[:, None] * padded
    x = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, padded, BLOCK_D):
        d = start + column
        mask = inside[:, None] & (d < padded)[None, :]
        a = tl.load(own + d[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(partner + d[None, :], mask=mask, other=0.0).to(tl.float32)
        x += tl.sum(a * b, axis=1)
    return x


@triton.jit
def _store_loss(loss_ptr, lse_ptr, r, rows, negatives, positive, DECOUPLED: tl.constexpr):
    """From log2 Σ_negatives exp(s_ij) and the positive, in bits."""
    loss = (negatives - positive) * LN_2
    if not DECOUPLED:
        loss = _softplus(loss)
    tl.store(loss_ptr + r, loss, mask=r < rows)
    tl.store(lse_ptr + r, positive * LN_2 + loss, mask=r < rows)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def losses_kernel(
    u_ptr,  # [M, D_pad], float16 or float32
    temperature_ptr,  # [], float32
    sum_ptr,  # [SLOTS, R], float32
    top_ptr,  # [LOW_SLOTS, R], float32, read for low temperatures only
    loss_ptr,  # [R], float32
    lse_ptr,  # [R], float32, natural
    row_offset, rows, padded, slots, low_slots, DECOUPLED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program: BR rows; loss_i = softplus(log Σ_negatives exp(s_ij) - s_i,p(i)).

    The positive stays outside the sum, so a small loss keeps its relative accuracy. Without the
    softplus if DECOUPLED.
    Reads SLOTS floats and two rows of û per row, writes two floats.
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    if needs_maximum(temperature_ptr):
        top, total = _merge(top_ptr, sum_ptr, rows, r, low_slots, BLOCK_R, BLOCK_S)
    else:
        s = tl.arange(0, BLOCK_S)
        top = tl.zeros([BLOCK_R], tl.float32)
        total = tl.zeros([BLOCK_R], tl.float32)
        for first in range(0, slots, BLOCK_S):
            offset = (first + s).to(tl.int64)[:, None] * rows + r[None, :]
            mask = ((first + s) < slots)[:, None] & (r < rows)[None, :]
            total += tl.sum(tl.load(sum_ptr + offset, mask=mask, other=0.0), axis=0)
    positive = _positive(u_ptr, row_offset + r, r < rows, padded, BLOCK_R, BLOCK_D)
    _store_loss(loss_ptr, lse_ptr, r, rows, top + tl.log2(total), positive, DECOUPLED)


@triton.jit
def _entropy(top, total, moment, positive):
    """Nats of the softmax over a row's positive and a set of negatives, without cancellation."""
    lse = _log2_add(top + tl.log2(total), positive)
    share = tl.exp2(top - lse)
    p = tl.exp2(positive - lse)
    return (share * (moment + (top - lse) * total) + p * (positive - lse)) * -LN_2


@triton.jit(do_not_specialize=UNSPECIALIZED)
def statistics_kernel(
    u_ptr,  # [M, D_pad], float16 or float32
    partial_ptr,  # [2, 3, SPLITS, R], float32: other view, own view; maxima, sums, moments
    loss_ptr,  # [R], float32
    lse_ptr,  # [R], float32, natural
    stats_ptr,  # [R, 4], float32
    row_offset, rows, padded, splits, DECOUPLED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BR rows; losses_kernel's outputs and the four statistics.

    Columns: positive above every negative of the other view; entropy over the other view's rows;
    the same two over all rows.
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < rows
    plane = tl.cast(splits, tl.int64) * rows
    top_o = tl.full([BLOCK_R], LOWEST, tl.float32)
    top_s = tl.full([BLOCK_R], LOWEST, tl.float32)
    for split in range(splits):
        at = partial_ptr + split * tl.cast(rows, tl.int64) + r
        top_o = tl.maximum(top_o, tl.load(at, mask=inside, other=LOWEST))
        top_s = tl.maximum(top_s, tl.load(at + 3 * plane, mask=inside, other=LOWEST))
    top = tl.maximum(top_o, top_s)
    sum_o = tl.zeros([BLOCK_R], tl.float32)
    sum_all = tl.zeros([BLOCK_R], tl.float32)
    moment_o = tl.zeros([BLOCK_R], tl.float32)
    moment_all = tl.zeros([BLOCK_R], tl.float32)
    for split in range(splits):
        for own in tl.static_range(2):
            at = partial_ptr + 3 * own * plane + split * tl.cast(rows, tl.int64) + r
            t = tl.load(at, mask=inside, other=LOWEST)
            total = tl.load(at + plane, mask=inside, other=0.0)
            moment = tl.load(at + 2 * plane, mask=inside, other=0.0)
            scale = tl.exp2(t - top)
            sum_all += scale * total
            moment_all += scale * (moment + (t - top) * total)
            if own == 0:
                scale = tl.exp2(t - top_o)
                sum_o += scale * total
                moment_o += scale * (moment + (t - top_o) * total)

    positive = _positive(u_ptr, row_offset + r, inside, padded, BLOCK_R, BLOCK_D)
    _store_loss(loss_ptr, lse_ptr, r, rows, top + tl.log2(sum_all), positive, DECOUPLED)
    out = stats_ptr + 4 * r
    tl.store(out, (positive > top_o).to(tl.float32), mask=inside)
    tl.store(out + 1, _entropy(top_o, sum_o, moment_o, positive), mask=inside)
    tl.store(out + 2, (positive > top).to(tl.float32), mask=inside)
    tl.store(out + 3, _entropy(top, sum_all, moment_all, positive), mask=inside)
