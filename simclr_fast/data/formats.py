"""Which image files are read, and what reads them.

JPEG, PNG, WebP and BMP by DALI or Pillow, the others by Pillow. HEIC and JPEG XL need a package
that teaches them to Pillow.
"""

import io
from functools import cache
from importlib import import_module
from typing import Any

from simclr_fast.utils.extras import missing, need

_ALWAYS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)
# Suffixes → the module that reads such files, and its name for pip.
_SOMETIMES = {
    (".jp2", ".j2k", ".jpx"): ("PIL", "pillow, with OpenJPEG"),
    (".avif",): ("PIL", "pillow>=11.3"),
    (".heic", ".heif", ".hif"): ("pillow_heif", "pillow-heif"),
    (".jxl",): ("pillow_jxl", "pillow-jxl-plugin"),
}
# Pillow's names of the formats. Others are refused: some run programs, some have no pixels.
_PILLOW = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
_ADDED = ("HEIF", "JXL")
_HEIC_BRANDS = frozenset(b"heic heix heim heis hevc hevx mif1 msf1".split())


@cache
def suffixes(channels: int = 3) -> frozenset[str]:
    """The suffixes of the files that can be read here, such as ".jpg".

    channels: .npy files are images only if other channels than RGB are asked for.
    """
    found = {s for group in _SOMETIMES if _reads(group[0]) for s in group}
    return frozenset((*_ALWAYS, *found, *((".npy",) if channels != 3 else ())))


def unread(suffix: str) -> str | None:
    """For an image suffix that cannot be read here: what to install; None for other suffixes."""
    for group, (_, pip) in _SOMETIMES.items():
        if suffix in group and suffix not in suffixes():
            return f"pip install '{pip}'"
    return None


@cache
def _reads(suffix: str) -> bool:
    module = next(module for group, (module, _) in _SOMETIMES.items() if suffix in group)
    if missing(["PIL", module]):
        return False
    from PIL import features

    if suffix == ".avif":
        return "avif" in features.modules and features.check_module("avif")
    return suffix != ".jp2" or features.check_codec("jpg_2000")


def open_picture(data: bytes) -> Any:
    """Open an image file with Pillow, which decodes it later.

    Raises:
        ValueError: it is of no format that is read here. ImportError: Pillow is missing.
    """
    image = need("PIL.Image")
    formats = _register()
    try:
        return image.open(io.BytesIO(data), formats=formats)
    except image.UnidentifiedImageError as error:
        raise ValueError(_reason(data)) from error


@cache
def _register() -> tuple[str, ...]:
    """Let Pillow know the installed packages; the formats that it may open."""
    image = need("PIL.Image")
    image.init()
    if not missing(["pillow_heif"]):
        import_module("pillow_heif").register_heif_opener()
    if not missing(["pillow_jxl"]):
        import_module("pillow_jxl")
    return tuple(name for name in (*_PILLOW, *_ADDED) if name in image.OPEN)


def _reason(data: bytes) -> str:
    """Why a file is not read, from its first bytes."""
    if not data:
        return "an empty file"
    if data.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file: git lfs pull"
    if data.lstrip()[:9].lower().startswith((b"<html", b"<!doctype")):
        return "a web page, perhaps of a failed download"
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    for suffix, name, found in (
        (".heic", "HEIC", brand in _HEIC_BRANDS),
        (".avif", "AVIF", brand in (b"avif", b"avis")),
        (".jxl", "JPEG XL", data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL "))),
        (".jp2", "JPEG 2000", data.startswith((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"))),
    ):
        if found:
            install = unread(suffix)
            return f"a {name} file, " + (f"which needs: {install}" if install else "damaged")
    return "damaged, or neither JPEG, PNG, WebP, BMP, GIF, TIFF, PNM, JPEG 2000, AVIF nor HEIC"
