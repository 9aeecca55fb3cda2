"""The losses of NT-Xent and their statistics: Σ exp by tiles, then row by row (Triton)."""

import triton
import triton.language as tl

from .normalize import UNSPECIALIZED
from .nt_xent_tiles import (
    EXPONENT_LIMIT,
    LN_2,
    LOG2_E,
    LOW_PASS,
    LOWEST,
    PASSES,
    PLAIN_PASS,
    add_up,
    exclude,
    key_of,
    needs_maximum,
    part_of_pass,
    query_tile,
    reset,
    scores,
    share,
)

# W is in [0, 2] and is rounded to float16 for the tensor cores. Multiplied by 2^14, weights down to
# 1e-8 are normal numbers of float16.
WEIGHT_SHIFT = tl.constexpr(14.0)
# The planes of the partial results, each [SLOTS, R]. The first is always written.
SUMS = tl.constexpr(0)
TOPS = tl.constexpr(1)
MOMENTS = tl.constexpr(2)
# Numbers beside Σ û in the statistics of a program: six sums over rows, and two unused.
SCALARS = tl.constexpr(8)


@triton.jit
def sums_along(x, AXIS: tl.constexpr, LOW: tl.constexpr, STATISTICS: tl.constexpr):
    """Along AXIS: the maximum, Σ exp2(x - ref) and, for statistics, Σ (x - ref) exp2(x - ref).

    The reference is 0, and for low temperatures the maximum.
    """
    top = tl.max(x, axis=AXIS)
    if LOW:
        x -= tl.expand_dims(top, AXIS)
    p = tl.exp2(x)
    total = tl.sum(p, axis=AXIS)
    moment = tl.sum(p * x, axis=AXIS) if STATISTICS else total
    return top, total, moment


