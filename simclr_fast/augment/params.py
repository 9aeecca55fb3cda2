"""The distribution of SimCLR's two views, and the drawing of their parameters.

The generator is counter-based. The parameters of a view depend only on (seed, epoch, sample id,
view) and the image's size. Batch size, order, threads, workers, ranks, backend and a resume do not
change them.
"""

import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import permutations
from typing import Any, Literal

import numpy as np

from simclr_fast.utils.numbers import as_float, as_int

_ORDERS = np.array(list(permutations(range(4))), dtype=np.uint8)
_PHILOX_ROUNDS = 10
# A block of the counter gives 4 numbers. One block is for the switches, one for order and sigma,
# one for the factors, and then one for each attempt at a crop.
_SWITCHES, _ORDER, _FACTORS, _FIRST_CROP = 0, 1, 2, 3
# The attempts at a crop of google-research/simclr's call of sample_distorted_bounding_box.
_SIMCLR_ATTEMPTS = 100
# Blocks between two pairs of views, more than one view can use; and the most views of an image.
_PAIR, _MOST_VIEWS = 1 << 16, 1 << 17
_TORCHVISION_ATTEMPTS = 10
_FIRST_ATTEMPTS = 3


@dataclass(frozen=True)
class Augmentation:
    """The distribution of views. A probability of 0 or crop=False switches a step off.

    spec="simclr" follows data_util.py of google-research/simclr (TensorFlow 2), with which the
    papers' results were obtained, and is therefore the default. The crop's aspect is uniform in
    `ratio`, its height is uniform given the aspect, and it covers at least `min_covered` of the
    image, which is 0.1 in that code. The resize is bicubic without antialiasing. Contrast is
    changed around each channel's mean, saturation in HSV. The blur pads with zeros. There is one
    deliberate difference: the blur's sigma is drawn per sample, as the paper says, while the code
    draws it per replica.

    spec="torchvision" follows torchvision's RandomResizedCrop, ColorJitter, RandomGrayscale and
    GaussianBlur. The crop's area is uniform, its aspect log-uniform. The resize is antialiased.
    Contrast is changed around the mean luma, saturation by blending with the luma. The blur
    reflects.

    In both, the factors of the jitter are U(1 ± 0.8 s) and the hue shift is U(± 0.2 s) turns in
    HSV. The order of the jitter steps is random per sample, and values are clipped after each. The
    blur's radius is (size // 10) // 2.

    Arguments:
        size: output height and width in pixels.
        s: strength of the colour jitter (1 for ImageNet, 0.5 for CIFAR-10 in the paper).
        area: range of the crop's share of the image, within (0, 1].
        min_covered: with spec="simclr", crops with a smaller share are drawn again; below the end
            of `area`.
        ratio: range of the crop's width / height.
        hue: largest hue shift in turns, at most 0.5; None means 0.2 s.
        brightness: "multiplicative" (SimCLR v2, torchvision) or "additive" (SimCLR v1: U(± 0.8 s)
            added; spec="simclr" only).
        interpolation: "bicubic" or "bilinear" (the default of torchvision's RandomResizedCrop).
        crop: False resizes the whole image instead.
        p_flip, p_jitter, p_gray, p_blur: probabilities.
        sigma: range of the blur's standard deviation in pixels.
        mean, std: per channel. The result is (x - mean) / std, for x in [0, 1]; None for x itself.
        saturation: half-width of the range of the saturation's factor; None means 0.8 s.
        channels: of the images. Crop, flip, brightness, contrast and blur work on any number of
            channels, each by itself: contrast is then changed around the channel's mean in both
            specs. Hue, saturation and gray need RGB: other channels need hue=0, saturation=0 and
            p_gray=0.
    """

    size: int = 224
    spec: Literal["simclr", "torchvision"] = "simclr"
    s: float = 1.0
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hue: float | None = None
    brightness: Literal["multiplicative", "additive"] = "multiplicative"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    crop: bool = True
    p_flip: float = 0.5
    p_jitter: float = 0.8
    p_gray: float = 0.2
    p_blur: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    saturation: float | None = None
    channels: int = 3
    min_covered: float = 0.1

    def __post_init__(self) -> None:
        # Plain numbers, so that the settings can be written as JSON.
        object.__setattr__(self, "size", as_int("size", self.size, 1))
        object.__setattr__(self, "channels", as_int("channels", self.channels, 1))
        for name in ("s", "hue", "saturation", "p_flip", "p_jitter", "p_gray", "p_blur"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, as_float(name, getattr(self, name)))
        for name in ("area", "ratio", "sigma", "mean", "std"):
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(as_float(name, v) for v in values))
        _check_choice("spec", self.spec, ("simclr", "torchvision"))
        _check_choice("brightness", self.brightness, ("multiplicative", "additive"))
        _check_choice("interpolation", self.interpolation, ("bicubic", "bilinear"))
        if self.brightness == "additive" and self.spec != "simclr":
            raise ValueError('brightness="additive" needs spec="simclr"')
        _check_number("s", self.s, 0, np.inf)
        if self.hue is not None:
            _check_number("hue", self.hue, 0, 0.5)
        elif self.max_hue > 0.5:
            raise ValueError(f"s={self.s!r} gives a hue range of 0.2 s > 0.5; pass hue=0.5 or less")
        if self.saturation is not None:
            _check_number("saturation", self.saturation, 0, np.inf)
        for name in ("p_flip", "p_jitter", "p_gray", "p_blur"):
            _check_number(name, getattr(self, name), 0, 1)
        self._check_colours()
        _check_range("area", self.area, 0, 1)
        object.__setattr__(self, "min_covered", as_float("min_covered", self.min_covered))
        _check_number("min_covered", self.min_covered, 0, 1)
        if self.spec == "simclr" and self.crop and not self.min_covered < self.area[1]:
            raise ValueError(
                f"min_covered must be below the end of area {self.area}, got {self.min_covered}: "
                "no crop would be large enough, so all would be the whole image"
            )
        _check_range("ratio", self.ratio, 0, np.inf)
        _check_range("sigma", self.sigma, 0, 16)
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean and std go together, got mean={self.mean!r}, std={self.std!r}")
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None and (len(value) != self.channels or not np.isfinite(value).all()):
                raise ValueError(f"{name} must be {self.channels} finite numbers, got {value!r}")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std!r}")

    def _check_colours(self) -> None:
        """Raise ValueError if steps that need RGB may happen to images of other channels."""
        jitter = self.p_jitter > 0
        steps = {
            "saturation=0": jitter and self.max_saturation > 0,
            "hue=0": jitter and self.max_hue > 0,
            "p_gray=0": self.p_gray > 0,
        }
        if self.channels != 3 and (needed := [step for step, happens in steps.items() if happens]):
            options = (step.replace("=", " ").replace("_", "-") for step in needed)
            raise ValueError(
                f"images of channels={self.channels} need {', '.join(needed)}, because hue, "
                "saturation and gray are of RGB; as options "
                f"--augmentation.{' --augmentation.'.join(options)}"
            )

    @property
    def max_saturation(self) -> float:
        """Half-width of the range of the saturation's factor."""
        return 0.8 * self.s if self.saturation is None else self.saturation

    @property
    def max_hue(self) -> float:
        """Half-width of the hue range in turns."""
        return 0.2 * self.s if self.hue is None else self.hue

    @property
    def blur_radius(self) -> int:
        """Radius of the blur's kernel in pixels: 11 (23 taps) at 224."""
        return self.size // 10 // 2

    @property
    def normalization(self) -> tuple[list[float], list[float]]:
        """Scale and shift per channel: the output is x · scale + shift for x in [0, 1]."""
        if self.mean is None or self.std is None:
            return [1.0] * self.channels, [0.0] * self.channels
        return [1 / d for d in self.std], [-m / d for m, d in zip(self.mean, self.std, strict=True)]


