"""A batch norm with known statistics, a residual and ReLU in one pass (Triton)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Values of one program, which holds two tensors of them in float32.
BLOCK_VALUES = 4096
BLOCK_COLUMNS = 128
WARPS = 8
# Units of columns: with whole units, the compiler knows that rows are aligned for wide loads.
UNIT = 16
# Statistics and parameters are read rarely, and their addresses need not be aligned.
UNSPECIALIZED = (
    "rows",
    "column_units",
    "channels",
    "mean_ptr",
    "inverse_ptr",
    "weight_ptr",
    "bias_ptr",
    "other_mean_ptr",
    "other_inverse_ptr",
    "other_weight_ptr",
    "other_bias_ptr",
)


@triton.jit
def _normalize(x, mean_ptr, inverse_ptr, weight_ptr, bias_ptr, channel, inside):
    mean = tl.load(mean_ptr + channel, mask=inside, other=0.0)
    scale = tl.load(inverse_ptr + channel, mask=inside, other=0.0)
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + channel, mask=inside, other=0.0)
    y = (x - mean) * scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + channel, mask=inside, other=0.0)
    return y


@triton.jit(do_not_specialize=UNSPECIALIZED)
def norm_act_kernel(
    x_ptr,  # [ROWS, COLUMNS], float16, bfloat16 or float32, as other and y
    other_ptr,  # None: no residual
    y_ptr,  # may be that of x or of other
    mean_ptr,  # [CHANNELS], float32, as all that follow
    inverse_ptr,
    weight_ptr,
    bias_ptr,
    other_mean_ptr,  # None: the residual is added as it is
    other_inverse_ptr,
    other_weight_ptr,
    other_bias_ptr,
    rows,
    column_units,
    channels,
    LAST: tl.constexpr,
    RELU: tl.constexpr,
    COLUMN_UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: BLOCK_R × BLOCK_C values of y = act(γ (x - mean)·inverse + β + r).

    r is 0, other, or γ' (other - mean')·inverse' + β'. In channels_last (LAST) a row is a place and
    a column a channel; otherwise a row is a channel of an image, and a column a place. Reads x and
    other once and writes y once; a program also reads what belongs to its channels.
    """
    columns = column_units * COLUMN_UNIT
    blocks = (columns + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    # Neighbouring programs have neighbouring columns, so that memory is read in order.
    row = (pid // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BR]
    column = pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)  # [BC]
    offset = row[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if LAST:
        channel, known = column[None, :], (column < columns)[None, :]
    else:
        channel, known = (row % channels)[:, None], (row < rows)[:, None]
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    y = _normalize(x, mean_ptr, inverse_ptr, weight_ptr, bias_ptr, channel, known)
    if other_ptr is not None:
        r = tl.load(other_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if other_mean_ptr is not None:
            r = _normalize(
                r,
                other_mean_ptr,
                other_inverse_ptr,
                other_weight_ptr,
                other_bias_ptr,
                channel,
                known,
            )
        y += r
    if RELU:
        # A maximum would drop a NaN.
        y = tl.where(y < 0.0, 0.0, y)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


def _block_columns(columns: int) -> int:
    """One of three, as each is compiled for itself."""
    if columns > BLOCK_COLUMNS // 2:
        return BLOCK_COLUMNS
    return BLOCK_COLUMNS // 2 if columns > BLOCK_COLUMNS // 8 else BLOCK_COLUMNS // 8


def norm_act(
    y: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    other: Tensor | None,
    other_mean: Tensor | None,
    other_inverse: Tensor | None,
    other_weight: Tensor | None,
    other_bias: Tensor | None,
    relu: bool,
) -> None:
    """Write into y, which may be x or other. The arguments are those of ops/norm_act.py.

    x is not empty. y, x and other have one layout.
    """
    channels = x.size(1)
    places = x.numel() // channels
    last = not x.is_contiguous() or places == x.size(0)
    rows, columns = (places, channels) if last else (x.size(0) * channels, places // x.size(0))
    unit = 1 if columns % UNIT else UNIT
    block_columns = _block_columns(columns)
    # Ragged rows have no wide loads, and so an address for every value; of narrow rows a thread has
    # as many as values. With all, ptxas spills.
    halved = unit == 1 or block_columns == BLOCK_COLUMNS // 8
    block_rows = BLOCK_VALUES // block_columns // (2 if halved else 1)
    grid = -(-rows // block_rows) * -(-columns // block_columns)
    with torch.cuda.device_of(x):
        norm_act_kernel[(grid,)](
            x,
            other,
            y,
            mean,
            inverse,
            weight,
            bias,
            other_mean,
            other_inverse,
            other_weight,
            other_bias,
            rows,
            columns // unit,
            channels,
            LAST=last,
            RELU=relu,
            COLUMN_UNIT=unit,
            BLOCK_R=block_rows,
            BLOCK_C=block_columns,
            num_warps=WARPS,
        )
