"""The jitter's steps on pixels in registers, as csrc/augment_color.h has them for the CPU."""

import triton
import triton.language as tl

# Arguments that a launch must not turn into other kernels. An integer of 1 would become a constant,
# and a multiple of 16 or an aligned address each make a variant. What counts for speed, a size
# divisible by 16, is the flag ALIGNED: two variants over all batches and sizes.
UNSPECIALIZED = (
    "address",
    "row_stride",
    "crops",
    "ints",
    "floats",
    "normalize",
    "out",
    "stride_n",
    "stride_c",
    "stride_y",
    "stride_x",
    "size",
    "blocks",
    "most_radius",
)


@triton.jit
def sized(size, ALIGNED: tl.constexpr):
    """The view's side, known to the compiler as a multiple of 16 if ALIGNED."""
    return tl.multiple_of(size, 16) if ALIGNED else size


@triton.jit
def clip(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def luma(r, g, b):
    return 0.2989 * r + 0.587 * g + 0.114 * b


@triton.jit
def wrap6(x):
    return tl.where(x >= 6.0, x - 6.0, x)


@triton.jit
def hue_channel(h, n: tl.constexpr, top, chroma):
    k = wrap6(h + n)
    return clip(top - chroma * clip(tl.minimum(k, 4.0 - k)))


@triton.jit
def jitter_step(
    op, f, r, g, b, mean_r, mean_g, mean_b, SIMCLR: tl.constexpr, ADDITIVE: tl.constexpr
):
    """Jitter step op (0 brightness, 1 contrast, 2 saturation, 3 hue) on r, g, b  # [BLOCK] each"""
    if op == 0:
        if ADDITIVE:
            r, g, b = clip(r + f), clip(g + f), clip(b + f)
        else:
            r, g, b = clip(r * f), clip(g * f), clip(b * f)
    elif op == 1:
        r = clip(r * f + mean_r * (1.0 - f))
        g = clip(g * f + mean_g * (1.0 - f))
        b = clip(b * f + mean_b * (1.0 - f))
    else:
        top = tl.maximum(r, tl.maximum(g, b))
        chroma = top - tl.minimum(r, tl.minimum(g, b))
        safe = tl.where(chroma > 0.0, chroma, 1.0)
        if op == 2:
            if SIMCLR:
                factor = tl.maximum(tl.minimum(top / safe, f), 0.0)
                r = clip(top - (top - r) * factor)
                g = clip(top - (top - g) * factor)
                b = clip(top - (top - b) * factor)
            else:
                rest = luma(r, g, b) * (1.0 - f)
                r, g, b = clip(r * f + rest), clip(g * f + rest), clip(b * f + rest)
        else:
            green = 2.0 + (b - r) / safe
            blue = 4.0 + (r - g) / safe
            h = tl.where(top == r, (g - b) / safe, tl.where(top == g, green, blue))
            h = tl.where(h < 0.0, h + 6.0, h)
            h = wrap6(h + 6.0 * (f - tl.floor(f)))
            r = hue_channel(h, 5.0, top, chroma)
            g = hue_channel(h, 3.0, top, chroma)
            b = hue_channel(h, 1.0, top, chroma)
    return r, g, b


@triton.jit
def steps_before_contrast(ints, floats, r, g, b, SIMCLR: tl.constexpr, ADDITIVE: tl.constexpr):
    before = tl.load(ints + 5)
    for j in range(4):
        op = tl.load(ints + 6 + j)
        before = tl.where(op == 1, 0, before)
        if before != 0:
            f = tl.load(floats + op)
            r, g, b = jitter_step(op, f, r, g, b, 0.0, 0.0, 0.0, SIMCLR, ADDITIVE)
    return r, g, b


@triton.jit
def store_sums(sums, r, g, b, mask):
    tl.store(sums, tl.sum(tl.where(mask, r, 0.0)))
    tl.store(sums + 1, tl.sum(tl.where(mask, g, 0.0)))
    tl.store(sums + 2, tl.sum(tl.where(mask, b, 0.0)))
