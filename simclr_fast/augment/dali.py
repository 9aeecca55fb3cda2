"""Both views inside a DALI pipeline, by DALI's operators, on the CPU or the GPU.

The parameters are drawn outside (augment/params.py) and fed in, because DALI's random operators
depend on the batch slot and have no order of the colour jitter per sample. Usage:

    @pipeline_def(batch_size=n, num_threads=t, device_id=0, enable_conditionals=True)
    def two_views(aug, device):
        kinds = [types.UINT8, types.INT64, *2 * param_types(aug)]
        files, index, *nodes = fn.external_source(
            source, batch=True, num_outputs=len(kinds), dtype=kinds)
        decoder = "mixed" if device == "gpu" else "cpu"
        images = fn.decoders.image(files, device=decoder, jpeg_fancy_upsampling=True)
        return *make_views(images, nodes, aug, device), index

where `source()` returns [encoded files, ids, *feeds(view 0's params), *feeds(view 1's params)].
With batch=True each array that `feeds` returns is one output; with per-sample sources take row i.
DALI's CPU decoder always uses fancy upsampling, its GPU decoder only if asked to.

In two points DALI differs from our definition of a view:

- Where the resize filter reaches beyond the crop, DALI repeats edge pixels or reads pixels outside.
  Both specs leave those weights out and renormalise. So each crop is cut out, surrounded by zeros
  and resized. Each row and column is then multiplied by 1 / (sum of the weights inside).
- DALI's blur reflects at the border. The "simclr" spec pads with zeros, so a margin of zeros is
  added before the blur.

Each sample has its own order of the four jitter steps, but a graph has one order. So the graph is a
fixed row of slots into which every order fits. A sample skips the slots that it does not use. There
are two kinds of slots:

    hsv     turns the hue and scales the saturation of HSV, in either order: the two commute
    linear  clip(x · factor + pivot · weight + added): brightness, contrast, and torchvision's
            saturation

In DALI every arithmetic operation is an operator, and on the GPU a kernel launch. There the three
channels of a pixel stay together (`_Interleaved`), which needs the fewest operators. On the CPU,
operators that reduce or repeat over channels are slow, and three planes are faster (`_Planes`).
"""

from functools import cache
from importlib import import_module
from itertools import permutations
from typing import Any, Literal

import numpy as np

from simclr_fast.augment.params import Augmentation, ViewParams, draw_params


