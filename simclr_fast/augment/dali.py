"""Both views inside a DALI pipeline: every step by DALI's operators, exact, on the CPU or the GPU.

The parameters are drawn outside (augment_params) and fed in, because DALI's own random operators
depend on the batch slot and have no per-sample order of the colour jitter. To wire it up:

    @pipeline_def(batch_size=n, num_threads=t, device_id=0, enable_conditionals=True)
    def two_views(aug, device):
        kinds = [types.UINT8, types.INT64, *2 * param_types()]
        files, index, *nodes = fn.external_source(
            source, batch=True, num_outputs=len(kinds), dtype=kinds)
        decoder = "mixed" if device == "gpu" else "cpu"
        images = fn.decoders.image(files, device=decoder, jpeg_fancy_upsampling=True)
        return *make_views(images, nodes, aug, device), index

where `source()` returns [encoded files, ids, *feeds(view 0's params), *feeds(view 1's params)].
With batch=True each array that `feeds` returns is one output; with per-sample sources take row i.
DALI's CPU decoder always has fancy upsampling; its GPU decoder only when asked.

Two of DALI's habits are corrected. It repeats edge pixels where the filter leaves the image, or
reads pixels outside the region of interest; both specs drop those weights and renormalise. So each
crop is cut out, surrounded by zeros, resized, and multiplied by the gain 1 / (weight inside) per
row and column. And its blur reflects; the "simclr" spec pads with zeros, again by a margin.
"""

from types import ModuleType
from typing import Any

import numpy as np

from simclr_fast.augment.params import Augmentation, ViewParams
from simclr_fast.utils.extras import need

PARAM_NAMES = (
    "crop_start",  # int32 [2]: y, x of the box
    "crop_shape",  # int32 [2]
    "pad_start",  # int32 [2]: minus the margin of zeros
    "pad_shape",  # int32 [2]: box plus two margins
    "roi_start",  # float32 [2]: the box within its margins; x swapped with roi_end's for a flip
    "roi_end",  # float32 [2]
    "row_gain",  # float32 [size, 1, 1]
    "column_gain",  # float32 [1, size, 1]
    "jitter",  # bool
    "step0",  # int32: index of the jitter step done first, into the factors
    "step1",
    "step2",
    "step3",
    "brightness",  # float32, like the following
    "contrast",
    "saturation",
    "hue",
    "gray",  # bool
    "blur",  # bool
    "sigma",  # float32
    "window",  # int32
)
CROP_NAMES = PARAM_NAMES[:8]
_LUMA = [0.2989, 0.587, 0.114]
# Beyond 4 sigma the Gaussian's tail weighs 6e-5 in all.
_BLUR_SIGMAS = 4


def param_types() -> list[Any]:
    """DALI's data type of each of PARAM_NAMES."""
    types = _dali("types")
    kinds = {"bool": types.BOOL, "int32": types.INT32, "float32": types.FLOAT}
    one = ViewParams(
        box=np.ones((1, 4), np.int32),
        flip=np.zeros(1, bool),
        jitter=np.zeros(1, bool),
        order=np.zeros((1, 4), np.uint8),
        factors=np.ones((1, 4), np.float32),
        gray=np.zeros(1, bool),
        sigma=np.zeros(1, np.float32),
    )
    return [kinds[str(array.dtype)] for array in feeds(one, Augmentation(size=8))]


def feeds(params: ViewParams, aug: Augmentation) -> list[np.ndarray]:
    """One array [n, ...] per entry of PARAM_NAMES, to feed for one view."""
    radius = np.minimum(np.ceil(_BLUR_SIGMAS * params.sigma), aug.blur_radius).astype(np.int32)
    blur = (params.sigma > 0) & (radius > 0)
    values = [
        params.jitter,
        *params.order.T.astype(np.int32),
        *params.factors.T,
        params.gray,
        blur,
        np.where(blur, params.sigma, 1).astype(np.float32),
        2 * radius + 1,
    ]
    return crop_feeds(params, aug, params.flip) + [np.ascontiguousarray(v) for v in values]


