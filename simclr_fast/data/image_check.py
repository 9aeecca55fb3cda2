"""Check image files before they are decoded: are they whole, and how large are the images?

JPEG, PNG, WebP and BMP files are checked. Those that DALI would decode otherwise than Pillow, and
files of other formats, are decoded by Pillow and become BMP files.

A file that DALI cannot decode ends its pipeline. Worse, its worker threads may go on writing into
freed memory (seen with 2.4: a crash some batches later). So DALI must not see such a file. The
checks here read its structure: signature, headers, checksums, a missing end. In addition, Pillow
decodes each file once, before its first use; a JPEG at an eighth of its size.
"""

import io
import math
import re
import struct
import warnings
import zlib
from typing import NamedTuple

import numpy as np

from simclr_fast.augment.channels import as_channels, picture_channels
from simclr_fast.augment.rgb import rgb_array
from simclr_fast.data.formats import open_picture
from simclr_fast.utils.extras import missing, need

# Baseline, extended and progressive Huffman frames. Decoders support no others.
_FRAMES = (0xC0, 0xC1, 0xC2)
_OTHER_FRAMES = frozenset(range(0xC3, 0xD0)) - {0xC4, 0xC8, 0xCC}
# TIFF and BigTIFF of either byte order.
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_JPEG = b"\xff\xd8"
_START_OF_SCAN, _END_OF_IMAGE, _APP1 = 0xDA, b"\xff\xd9", 0xE1
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
_ORIENTATION = 0x0112
# EXIF's types SHORT and LONG, in the letters of struct.
_EXIF_TYPES = {3: "H", 4: "I"}
# Where a PNG may hold EXIF or XMP.
_PNG_METADATA = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
# Flags of an extended WebP: animation, XMP, EXIF.
_WEBP_ODD = 0x02 | 0x04 | 0x08
# The start of a NumPy file, version 1: data type, order of the axes, shape.
_NPY = re.compile(
    rb"\x93NUMPY\x01\0..\{'descr': '([<>|](?:b1|[iu][1248]|f[248]))', "
    rb"'fortran_order': (True|False), 'shape': \(([0-9, ]*)\), \} *\n",
    re.DOTALL,
)
# Larger images are refused as decompression bombs. Pillow has the same limit.
_MAX_PIXELS = 178_956_970


class _Header(NamedTuple):
    """height, width: as stored. odd: DALI may decode the file otherwise than Pillow, or not turn it
    upright. Of a JPEG, orientation: 1 to 8; exif: the positions of its EXIF segments."""

    height: int
    width: int
    odd: bool = False
    orientation: int = 1
    exif: tuple[int, ...] = ()