class _Part:
    """A part of DALI, which is imported when it is first used: DALI is optional."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(f"nvidia.dali.{self._name}"), name)


fn, math, types = _Part("fn"), _Part("math"), _Part("types")
CROP_NAMES = (
    "crop_start",  # int32 [2]: y, x of the box
    "crop_shape",  # int32 [2]
    "pad_start",  # int32 [2]: minus the margin of zeros
    "pad_shape",  # int32 [2]: box plus two margins
    "roi_start",  # float32 [2]: the box within its margins; x swapped with roi_end's for a flip
    "roi_end",  # float32 [2]
    "row_gain",  # float32 [size, 1, 1]; by 1 / 255 in `feeds`
    "column_gain",  # float32 [1, size, 1]
)
# The largest number of images that go through a pipeline together. Memory grows with it, so a
# batch of thousands is made in several parts.
PART = 128
# The memory of DALI's pipeline for one image, measured on the CPU: bytes per pixel of a view, for
# both views; bytes per pixel of the source, for images decoded ahead and their crops.
_BYTES_PER_VIEW_PIXEL, _BYTES_PER_SOURCE_PIXEL = 240, 21
# Images of up to this many pixels (about 400 × 500) go through in full parts, larger ones in
# smaller parts.
_COMMON_PIXELS = 190_000
Slot = Literal["hsv", "linear"]
# The rows of slots.
# "simclr": brightness and contrast are linear, saturation and hue are hsv. Neighbouring hsv steps
# share a slot because they commute. The first slot takes only one step: its input still has the
# bicubic overshoot, which the spec clips between the steps, and with a clip they do not commute.
# "torchvision": all steps except the hue are linear.
_SLOTS: dict[str, tuple[Slot, ...]] = {
    "simclr": ("hsv", "linear", "hsv", "linear", "linear", "hsv"),
    "torchvision": ("linear",) * 3 + ("hsv",) + ("linear",) * 3,
}
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_LUMA = [0.2989, 0.587, 0.114]
# The Gaussian's tails beyond 4 sigma have a total weight of 6e-5.
_BLUR_SIGMAS = 4
# On the GPU a hue is a 16-bit number. This number is a sixth of a turn, so that the sum of three
# hues of up to a turn each fits. An error of 1 changes a channel by at most 0.07 / 255.
_HUE_NUMBERS = 65535 // 18
_UNLIMITED = 1e30
# Every 16-bit number, for tables.
_KEYS = list(range(1 << 16))


def dali_bytes(size: int, source_pixels: int = _COMMON_PIXELS, images: int = PART) -> int:
    """Bytes that DALI needs for a part of `images` images, with two views of size × size pixels."""
    return images * (_BYTES_PER_VIEW_PIXEL * size**2 + _BYTES_PER_SOURCE_PIXEL * source_pixels)


def param_names(aug: Augmentation) -> list[str]:
    """The names of the arrays of `feeds`, in order."""
    names = list(CROP_NAMES)
    for i, kind in enumerate(_SLOTS[aug.spec]):
        names += [f"used{i}"]  # bool: whether the sample has a step in this slot
        if kind == "linear":
            names += [f"factor{i}", f"weight{i}"]  # float32
            names += [f"added{i}"] if aug.brightness == "additive" else []  # float32
            # bool: the pivot is each pixel's luma, not the mean.
            names += [f"luma{i}"] if aug.spec == "torchvision" else []
        else:
            names += [f"turn{i}"]  # float32: of the hue, in _HUE_NUMBERS; at least 0
            names += [f"saturation{i}"] if aug.spec == "simclr" else []  # float32: factor
            # float32: how far the saturation may exceed 1; it may where channels are below 0.
            names += [f"limit{i}"] if i == 0 else []
    names += ["gray"]  # bool
    names += ["blur"]  # bool
    names += ["sigma"]  # float32
    names += ["window"]  # int32
    return names


def param_types(aug: Augmentation) -> list[Any]:
    """DALI's data type of each entry of `param_names`."""
    kinds = {"bool": types.BOOL, "int32": types.INT32, "float32": types.FLOAT}
    one = draw_params(aug, 0, 0, np.zeros(1, np.int64), 0, np.ones((1, 2), np.int64))
    return [kinds[str(array.dtype)] for array in feeds(one, aug)]


def feeds(params: ViewParams, aug: Augmentation) -> list[np.ndarray]:
    """The arrays [n, ...] to feed for one view, one per entry of `param_names`."""
    radius = np.minimum(np.ceil(_BLUR_SIGMAS * params.sigma), aug.blur_radius).astype(np.int32)
    blur = (params.sigma > 0) & (radius > 0)
    values = crop_feeds(params, aug, params.flip)
    values[CROP_NAMES.index("row_gain")] *= np.float32(1 / 255)
    values += _slot_feeds(params, aug)
    values += [
        params.gray,
        blur,
        np.where(blur, params.sigma, 1).astype(np.float32),
        2 * radius + 1,
    ]
    return [np.ascontiguousarray(value) for value in values]