def crop_feeds(params: ViewParams, aug: Augmentation, flip: np.ndarray) -> list[np.ndarray]:
    """One array [n, ...] per entry of CROP_NAMES. flip: bool [n], the views to mirror."""
    n = len(params)
    start, shape = params.box[:, :2], params.box[:, 2:]
    support = 1 if aug.interpolation == "bilinear" else 2
    stretch = np.maximum(shape / aug.size, 1) if aug.spec == "torchvision" else np.ones_like(shape)
    margin = np.ceil(support * stretch).astype(np.int32) + 1
    roi_start, roi_end = margin.astype(np.float32), (margin + shape).astype(np.float32)
    roi_start[flip, 1], roi_end[flip, 1] = roi_end[flip, 1], roi_start[flip, 1]
    rows, columns = (_gain(shape[:, axis], stretch[:, axis], aug, support) for axis in (0, 1))
    columns[flip] = columns[flip, ::-1]
    values = [
        start,
        shape,
        -margin,
        shape + 2 * margin,
        roi_start,
        roi_end,
        rows.reshape(n, -1, 1, 1),
        columns.reshape(n, 1, -1, 1),
    ]
    return [np.ascontiguousarray(v) for v in values]


def _gain(extent: np.ndarray, stretch: np.ndarray, aug: Augmentation, support: int) -> np.ndarray:
    """float32 [n, size]: all of the resize filter's weight over its weight inside [0, extent)."""
    scale = (extent / aug.size)[:, None, None]
    stretch = stretch[:, None, None]
    # Only outputs this close to an end reach outside, and the two ends mirror each other.
    near = np.max(support * stretch / scale, initial=0)
    edge = min(int(np.ceil(near)) + 1, aug.size)
    center = (np.arange(edge)[:, None] + 0.5) * scale  # [n, edge, 1]
    taps = np.arange(2 * int(np.ceil(support * stretch.max(initial=1))) + 1)
    sample = np.floor(center - support * stretch + 0.5) + taps  # [n, edge, taps]
    x = np.abs(sample + 0.5 - center) / stretch
    if support == 1:
        weight = np.maximum(1 - x, 0)
    else:
        outer = np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0)
        weight = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, outer)
    total = weight.sum(-1)
    gain = np.ones((len(extent), aug.size), np.float32)
    outside = np.zeros_like(gain)
    outside[:, :edge] += (weight * (sample < 0)).sum(-1) / total
    outside[:, aug.size - edge :] += outside[:, edge - 1 :: -1]
    return gain / (1 - outside)


def make_views(
    images: Any,
    nodes: list[Any],
    aug: Augmentation,
    device: str,
    *,
    dtype: Any = None,
    channels_last: bool = False,
) -> list[Any]:
    """Inside a pipeline with enable_conditionals=True: decoded images → one output per view.

    images: uint8 HWC RGB, a DataNode on `device` ("cpu" or "gpu").
    nodes: the CPU DataNodes of the views' parameters, len(PARAM_NAMES) per view, in that order.
    dtype: types.FLOAT (default) or types.FLOAT16.
    The outputs are [3, size, size], or [size, size, 3] with channels_last.
    """
    count = len(PARAM_NAMES)
    outputs = []
    for first in range(0, len(nodes), count):
        params = {name: nodes[first + i] for i, name in enumerate(PARAM_NAMES)}
        outputs.append(_make_view(images, params, aug, device, dtype, channels_last))
    return outputs


def make_crops(images: Any, nodes: list[Any], aug: Augmentation, device: str) -> list[Any]:
    """As `make_views`, up to the resize: one uint8 [size, size, 3] per view, rounded and clipped.

    nodes: the CPU DataNodes of the views' crops, len(CROP_NAMES) per view, in that order.
    """
    fn, types = _dali("fn"), _dali("types")
    count = len(CROP_NAMES)
    crops = []
    for first in range(0, len(nodes), count):
        params = {name: nodes[first + i] for i, name in enumerate(CROP_NAMES)}
        x, gain = _crop(images, params, aug, device)
        crops.append(fn.cast(x * gain, dtype=types.UINT8))
    return crops


