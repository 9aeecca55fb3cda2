"""NT-Xent by tiles of the similarity matrix, which never reaches memory (Triton).

x_ij = û_i·û_j = s_ij · log2(e). Rows 2k and 2k+1 are the views of pair k, so a pair's self and
positive similarities lie in diagonal tiles only; these and the ragged last tile take the masked
loop, all others the unmasked one. README.md derives the formulas.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Largest log2(e)/τ whose sums of exp2(x) stay inside float32; beyond it rows track their maximum.
EXPONENT_LIMIT = tl.constexpr(96.0)
# Stands for -inf, and keeps exp2(a - b) defined when both are it.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def needs_maximum(temperature_ptr):
    return tl.load(temperature_ptr) * EXPONENT_LIMIT < LOG2_E


@triton.jit
def load_rows(
    u_ptr, first, end, column, padded,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr,
    STEP: tl.constexpr = 1,
):  # fmt: skip
    """ROWS rows of û from `first` in steps of STEP, features from `column`, zero outside."""
    r = STEP * tl.arange(0, ROWS)
    d = column + tl.arange(0, COLUMNS)
    pointers = u_ptr + tl.cast(first, tl.int64) * padded + r[:, None] * padded + d[None, :]
    if MASK_ROWS and MASK_COLUMNS:
        mask = ((first + r) < end)[:, None] & (d < padded)[None, :]
        return tl.load(pointers, mask=mask, other=0.0)
    elif MASK_ROWS:
        return tl.load(pointers, mask=((first + r) < end)[:, None], other=0.0)
    elif MASK_COLUMNS:
        return tl.load(pointers, mask=(d < padded)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def query_tile(
    u_ptr, row, row_end, padded,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
    STEP: tl.constexpr = 1,
):  # fmt: skip
    """The rows of û that a program keeps, when one block holds all features."""
    if WHOLE:
        return load_rows(u_ptr, row, row_end, 0, padded, BLOCK_M, BLOCK_D, True, not EVEN, STEP)
    else:
        return row


@triton.jit
def scores(
    u_ptr, queries, row, row_end, key, key_end, padded,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    STEP: tl.constexpr = 1,
):  # fmt: skip
    """x of the tile at (row, key), [BM, BN], and the rows of û it loaded, [BN, BD] if WHOLE."""
    if WHOLE:
        keys = load_rows(u_ptr, key, key_end, 0, padded, BLOCK_N, BLOCK_D, MASKED, not EVEN, STEP)
        return tl.dot(queries, tl.trans(keys), input_precision=PRECISION), keys
    else:
        x = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for column in range(0, padded, BLOCK_D):
            a = load_rows(u_ptr, row, row_end, column, padded, BLOCK_M, BLOCK_D, True, False, STEP)
            b = load_rows(
                u_ptr, key, key_end, column, padded, BLOCK_N, BLOCK_D, MASKED, False, STEP
            )
            x = tl.dot(a, tl.trans(b), x, input_precision=PRECISION)
        return x, key


@triton.jit
def is_negative(row, key, key_end, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether a pair of rows is another pair's and inside the matrix, [BM, BN]."""
    i = row + tl.arange(0, BLOCK_M)
    j = key + tl.arange(0, BLOCK_N)
    return ((i >> 1)[:, None] != (j >> 1)[None, :]) & (j < key_end)[None, :]


@triton.jit
def is_other(row, key, key_end, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether two rows differ, and lie inside the matrix, [BM, BN]."""
    i = row + tl.arange(0, BLOCK_M)
    j = key + tl.arange(0, BLOCK_N)
    return (i[:, None] != j[None, :]) & (j < key_end)[None, :]


@triton.jit
def share(row, row_end, total, split, splits, BLOCK_N: tl.constexpr):
    """This split's part of a row tile's sequence of key tiles: the unmasked ones, then the others.

    The masked ones hold the diagonal (lo .. hi) and the ragged last tile. Returns the part's begin
    and end, the length of the unmasked sequence, and lo, hi.
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
def plain_key(t, lo, hi, BLOCK_N: tl.constexpr):
    return (t + tl.where(t >= lo, hi - lo, 0)) * BLOCK_N


@triton.jit
def masked_key(t, plain, lo, hi, total, BLOCK_N: tl.constexpr):
    k = t - plain
    return tl.where(k < hi - lo, lo + k, tl.cdiv(total, BLOCK_N) - 1) * BLOCK_N
