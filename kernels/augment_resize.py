"""Crop and resize of images of any sizes, and the jitter steps before contrast (Triton)."""

import triton
import triton.language as tl

from .augment_color import (
    FLIP,
    FLOATS,
    INTS,
    UNSPECIALIZED,
    clip,
    sized,
    steps_before_contrast,
    store_sums,
)


@triton.jit
def _filter(x, BILINEAR: tl.constexpr):
    """The triangle, or Keys' cubic with a = -0.5."""
    x = tl.abs(x)
    if BILINEAR:
        return tl.maximum(1.0 - x, 0.0)
    inner = (1.5 * x - 2.5) * x * x + 1.0
    outer = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return tl.where(x < 1.0, inner, tl.where(x < 2.0, outer, 0.0))


@triton.jit
def _window(position, extent, size, SIMCLR: tl.constexpr, BILINEAR: tl.constexpr):
    """The filter of an output position along one axis: centre, first sample, samples, stretch.

    The filter is zero at distances of `support` and more. So at most ceil(2 support) samples have a
    weight, for example 4 with a bicubic filter that is not stretched.
    """
    scale = extent.to(tl.float32) / size
    stretch = scale * 0.0 + 1.0
    if not SIMCLR:
        stretch = tl.maximum(scale, 1.0)
    support = stretch * (1.0 if BILINEAR else 2.0)
    center = (position.to(tl.float32) + 0.5) * scale
    first = tl.floor(center - support + 0.5).to(tl.int32)
    return center, first, tl.ceil(2.0 * support).to(tl.int32), stretch


@triton.jit
def _tap(first, k, center, stretch, extent, BILINEAR: tl.constexpr):
    """The k-th sample of a filter and its weight, which is 0 outside the box."""
    sample = first + k
    weight = _filter((sample.to(tl.float32) + 0.5 - center) / stretch, BILINEAR)
    return sample, tl.where((sample >= 0) & (sample < extent), weight, 0.0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def resize_kernel(
    address,  # int64 [n]: of each image's first element
    row_stride,  # int64 [n], in elements
    ints,  # int32 [n, INTS]
    floats,  # float32 [n, FLOATS]
    planes,  # float32 [n, 3, S, S]
    partial,  # float32 [n, blocks, 3]
    size,
    blocks,
    SIMCLR: tl.constexpr,
    ADDITIVE: tl.constexpr,
    BILINEAR: tl.constexpr,
    BYTES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK pixels of one view, resized and with the jitter steps before contrast.

    out = Σ weight · source / Σ weight over the samples of both axes that are inside the box. Reads
    the samples through the cache, which neighbouring pixels share, so each source pixel once from
    memory. Writes 12 bytes per pixel, and the sums of r, g and b.
    """
    size = sized(size, ALIGNED)
    i = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    pixel = block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = pixel < size * size
    ints += i * INTS
    floats += i * FLOATS
    top, left = tl.load(ints).to(tl.int64), tl.load(ints + 1).to(tl.int64)
    h, w, flip = tl.load(ints + 2), tl.load(ints + 3), tl.load(ints + FLIP)
    stride = tl.load(row_stride + i)
    y = pixel // size
    x = pixel % size
    x = tl.where(flip != 0, size - 1 - x, x)
    y_center, y_first, y_taps, y_stretch = _window(y, h, size, SIMCLR, BILINEAR)
    x_center, x_first, x_taps, x_stretch = _window(x, w, size, SIMCLR, BILINEAR)
    if BYTES:
        source = tl.load(address + i).to(tl.pointer_type(tl.uint8))
    else:
        source = tl.load(address + i).to(tl.pointer_type(tl.float32))
    source += top * stride + left * 3
    r = tl.zeros([BLOCK], tl.float32)
    g = tl.zeros([BLOCK], tl.float32)
    b = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for ky in range(0, y_taps):
        row, row_weight = _tap(y_first, ky, y_center, y_stretch, h, BILINEAR)
        for kx in range(0, x_taps):
            column, weight = _tap(x_first, kx, x_center, x_stretch, w, BILINEAR)
            weight = weight * row_weight
            total += weight
            inside = mask & (row >= 0) & (row < h) & (column >= 0) & (column < w)
            at = source + row.to(tl.int64) * stride + column.to(tl.int64) * 3
            r += weight * tl.load(at, mask=inside, other=0).to(tl.float32)
            g += weight * tl.load(at + 1, mask=inside, other=0).to(tl.float32)
            b += weight * tl.load(at + 2, mask=inside, other=0).to(tl.float32)
    total = tl.where(mask, total, 1.0)
    gain = 1.0 / (total * 255.0) if BYTES else 1.0 / total
    r, g, b = r * gain, g * gain, b * gain
    if not SIMCLR:
        r, g, b = clip(r), clip(g), clip(b)
    r, g, b = steps_before_contrast(ints, floats, r, g, b, SIMCLR, ADDITIVE)
    store_sums(partial + (i * blocks + block) * 3, r, g, b, mask)
    area = size * size
    plane = planes + i * 3 * area + pixel
    tl.store(plane, r, mask=mask)
    tl.store(plane + area, g, mask=mask)
    tl.store(plane + 2 * area, b, mask=mask)