@cache
def _slot_of_step(spec: str) -> np.ndarray:
    """The slot of each jitter step, in each of the 24 orders: int64 [4, 4, 4, 4].

    Element [a, b, c, step] is for the order that begins with steps a, b, c. Each step in turn takes
    the first slot of its kind that is not before the slot of the previous step. For "simclr" and
    the order contrast, hue, saturation, brightness:

        slot    0 hsv    1 linear    2 hsv              3 linear      4 linear    5 hsv
        step             contrast    hue, saturation    brightness
    """
    slots = _SLOTS[spec]
    hsv_steps = (_SATURATION, _HUE) if spec == "simclr" else (_HUE,)
    table = np.zeros((4, 4, 4, 4), np.int64)
    for a, b, c, d in permutations(range(4)):
        first_free = 0
        for step in (a, b, c, d):
            kind: Slot = "hsv" if step in hsv_steps else "linear"
            slot = slots.index(kind, first_free)
            table[a, b, c, step] = slot
            can_be_shared = kind == "hsv" and slot > 0
            first_free = slot if can_be_shared else slot + 1
    return table


def _slot_feeds(params: ViewParams, aug: Augmentation) -> list[np.ndarray]:
    """The arrays for the slots of the jitter, one per name of a slot in `param_names`."""
    simclr, additive = aug.spec == "simclr", aug.brightness == "additive"
    n, slots = len(params), len(_SLOTS[aug.spec])
    # Slots that a sample does not use keep these values.
    used, luma = np.zeros((2, slots, n), bool)
    turn, limit, added, weight = np.zeros((4, slots, n), np.float32)
    saturation, factor = np.ones((2, slots, n), np.float32)
    slot_of = _slot_of_step(aug.spec)[tuple(params.order[:, :3].T)]  # [n, 4]
    brightness, contrast, colour, hue = params.factors.T

    def put(array: np.ndarray, step: int, value: Any) -> None:
        array[slot_of[:, step], np.arange(n)] = value

    for step in range(4):
        put(used, step, params.jitter)
    put(added if additive else factor, _BRIGHTNESS, brightness)
    put(factor, _CONTRAST, contrast)
    put(weight, _CONTRAST, 1 - contrast)
    put(saturation if simclr else factor, _SATURATION, colour)
    if not simclr:
        put(weight, _SATURATION, 1 - colour)
        put(luma, _SATURATION, True)
    put(turn, _HUE, np.rint(6 * _HUE_NUMBERS * (hue - np.floor(hue))))
    # A step that only turns the hue must not clip the saturation.
    put(limit, _HUE, _UNLIMITED)
    arrays = {
        "used": used,
        "factor": factor,
        "weight": weight,
        "added": added,
        "luma": luma,
        "turn": turn,
        "saturation": saturation,
        "limit": limit,
    }
    by_name = {f"{name}{i}": row for name, array in arrays.items() for i, row in enumerate(array)}
    return [by_name[name] for name in param_names(aug) if name in by_name]


def crop_feeds(params: ViewParams, aug: Augmentation, flip: np.ndarray) -> list[np.ndarray]:
    """The arrays [n, ...] of CROP_NAMES. flip: bool [n], the views to mirror."""
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
        rows[:, :, None, None],
        columns[:, None, :, None],
    ]
    return [np.ascontiguousarray(v) for v in values]


def _gain(extent: np.ndarray, stretch: np.ndarray, aug: Augmentation, support: int) -> np.ndarray:
    """float32 [n, size]: 1 / (the share of the resize filter's weight inside [0, extent))."""
    scale = (extent / aug.size)[:, None, None]
    stretch = stretch[:, None, None]
    # Only outputs near an end reach outside. The weights at both ends are mirror images.
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
    half: bool = False,
    channels_last: bool = False,
    interleaved: bool | None = None,
) -> list[Any]:
    """Inside a pipeline with enable_conditionals=True: decoded images → one output per view.

    images: uint8 HWC RGB, a DataNode on `device` ("cpu" or "gpu").
    nodes: the CPU DataNodes of the views' parameters, one per `param_names` for each view.
    half: outputs in float16, else float32.
    interleaved: keep the channels of a pixel together during the jitter. Default: on a GPU.
    The outputs are [3, size, size], or [size, size, 3] with channels_last.
    """
    names = param_names(aug)
    colors = (
        _Interleaved(device)
        if interleaved or (interleaved is None and device == "gpu")
        else _Planes()
    )
    outputs = []
    for first in range(0, len(nodes), len(names)):
        params = {name: nodes[first + i] for i, name in enumerate(names)}
        outputs.append(_make_view(images, params, aug, device, colors, half, channels_last))
    return outputs


