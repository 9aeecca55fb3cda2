"""Small files as people have them, and the right answer for each, for tables of test cases.

A picture is a tiny PNG of one colour. The colour is its number, so the pixels tell which picture
was read.
"""

import io
import json
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (6, 5)


@dataclass(frozen=True)
class Case:
    """make: writes files into a folder and returns what is opened.

    images: the numbers of the pictures, in order. labels: theirs, None for no labels.
    left_out: reason → number. options: further arguments of `open_source`.
    error: what the message says if on_error is "raise"; `images` is then what "skip" leaves, or
        None if it is an error as well.
    """

    name: str
    make: Callable[[Path], Any]
    images: list[int] | None = None
    labels: list[int] | None = None
    classes: tuple[str, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    def __str__(self) -> str:
        return self.name


def picture(i: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", SIZE, (i, 255 - i, 7)).save(buffer, kind)
    return buffer.getvalue()


def number(pixels: np.ndarray) -> int:
    return int(pixels[0, 0, 0])


def write(folder: Path, files: dict[str, Any]) -> Path:
    """Write files: a number is the picture of this number."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(as_bytes(content))
    return folder


def as_bytes(content: Any) -> bytes:
    if isinstance(content, int):
        return picture(content)
    if isinstance(content, dict | list):
        return json.dumps(content).encode()
    return content.encode() if isinstance(content, str) else content


def write_tar(path: Path, members: list[tuple[str, Any]], mode: str = "w", **options: Any) -> Path:
    """Write a tar. A member's content may be ("hard" or "link", target)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type = tarfile.LNKTYPE if content[0] == "hard" else tarfile.SYMTYPE
                info.linkname = content[1]
                tar.addfile(info)
                continue
            data = as_bytes(content)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def varint(value: int) -> bytes:
    value %= 1 << 64
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(values: list[Any]) -> bytes:
    """A tf.train.Feature of bytes, floats or integers."""
    if all(isinstance(value, bytes) for value in values):
        return message(1, b"".join(message(1, value) for value in values))
    if all(isinstance(value, float) for value in values):
        return message(2, message(1, struct.pack(f"<{len(values)}f", *values)))
    return message(3, message(1, b"".join(map(varint, values))))


def example(features: dict[str, Any]) -> bytes:
    """A record of a TFRecord file: a tf.train.Example."""
    entries = b""
    for name, value in features.items():
        values = value if isinstance(value, list) else [value]
        entries += message(1, message(1, name.encode()) + message(2, feature(values)))
    return tfrecord(message(1, entries))


def tfrecord(data: bytes) -> bytes:
    """Data as a record of a TFRecord file, with the checksums."""
    length = struct.pack("<Q", len(data))
    return length + checksum(length) + data + checksum(data)


def checksum(data: bytes) -> bytes:
    """TFRecord's masked CRC-32C, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % (1 << 32))


def recordio(label: float | list[float], data: bytes) -> bytes:
    """A record of a RecordIO file as im2rec writes it."""
    labels = label if isinstance(label, list) else []
    first = 0.0 if isinstance(label, list) else label
    body = struct.pack("<IfQQ", len(labels), first, 0, 0)
    body += struct.pack(f"<{len(labels)}f", *labels) + data
    return struct.pack("<II", 0xCED7230A, len(body)) + body + bytes(-len(body) % 4)