def _make_view(
    images: Any, p: dict[str, Any], aug: Augmentation, device: str, dtype: Any, channels_last: bool
) -> Any:
    fn, types = _dali("fn"), _dali("types")

    def local(name: str) -> Any:
        return p[name].gpu() if device == "gpu" else p[name]

    x, gain = _crop(images, p, aug, device)
    # One plane per channel: DALI's arithmetic is slow where it reduces over channels.
    planes = fn.transpose(x * (gain * (1 / 255)), perm=[2, 0, 1], transpose_layout=False)
    r, g, b = (fn.reshape(planes[channel], layout="HW") for channel in range(3))
    # Otherwise the first step to come sees the bicubic overshoot.
    clipped = aug.spec == "torchvision"
    if clipped:
        r, g, b = _clip(r), _clip(g), _clip(b)
    # Nested: the outer condition is Python's, the inner one the graph's, per sample.
    if aug.p_jitter > 0:  # noqa: SIM102
        if p["jitter"]:
            for k in range(4):
                r, g, b = _jitter_step(r, g, b, p[f"step{k}"], local, aug, clipped or k > 0)
    if aug.p_gray > 0:  # noqa: SIM102
        if p["gray"]:
            y = _luma(r, g, b)
            r, g, b = y, y, y
    if not clipped:  # noqa: SIM102
        if not p["jitter"]:
            r, g, b = _clip(r), _clip(g), _clip(b)
    x = fn.stack(r, g, b, axis_name="C")
    pad = aug.blur_radius if aug.spec == "simclr" else 0
    if aug.p_blur > 0 and aug.blur_radius > 0:  # noqa: SIM102
        if p["blur"]:
            x = fn.crop_mirror_normalize(
                x,
                crop=[aug.size + 2 * pad] * 2,
                out_of_bounds_policy="pad",
                dtype=types.FLOAT,
                output_layout="HWC",
            )
            # On three planes it takes a third longer.
            x = fn.gaussian_blur(x, sigma=p["sigma"], window_size=p["window"])
            x = fn.crop_mirror_normalize(
                x, crop=[aug.size] * 2, dtype=types.FLOAT, output_layout="CHW"
            )
    dtype = types.FLOAT if dtype is None else dtype
    if aug.mean is None and dtype == types.FLOAT and not channels_last:
        return x
    mean, std = aug.mean or (0.0,) * 3, aug.std or (1.0,) * 3
    return fn.crop_mirror_normalize(
        x,
        mean=list(mean),
        std=list(std),
        dtype=dtype,
        output_layout="HWC" if channels_last else "CHW",
    )


def _crop(images: Any, p: dict[str, Any], aug: Augmentation, device: str) -> tuple[Any, Any]:
    """The box, resized: float32 [size, size, 3], and what to multiply by: [size, size, 1]."""
    fn, types = _dali("fn"), _dali("types")
    row_gain, column_gain = (
        p[name].gpu() if device == "gpu" else p[name] for name in ("row_gain", "column_gain")
    )
    x = fn.slice(images, p["crop_start"], p["crop_shape"], axis_names="HW")
    x = fn.slice(
        x,
        p["pad_start"],
        p["pad_shape"],
        axis_names="HW",
        out_of_bounds_policy="pad",
        fill_values=0,
    )
    cubic = aug.interpolation == "bicubic"
    x = fn.resize(
        x,
        size=[aug.size, aug.size],
        roi_start=p["roi_start"],
        roi_end=p["roi_end"],
        interp_type=types.INTERP_CUBIC if cubic else types.INTERP_LINEAR,
        antialias=aug.spec == "torchvision",
        dtype=types.FLOAT,
    )
    return x, row_gain * column_gain


