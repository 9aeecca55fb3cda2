"""Random access into WebDataset tars, TFRecord and MXNet RecordIO files.

Each shard is scanned once to find its images. The file is mapped, and only headers are read.
Formats: POSIX tar; tensorflow.org/tutorials/load_data/tfrecord (length, CRC, Example protocol
buffer, CRC); mxnet.apache.org RecordIO (magic, flag and length, IRHeader, image).
"""

import mmap
import struct
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from simclr_fast.data.sources import IMAGE_SUFFIXES, Source, file_fingerprint

_RECORDIO_MAGIC = 0xCED7230A
_TFRECORD_IMAGE = (b"image/encoded", b"image")
_TFRECORD_LABEL = (b"image/class/label", b"label")


class _Record(NamedTuple):
    key: str
    spans: tuple[tuple[int, int], ...]  # (offset, bytes), joined by the RecordIO magic if several
    label: int | None


class ShardSource(Source):
    """One image per record of one or more shards."""

    def __init__(self, paths: Sequence[Path], scan: Callable[[Path], Iterator[_Record]]) -> None:
        self.paths = list(paths)
        self._maps: dict[int, np.ndarray] = {}
        self._records = [(s, record) for s, path in enumerate(self.paths) for record in scan(path)]
        if not self._records:
            raise ValueError(f"no images in {', '.join(map(str, paths))}")
        labels = [record.label for _, record in self._records]
        if all(label is not None for label in labels):
            self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._records)

    def read(self, i: int) -> np.ndarray:
        shard, record = self._records[i]
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self.paths[shard], np.uint8, mode="r")
        parts = [self._maps[shard][offset : offset + size] for offset, size in record.spans]
        if len(parts) == 1:
            return parts[0]
        magic = np.frombuffer(struct.pack("<I", _RECORDIO_MAGIC), np.uint8)
        joined = [parts[0]]
        for part in parts[1:]:
            joined += [magic, part]
        return np.concatenate(joined)

    def name(self, i: int) -> str:
        shard, record = self._records[i]
        return f"{self.paths[shard]}:{record.key}"

    def fingerprint(self) -> bytes:
        return file_fingerprint(self.paths)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}


def open_shards(paths: Sequence[Path]) -> ShardSource:
    """Open shards of one kind: .tar, .tfrecord or .rec."""
    scans = {".tar": scan_webdataset, ".tfrecord": scan_tfrecord, ".rec": scan_recordio}
    return ShardSource(paths, scans[paths[0].suffix.lower()])


def scan_webdataset(path: Path) -> Iterator[_Record]:
    """Members KEY.jpg (or another image suffix); the label is the text of KEY.cls if present."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not member.isfile():
                    continue
                if f".{suffix.lower()}" in IMAGE_SUFFIXES:
                    images[key] = (member.offset_data, member.size)
                elif suffix == "cls":
                    labels[key] = int(tar.extractfile(member).read())  # type: ignore[union-attr]
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"not a readable WebDataset tar: {path}: {error}") from error
    for key, span in images.items():
        yield _Record(key, (span,), labels.get(key))


def scan_tfrecord(path: Path) -> Iterator[_Record]:
    """tf.train.Example records with image/encoded and image/class/label (or image, label)."""
    with _mapped(path) as data:
        position, number = 0, 0
        while position < len(data):
            if position + 12 > len(data):
                raise ValueError(f"{path} ends within the header of record {number}")
            (length,) = struct.unpack_from("<Q", data, position)
            start, end = position + 12, position + 12 + length
            if end + 4 > len(data):
                raise ValueError(f"{path} ends within record {number}")
            try:
                span, label = _parse_example(data, start, end)
            except (IndexError, ValueError, struct.error) as error:
                raise ValueError(f"{path}: record {number} is not a tf.train.Example") from error
            if span is None:
                raise ValueError(f"{path}: record {number} has no feature image/encoded or image")
            yield _Record(str(number), (span,), label)
            position, number = end + 4, number + 1


def scan_recordio(path: Path) -> Iterator[_Record]:
    """Image records of MXNet's im2rec: IRHeader (flag, label, id, id2), then an image file."""
    with _mapped(path) as data:
        position, number = 0, 0
        while position < len(data):
            spans = []
            while True:
                if position + 8 > len(data):
                    raise ValueError(f"{path} ends within record {number}")
                magic, header = struct.unpack_from("<II", data, position)
                if magic != _RECORDIO_MAGIC:
                    raise ValueError(f"{path}: no RecordIO magic at byte {position}")
                part, length = header >> 29, header & ((1 << 29) - 1)
                if position + 8 + length > len(data):
                    raise ValueError(f"{path} ends within record {number}")
                spans.append((position + 8, length))
                position += 8 + (length + 3) // 4 * 4
                # 0: a whole record; 1, 2, 3: the first, a middle, the last part of one.
                if part in (0, 3):
                    break
            offset, length = spans[0]
            if length < 24:
                raise ValueError(f"{path}: record {number} has no IRHeader")
            flag, label = struct.unpack_from("<If", data, offset)
            skip = 24 + 4 * flag
            if flag > 0:
                (label,) = struct.unpack_from("<f", data, offset + 24)
            spans[0] = (offset + skip, length - skip)
            yield _Record(str(number), tuple(spans), int(label))
            number += 1


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap | bytes]:
    """The bytes of a file, mapped read-only; b"" for an empty file, which cannot be mapped."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


def _fields(data: mmap.mmap | bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, wire type, value or offset, length) of a protocol buffer message."""
    while start < end:
        key, start = _varint(data, start)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, start = _varint(data, start)
            yield number, wire, value, 0
        elif wire == 2:
            length, start = _varint(data, start)
            if start + length > end:
                raise ValueError("a field leaves its message")
            yield number, wire, start, length
            start += length
        elif wire in (1, 5):
            start += 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")


def _varint(data: mmap.mmap | bytes, position: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7


def _parse_example(
    data: mmap.mmap | bytes, start: int, end: int
) -> tuple[tuple[int, int] | None, int | None]:
    """The image's (offset, bytes) and label. Example.features=1 → Features.feature=1 (a map)."""
    image, label = None, None
    for _, _, features, size in _fields(data, start, end):
        for _, _, entry, entry_size in _fields(data, features, features + size):
            name, feature = b"", (0, 0)
            for number, _, offset, length in _fields(data, entry, entry + entry_size):
                if number == 1:
                    name = bytes(data[offset : offset + length])
                else:
                    feature = (offset, length)
            if name in _TFRECORD_IMAGE:
                image = _first_value(data, feature)
            elif name in _TFRECORD_LABEL:
                label = _first_integer(data, feature)
    return image, label


def _first_value(data: mmap.mmap | bytes, feature: tuple[int, int]) -> tuple[int, int] | None:
    """Feature.bytes_list=1 → BytesList.value=1."""
    for _, _, offset, length in _fields(data, feature[0], sum(feature)):
        for _, _, value, size in _fields(data, offset, offset + length):
            return value, size
    return None


def _first_integer(data: mmap.mmap | bytes, feature: tuple[int, int]) -> int | None:
    """Feature.int64_list=3 → Int64List.value=1, packed or not."""
    for _, _, offset, length in _fields(data, feature[0], sum(feature)):
        for _, wire, value, _ in _fields(data, offset, offset + length):
            return value if wire == 0 else _varint(data, value)[0]
    return None