def in_common_format(encoded: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Check a file. Return one that DALI decodes to the pixels of `pillow_pixels`, and its size.

    encoded: uint8 [k], a whole file. Returned unchanged, with other EXIF, or as a 24-bit BMP.
    The size is (height, width) of the upright image.

    Raises:
        ValueError: the file is damaged or of an unknown format; the message says how.
        ImportError: Pillow is missing, which this file needs.
    """
    data = encoded.tobytes()
    header = _checked_header(data)
    if header is None or header.odd:
        pixels = pillow_pixels(encoded)
        buffer = io.BytesIO()
        need("PIL.Image").fromarray(pixels).save(buffer, "BMP")
        return np.frombuffer(buffer.getvalue(), np.uint8), pixels.shape[:2]
    if header.exif or header.orientation != 1:
        encoded = np.frombuffer(_with_plain_exif(data, header), np.uint8)
    size = header.height, header.width
    return encoded, size[::-1] if header.orientation >= 5 else size


def pillow_pixels(encoded: np.ndarray) -> np.ndarray:
    """Decode a file with Pillow and turn it upright: uint8 [H, W, 3]. Of several images, the first.

    Raises:
        ValueError: the file is damaged, or its pixels are out of range (augment/rgb.py).
        ImportError: Pillow is missing.
    """
    need("PIL.Image")
    data = encoded.tobytes()
    _checked_header(data)
    try:
        with open_picture(data) as picture:
            _check_pixels(picture.height, picture.width)
            return rgb_array(picture)
    # Pillow raises errors of many types for damaged files.
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


def channel_pixels(encoded: np.ndarray, channels: int) -> np.ndarray:
    """Decode a file of `channels` channels: uint8 or float32 [H, W, channels].

    A NumPy file (.npy); a TIFF, by tifffile if it is installed; else what Pillow reads. No channel
    is added, dropped or converted.

    Raises:
        ValueError: the file is damaged or has other channels. ImportError: Pillow is missing.
    """
    data = encoded.tobytes()
    try:
        if data.startswith(b"\x93NUMPY"):
            return as_channels(_npy_array(data), channels)
        if data.startswith(_TIFF) and not missing(["tifffile"]):
            return as_channels(need("tifffile").imread(io.BytesIO(data)), channels)
    # Damaged files raise errors of many types.
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error
    need("PIL.Image")
    _checked_header(data)
    try:
        with open_picture(data) as picture:
            _check_pixels(picture.height, picture.width)
            return picture_channels(picture, channels)
    except Exception as error:
        more = "; pip install tifffile reads more kinds of TIFF" if data.startswith(_TIFF) else ""
        raise ValueError(f"{error or type(error).__name__}{more}") from error


def _npy_array(data: bytes) -> np.ndarray:
    """np.load of a whole file, without its parser for the usual headers.

    np.load parses them with Python's ast module. When several threads do so at once, ast of Python
    3.11 may say of a sound header "AST constructor recursion depth mismatch" (cpython#106905).
    """
    if found := _NPY.match(data):
        dtype = np.dtype(found[1].decode())
        shape = tuple(int(n) for n in found[3].split(b",") if n.strip())
        if len(data) - found.end() >= dtype.itemsize * math.prod(shape) > 0:
            flat = np.frombuffer(data, dtype, math.prod(shape), found.end())
            return np.array(flat.reshape(shape, order="F" if found[2] == b"True" else "C"))
    array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    return array


def _checked_header(data: bytes) -> _Header | None:
    """Check the structure of a JPEG, PNG, WebP or BMP file; None for other formats."""
    try:
        header = _header(data)
    except (IndexError, struct.error) as error:
        raise ValueError(f"cut off within its header ({len(data)} bytes)") from error
    if header is not None:
        _check_pixels(header.height, header.width)
    return header


def _check_pixels(height: int, width: int) -> None:
    if height < 1 or width < 1 or height * width > _MAX_PIXELS:
        raise ValueError(f"{height} × {width} pixels; from 1 to {_MAX_PIXELS} are allowed")


def try_decoding(encoded: np.ndarray) -> None:
    """Raise ValueError if Pillow cannot decode the file. Finds damage that the structure hides.

    A JPEG is decoded at an eighth of its size, which takes half the time and finds the same errors.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        warnings.warn(
            "Pillow is not installed, so an image that DALI cannot decode may end the process "
            "without being named: pip install pillow",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    try:
        with open_picture(encoded.tobytes()) as image:
            image.draft(None, (1, 1))
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _header(data: bytes) -> _Header | None:
    if data.startswith(_JPEG):
        return _jpeg(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(data)
    if data.startswith(b"BM"):
        return _bmp(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _webp(data)
    return None


def _jpeg(data: bytes) -> _Header:
    position, size, channels = 2, None, 0
    exif: list[int] = []
    xmp = b""
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
        elif marker == _APP1 and data.startswith(_EXIF, position + 4):
            exif.append(position + 4)
        elif marker == _APP1 and data.startswith(_XMP, position + 4):
            xmp = data[position + 4 + len(_XMP) : position + 2 + length]
        elif marker == _START_OF_SCAN:
            break
        if length < 2:
            raise ValueError(f"a JPEG segment of length {length} at byte {position}")
        position += 2 + length
    if size is None:
        raise ValueError("a JPEG scan without a frame")
    if data.rfind(_END_OF_IMAGE, position) < 0:
        raise ValueError("a JPEG without its end: cut off")
    segments = (data[i + len(_EXIF) : i - 2 + int.from_bytes(data[i - 2 : i], "big")] for i in exif)
    orientation = _exif_orientation(b"".join(segments), xmp)
    return _Header(*size, channels == 4 or orientation is None, orientation or 1, tuple(exif))


def _exif_orientation(exif: bytes, xmp: bytes) -> int | None:
    """The orientation, 1 to 8, from EXIF, else from XMP, else 1. None for unusual EXIF, which
    Pillow shall read."""
    value: int | None = None
    if exif:
        order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
        if order is None:
            return None
        try:
            (start,) = struct.unpack_from(order + "I", exif, 4)
            (entries,) = struct.unpack_from(order + "H", exif, start)
            for entry in range(start + 2, start + 2 + 12 * entries, 12):
                tag, kind, count, _ = struct.unpack_from(order + "HHII", exif, entry)
                if tag == _ORIENTATION:
                    if count != 1 or kind not in _EXIF_TYPES:
                        return None
                    (value,) = struct.unpack_from(order + _EXIF_TYPES[kind], exif, entry + 8)
        except struct.error:
            return None
    if value is None and (found := re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp)):
        value = int(found[1])
    return value if value in range(2, 9) else 1


def _with_plain_exif(data: bytes, header: _Header) -> bytes:
    """A JPEG whose EXIF has nothing but the orientation, so that DALI reads the same one as we."""
    plain = bytearray(data)
    for position in header.exif:
        plain[position : position + len(_EXIF)] = b"Other\0"
    if header.orientation != 1:
        entry = struct.pack("<HHIHH", _ORIENTATION, 3, 1, header.orientation, 0)
        segment = _EXIF + struct.pack("<2sHIH", b"II", 42, 8, 1) + entry + bytes(4)
        plain[2:2] = struct.pack(">BBH", 0xFF, _APP1, len(segment) + 2) + segment
    return bytes(plain)


def _png(data: bytes) -> _Header:
    position, kind = 8, b""
    header: _Header | None = None
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, position)
        (checksum,) = struct.unpack_from(">I", data, position + 8 + length)
        if zlib.crc32(memoryview(data)[position + 4 : position + 8 + length]) != checksum:
            raise ValueError(f"a PNG chunk at byte {position} has a wrong checksum")
        if header is None:
            width, height, bits = struct.unpack_from(">IIB", data, position + 8)
            header = _Header(height, width, odd=bits == 16)
        elif kind == b"eXIf" or data.startswith(_PNG_METADATA, position + 8):
            header = header._replace(odd=True)
        position += 12 + length
    assert header is not None
    return header


def _bmp(data: bytes) -> _Header:
    pixels, header = struct.unpack_from("<II", data, 10)
    if header == 12:  # of OS/2
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        return _Header(height, width, odd=True)
    width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
    rows = (width * bits + 31) // 32 * 4 * abs(height)
    if compression == 0 and pixels + rows > len(data):
        raise ValueError(f"a BMP of {pixels + rows} bytes cut off at {len(data)}")
    return _Header(abs(height), width, bits not in (1, 4, 8, 24) or compression != 0 or height < 0)


def _webp(data: bytes) -> _Header:
    (length,) = struct.unpack_from("<I", data, 4)
    if length + 8 > len(data):
        raise ValueError(f"a WebP of {length + 8} bytes cut off at {len(data)}")
    kind = data[12:16]
    if kind == b"VP8X":
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
        return _Header(height, width, bool(data[20] & _WEBP_ODD))
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return _Header((bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return _Header(height & 0x3FFF, width & 0x3FFF)
    raise ValueError(f"an unknown WebP chunk {kind!r}")
