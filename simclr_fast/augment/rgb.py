"""The one conversion of images to 8-bit RGB, for files, data sets, arrays and `SimCLRViews`.

Pillow's conversion is the reference, with four rules of our own:

- Alpha is dropped, and what is transparent keeps its colour. Premultiplied modes (RGBa, La) are
  divided by their alpha first.
- 16-bit grayscale (I;16, I, uint16) is scaled: round(v / 257). Pillow would clip it at 255. Values
  of mode I outside [0, 65535] are refused. Of 16-bit colour files, Pillow reads the high byte.
- Floating-point pixels (F) must lie in [0, 1]. They are scaled: round(255 v).
- An orientation in EXIF or XMP is applied, so that the image stands upright.
"""

from typing import Any

import numpy as np

_ORIENTATION = 0x0112
_LEVELS16 = 65535 // 255


def rgb_array(picture: Any, *, upright: bool = True) -> np.ndarray:
    """Convert a PIL image of any mode: uint8 [H, W, 3], contiguous.

    upright: apply the orientation that the image's EXIF or XMP names.

    Raises:
        ValueError: values are out of range, or Pillow cannot decode or convert the image.
    """
    picture.load()
    mode = picture.mode
    if mode == "F" or mode.startswith("I"):
        values = np.asarray(picture)
        if values.dtype.kind == "i":
            check_range(values, 65535, f"mode {mode}")
            values = values.astype(np.uint16)
        pixels = gray_levels(values, f"mode {mode}")
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    else:
        if mode == "La":
            picture = picture.convert("LA")
        elif mode == "P" and isinstance(picture.info.get("transparency"), bytes):
            # The same pixels, without a warning of Pillow about the alpha that is lost.
            picture = picture.convert("RGBA")
        pixels = np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))
    return turned(pixels, orientation(picture)) if upright else np.array(pixels)


def gray_levels(values: np.ndarray, kind: str) -> np.ndarray:
    """Scale grayscale or channels of more than 8 bits to uint8, by the rules above.

    values: uint8, bool, uint16 or floating. kind: what they are, for the error.

    Raises:
        ValueError: values are out of range or not finite. TypeError: another dtype.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values * np.uint8(255)
    if values.dtype.kind == "f":
        check_range(values, 1, kind)
        scale = 255.0
    elif (values.dtype.kind, values.dtype.itemsize) == ("u", 2):
        scale = 1 / _LEVELS16
    else:
        raise TypeError(f"pixels must be uint8, uint16 or floating in [0, 1], got {values.dtype}")
    return np.rint(values.astype(np.float64) * scale).astype(np.uint8)


def check_range(values: np.ndarray, highest: int, kind: str) -> None:
    """Raise ValueError unless the pixels lie in [0, highest]. kind: what they are."""
    if values.size:
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= highest):
            raise ValueError(
                f"pixels of {kind} must lie in [0, {highest}], got {low:g} to {high:g}: scale them"
            )


def orientation(picture: Any) -> int:
    """The orientation in an image's EXIF or XMP: 1 (upright) to 8; 1 where it cannot be read."""
    try:
        value = picture.getexif().get(_ORIENTATION, 1)
    # EXIF is read by Pillow without checks, so damage raises errors of many types.
    except Exception:
        return 1
    return value if value in range(2, 9) else 1


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn pixels [H, W, C] of an orientation upright; contiguous."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.array(pixels, order="C")
