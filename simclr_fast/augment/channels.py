"""Images of any number of channels other than RGB: microscopy, satellites, medicine.

Nothing is converted: an image must have the channels that were asked for. 8-bit images stay uint8;
others become float32, so that 12 or 16 bits are kept: 16-bit ones by v / 65535, floating ones as
they are, in [0, 1].
"""

from typing import Any

import numpy as np

from simclr_fast.augment.rgb import check_range, orientation, turned

_LARGEST = 65535


def as_channels(array: np.ndarray, channels: int) -> np.ndarray:
    """An image [H, W, C], [C, H, W] or, for one channel, [H, W] → [H, W, C], contiguous.

    array: uint8, bool, uint16, int16 or int32 (as 16-bit), or floating in [0, 1]. If both layouts
    fit, the channels come last. Returns uint8 or float32 in [0, 1].

    Raises:
        ValueError: it has other channels, or values are out of range. TypeError: another dtype.
    """
    image = array[..., None] if array.ndim == 2 else array
    if image.ndim == 3 and image.shape[2] != channels and image.shape[0] == channels:
        image = image.transpose(1, 2, 0)
    if image.ndim != 3 or image.shape[2] != channels:
        raise ValueError(
            f"an image must be [H, W, {channels}] or [{channels}, H, W] for channels={channels}, "
            f"got {list(array.shape)}"
        )
    kind, size = image.dtype.kind, image.dtype.itemsize
    if kind == "b" or (kind, size) == ("u", 1):
        return np.ascontiguousarray(image * np.uint8(255) if kind == "b" else image)
    if kind != "f" and (kind, size) not in (("u", 2), ("i", 2), ("i", 4)):
        raise TypeError(f"pixels must be uint8, uint16 or floating in [0, 1], got {array.dtype}")
    highest = 1 if kind == "f" else _LARGEST
    check_range(image, highest, str(array.dtype))
    scaled = image if kind == "f" else image.astype(np.float64) / _LARGEST
    return np.ascontiguousarray(scaled, dtype=np.float32)


def picture_channels(picture: Any, channels: int) -> np.ndarray:
    """The bands of a PIL image, upright, as `as_channels` returns them.

    A TIFF of as many pages as channels, with one band each, is one image.

    Raises:
        ValueError: it has another number of bands.
    """
    pages = getattr(picture, "n_frames", 1)
    if channels > 1 and pages == channels and len(picture.getbands()) == 1:
        bands = []
        for page in range(pages):
            picture.seek(page)
            bands.append(np.array(picture))
        return turned(as_channels(np.stack(bands), channels), orientation(picture))
    picture.load()
    if picture.mode in ("P", "PA"):
        raise ValueError(f"an image with a palette has no {channels} channels: convert it first")
    if len(picture.getbands()) != channels:
        raise ValueError(
            f"an image must have {channels} channels, got mode {picture.mode} with "
            f"{len(picture.getbands())}"
        )
    return turned(as_channels(np.asarray(picture), channels), orientation(picture))


def shown(pixels: np.ndarray) -> np.ndarray:
    """uint8 [..., C] as RGB [..., 3] for a picture: the first three channels. One channel is gray,
    and the first of two is red, the second green."""
    channels = pixels.shape[-1]
    if channels == 1:
        return np.repeat(pixels, 3, axis=-1)
    if channels == 2:
        return np.concatenate([pixels, np.zeros_like(pixels[..., :1])], axis=-1)
    return pixels[..., :3]
