"""Check image files before they are decoded: are they whole, and how large are the images?

JPEG, PNG, WebP and BMP files are checked. Files of other formats are converted to BMP first.

A file that DALI cannot decode ends its pipeline. Worse, its worker threads may go on writing into
freed memory (seen with 2.4: a crash some batches later). So DALI must not see such a file. The
checks here read its structure: signature, headers, checksums, a missing end. In addition, Pillow
decodes each file once, before its first use; a JPEG at an eighth of its size.
"""

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np

from simclr_fast.utils.extras import need

# Baseline, extended and progressive Huffman frames. Decoders support no others.
_FRAMES = (0xC0, 0xC1, 0xC2)
_OTHER_FRAMES = frozenset(range(0xC3, 0xD0)) - {0xC4, 0xC8, 0xCC}
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, b"\xff\xd9"
# TIFF of either byte order, GIF, and PNM of one to three channels.
_OTHERS = (b"II*\0", b"MM\0*", b"GIF8", *(b"P%d" % kind for kind in range(1, 7)))
# Larger images are refused as decompression bombs. Pillow has the same limit.
_MAX_PIXELS = 178_956_970


def in_common_format(encoded: np.ndarray) -> np.ndarray:
    """Convert TIFF, PNM and GIF files to 24-bit BMP with Pillow; return other files unchanged.

    encoded: uint8 [k], a whole file. If it holds several pictures, the first is used. 16-bit
    grayscale is scaled to 8 bits.

    Raises:
        ValueError: the file is damaged; the message says how. ImportError: Pillow is missing.
    """
    start = encoded[:4].tobytes()
    if not start.startswith(_OTHERS):
        return encoded
    image = need("PIL.Image")
    buffer = io.BytesIO()
    try:
        with image.open(io.BytesIO(encoded.tobytes()), formats=("TIFF", "PPM", "GIF")) as picture:
            _check_pixels(picture.height, picture.width)
            _rgb(picture).save(buffer, "BMP")
    # Pillow raises errors of many types for damaged files of these formats.
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error
    return np.frombuffer(buffer.getvalue(), np.uint8)


def pillow_pixels(encoded: np.ndarray) -> np.ndarray:
    """Decode a file of a format that `checked_size` knows, with Pillow: uint8 [H, W, 3].

    The EXIF orientation is ignored.

    Raises:
        ValueError: the file is damaged. ImportError: Pillow is missing.
    """
    image = need("PIL.Image")
    try:
        with image.open(io.BytesIO(encoded.tobytes())) as picture:
            return np.array(_rgb(picture))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _rgb(picture: Any) -> Any:
    """Convert a Pillow image to 8-bit RGB. 16-bit grayscale is scaled, alpha is dropped."""
    if picture.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    if picture.mode.startswith("I"):
        gray = np.clip(np.asarray(picture), 0, 65535) / 257
        picture = need("PIL.Image").fromarray(np.rint(gray).astype(np.uint8))
    return picture.convert("RGB")


def checked_size(encoded: np.ndarray) -> tuple[int, int]:
    """Check a file's structure; return (height, width) in pixels, before any EXIF rotation.

    encoded: uint8 [k], a whole file.

    Raises:
        ValueError: the file is damaged or of an unknown format; the message says how.
    """
    try:
        height, width = _size(encoded.tobytes())
    except (IndexError, struct.error) as error:
        raise ValueError(f"cut off within its header ({len(encoded)} bytes)") from error
    _check_pixels(height, width)
    return height, width


def _check_pixels(height: int, width: int) -> None:
    if height < 1 or width < 1 or height * width > _MAX_PIXELS:
        raise ValueError(f"{height} × {width} pixels; from 1 to {_MAX_PIXELS} are allowed")


def try_decoding(encoded: np.ndarray) -> None:
    """Raise ValueError if Pillow cannot decode the file. Finds damage that the structure hides.

    A JPEG is decoded at an eighth of its size, which takes half the time and finds the same errors.
    """
    try:
        from PIL import Image
    except ImportError:
        warnings.warn(
            "Pillow is not installed, so an image that DALI cannot decode may end the process "
            "without being named: pip install pillow",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    try:
        with Image.open(io.BytesIO(encoded.tobytes())) as image:
            image.draft(None, (1, 1))
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _size(data: bytes) -> tuple[int, int]:
    if data.startswith(b"\xff\xd8"):
        return _jpeg(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(data)
    if data.startswith(b"BM"):
        return _bmp(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp(data)
    raise ValueError("neither JPEG, PNG, WebP, BMP, TIFF, PNM nor GIF" if data else "an empty file")


def _jpeg(data: bytes) -> tuple[int, int]:
    position, size = 2, None
    while True:
        if data[position] != 0xFF:
            raise ValueError(f"no JPEG marker at byte {position}")
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        (length,) = struct.unpack_from(">H", data, position + 2)
        if marker in _FRAMES:
            precision, height, width, channels = struct.unpack_from(">BHHB", data, position + 4)
            if precision != 8 or channels not in (1, 3, 4):
                raise ValueError(f"a JPEG of {channels} channels with {precision} bits")
            size = height, width
        elif marker in _OTHER_FRAMES:
            raise ValueError(f"a JPEG frame of an unsupported kind, marker {marker:#x}")
        elif marker == _START_OF_SCAN:
            break
        if length < 2:
            raise ValueError(f"a JPEG segment of length {length} at byte {position}")
        position += 2 + length
    if size is None:
        raise ValueError("a JPEG scan without a frame")
    if data.rfind(_END_OF_IMAGE, position) < 0:
        raise ValueError("a JPEG without its end: cut off")
    return size


def _png(data: bytes) -> tuple[int, int]:
    position, kind, size = 8, b"", None
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, position)
        (checksum,) = struct.unpack_from(">I", data, position + 8 + length)
        if zlib.crc32(memoryview(data)[position + 4 : position + 8 + length]) != checksum:
            raise ValueError(f"a PNG chunk at byte {position} has a wrong checksum")
        if size is None:
            size = struct.unpack_from(">II", data, position + 8)
        position += 12 + length
    width, height = size or (0, 0)
    return height, width


def _bmp(data: bytes) -> tuple[int, int]:
    (pixels,) = struct.unpack_from("<I", data, 10)
    width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
    rows = (width * bits + 31) // 32 * 4 * abs(height)
    if compression == 0 and pixels + rows > len(data):
        raise ValueError(f"a BMP of {pixels + rows} bytes cut off at {len(data)}")
    return abs(height), width


def _webp(data: bytes) -> tuple[int, int]:
    (length,) = struct.unpack_from("<I", data, 4)
    if length + 8 > len(data):
        raise ValueError(f"a WebP of {length + 8} bytes cut off at {len(data)}")
    kind = data[12:16]
    if kind == b"VP8X":
        width = int.from_bytes(data[24:27], "little") + 1
        return int.from_bytes(data[27:30], "little") + 1, width
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return height & 0x3FFF, width & 0x3FFF
    raise ValueError(f"an unknown WebP chunk {kind!r}")
