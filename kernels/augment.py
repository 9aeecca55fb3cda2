"""Views on the GPU: crop, resize, flip, jitter, gray, blur, normalise, cast, layout.

One program computes BLOCK pixels of one view. Contrast needs the mean after the steps before it and
the blur needs neighbours, so there are up to four launches over float32 planes [n, 3, S, S]:

    resize   source → planes, steps before contrast, partial sums      reads the boxes, writes P
    color    contrast and what follows; finishes views without blur    reads P, writes P or views
    blur x   blurred views only                                        reads P, writes Q
    blur y   blurred views only, finishes them                         reads Q, writes views

with P = Q = 12 n S² bytes. Formulas as in csrc/augment_color.h; no atomics, so results repeat.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _clip(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _luma(r, g, b):
    return 0.2989 * r + 0.587 * g + 0.114 * b


@triton.jit
def _wrap6(x):
    return tl.where(x >= 6.0, x - 6.0, x)


@triton.jit
def _hue_channel(h, n: tl.constexpr, top, chroma):
    k = _wrap6(h + n)
    return _clip(top - chroma * _clip(tl.minimum(k, 4.0 - k)))


@triton.jit
def _step(op, f, r, g, b, mean_r, mean_g, mean_b, SIMCLR: tl.constexpr, ADDITIVE: tl.constexpr):
    """Jitter step op (0 brightness, 1 contrast, 2 saturation, 3 hue) on r, g, b  # [BLOCK] each"""
    if op == 0:
        if ADDITIVE:
            r, g, b = _clip(r + f), _clip(g + f), _clip(b + f)
        else:
            r, g, b = _clip(r * f), _clip(g * f), _clip(b * f)
    elif op == 1:
        r = _clip(r * f + mean_r * (1.0 - f))
        g = _clip(g * f + mean_g * (1.0 - f))
        b = _clip(b * f + mean_b * (1.0 - f))
    else:
        top = tl.maximum(r, tl.maximum(g, b))
        chroma = top - tl.minimum(r, tl.minimum(g, b))
        safe = tl.where(chroma > 0.0, chroma, 1.0)
        if op == 2:
            if SIMCLR:
                factor = tl.maximum(tl.minimum(top / safe, f), 0.0)
                r = _clip(top - (top - r) * factor)
                g = _clip(top - (top - g) * factor)
                b = _clip(top - (top - b) * factor)
            else:
                rest = _luma(r, g, b) * (1.0 - f)
                r, g, b = _clip(r * f + rest), _clip(g * f + rest), _clip(b * f + rest)
        else:
            green = 2.0 + (b - r) / safe
            blue = 4.0 + (r - g) / safe
            h = tl.where(top == r, (g - b) / safe, tl.where(top == g, green, blue))
            h = tl.where(h < 0.0, h + 6.0, h)
            h = _wrap6(h + 6.0 * (f - tl.floor(f)))
            r = _hue_channel(h, 5.0, top, chroma)
            g = _hue_channel(h, 3.0, top, chroma)
            b = _hue_channel(h, 1.0, top, chroma)
    return r, g, b


@triton.jit
def _filter(x, BILINEAR: tl.constexpr):
    x = tl.abs(x)
    if BILINEAR:
        return tl.maximum(1.0 - x, 0.0)
    inner = (1.5 * x - 2.5) * x * x + 1.0
    outer = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return tl.where(x < 1.0, inner, tl.where(x < 2.0, outer, 0.0))


@triton.jit
def _window(position, extent, size, SIMCLR: tl.constexpr, BILINEAR: tl.constexpr):
    """Centre, first sample, number of samples and stretch of the resize filter along one axis."""
    scale = extent.to(tl.float32) / size
    stretch = scale * 0.0 + 1.0
    if not SIMCLR:
        stretch = tl.maximum(scale, 1.0)
    support = stretch * (1.0 if BILINEAR else 2.0)
    center = (position.to(tl.float32) + 0.5) * scale
    first = tl.floor(center - support + 0.5).to(tl.int32)
    return center, first, (2.0 * support + 1.0).to(tl.int32) + 1, stretch


@triton.jit
def _tap(first, k, center, stretch, extent, BILINEAR: tl.constexpr):
    sample = first + k
    weight = _filter((sample.to(tl.float32) + 0.5 - center) / stretch, BILINEAR)
    return sample, tl.where((sample >= 0) & (sample < extent), weight, 0.0)


