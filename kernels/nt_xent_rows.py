"""The row-wise kernels around the NT-Xent tiles (Triton): losses, gradient weights, gradients.

Arrays over rows are interleaved: the positive of row i is row i ^ 1. README.md derives the formulas.
"""

import triton
import triton.language as tl

from .nt_xent_tiles import LOG2_E, LOWEST, needs_maximum

LN_2 = tl.constexpr(0.6931471805599453)
# W in [0, 2] is rounded to float16 for the tensor cores; this many binades keep 1e-8 normal.
WEIGHT_SHIFT = tl.constexpr(14.0)


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
def _one_minus_exp(loss):
    """1 - exp(-loss) to float32 relative accuracy: the negatives' share of a row's softmax."""
    series = 1.0 - loss / 9.0
    for k in tl.static_range(8, 1, -1):
        series = 1.0 - loss / k * series
    return tl.where(loss < 0.5, loss * series, 1.0 - tl.exp(-loss))


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
def losses_kernel(
    u_ptr,  # [M, D_pad], float16 or float32
    temperature_ptr,  # [], float32
    sum_ptr,  # [SLOTS, R], float32
    top_ptr,  # [LOW_SLOTS, R], float32, read for low temperatures only
    loss_ptr,  # [R], float32
    lse_ptr,  # [R], float32, natural
    row_offset, rows, padded, slots, low_slots,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program: BR rows; loss_i = softplus(log Σ_negatives exp(s_ij) - s_i,p(i)).

    The positive stays outside the sum, so a small loss keeps its relative accuracy.
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
    loss = _softplus((top + tl.log2(total) - positive) * LN_2)
    tl.store(loss_ptr + r, loss, mask=r < rows)
    tl.store(lse_ptr + r, positive * LN_2 + loss, mask=r < rows)


@triton.jit
def _entropy(top, total, moment, positive):
    """Nats of the softmax over a row's positive and a set of negatives, without cancellation."""
    lse = _log2_add(top + tl.log2(total), positive)
    share = tl.exp2(top - lse)
    p = tl.exp2(positive - lse)
    return (share * (moment + (top - lse) * total) + p * (positive - lse)) * -LN_2


@triton.jit
def statistics_kernel(
    u_ptr,  # [M, D_pad], float16 or float32
    partial_ptr,  # [2, 3, SPLITS, R], float32: other view, own view; maxima, sums, moments
    loss_ptr,  # [R], float32
    lse_ptr,  # [R], float32, natural
    stats_ptr,  # [R, 4], float32
    row_offset, rows, padded, splits,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BR rows; losses_kernel's outputs and the four statistics.

    Columns: positive above every negative of the other view; entropy over the other view's rows;
    the same two over all rows.
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < rows
    plane = splits.to(tl.int64) * rows
    top_o = tl.full([BLOCK_R], LOWEST, tl.float32)
    top_s = tl.full([BLOCK_R], LOWEST, tl.float32)
    for split in range(splits):
        at = partial_ptr + split * rows.to(tl.int64) + r
        top_o = tl.maximum(top_o, tl.load(at, mask=inside, other=LOWEST))
        top_s = tl.maximum(top_s, tl.load(at + 3 * plane, mask=inside, other=LOWEST))
    top = tl.maximum(top_o, top_s)
    sum_o = tl.zeros([BLOCK_R], tl.float32)
    sum_all = tl.zeros([BLOCK_R], tl.float32)
    moment_o = tl.zeros([BLOCK_R], tl.float32)
    moment_all = tl.zeros([BLOCK_R], tl.float32)
    for split in range(splits):
        for own in tl.static_range(2):
            at = partial_ptr + 3 * own * plane + split * rows.to(tl.int64) + r
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
    loss = _softplus((top + tl.log2(sum_all) - positive) * LN_2)
    tl.store(loss_ptr + r, loss, mask=inside)
    tl.store(lse_ptr + r, positive * LN_2 + loss, mask=inside)
    out = stats_ptr + 4 * r
    tl.store(out, (positive > top_o).to(tl.float32), mask=inside)
    tl.store(out + 1, _entropy(top_o, sum_o, moment_o, positive), mask=inside)
    tl.store(out + 2, (positive > top).to(tl.float32), mask=inside)
    tl.store(out + 3, _entropy(top, sum_all, moment_all, positive), mask=inside)


@triton.jit
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
def _gradient_block(
    gradient_ptr, u_ptr, r, row, d, inside, rows, padded, splits, scale, positive_weight
):
    """û_i and √(τ log2 e) dL/du_i over a block of features, [BR, BD] each."""
    mask = inside[:, None] & (d < padded)[None, :]
    total = tl.zeros([r.shape[0], d.shape[0]], tl.float32)
    for split in range(splits):
        at = (split * rows.to(tl.int64) + r)[:, None] * padded + d[None, :]
        total += tl.load(gradient_ptr + at, mask=mask, other=0.0)
    own = tl.load(u_ptr + row[:, None] * padded + d[None, :], mask=mask, other=0.0)
    partner = tl.load(u_ptr + (row ^ 1)[:, None] * padded + d[None, :], mask=mask, other=0.0)
    return own.to(tl.float32), scale * total + positive_weight[:, None] * partner.to(tl.float32)


@triton.jit
def finish_gradient_kernel(
    gradient_ptr,  # [SPLITS, R, D_pad], float32: Σ_j W_ij û_j over the negatives, scaled
    grad_ptr,  # [M], float32, any stride
    scale_ptr,  # [], float32
    u_ptr,  # [M, D_pad], float16 or float32
    loss_ptr,  # [R], float32
    inv_norm_ptr,  # [R], float32
    temperature_ptr,  # [], float32
    grad_z_ptr,  # [R, D], view-major
    grad_temperature_ptr,  # [programs], float32
    row_offset, rows, dim, padded, splits, grad_stride,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BR rows; adds the positive, and goes from û to z and to the temperature.

    dz_i = (G_i - û_i <û_i, G_i> / <û_i, û_i>) / |z_i|. Reads the partial sums and û twice (the
    second time from cache), writes dz once.
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BR]
    row = row_offset + r
    inside = r < rows
    column = tl.arange(0, BLOCK_D)
    own_loss = tl.load(loss_ptr + r, mask=inside, other=0.0)
    partner_loss = tl.load(loss_ptr + (r ^ 1), mask=inside, other=0.0)
    own_grad = tl.load(grad_ptr + row * grad_stride, mask=inside, other=0.0)
    partner_grad = tl.load(grad_ptr + (row ^ 1) * grad_stride, mask=inside, other=0.0)
    positive = -own_grad * _one_minus_exp(own_loss) - partner_grad * _one_minus_exp(partner_loss)
    scale = tl.load(scale_ptr) * tl.exp2(-WEIGHT_SHIFT)

    projection = tl.zeros([BLOCK_R], tl.float32)
    squares = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, padded, BLOCK_D):
        u, g = _gradient_block(
            gradient_ptr, u_ptr, r, row, start + column, inside, rows, padded, splits, scale,
            positive,
        )  # fmt: skip
        projection += tl.sum(u * g, axis=1)
        squares += tl.sum(u * u, axis=1)

    temperature = tl.load(temperature_ptr)
    tau_part = -0.5 / (temperature * LOG2_E) * tl.sum(projection, axis=0)
    tl.store(grad_temperature_ptr + tl.program_id(0), tau_part)

    inv_norm = tl.load(inv_norm_ptr + r, mask=inside, other=1.0)
    # A norm below torch.nn.functional.normalize's eps is a constant there.
    radial = tl.where(inv_norm >= 1e12, 0.0, projection / squares)
    outer = inv_norm / tl.sqrt(temperature * LOG2_E)
    out = grad_z_ptr + ((r & 1) * (rows // 2) + (r >> 1))[:, None] * dim
    for start in range(0, dim, BLOCK_D):
        d = start + column
        u, g = _gradient_block(
            gradient_ptr, u_ptr, r, row, d, inside, rows, padded, splits, scale, positive
        )
        grad_z = (outer[:, None] * (g - radial[:, None] * u)).to(grad_z_ptr.dtype.element_ty)
        tl.store(out + d[None, :], grad_z, mask=inside[:, None] & (d < dim)[None, :])