@dataclass
class ViewParams:
    """One view's parameters for n images, as numpy arrays.

    box:     int32 [n, 4]: y, x, height, width in pixels of the source image.
    flip, jitter, gray: bool [n].
    order:   uint8 [n, 4]: order[i, k] is the jitter step done k-th, as an index into factors.
    factors: float32 [n, 4]: brightness, contrast, saturation, hue in turns.
    sigma:   float32 [n]: of the blur in output pixels; 0 is no blur.
    """

    box: np.ndarray
    flip: np.ndarray
    jitter: np.ndarray
    order: np.ndarray
    factors: np.ndarray
    gray: np.ndarray
    sigma: np.ndarray

    def __len__(self) -> int:
        return len(self.box)

    def __getitem__(self, index: slice | np.ndarray) -> "ViewParams":
        return ViewParams(*(getattr(self, f.name)[index] for f in fields(self)))


def draw_params(
    aug: Augmentation, seed: int, epoch: int, ids: np.ndarray, view: int, sizes: np.ndarray
) -> ViewParams:
    """Draw the parameters of one view of each sample.

    seed: any integer, taken modulo 2^64. epoch: in [0, 2^31). ids: integer [n], the samples'
    identities. view: the view's number, from 0. sizes: integer [n, 2], (height, width) of each
    source image.
    """
    if not 0 <= view < _MOST_VIEWS:
        raise ValueError(f"view must be in [0, {_MOST_VIEWS}), got {view!r}")
    ids, sizes = _checked(epoch, ids, sizes)
    return _draw(aug, seed, np.full(len(ids), epoch << 1 | view & 1), ids, sizes, view >> 1)


