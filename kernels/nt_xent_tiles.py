"""What the tile kernels share: loads, scores, the order of key tiles, sums over programs (Triton).

The kernels compute tiles of the matrix x_ij = û_i·û_j = s_ij · log2(e) in registers; the matrix
itself is never stored. Rows 2k and 2k+1 are the views of pair k. README.md derives the formulas.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Up to this log2(e)/τ, sums of exp2(x) stay in float32's range. Beyond it rows track their maximum.
EXPONENT_LIMIT = tl.constexpr(96.0)
# The score of an excluded pair of rows. Finite, so that the difference of two of them is defined.
LOWEST = tl.constexpr(-1e30)

# A program runs three loops over its key tiles. For low temperatures the first has all tiles and
# tracks maxima. Otherwise the second has the tiles that need no mask, and the third those on the
# diagonal or beyond the end.
LOW_PASS = tl.constexpr(0)
PLAIN_PASS = tl.constexpr(1)
PASSES = tl.constexpr(3)


@triton.jit
def needs_maximum(temperature_ptr):
    """Whether the temperature is so low that exp2(x) may leave float32's range."""
    return tl.load(temperature_ptr) * EXPONENT_LIMIT < LOG2_E


@triton.jit
def load_rows(
    u_ptr,
    first,
    end,
    column,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    STEP: tl.constexpr = 1,
):
    """ROWS rows of û from `first` in steps of STEP, features from `column`, zero outside.

    Without MASKED all rows must be inside; the compiler then drops the mask.
    """
    r = STEP * tl.arange(0, ROWS)
    d = column + tl.arange(0, COLUMNS)
    row_inside = ((first + r) < end) | (not MASKED)
    column_inside = (d < PADDED) | (PADDED % COLUMNS == 0)
    pointers = u_ptr + tl.cast(first, tl.int64) * PADDED + r[:, None] * PADDED + d[None, :]
    return tl.load(pointers, mask=row_inside[:, None] & column_inside[None, :], other=0.0)


@triton.jit
def query_tile(
    u_ptr,
    row,
    row_end,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEP: tl.constexpr = 1,
):
    """The rows of û that a program keeps. If a block does not hold all features, nothing of use."""
    if BLOCK_D >= PADDED:
        return load_rows(u_ptr, row, row_end, 0, PADDED, BLOCK_M, BLOCK_D, True, STEP)
    else:
        return row


@triton.jit
def scores(
    u_ptr,
    queries,
    row,
    row_end,
    key,
    key_end,
    PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    STEP: tl.constexpr = 1,
):
    """x of the tile at (row, key), [BM, BN]; and its keys [BN, BD] if they hold all features."""
    if BLOCK_D >= PADDED:
        keys = load_rows(u_ptr, key, key_end, 0, PADDED, BLOCK_N, BLOCK_D, MASKED, STEP)
        return tl.dot(queries, tl.trans(keys), input_precision=PRECISION), keys
    else:
        x = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for column in range(0, PADDED, BLOCK_D):
            a = load_rows(u_ptr, row, row_end, column, PADDED, BLOCK_M, BLOCK_D, True, STEP)
            b = load_rows(u_ptr, key, key_end, column, PADDED, BLOCK_N, BLOCK_D, MASKED, STEP)
            x = tl.dot(a, tl.trans(b), x, input_precision=PRECISION)
        return x, key


@triton.jit
def exclude(x, i, j, end):
    """x [BM, BN] with LOWEST where i = j, and where j is not below `end`."""
    return tl.where((i[:, None] == j[None, :]) | (j >= end)[None, :], LOWEST, x)


@triton.jit
def share(row, row_end, total, split, splits, BLOCK_N: tl.constexpr):
    """This split's part of a row tile's list of key tiles.

    The list has first the `plain` tiles that need no mask, then those on the diagonal (numbers lo
    to hi) and the incomplete last tile. Returns begin and end of the part, plain, lo and hi.
    """
    tiles = tl.cdiv(total, BLOCK_N)
    whole = total // BLOCK_N
    lo = row // BLOCK_N
    hi = tl.cdiv(row_end, BLOCK_N)
    plain = whole - (tl.minimum(hi, whole) - tl.minimum(lo, whole))
    begin = (tl.cast(tiles, tl.int64) * split // splits).to(tl.int32)
    end = (tl.cast(tiles, tl.int64) * (split + 1) // splits).to(tl.int32)
    return begin, end, plain, lo, hi


@triton.jit
def part_of_pass(PASS: tl.constexpr, low, begin, end, plain):
    """Begin and end of the part of the list that one of the three loops has."""
    if PASS == LOW_PASS:
        first, last = begin, tl.where(low, end, begin)
    elif PASS == PLAIN_PASS:
        first, last = tl.where(low, end, begin), tl.minimum(end, plain)
    else:
        first, last = tl.where(low, end, tl.maximum(begin, plain)), end
    return first, last


@triton.jit
def key_of(PASS: tl.constexpr, t, plain, lo, hi, total, BLOCK_N: tl.constexpr):
    """The first row of the key tile at place t of the list."""
    unmasked = t + tl.where(t >= lo, hi - lo, 0)
    if PASS == PLAIN_PASS:
        tile = unmasked
    else:
        k = t - plain
        masked = tl.where(k < hi - lo, lo + k, tl.cdiv(total, BLOCK_N) - 1)
        tile = tl.where(t < plain, unmasked, masked)
    return tile * BLOCK_N


@triton.jit
def reset(counter_ptr):
    """Set the counter of the next kernel's `add_up` to 0."""
    first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (tl.program_id(2) == 0)
    tl.store(counter_ptr, 0, mask=first)


@triton.jit
def add_up(value, part_ptr, counter_ptr, out_ptr, scale, BLOCK: tl.constexpr):
    """out [] = scale · (the sum of `value` over all programs of the grid), float32.

    Every program stores its value in part [programs] and counts itself. The last one adds all
    values in the order of the programs, so the result does not depend on which one is last.
    """
    programs = tl.num_programs(0)
    tl.store(part_ptr + tl.program_id(0), value)
    # All threads of the program must have stored before it counts itself.
    tl.debug_barrier()
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1:
        i = tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, programs, BLOCK):
            # From L2: other multiprocessors' values are not in this one's L1 cache.
            total += tl.load(
                part_ptr + first + i, mask=first + i < programs, other=0.0, cache_modifier=".cg"
            )
        tl.store(out_ptr, scale * tl.sum(total, axis=0))