def _at_most_one(x: Any) -> Any:
    return _dali("math").min(x, 1.0)


def _clip(x: Any) -> Any:
    math = _dali("math")
    # math.clamp is three times as slow.
    return math.max(_at_most_one(x), 0.0)


def _luma(r: Any, g: Any, b: Any) -> Any:
    return _LUMA[0] * r + _LUMA[1] * g + _LUMA[2] * b


def _jitter_step(
    r: Any, g: Any, b: Any, step: Any, local: Any, aug: Augmentation, clipped: bool
) -> Any:
    """Jitter step number `step`, per sample, of float32 [size, size] each.

    clipped: the input lies in [0, 1]; then hue and HSV saturation do not leave it.
    """
    if step == 0:
        f = local("brightness")
        # Factors are at least 0.
        below = _at_most_one if clipped else _clip
        if aug.brightness == "additive":
            r, g, b = _clip(r + f), _clip(g + f), _clip(b + f)
        else:
            r, g, b = (below(x * f) for x in (r, g, b))
    elif step == 1:
        r, g, b = _contrast(r, g, b, local("contrast"), aug)
    elif step == 2:
        r, g, b = _saturate(r, g, b, local("saturation"), aug, clipped)
    else:
        r, g, b = _rotate_hue(r, g, b, local("hue"))
        if not clipped:
            r, g, b = _clip(r), _clip(g), _clip(b)
    return r, g, b


def _contrast(r: Any, g: Any, b: Any, f: Any, aug: Augmentation) -> Any:
    fn = _dali("fn")
    mean_r, mean_g, mean_b = (fn.reductions.mean(x, keep_dims=True) for x in (r, g, b))
    if aug.spec == "torchvision":
        mean_r = _luma(mean_r, mean_g, mean_b)
        mean_g = mean_b = mean_r
    rest = 1 - f
    return _clip(r * f + mean_r * rest), _clip(g * f + mean_g * rest), _clip(b * f + mean_b * rest)


def _saturate(r: Any, g: Any, b: Any, f: Any, aug: Augmentation, clipped: bool) -> Any:
    math = _dali("math")
    if aug.spec == "torchvision":
        rest = _luma(r, g, b) * (1 - f)
        return _clip(r * f + rest), _clip(g * f + rest), _clip(b * f + rest)
    # Scaling HSV S moves each channel towards the largest, V, by at most V / chroma.
    top = math.max(math.max(r, g), b)
    chroma = top - math.min(math.min(r, g), b)
    factor = math.min(top / math.max(chroma, 1e-30), f)
    if not clipped:
        factor = math.max(factor, 0.0)
    rest = top - top * factor
    r, g, b = rest + r * factor, rest + g * factor, rest + b * factor
    return (r, g, b) if clipped else (_clip(r), _clip(g), _clip(b))


def _rotate_hue(r: Any, g: Any, b: Any, turns: Any) -> Any:
    """HSV hue + turns.

    The hue in sixths is |k + (middle - low) / chroma| with k by which channel is the largest;
    then each channel is low + chroma·clamp(its piecewise linear function of the hue, 0, 1).
    """
    math = _dali("math")
    swapped = g < b
    high, low = math.max(g, b), math.min(g, b)
    k = -6.0 * swapped
    below = r < high
    top, middle = math.max(r, high), math.min(r, high)
    k = k + below * (-2.0 - 2.0 * k)
    bottom = math.min(middle, low)
    chroma = top - bottom
    h = math.fabs(k + (middle - low) / math.max(chroma, 1e-30)) + 6.0 * (turns - math.floor(turns))
    h = h - 6.0 * (h >= 6.0)
    return (
        bottom + chroma * _clip(math.fabs(h - 3.0) - 1.0),
        bottom + chroma * _clip(2.0 - math.fabs(h - 2.0)),
        bottom + chroma * _clip(2.0 - math.fabs(h - 4.0)),
    )


def _dali(name: str) -> ModuleType:
    return getattr(need("nvidia.dali"), name)