def draw_views(
    aug: Augmentation, seed: int, epoch: int, ids: np.ndarray, sizes: np.ndarray, n_views: int = 2
) -> list[ViewParams]:
    """`draw_params` of views 0 to n_views - 1. Two at once take half the time of two calls."""
    ids, sizes = _checked(epoch, ids, sizes)
    n, views = len(ids), []
    streams = np.repeat([epoch << 1, epoch << 1 | 1], n)
    for pair in range(-(-n_views // 2)):
        both = _draw(aug, seed, streams, np.tile(ids, 2), np.tile(sizes, (2, 1)), pair)
        views += [both[:n], both[n:]]
    return views[:n_views]


def covering(views: Sequence[ViewParams]) -> np.ndarray:
    """The smallest boxes that cover the boxes of all views: int32 [n, 4], as `ViewParams.box`."""
    boxes = np.stack([view.box for view in views])
    corners, ends = boxes[..., :2], boxes[..., :2] + boxes[..., 2:]
    corner = corners.min(axis=0)
    return np.concatenate([corner, ends.max(axis=0) - corner], axis=1)


def _checked(epoch: int, ids: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ids = np.asarray(ids)
    sizes = np.asarray(sizes)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"ids must be an integer array [n], got {ids.dtype} {ids.shape}")
    if sizes.shape != (len(ids), 2) or not np.issubdtype(sizes.dtype, np.integer):
        raise TypeError(f"sizes must be integers [{len(ids)}, 2], got {sizes.dtype} {sizes.shape}")
    if sizes.size and sizes.min() < 1:
        raise ValueError(f"sizes must be at least 1, got {sizes.min()}")
    if not 0 <= epoch < 2**31:
        raise ValueError(f"epoch must be in [0, 2^31), got {epoch!r}")
    return ids, sizes


def _draw(
    aug: Augmentation,
    seed: int,
    streams: np.ndarray,
    ids: np.ndarray,
    sizes: np.ndarray,
    pair: int = 0,
) -> ViewParams:
    """Draw one view per row, of number 2 · pair or 2 · pair + 1.

    streams: integer [n], for each row 2 · epoch, plus 1 for the second view of the pair.
    """

    def uniform(first: int, stop: int, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        blocks = np.arange(first, stop) + pair * _PAIR
        return _uniform(seed, streams[rows], ids[rows], blocks)

    # The same call also draws the first attempts at a crop.
    u = uniform(0, _FIRST_CROP + (_FIRST_ATTEMPTS if aug.crop else 0))
    switches, order, factors = u[:, _SWITCHES], u[:, _ORDER], u[:, _FACTORS]
    jitter = 0.8 * aug.s
    spread = np.array([jitter, jitter, aug.max_saturation])
    low = np.append(np.maximum(1 - spread, 0), -aug.max_hue)
    high = np.append(1 + spread, aug.max_hue)
    if aug.brightness == "additive":
        low[0], high[0] = -jitter, jitter
    sigma = aug.sigma[0] + order[:, 1] * (aug.sigma[1] - aug.sigma[0])
    return ViewParams(
        box=_draw_boxes(aug, u[:, _FIRST_CROP:], uniform, sizes) if aug.crop else whole(sizes),
        flip=switches[:, 0] < aug.p_flip,
        jitter=switches[:, 1] < aug.p_jitter,
        order=_ORDERS[(order[:, 0] * 24).astype(np.int64)],
        factors=(low + factors * (high - low)).astype(np.float32, order="C"),
        gray=switches[:, 2] < aug.p_gray,
        sigma=np.where(switches[:, 3] < aug.p_blur, sigma, 0).astype(np.float32),
    )


def philox(key: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., 2011): uint32 key [2], counter [4, ...] → [4, ...]."""
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    c0, c1, c2, c3 = counter.astype(np.uint64)
    k0, k1 = int(key[0]), int(key[1])
    for _ in range(_PHILOX_ROUNDS):
        a = c0 * np.uint64(0xD2511F53)
        b = c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (b >> shift) ^ c1 ^ np.uint64(k0),
            b & low,
            (a >> shift) ^ c3 ^ np.uint64(k1),
            a & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def _uniform(seed: int, streams: np.ndarray, ids: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """float64 [n, blocks, 4], each uniform on the open interval (0, 1)."""
    seed = as_int("seed", seed) % 2**64
    key = np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint64)
    unsigned = ids.astype(np.int64).astype(np.uint64)[:, None]
    counter = np.empty((4, len(ids), len(blocks)), dtype=np.uint64)
    counter[0] = blocks
    counter[1] = unsigned & np.uint64(0xFFFFFFFF)
    counter[2] = unsigned >> np.uint64(32)
    counter[3] = streams[:, None]
    return np.moveaxis((philox(key, counter) + 0.5) * 2.0**-32, 0, -1)


def whole(sizes: np.ndarray) -> np.ndarray:
    """The boxes of whole images."""
    return np.concatenate([np.zeros_like(sizes), sizes], axis=1).astype(np.int32)


def _draw_boxes(
    aug: Augmentation,
    draws: np.ndarray,
    uniform: Callable[[int, int, np.ndarray], np.ndarray],
    sizes: np.ndarray,
) -> np.ndarray:
    """The first attempt of each sample that the spec accepts; if there is none, its fallback.

    draws: the numbers of the first attempts, [n, _FIRST_ATTEMPTS, 4]. They suffice for most
        samples. For the others, `uniform` draws all further attempts.
    """
    simclr = aug.spec == "simclr"
    attempts = _SIMCLR_ATTEMPTS if simclr else _TORCHVISION_ATTEMPTS
    propose = _propose_simclr if simclr else _propose_torchvision
    boxes = whole(sizes) if simclr else _central(aug, sizes)
    pending = np.arange(len(sizes))
    for stop in (_FIRST_ATTEMPTS, attempts):
        box, accepted = propose(aug, draws, sizes[pending, None, :])
        first = accepted.argmax(axis=1)
        settled = accepted[np.arange(len(pending)), first]
        boxes[pending[settled]] = box[settled, first[settled]]
        pending = pending[~settled]
        if stop == attempts or not len(pending):
            break
        draws = uniform(_FIRST_CROP + stop, _FIRST_CROP + attempts, pending)
    return boxes


def _propose_torchvision(
    aug: Augmentation, u: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """RandomResizedCrop.make_params, one attempt per entry of u [n, attempts, 4]."""
    height, width = sizes[..., 0], sizes[..., 1]
    area = height * width * (aug.area[0] + u[..., 0] * (aug.area[1] - aug.area[0]))
    low, high = np.log(aug.ratio)
    aspect = np.exp(low + u[..., 1] * (high - low))
    w = np.rint(np.sqrt(area * aspect))
    h = np.rint(np.sqrt(area / aspect))
    accepted = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    y = np.floor(u[..., 2] * (height - h + 1))
    x = np.floor(u[..., 3] * (width - w + 1))
    return np.stack([y, x, h, w], axis=-1), accepted


def _central(aug: Augmentation, sizes: np.ndarray) -> np.ndarray:
    """RandomResizedCrop's fallback: the largest central box with an allowed aspect."""
    height, width = sizes[:, 0], sizes[:, 1]
    aspect = width / height
    w = np.where(aspect > aug.ratio[1], np.rint(height * aug.ratio[1]), width)
    h = np.where(aspect < aug.ratio[0], np.rint(width / aug.ratio[0]), height)
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=-1).astype(np.int32)


def _propose_simclr(
    aug: Augmentation, u: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """TensorFlow's sample_distorted_bounding_box with the whole image as the object."""
    height, width = sizes[..., 0], sizes[..., 1]
    aspect = aug.ratio[0] + u[..., 0] * (aug.ratio[1] - aug.ratio[0])
    pixels = height * width
    least, most = aug.area[0] * pixels, aug.area[1] * pixels
    highest = np.rint(np.sqrt(most / aspect))
    highest = np.where(
        np.rint(highest * aspect) > width, np.floor((width + 0.5 - 1e-7) / aspect), highest
    )
    highest = np.minimum(highest - (np.rint(highest * aspect) > width), height)
    lowest = np.minimum(np.rint(np.sqrt(least / aspect)), highest)
    h = lowest + np.floor(u[..., 1] * (highest - lowest + 1))
    # If rounding broke the bounds on the area, change the height by one pixel.
    h = h + (h * np.rint(h * aspect) < least)
    h = h - (h * np.rint(h * aspect) > most)
    w = np.rint(h * aspect)
    accepted = (least <= h * w) & (h * w <= most) & (h <= height) & (w <= width) & (h * w > 0)
    accepted &= h * w >= aug.min_covered * pixels
    # TensorFlow draws from [0, n), so the last offset is never drawn.
    y = np.floor(u[..., 2] * (height - h))
    x = np.floor(u[..., 3] * (width - w))
    return np.stack([y, x, h, w], axis=-1), accepted


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _check_number(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high or not np.isfinite(value):
        raise ValueError(f"{name} must be a finite number in [{low}, {high}], got {value!r}")


def _check_range(name: str, value: tuple[float, float], low: float, high: float) -> None:
    if len(value) != 2 or not low < value[0] <= value[1] <= high or not np.isfinite(value[1]):
        raise ValueError(f"{name} must be (a, b) with {low} < a <= b <= {high}, got {value!r}")


def augmentation_from(values: dict[str, Any]) -> Augmentation:
    """An Augmentation from its fields as read from JSON."""
    hints = typing.get_type_hints(Augmentation)
    typed: dict[str, Any] = {
        name: tuple(value) if _is_tuple(hints[name]) and value is not None else value
        for name, value in values.items()
    }
    return Augmentation(**typed)


def _is_tuple(hint: Any) -> bool:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return any(typing.get_origin(option) is tuple for option in options)
