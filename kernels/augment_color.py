"""The jitter steps on pixels in registers. csrc/augment_color.h has the same for the CPU."""

import triton
import triton.language as tl

# The parameters of a view, packed by `pack_params` of simclr_fast/augment/views.py. Columns of
# `ints` [n, INTS]: y, x, height and width of the box, then these. ORDER is the first of four.
FLIP = tl.constexpr(4)
JITTER = tl.constexpr(5)
ORDER = tl.constexpr(6)
GRAY = tl.constexpr(10)
INTS = tl.constexpr(11)
# Columns of `floats` [n, FLOATS]: the factor of each jitter step, then sigma.
SIGMA = tl.constexpr(4)
FLOATS = tl.constexpr(5)
# The jitter steps, by their numbers in ORDER. The fourth is the hue.
BRIGHTNESS = tl.constexpr(0)
CONTRAST = tl.constexpr(1)
SATURATION = tl.constexpr(2)

# Triton compiles a kernel anew when an integer becomes 1 or a multiple of 16, or an address becomes
# a multiple of 16 bytes. For these arguments it does not. Only one of these facts makes the kernels
# faster, a size divisible by 16: the flag ALIGNED. So all batches and sizes take two variants.
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
    """x in [0, 12) modulo 6: a hue in sixths of a turn."""
    return tl.where(x >= 6.0, x - 6.0, x)


@triton.jit
def hue_channel(h, n: tl.constexpr, top, chroma):
    """A channel of the HSV colour of hue h, in sixths of a turn. n: 5 red, 3 green, 1 blue."""
    k = wrap6(h + n)
    return clip(top - chroma * clip(tl.minimum(k, 4.0 - k)))


@triton.jit
def jitter_step(
    step, f, r, g, b, mean_r, mean_g, mean_b, SIMCLR: tl.constexpr, ADDITIVE: tl.constexpr
):
    """Do a jitter step with factor f on r, g, b, [BLOCK] each. The means are for contrast."""
    if step == BRIGHTNESS:
        if ADDITIVE:
            r, g, b = clip(r + f), clip(g + f), clip(b + f)
        else:
            r, g, b = clip(r * f), clip(g * f), clip(b * f)
    elif step == CONTRAST:
        r = clip(r * f + mean_r * (1.0 - f))
        g = clip(g * f + mean_g * (1.0 - f))
        b = clip(b * f + mean_b * (1.0 - f))
    else:
        top = tl.maximum(r, tl.maximum(g, b))
        chroma = top - tl.minimum(r, tl.minimum(g, b))
        safe = tl.where(chroma > 0.0, chroma, 1.0)
        if step == SATURATION:
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
    """Do the jitter steps that come before contrast. A view without jitter has none."""
    before = tl.load(ints + JITTER)
    for j in range(4):
        step = tl.load(ints + ORDER + j)
        before = tl.where(step == CONTRAST, 0, before)
        if before != 0:
            f = tl.load(floats + step)
            r, g, b = jitter_step(step, f, r, g, b, 0.0, 0.0, 0.0, SIMCLR, ADDITIVE)
    return r, g, b


@triton.jit
def store_sums(sums, r, g, b, mask):
    """Write the sums of r, g and b over the pixels in `mask`."""
    tl.store(sums, tl.sum(tl.where(mask, r, 0.0)))
    tl.store(sums + 1, tl.sum(tl.where(mask, g, 0.0)))
    tl.store(sums + 2, tl.sum(tl.where(mask, b, 0.0)))