def make_crops(images: Any, nodes: list[Any], aug: Augmentation, device: str) -> list[Any]:
    """Only crop and resize: one uint8 [size, size, 3] per view, rounded and clipped.

    images: as for `make_views`. nodes: the CPU DataNodes of the views' crops, those of CROP_NAMES
    for each view.
    """
    count = len(CROP_NAMES)
    crops = []
    for first in range(0, len(nodes), count):
        params = {name: nodes[first + i] for i, name in enumerate(CROP_NAMES)}
        x, gain = _crop(images, params, aug, device)
        crops.append(fn.cast(x * gain, dtype=types.UINT8))
    return crops


def _make_view(
    images: Any,
    p: dict[str, Any],
    aug: Augmentation,
    device: str,
    colors: "_Interleaved | _Planes",
    half: bool,
    channels_last: bool,
) -> Any:
    x, gain = _crop(images, p, aug, device)
    x = colors.split(x * gain)
    if aug.spec == "torchvision":
        x = colors.clip(x)
    # Nested, because Python evaluates the outer condition, and the graph the inner one per sample.
    if aug.p_jitter > 0:
        for i, kind in enumerate(_SLOTS[aug.spec]):
            if p[f"used{i}"]:
                step = _hsv_slot if kind == "hsv" else _linear_slot
                x = step(x, i, p, aug, device, colors)
    if aug.p_gray > 0:  # noqa: SIM102
        if p["gray"]:
            x = colors.luma(x)
    if aug.spec == "simclr":
        # Without jitter, nothing has clipped the bicubic overshoot yet.
        x = colors.clip(x)
    x = colors.join(x)
    planar = isinstance(colors, _Planes)
    if aug.p_blur > 0 and aug.blur_radius > 0:  # noqa: SIM102
        if p["blur"]:
            x = _blur(x, p, aug, planar)
    if planar and aug.mean is None and not half and not channels_last:
        return x
    # Also cuts off the blur's margin.
    return fn.crop_mirror_normalize(
        x,
        crop=[aug.size] * 2,
        mean=list(aug.mean or (0.0,) * 3),
        std=list(aug.std or (1.0,) * 3),
        dtype=types.FLOAT16 if half else types.FLOAT,
        output_layout="HWC" if channels_last else "CHW",
    )


def _hsv_slot(
    x: Any,
    i: int,
    p: dict[str, Any],
    aug: Augmentation,
    device: str,
    colors: "_Interleaved | _Planes",
) -> Any:
    """Slot i, which turns the hue and scales the saturation of HSV."""
    saturation = _local(p[f"saturation{i}"], device) if aug.spec == "simclr" else None
    limit = _local(p[f"limit{i}"], device) if i == 0 else None
    x = colors.hsv(x, _local(p[f"turn{i}"], device), saturation, limit)
    # The input of the first slot of "simclr" has the bicubic overshoot.
    return colors.clip(x) if i == 0 else x


def _linear_slot(
    x: Any,
    i: int,
    p: dict[str, Any],
    aug: Augmentation,
    device: str,
    colors: "_Interleaved | _Planes",
) -> Any:
    """Slot i, which computes clip(x · factor + pivot · weight + added)."""
    if aug.spec == "simclr":
        pivot = colors.mean(x)
    elif p[f"luma{i}"]:
        pivot = colors.luma(x)
    else:
        pivot = colors.mean_luma(x)
    factor, weight = _local(p[f"factor{i}"], device), _local(p[f"weight{i}"], device)
    added = _local(p[f"added{i}"], device) if aug.brightness == "additive" else None
    return colors.linear(x, factor, pivot, weight, added)