@triton.jit
def merge(
    top,
    total,
    moment,
    other_top,
    other_total,
    other_moment,
    LOW: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """The results of `sums_along` for the union of two sets of keys.

    A set without keys has the maximum LOWEST, so its sums are multiplied by 0.
    """
    if LOW:
        high = tl.maximum(top, other_top)
        scale = tl.exp2(top - high)
        other_scale = tl.exp2(other_top - high)
        if STATISTICS:
            moment = scale * (moment + (top - high) * total)
            moment += other_scale * (other_moment + (other_top - high) * other_total)
        return high, scale * total + other_scale * other_total, moment
    elif STATISTICS:
        return tl.maximum(top, other_top), total + other_total, moment + other_moment
    else:
        return top, total + other_total, moment


@triton.jit
def store_partial(partial_ptr, at, plane, top, total, moment, low, mask, STATISTICS: tl.constexpr):
    """Write the results of `sums_along` to their planes; `plane`: elements of a plane."""
    tl.store(partial_ptr + SUMS * plane + at, total, mask=mask)
    if STATISTICS:
        tl.store(partial_ptr + TOPS * plane + at, top, mask=mask)
        tl.store(partial_ptr + MOMENTS * plane + at, moment, mask=mask)
    elif low:
        tl.store(partial_ptr + TOPS * plane + at, top, mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def negatives_kernel(
    u_ptr,  # [M, D_pad], float16 or float32
    temperature_ptr,  # [], float32
    partial_ptr,  # [2 or 3, 2 · SPLITS, R], float32
    positive_ptr,  # [R], float32, written with statistics only
    counter_ptr,  # [], int32, becomes 0
    row_offset,
    rows,
    total,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """One program: BM rows of one view against one split of one view's M / 2 keys.

    Σ exp2(x_ij) over the negatives j; with STATISTICS also their maximum, Σ x_ij exp2(x_ij), and
    the positive's x. The positive comes from the same tiles as the negatives, so that equal rows
    have equal scores. The results for split s of the other view's keys go to slot s, those for the
    own view's keys to slot SPLITS + s.
    Reads the row tile once and M / 2 / SPLITS rows of û from L2, writes 1 to 3 floats per row.
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
    q = query_tile(u_ptr, row, row_end, PADDED, BLOCK_M, BLOCK_D, 2)
    reset(counter_ptr)

    r = first + tl.arange(0, BLOCK_M)
    i = pair + tl.arange(0, BLOCK_M)
    inside = 2 * r < rows
    low = needs_maximum(temperature_ptr)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    moment = tl.zeros([BLOCK_M], tl.float32)
    for PASS in tl.static_range(PASSES):
        first_tile, last_tile = part_of_pass(PASS, low, begin, end, plain)
        for t in range(first_tile, last_tile):
            key = key_of(PASS, t, plain, lo, hi, pairs, BLOCK_N)
            x, _ = scores(
                u_ptr,
                queries=q,
                row=row,
                row_end=row_end,
                key=2 * key + key_view,
                key_end=total,
                PADDED=PADDED,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                BLOCK_D=BLOCK_D,
                PRECISION=PRECISION,
                MASKED=PASS != PLAIN_PASS,
                STEP=2,
            )
            if PASS != PLAIN_PASS:
                j = key + tl.arange(0, BLOCK_N)
                if STATISTICS:
                    here = (key <= i) & (i < key + BLOCK_N) & inside & (own == 0)
                    positive = tl.sum(tl.where(i[:, None] == j[None, :], x, 0.0), axis=1)
                    tl.store(positive_ptr + 2 * r + view, positive, mask=here)
                x = exclude(x, i, j, pairs)
            t_top, t_sums, t_moment = sums_along(x, 1, PASS == LOW_PASS, STATISTICS)
            top, sums, moment = merge(
                top, sums, moment, t_top, t_sums, t_moment, PASS == LOW_PASS, STATISTICS
            )

    plane = 2 * splits * tl.cast(rows, tl.int64)
    at = tl.cast(own * splits + split, tl.int64) * rows + 2 * r + view
    store_partial(partial_ptr, at, plane, top, sums, moment, low, inside, STATISTICS)


@triton.jit
def first_row(tile, BLOCK_M: tl.constexpr):
    """The first row of a tile of one view. Tiles 2k and 2k + 1 alternate in 2 BM rows."""
    return tile // 2 * 2 * BLOCK_M + tile % 2


@triton.jit
def column_slot(b, own, chunks, other_slots, STATISTICS: tl.constexpr):
    """The slot for the results that tile I gives to tile I + b. own: whether b is even."""
    if STATISTICS:
        slot = tl.where(own == 0, chunks, other_slots + chunks - 1) + b // 2
    else:
        slot = chunks + b - 1
    return slot


@triton.jit(do_not_specialize=UNSPECIALIZED)
def symmetric_kernel(
    u_ptr,  # [M, D_pad], float16 or float32
    temperature_ptr,  # [], float32
    partial_ptr,  # [2 or 3, SLOTS, M], float32
    positive_ptr,  # [M], float32, written with statistics only
    counter_ptr,  # [], int32, becomes 0
    total,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """One program: row tile I against key tiles J = I + b (mod T), for one chunk of b = 0 .. T / 2.

    It gives the results of negatives_kernel with half as many dot products, and needs T / 2 more
    slots. M = T · BM, and tile I holds rows of view I mod 2: for even b the keys are of the own
    view. Each pair of tiles is visited once. The sums along its rows are results for I and go to
    the chunk's slot. The sums along its columns are results for J and go to the slot of b. So each
    slot is written once. With statistics the slots for the other view come first.
    Reads the row tile once and BM rows of û from L2 per b, writes 1 to 3 floats per row and slot.
    """
    tile = tl.program_id(0)
    tiles = tl.num_programs(0)
    chunk = tl.program_id(1)
    chunks = tl.num_programs(1)
    half = tiles // 2
    r = tl.arange(0, BLOCK_M)
    row = first_row(tile, BLOCK_M)
    q = query_tile(u_ptr, row, total, PADDED, BLOCK_M, BLOCK_D, 2)
    reset(counter_ptr)

    low = needs_maximum(temperature_ptr)
    KINDS: tl.constexpr = 2 if STATISTICS else 1
    other_slots = chunks + (half + 1) // 2
    slots = KINDS * chunks + half
    plane = slots * tl.cast(total, tl.int64)
    # With b = T / 2 each pair of tiles would be visited from both sides: half of the tiles skip it.
    repeated = tile >= half
    length = tl.cdiv(half + 1, chunks)
    begin = chunk * length
    end = tl.minimum(begin + length, half + tl.where(repeated, 0, 1))
    # b = 0 (the tile itself) needs a mask; for even I also b = 1 (the tile of the positives).
    plain = 2 - tile % 2
    for own in range(KINDS):
        top = tl.full([BLOCK_M], LOWEST, tl.float32)
        sums = tl.zeros([BLOCK_M], tl.float32)
        moment = tl.zeros([BLOCK_M], tl.float32)
        for PASS in tl.static_range(PASSES):
            if PASS == LOW_PASS:
                first, last = begin, tl.where(low, end, begin)
            elif PASS == PLAIN_PASS:
                first, last = tl.where(low, end, tl.maximum(begin, plain)), end
            else:
                first, last = tl.where(low, end, begin), tl.minimum(end, plain)
            if STATISTICS:
                # b odd for the other view.
                first += (first + own + 1) % 2
            for b in range(first, last, KINDS):
                key_tile = tile + b
                key_tile -= tl.where(key_tile >= tiles, tiles, 0)
                key = first_row(key_tile, BLOCK_M)
                x, _ = scores(
                    u_ptr,
                    queries=q,
                    row=row,
                    row_end=total,
                    key=key,
                    key_end=total,
                    PADDED=PADDED,
                    BLOCK_M=BLOCK_M,
                    BLOCK_N=BLOCK_M,
                    BLOCK_D=BLOCK_D,
                    PRECISION=PRECISION,
                    MASKED=False,
                    STEP=2,
                )
                if PASS != PLAIN_PASS:
                    same = (r[:, None] == r[None, :]) & (key // 2 == row // 2)
                    if STATISTICS:
                        positive = tl.where(same, x, 0.0)
                        found = (r >= 0) & (key == row + 1)
                        tl.store(positive_ptr + row + 2 * r, tl.sum(positive, axis=1), mask=found)
                        tl.store(positive_ptr + key + 2 * r, tl.sum(positive, axis=0), mask=found)
                    x = tl.where(same, LOWEST, x)
                t_top, t_sums, t_moment = sums_along(x, 1, PASS == LOW_PASS, STATISTICS)
                top, sums, moment = merge(
                    top, sums, moment, t_top, t_sums, t_moment, PASS == LOW_PASS, STATISTICS
                )
                t_top, t_sums, t_moment = sums_along(x, 0, PASS == LOW_PASS, STATISTICS)
                slot = column_slot(b, own, chunks, other_slots, STATISTICS)
                at = tl.cast(slot, tl.int64) * total + key + 2 * r
                # For b = 0 the sums along the rows are all results.
                store_partial(
                    partial_ptr, at, plane, t_top, t_sums, t_moment, PASS == LOW_PASS,
                    (r >= 0) & (b > 0), STATISTICS,
                )  # fmt: skip
        at = tl.cast(own * other_slots + chunk, tl.int64) * total + row + 2 * r
        store_partial(partial_ptr, at, plane, top, sums, moment, low, r >= 0, STATISTICS)
    # The slots of the visits with b = T / 2 that were skipped: results without keys.
    slot = column_slot(half, (half + 1) % 2, chunks, other_slots, STATISTICS)
    at = tl.cast(slot, tl.int64) * total + first_row(tile - half, BLOCK_M) + 2 * r
    nothing = tl.zeros([BLOCK_M], tl.float32)
    store_partial(
        partial_ptr, at, plane, nothing + LOWEST, nothing, nothing, low,
        (r >= 0) & repeated & (chunk == 0), STATISTICS,
    )  # fmt: skip


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
    """log2(2^a + 2^b)."""
    top = tl.maximum(a, b)
    return top + tl.log2(tl.exp2(a - top) + tl.exp2(b - top))


@triton.jit
def merge_slots(
    partial_ptr,
    begin,
    end,
    plane,
    rows,
    r,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    LOW: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """Maximum, sum and moment of each row over the slots begin .. end, [BR]."""
    top = tl.full([BLOCK_R], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    moment = tl.zeros([BLOCK_R], tl.float32)
    for first in range(begin, end, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        at = partial_ptr + s.to(tl.int64)[:, None] * rows + r[None, :]
        mask = (s < end)[:, None] & (r < rows)[None, :]
        totals = tl.load(at + SUMS * plane, mask=mask, other=0.0)
        if LOW or STATISTICS:
            tops = tl.load(at + TOPS * plane, mask=mask, other=LOWEST)
            high = tl.max(tops, axis=0)
        else:
            high = top
        moments = tl.load(at + MOMENTS * plane, mask=mask, other=0.0) if STATISTICS else totals
        if LOW:
            down = tops - high[None, :]
            scale = tl.exp2(down)
            moments = scale * (moments + down * totals)
            totals *= scale
        top, total, moment = merge(
            top, total, moment, high, tl.sum(totals, axis=0), tl.sum(moments, axis=0), LOW,
            STATISTICS,
        )  # fmt: skip
    if not LOW:
        if STATISTICS:
            # From the reference 0 to the maximum. Without negatives both sums stay 0.
            scale = tl.exp2(-tl.maximum(top, -EXPONENT_LIMIT - 1.0))
            moment = scale * (moment - tl.where(total > 0.0, top, 0.0) * total)
            total *= scale
        else:
            top = tl.zeros([BLOCK_R], tl.float32)
    return top, total, moment


@triton.jit
def _entropy(top, total, moment, positive):
    """Entropy in nats of the softmax over a row's positive and a set of negatives.

    No two nearly equal numbers are subtracted.
    """
    lse = _log2_add(top + tl.log2(total), positive)
    share = tl.exp2(top - lse)
    p = tl.exp2(positive - lse)
    return (share * (moment + (top - lse) * total) + p * (positive - lse)) * -LN_2


@triton.jit(do_not_specialize=UNSPECIALIZED)
def losses_kernel(
    u_ptr,  # [M, D_pad], float16 or float32
    temperature_ptr,  # [], float32
    partial_ptr,  # [2 or 3, SLOTS, R], float32, of the tile kernels
    positive_ptr,  # [R], float32: the positives' x from the tiles; read with statistics only
    loss_ptr,  # [R], float32
    lse_ptr,  # [R], float32, natural
    factor_ptr,  # [R], float32: what gradient_kernel multiplies by if all rows weigh the same
    stats_ptr,  # [R, 4], float32, written with statistics only
    part_ptr,  # [programs], float32
    counter_ptr,  # [], int32, 0
    reduced_ptr,  # [], float32: loss_scale times the sum of the losses
    loss_scale,  # float32
    row_offset,
    rows,
    slots,
    other_slots,
    PADDED: tl.constexpr,
    DECOUPLED: tl.constexpr,
    STATISTICS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program: BR rows; loss_i = softplus(log Σ_negatives exp(s_ij) - s_i,p(i)).

    If DECOUPLED, the loss is the difference itself. The positive stays outside the sum, so a small
    loss keeps its relative accuracy. STATISTICS: the four columns that `nt_xent.forward` describes.
    Reads 1 to 3 floats per slot and two rows of û per row, writes 3 to 7 floats.
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < rows
    low = needs_maximum(temperature_ptr)
    plane = slots * tl.cast(rows, tl.int64)
    column = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (column < PADDED)[None, :]
    row = row_offset + r
    own = tl.load(u_ptr + row[:, None] * PADDED + column[None, :], mask=mask, other=0.0)
    partner = tl.load(u_ptr + (row ^ 1)[:, None] * PADDED + column[None, :], mask=mask, other=0.0)
    positive = tl.sum(own.to(tl.float32) * partner.to(tl.float32), axis=1)

    if low:
        top_o, sum_o, moment_o = merge_slots(
            partial_ptr, 0, other_slots, plane, rows, r, BLOCK_R, BLOCK_S, True, STATISTICS
        )
    else:
        top_o, sum_o, moment_o = merge_slots(
            partial_ptr, 0, other_slots, plane, rows, r, BLOCK_R, BLOCK_S, False, STATISTICS
        )
    top, total, moment = top_o, sum_o, moment_o
    if STATISTICS:
        if low:
            top, total, moment = merge_slots(
                partial_ptr, other_slots, slots, plane, rows, r, BLOCK_R, BLOCK_S, True, True
            )
        else:
            top, total, moment = merge_slots(
                partial_ptr, other_slots, slots, plane, rows, r, BLOCK_R, BLOCK_S, False, True
            )
        # Both have their maximum as the reference now.
        top, total, moment = merge(top, total, moment, top_o, sum_o, moment_o, True, True)
        tiles_positive = tl.load(positive_ptr + r, mask=inside, other=0.0)
        out = stats_ptr + 4 * r
        tl.store(out, (tiles_positive > top_o).to(tl.float32), mask=inside)
        tl.store(out + 1, _entropy(top_o, sum_o, moment_o, positive), mask=inside)
        tl.store(out + 2, (tiles_positive > top).to(tl.float32), mask=inside)
        tl.store(out + 3, _entropy(top, total, moment, positive), mask=inside)

    loss = (top + tl.log2(total) - positive) * LN_2
    if not DECOUPLED:
        loss = _softplus(loss)
    lse = positive * LN_2 + loss
    tl.store(loss_ptr + r, loss, mask=inside)
    tl.store(lse_ptr + r, lse, mask=inside)
    tl.store(factor_ptr + r, gradient_factor(lse, 1.0, low), mask=inside)
    add_up(
        tl.sum(tl.where(inside, loss, 0.0), axis=0), part_ptr, counter_ptr, reduced_ptr,
        loss_scale, 1024,
    )  # fmt: skip


@triton.jit
def gradient_factor(lse, weight, low):
    """f of `pair_weights`: w exp2(shift - y), y = lse log2(e); for low temperatures y - shift."""
    y = lse * LOG2_E - WEIGHT_SHIFT
    # 0 · ∞ counts 0.
    return tl.where(low, y, tl.where(weight == 0.0, 0.0, weight * tl.exp2(-y)))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def statistics_parts_kernel(
    u_ptr,  # [M, D_pad], float16 or float32
    loss_ptr,  # [M], float32, any stride
    lse_ptr,  # [M], float32, any stride
    stats_ptr,  # [M, 4], float32, any strides
    parts_ptr,  # [programs, D_pad + SCALARS], float32
    rows,
    loss_stride,
    lse_stride,
    stats_row_stride,
    stats_stride,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: the sums over ROWS rows that mean_statistics_kernel needs.

    Σ û [D_pad], then the SCALARS: columns 0 and 1 of stats over the rows of view 1, columns 2 and 3
    over all rows, Σ (lse - loss) and Σ |û|². Reads û and six floats per row once.
    """
    d = tl.arange(0, BLOCK_D)
    columns = tl.zeros([BLOCK_D], tl.float32)
    scalars = tl.zeros([SCALARS], tl.float32)
    k = tl.arange(0, SCALARS)
    begin = tl.program_id(0).to(tl.int64) * ROWS
    for first in range(0, ROWS, BLOCK_R):
        r = begin + first + tl.arange(0, BLOCK_R)
        inside = r < rows
        mask = inside[:, None] & (d < PADDED)[None, :]
        u = tl.load(u_ptr + r[:, None] * PADDED + d[None, :], mask=mask, other=0.0)
        u = u.to(tl.float32)
        columns += tl.sum(u, axis=0)
        at = stats_ptr + r[:, None] * stats_row_stride + k[None, :] * stats_stride
        counts = inside[:, None] & (k < 4)[None, :] & ((r % 2 == 0)[:, None] | (k >= 2)[None, :])
        scalars += tl.sum(tl.load(at, mask=counts, other=0.0), axis=0)
        loss = tl.load(loss_ptr + r * loss_stride, mask=inside, other=0.0)
        lse = tl.load(lse_ptr + r * lse_stride, mask=inside, other=0.0)
        scalars += tl.where(k == 4, tl.sum(lse - loss, axis=0), 0.0)
        scalars += tl.where(k == 5, tl.sum(tl.sum(u * u, axis=1), axis=0), 0.0)
    out = parts_ptr + tl.program_id(0).to(tl.int64) * (PADDED + SCALARS)
    tl.store(out + d, columns, mask=d < PADDED)
    tl.store(out + PADDED + k, scalars)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def mean_statistics_kernel(
    parts_ptr,  # [PARTS, D_pad + SCALARS], float32
    temperature_ptr,  # [], float32
    out_ptr,  # [6], float32
    rows,
    parts,
    PADDED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: the six values of NTXentStats from the parts, added in their order.

    The negatives' mean similarity needs no matrix: Σ_i Σ_j≠i û_i·û_j = |Σ û|² - Σ |û|².
    """
    d = tl.arange(0, BLOCK_D)
    k = tl.arange(0, SCALARS)
    columns = tl.zeros([BLOCK_D], tl.float32)
    scalars = tl.zeros([SCALARS], tl.float32)
    for part in range(parts):
        at = parts_ptr + tl.cast(part, tl.int64) * (PADDED + SCALARS)
        columns += tl.load(at + d, mask=d < PADDED, other=0.0)
        scalars += tl.load(at + PADDED + k)
    count = tl.cast(rows, tl.float32)
    temperature = tl.load(temperature_ptr)
    logits = tl.sum(tl.where(k == 4, scalars, 0.0), axis=0)
    squares = tl.sum(tl.where(k == 5, scalars, 0.0), axis=0)
    others = (tl.sum(columns * columns, axis=0) - squares) * LN_2
    positive = logits / count * temperature
    # A single pair has no negatives. What rounding leaves of their sum must not count.
    negative = (others - logits) * temperature / (count * tl.maximum(count - 2.0, 1.0))
    negative = tl.where(rows > 2, negative, float("nan"))
    means = scalars / tl.where(k < 2, 0.5 * count, count)
    means = tl.where(k == 4, positive, tl.where(k == 5, negative, means))
    tl.store(out_ptr + k, means, mask=k < 6)
