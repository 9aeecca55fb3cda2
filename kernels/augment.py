"""Views on the GPU: crop, resize, flip, jitter, gray, blur, normalise, cast, layout (Triton).

A program computes BLOCK pixels of one view. The contrast step needs the mean of the whole view, and
the blur needs neighbouring pixels. So a batch takes up to four launches, with float32 planes P and
Q [n, 3, S, S] between them:

    resize   crop, resize, jitter steps before contrast, sums    reads the boxes, writes P
    color    contrast and the later steps                        reads P; writes P, or views
    blur x   along x; only views with blur                       reads P, writes Q
    blur y   along y; only views with blur                       reads Q, writes views

P and Q have 12 n S² bytes each. `color` writes P for views with blur and finishes the others.

`augment_crops` starts from crops that are already cut and resized, uint8 [n, S, S, 3]. Reading them
twice moves 6 n S² bytes, less than writing and reading planes. So "mean" takes the place of
"resize". It only adds up pixels, of the views with jitter, and "color" reads the crops again.

The formulas are those of csrc/augment_color.h. There are no atomics: results repeat bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .augment_color import (
    CONTRAST,
    FLIP,
    FLOATS,
    GRAY,
    INTS,
    JITTER,
    ORDER,
    SIGMA,
    UNSPECIALIZED,
    clip,
    jitter_step,
    luma,
    sized,
    steps_before_contrast,
    store_sums,
)
from .augment_resize import resize_kernel

# Four pixels per thread. Eight would need twice the registers, which would leave half as many warps
# to hide the memory's latency.
BLOCK, WARPS = 1024, 8
# Partial sums that a program adds at a time: all of a view of up to 256 × 256 pixels.
SUMS = 64


@triton.jit
def _crop_pixel(crops, i, y, x, size, mask):
    """The pixels (y, x) of crop i: r, g, b in [0, 1], [BLOCK] each."""
    at = crops + i * size * size * 3 + (y * size + x) * 3
    r = tl.load(at, mask=mask, other=0).to(tl.float32) * (1.0 / 255)
    g = tl.load(at + 1, mask=mask, other=0).to(tl.float32) * (1.0 / 255)
    b = tl.load(at + 2, mask=mask, other=0).to(tl.float32) * (1.0 / 255)
    return r, g, b


@triton.jit(do_not_specialize=UNSPECIALIZED)
def mean_kernel(
    crops,  # uint8 [n, S, S, 3]
    ints,  # int32 [n, INTS]
    floats,  # float32 [n, FLOATS]
    partial,  # float32 [n, blocks, 3]
    size,
    blocks,
    SIMCLR: tl.constexpr,
    ADDITIVE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the sums of r, g and b of BLOCK pixels, after the jitter steps before contrast.

    Reads 3 bytes per pixel, writes three floats. Returns at once for views without jitter.
    """
    size = sized(size, ALIGNED)
    i = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    ints += i * INTS
    floats += i * FLOATS
    if tl.load(ints + JITTER) == 0:
        return
    pixel = block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = pixel < size * size
    r, g, b = _crop_pixel(crops, i, pixel // size, pixel % size, size, mask)
    r, g, b = steps_before_contrast(ints, floats, r, g, b, SIMCLR, ADDITIVE)
    store_sums(partial + (i * blocks + block) * 3, r, g, b, mask)


@triton.jit
def _radius(sigma, most):
    """The blur's radius in pixels. The Gaussian's tails beyond 4 sigma weigh 6e-5 in total."""
    return tl.minimum(tl.ceil(4.0 * sigma).to(tl.int32), most)


@triton.jit
def _means(partial, blocks, count, SUMS: tl.constexpr):
    """The means of r, g and b over a view, from its partial sums [blocks, 3]."""
    every = tl.arange(0, SUMS)  # [SUMS]
    sums = partial + every * 3
    sum_r = tl.zeros([SUMS], tl.float32)
    sum_g = tl.zeros([SUMS], tl.float32)
    sum_b = tl.zeros([SUMS], tl.float32)
    for first in range(0, blocks, SUMS):
        inside = first + every < blocks
        sum_r += tl.load(sums + first * 3, mask=inside, other=0.0)
        sum_g += tl.load(sums + first * 3 + 1, mask=inside, other=0.0)
        sum_b += tl.load(sums + first * 3 + 2, mask=inside, other=0.0)
    return tl.sum(sum_r) / count, tl.sum(sum_g) / count, tl.sum(sum_b) / count


@triton.jit(do_not_specialize=UNSPECIALIZED)
def color_kernel(
    crops,  # uint8 [n, S, S, 3], read with CROPS
    ints,  # int32 [n, INTS]
    floats,  # float32 [n, FLOATS]
    planes,  # float32 [n, 3, S, S], read without CROPS; written for views with blur
    partial,  # float32 [n, blocks, 3]
    normalize,  # float32 [6]: scale of R, G, B, then shift
    out,  # [n, 3, S, S], any strides
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    size,
    blocks,
    most_radius,
    SIMCLR: tl.constexpr,
    ADDITIVE: tl.constexpr,
    CROPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK pixels of one view, from the contrast step on.

    Contrast is x · f + mean · (1 - f). The mean is the sum of the view's partial sums, divided by
    S². Pixels of a view with blur go to the planes, others become x · scale + shift in `out`.
    Reads 12 bytes per pixel, or 3 with CROPS, and the partial sums from L2; writes 12 bytes per
    pixel, or three elements of `out`.
    """
    size = sized(size, ALIGNED)
    i = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = pixel < size * size
    ints += i * INTS
    floats += i * FLOATS
    mean_r, mean_g, mean_b = _means(partial + i * blocks * 3, blocks, 1.0 * size * size, SUMS)
    if not SIMCLR:
        mean_r = luma(mean_r, mean_g, mean_b)
        mean_g = mean_r
        mean_b = mean_r
    area = size * size
    plane = planes + i * 3 * area + pixel
    y = pixel // size
    x = pixel % size
    jitter = tl.load(ints + JITTER)
    # `after`: whether to do the next jitter step. Planes have the steps before contrast already.
    if CROPS:
        source_x = tl.where(tl.load(ints + FLIP) != 0, size - 1 - x, x)
        r, g, b = _crop_pixel(crops, i, y, source_x, size, mask)
        after = jitter
    else:
        r = tl.load(plane, mask=mask, other=0.0)
        g = tl.load(plane + area, mask=mask, other=0.0)
        b = tl.load(plane + 2 * area, mask=mask, other=0.0)
        after = jitter * 0
    for j in range(4):
        step = tl.load(ints + ORDER + j)
        after = tl.where(step == CONTRAST, jitter, after)
        if after != 0:
            f = tl.load(floats + step)
            r, g, b = jitter_step(step, f, r, g, b, mean_r, mean_g, mean_b, SIMCLR, ADDITIVE)
    if tl.load(ints + GRAY) != 0:
        r = luma(r, g, b)
        g = r
        b = r
    r, g, b = clip(r), clip(g), clip(b)
    if _radius(tl.load(floats + SIGMA), most_radius) > 0:
        tl.store(plane, r, mask=mask)
        tl.store(plane + area, g, mask=mask)
        tl.store(plane + 2 * area, b, mask=mask)
    else:
        at = out + i * stride_n + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
        kind = out.dtype.element_ty
        r = r * tl.load(normalize) + tl.load(normalize + 3)
        g = g * tl.load(normalize + 1) + tl.load(normalize + 4)
        b = b * tl.load(normalize + 2) + tl.load(normalize + 5)
        tl.store(at, r.to(kind), mask=mask)
        tl.store(at + stride_c, g.to(kind), mask=mask)
        tl.store(at + stride_c + stride_c, b.to(kind), mask=mask)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def blur_kernel(
    floats,  # float32 [n, FLOATS]
    source,  # float32 [n, 3, S, S]
    normalize,  # float32 [6]: scale of R, G, B, then shift
    out,  # VERTICAL: the views [n, 3, S, S]; otherwise float32 [n, 3, S, S]
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    size,
    blocks,
    most_radius,
    VERTICAL: tl.constexpr,
    REFLECT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK pixels of one channel of a view, blurred along one axis.

    out(x) = Σ_k w_k source(x + k) / Σ_k w_k with w_k = exp(-k² / (2 sigma²)), |k| <= radius. Beyond
    the border the source is 0, or reflected. The vertical pass also normalises. Reads 4 bytes per
    pixel from memory, the taps from the cache; writes 4 bytes per pixel, or an element of the
    views. Returns at once for views without blur.
    """
    size = sized(size, ALIGNED)
    plane = tl.program_id(0) // blocks
    i = (plane // 3).to(tl.int64)
    c = (plane % 3).to(tl.int64)
    sigma = tl.load(floats + i * FLOATS + SIGMA)
    radius = _radius(sigma, most_radius)
    if radius <= 0:
        return
    pixel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = pixel < size * size
    y = pixel // size
    x = pixel % size
    source += (i * 3 + c) * size * size
    value = tl.zeros([BLOCK], tl.float32)
    total = sigma * 0.0
    for k in range(-radius, radius + 1):
        weight = tl.exp(-0.5 * k * k / (sigma * sigma))
        total += weight
        at = (y if VERTICAL else x) + k
        inside = mask & (at >= 0) & (at < size)
        if REFLECT:
            at = tl.abs(at)
            at = size - 1 - tl.abs(size - 1 - at)
            inside = mask & (at >= 0)
        offset = at * size + x if VERTICAL else y * size + at
        value += weight * tl.load(source + offset, mask=inside, other=0.0)
    value = value / total
    if VERTICAL:
        value = clip(value) * tl.load(normalize + c) + tl.load(normalize + 3 + c)
    at = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    out += i * stride_n + c * stride_c
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


def augment_views(
    where: Tensor,
    as_bytes: bool,
    ints: Tensor,
    floats: Tensor,
    normalize: Tensor,
    simclr_spec: bool,
    additive_brightness: bool,
    bilinear: bool,
    blur_radius: int,
    out: Tensor,
) -> None:
    """Launch the kernels on torch's current stream. All arguments are on `out`'s device.

    where: int64 [2, n], contiguous: each image's address and the stride of its rows in elements.
        The images are [H, W, 3] with strides (any, 3, 1), all uint8 (as_bytes) or all float32.
    ints: int32 [n, INTS], floats: float32 [n, FLOATS], normalize: float32 [6]; contiguous.
        augment_color.py says what is in them.
    out: [n, 3, S, S], any strides.
    """
    n, _, size, _ = out.shape
    if n == 0:
        return
    planes, partial, blocks = _scratch(out)
    with torch.cuda.device_of(out):
        resize_kernel[(n * blocks,)](
            where[0],
            where[1],
            ints,
            floats,
            planes,
            partial,
            size,
            blocks,
            SIMCLR=simclr_spec,
            ADDITIVE=additive_brightness,
            BILINEAR=bilinear,
            BYTES=as_bytes,
            ALIGNED=size % 16 == 0,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
        views = (normalize, simclr_spec, additive_brightness, blur_radius, out)
        _finish(None, ints, floats, planes, partial, *views)


def augment_crops(
    crops: Tensor,
    ints: Tensor,
    floats: Tensor,
    normalize: Tensor,
    simclr_spec: bool,
    additive_brightness: bool,
    blur_radius: int,
    out: Tensor,
) -> None:
    """`augment_views` of crops that are already cut and resized. The boxes in `ints` are not read.

    crops: uint8 [n, S, S, 3], contiguous.
    """
    n, _, size, _ = out.shape
    if n == 0:
        return
    planes, partial, blocks = _scratch(out)
    with torch.cuda.device_of(out):
        mean_kernel[(n * blocks,)](
            crops,
            ints,
            floats,
            partial,
            size,
            blocks,
            SIMCLR=simclr_spec,
            ADDITIVE=additive_brightness,
            ALIGNED=size % 16 == 0,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
        views = (normalize, simclr_spec, additive_brightness, blur_radius, out)
        _finish(crops, ints, floats, planes, partial, *views)


def _scratch(out: Tensor) -> tuple[Tensor, Tensor, int]:
    n, _, size, _ = out.shape
    blocks = triton.cdiv(size * size, BLOCK)
    planes = torch.empty((n, 3, size, size), dtype=torch.float32, device=out.device)
    partial = torch.empty((n, blocks, 3), dtype=torch.float32, device=out.device)
    return planes, partial, blocks


def _finish(
    crops: Tensor | None,
    ints: Tensor,
    floats: Tensor,
    planes: Tensor,
    partial: Tensor,
    normalize: Tensor,
    simclr_spec: bool,
    additive_brightness: bool,
    blur_radius: int,
    out: Tensor,
) -> None:
    n, blocks, _ = partial.shape
    size = out.size(2)
    color_kernel[(n * blocks,)](
        crops,
        ints,
        floats,
        planes,
        partial,
        normalize,
        out,
        *out.stride(),
        size,
        blocks,
        blur_radius,
        SIMCLR=simclr_spec,
        ADDITIVE=additive_brightness,
        CROPS=crops is not None,
        ALIGNED=size % 16 == 0,
        SUMS=SUMS,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    if blur_radius == 0:
        return
    rows = torch.empty_like(planes)
    for vertical, source, target in ((False, planes, rows), (True, rows, out)):
        blur_kernel[(n * 3 * blocks,)](
            floats,
            source,
            normalize,
            target,
            *target.stride(),
            size,
            blocks,
            blur_radius,
            VERTICAL=vertical,
            REFLECT=not simclr_spec,
            ALIGNED=size % 16 == 0,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