def _blur(x: Any, p: dict[str, Any], aug: Augmentation, planar: bool) -> Any:
    """Blur. Pixels that are not planar keep the margin of zeros that "simclr" adds."""
    pad = aug.blur_radius if aug.spec == "simclr" else 0
    if pad or planar:
        # The blur of three planes would take a third longer.
        x = fn.crop_mirror_normalize(
            x,
            crop=[aug.size + 2 * pad] * 2,
            out_of_bounds_policy="pad",
            dtype=types.FLOAT,
            output_layout="HWC",
        )
    x = fn.gaussian_blur(x, sigma=p["sigma"], window_size=p["window"])
    if planar:
        x = fn.crop_mirror_normalize(x, crop=[aug.size] * 2, dtype=types.FLOAT, output_layout="CHW")
    return x


def _local(node: Any, device: str) -> Any:
    """A parameter on the device of the pixels."""
    return node.gpu() if device == "gpu" else node


def _crop(images: Any, p: dict[str, Any], aug: Augmentation, device: str) -> tuple[Any, Any]:
    """The resized box, float32 [size, size, 3], and the gain to multiply it by, [size, size, 1]."""
    gain = _local(p["row_gain"], device) * _local(p["column_gain"], device)
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
    return x, gain


class _Interleaved:
    """Colours as one float32 [size, size, 3]. Needs few operators, each over all channels."""

    def __init__(self, device: str) -> None:
        def channels(values: list[Any], dtype: Any) -> Any:
            return types.Constant(values, dtype=dtype, shape=[1, 1, 3], device=device)

        # Green follows red by a third of a turn, and blue by two.
        self.behind_red = channels([0, 4 * _HUE_NUMBERS, 2 * _HUE_NUMBERS], types.UINT16)
        self.hue_by_angle, self.red_by_hue = _hue_by_angle(), _red_by_hue()

    def split(self, x: Any) -> Any:
        return x

    def join(self, x: Any) -> Any:
        return x

    def clip(self, x: Any) -> Any:
        return math.clamp(x, 0.0, 1.0)

    def mean(self, x: Any) -> Any:
        return fn.reductions.mean(x, axes=[0, 1], keep_dims=True)

    def mean_luma(self, x: Any) -> Any:
        return self.luma(self.mean(x))

    def luma(self, x: Any) -> Any:
        return fn.coord_transform(x, M=_LUMA * 3)

    def linear(self, x: Any, factor: Any, pivot: Any, weight: Any, added: Any) -> Any:
        rest = pivot * weight
        if added is not None:
            rest = rest + added
        return self.clip(x * factor + rest)

    def hsv(self, x: Any, turn: Any, saturation: Any, limit: Any) -> Any:
        """Turn the hue, and scale HSV's saturation.

        The hue is a function of the colour's angle around the grey axis. A table of it avoids a
        branch on the largest channel. Each channel is the smallest one plus a share of the chroma.
        The share depends only on the hue, so it is a table as well.
        """
        top = fn.reductions.max(x, axes=[2], keep_dims=True)
        chroma = top - fn.reductions.min(x, axes=[2], keep_dims=True)
        red = fn.coord_transform(x, M=[1.0, -0.5, -0.5])
        green = fn.coord_transform(x, M=[0.0, 0.75**0.5, -(0.75**0.5)])
        angle = math.atan2(green, red) * (32767 / np.pi) + 32768.0
        hue = fn.lookup_table(
            fn.cast(angle, dtype=types.UINT16),
            keys=_KEYS,
            values=self.hue_by_angle,
            dtype=types.UINT16,
        )
        hues = hue + (fn.cast(turn, dtype=types.UINT16) + self.behind_red)
        share = fn.lookup_table(hues, keys=_KEYS, values=self.red_by_hue, dtype=types.FLOAT)
        if saturation is not None:
            # HSV's saturation is chroma / top. It is at most 1.
            most = top if limit is None else top + limit
            chroma = math.min(chroma * saturation, most)
        return chroma * share + (top - chroma)