@triton.jit
def resize_kernel(
    address,  # int64 [n]: of each image's first element
    row_stride,  # int64 [n], in elements
    ints,  # int32 [n, 11]: y, x, h, w, flip, jitter, order (4), gray
    floats,  # float32 [n, 5]: factors (4), sigma
    planes,  # float32 [n, 3, S, S]
    partial,  # float32 [n, blocks, 3]
    size,
    blocks,
    SIMCLR: tl.constexpr,
    ADDITIVE: tl.constexpr,
    BILINEAR: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    pixel = block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = pixel < size * size
    ints += i * 11
    floats += i * 5
    top, left = tl.load(ints).to(tl.int64), tl.load(ints + 1).to(tl.int64)
    h, w, flip = tl.load(ints + 2), tl.load(ints + 3), tl.load(ints + 4)
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
        r, g, b = _clip(r), _clip(g), _clip(b)
    before = tl.load(ints + 5)
    for j in range(4):
        op = tl.load(ints + 6 + j)
        before = tl.where(op == 1, 0, before)
        if before != 0:
            f = tl.load(floats + op)
            r, g, b = _step(op, f, r, g, b, 0.0, 0.0, 0.0, SIMCLR, ADDITIVE)
    sums = partial + (i * blocks + block) * 3
    tl.store(sums, tl.sum(tl.where(mask, r, 0.0)))
    tl.store(sums + 1, tl.sum(tl.where(mask, g, 0.0)))
    tl.store(sums + 2, tl.sum(tl.where(mask, b, 0.0)))
    area = size * size
    plane = planes + i * 3 * area + pixel
    tl.store(plane, r, mask=mask)
    tl.store(plane + area, g, mask=mask)
    tl.store(plane + 2 * area, b, mask=mask)


@triton.jit
def _radius(sigma, most):
    """Beyond 4 sigma the Gaussian's tail weighs 6e-5 in all."""
    return tl.minimum(tl.ceil(4.0 * sigma).to(tl.int32), most)


@triton.jit
def color_kernel(
    ints,
    floats,
    planes,
    partial,
    normalize,  # float32 [6]: scale of R, G, B, then shift
    out,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    size,
    blocks,
    most_radius,
    SIMCLR: tl.constexpr,
    ADDITIVE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = pixel < size * size
    ints += i * 11
    floats += i * 5
    every = tl.arange(0, BLOCKS)  # [BLOCKS]
    sums = partial + i * blocks * 3 + every * 3
    count = 1.0 * size * size
    mean_r = tl.sum(tl.load(sums, mask=every < blocks, other=0.0)) / count
    mean_g = tl.sum(tl.load(sums + 1, mask=every < blocks, other=0.0)) / count
    mean_b = tl.sum(tl.load(sums + 2, mask=every < blocks, other=0.0)) / count
    if not SIMCLR:
        mean_r = _luma(mean_r, mean_g, mean_b)
        mean_g = mean_r
        mean_b = mean_r
    area = size * size
    plane = planes + i * 3 * area + pixel
    r = tl.load(plane, mask=mask, other=0.0)
    g = tl.load(plane + area, mask=mask, other=0.0)
    b = tl.load(plane + 2 * area, mask=mask, other=0.0)
    jitter = tl.load(ints + 5)
    after = jitter * 0
    for j in range(4):
        op = tl.load(ints + 6 + j)
        after = tl.where(op == 1, jitter, after)
        if after != 0:
            f = tl.load(floats + op)
            r, g, b = _step(op, f, r, g, b, mean_r, mean_g, mean_b, SIMCLR, ADDITIVE)
    if tl.load(ints + 10) != 0:
        r = _luma(r, g, b)
        g = r
        b = r
    r, g, b = _clip(r), _clip(g), _clip(b)
    if _radius(tl.load(floats + 4), most_radius) > 0:
        tl.store(plane, r, mask=mask)
        tl.store(plane + area, g, mask=mask)
        tl.store(plane + 2 * area, b, mask=mask)
    else:
        y = (pixel // size).to(tl.int64)
        x = (pixel % size).to(tl.int64)
        at = out + i * stride_n + y * stride_y + x * stride_x
        kind = out.dtype.element_ty
        r = r * tl.load(normalize) + tl.load(normalize + 3)
        g = g * tl.load(normalize + 1) + tl.load(normalize + 4)
        b = b * tl.load(normalize + 2) + tl.load(normalize + 5)
        tl.store(at, r.to(kind), mask=mask)
        tl.store(at + stride_c, g.to(kind), mask=mask)
        tl.store(at + 2 * stride_c, b.to(kind), mask=mask)


@triton.jit
def blur_kernel(
    floats,
    source,  # float32 [n, 3, S, S]
    normalize,
    out,  # VERTICAL: the views; otherwise float32 [n, 3, S, S]
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    size,
    blocks,
    most_radius,
    VERTICAL: tl.constexpr,
    REFLECT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    plane = tl.program_id(0) // blocks
    i = (plane // 3).to(tl.int64)
    c = (plane % 3).to(tl.int64)
    sigma = tl.load(floats + i * 5 + 4)
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
        value = _clip(value) * tl.load(normalize + c) + tl.load(normalize + 3 + c)
    at = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    out += i * stride_n + c * stride_c
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


def augment_views(
    images: list[Tensor],
    ints: Tensor,
    floats: Tensor,
    normalize: Tensor,
    simclr_spec: bool,
    additive_brightness: bool,
    bilinear: bool,
    blur_radius: int,
    out: Tensor,
) -> None:
    """Launch the kernels on torch's current stream; arguments are on `out`'s device.

    images: n of [H, W, 3] with stride (any, 3, 1), all uint8 or all float32.
    ints: int32 [n, 11], floats: float32 [n, 5], normalize: float32 [6]: contiguous, as in the
    kernels.
    out: [n, 3, S, S] of any strides.
    """
    n, _, size, _ = out.shape
    if n == 0:
        return
    where = torch.tensor([[i.data_ptr(), i.stride(0)] for i in images], dtype=torch.int64)
    where = where.T.contiguous().to(out.device, non_blocking=True)
    planes = torch.empty((n, 3, size, size), dtype=torch.float32, device=out.device)
    blocks = triton.cdiv(size * size, BLOCK)
    partial = torch.empty((n, blocks, 3), dtype=torch.float32, device=out.device)
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
            BYTES=images[0].dtype == torch.uint8,
            BLOCK=BLOCK,
        )
        color_kernel[(n * blocks,)](
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
            BLOCKS=triton.next_power_of_2(blocks),
            BLOCK=BLOCK,
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
                BLOCK=BLOCK,
            )