def _hue_by_angle() -> list[float]:
    """A table from 16-bit angles to 16-bit hues. The angle 32768 is red."""
    angle = (np.arange(65536) - 32768) * (np.pi / 32767)
    red, green = np.cos(angle), np.sin(angle) / 3**0.5
    r, g, b = 2 / 3 * red, green - red / 3, -green - red / 3
    top = np.maximum(np.maximum(r, g), b)
    chroma = top - np.minimum(np.minimum(r, g), b)
    hue = np.where(top == r, g - b, np.where(top == g, 2 * chroma + b - r, 4 * chroma + r - g))
    numbers: list[float] = np.rint(hue / chroma % 6 * _HUE_NUMBERS).tolist()
    return numbers


def _red_by_hue() -> list[float]:
    """A table from 16-bit hues to (red - smallest channel) / chroma."""
    shares: list[float] = np.clip(
        np.abs(np.arange(65536) / _HUE_NUMBERS % 6 - 3) - 1, 0, 1
    ).tolist()
    return shares


class _Planes:
    """Colours as three float32 [size, size]. Its operators are fast on the CPU."""

    def split(self, x: Any) -> tuple[Any, Any, Any]:
        planes = fn.transpose(x, perm=[2, 0, 1], transpose_layout=False)
        r, g, b = (fn.reshape(planes[channel], layout="HW") for channel in range(3))
        return r, g, b

    def join(self, x: tuple[Any, Any, Any]) -> Any:
        return fn.stack(*x, axis_name="C")

    def clip(self, x: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        r, g, b = x
        return _clip(r), _clip(g), _clip(b)

    def mean(self, x: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        r, g, b = (fn.reductions.mean(plane, keep_dims=True) for plane in x)
        return r, g, b

    def mean_luma(self, x: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        # Return whole planes. DALI takes a batch of some [1, 1] and some [size, size] for [1, 1].
        y = self.luma(self.mean(x))[0] + 0.0 * x[0]
        return y, y, y

    def luma(self, x: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        r, g, b = x
        y = _LUMA[0] * r + _LUMA[1] * g + _LUMA[2] * b
        return y, y, y

    def linear(
        self, x: tuple[Any, Any, Any], factor: Any, pivot: Any, weight: Any, added: Any
    ) -> tuple[Any, Any, Any]:
        r, g, b = (channel * factor for channel in x)
        rest_r, rest_g, rest_b = (channel * weight for channel in pivot)
        if added is not None:
            rest_r, rest_g, rest_b = rest_r + added, rest_g + added, rest_b + added
        return _clip(r + rest_r), _clip(g + rest_g), _clip(b + rest_b)

    def hsv(
        self, x: tuple[Any, Any, Any], turn: Any, saturation: Any, limit: Any
    ) -> tuple[Any, Any, Any]:
        """The same as `_Interleaved.hsv`.

        The hue in sixths of a turn is |k + (middle - low) / chroma|, where k depends on which
        channel is the largest.
        """
        r, g, b = x
        swapped = g < b
        high, low = math.max(g, b), math.min(g, b)
        k = -6.0 * swapped
        below = r < high
        top, middle = math.max(r, high), math.min(r, high)
        k = k + below * (-2.0 - 2.0 * k)
        chroma = top - math.min(middle, low)
        h = math.fabs(k + (middle - low) / math.max(chroma, 1e-30)) + turn * (1 / _HUE_NUMBERS)
        h = h - 6.0 * (h >= 6.0)
        if saturation is not None:
            most = top if limit is None else top + limit
            chroma = math.min(chroma * saturation, most)
        least = top - chroma
        return (
            least + chroma * _clip(math.fabs(h - 3.0) - 1.0),
            least + chroma * _clip(2.0 - math.fabs(h - 2.0)),
            least + chroma * _clip(2.0 - math.fabs(h - 4.0)),
        )


def _clip(x: Any) -> Any:
    # math.clamp is three times as slow on the CPU.
    return math.max(math.min(x, 1.0), 0.0)
