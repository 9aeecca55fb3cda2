"""Random access into WebDataset tars, TFRecord and MXNet RecordIO files.

Each shard is scanned once to find its images. The file is mapped, and only headers are read.
Formats: POSIX tar; tensorflow.org/tutorials/load_data/tfrecord (length, CRC, Example protocol
buffer, CRC); mxnet.apache.org RecordIO (magic, flag and length, IRHeader, image).
"""

import bz2
import gzip
import logging
import lzma
import mmap
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from simclr_fast.data.account import Account, printable
from simclr_fast.data.crc32c import masked_crc32c
from simclr_fast.data.demo import cache_folder
from simclr_fast.data.folders import archive_kind
from simclr_fast.data.labels import Labels, from_text
from simclr_fast.data.sources import Source, file_fingerprint, fingerprint
from simclr_fast.data.tars import LABEL_FIELDS, Record, scan_tar
from simclr_fast.utils.checkpoint import write_atomic
from simclr_fast.utils.locks import locked

log = logging.getLogger(__name__)
_RECORDIO_MAGIC = 0xCED7230A
_TFRECORD_IMAGE = ("image/encoded", "image")
# The last one has the name of the class.
_TFRECORD_LABEL = ("image/class/label", "label", "labels", "class", "target", "image/class/text")
_COMPRESSED: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
_ZSTD = b"\x28\xb5\x2f\xfd"
_RECORD = "record"


class ShardSource(Source):
    """One image per record of one or more shards."""

    def __init__(self, paths: Sequence[Path], account: Account, image_key: str | None) -> None:
        self.paths, self.scanned = list(paths), account
        self._maps: dict[int, np.ndarray] = {}
        self._files: list[Path] = []
        self._records: list[tuple[int, Record]] = []
        for shard, path in enumerate(self.paths):
            file = decompressed(path, account)
            found = list(_scan(path, file, account, image_key))
            if not found:
                account.leave_out("shards without images", str(path))
            self._files.append(file)
            self._records += [(shard, record) for record in found]
        if not self._records:
            more = f" and {len(paths) - 1:,} more" if len(paths) > 1 else ""
            raise ValueError(f"no images in {printable(paths[0])}{more}: {account.line()}")
        # Reading a whole archive to open it would take too long: a record's checksum is compared
        # when its image is first read.
        self._sound = np.array([record.checked is None for _, record in self._records])
        self._read_labels()

    def _read_labels(self) -> None:
        labels = [record.label for _, record in self._records]
        for field in (_RECORD, *LABEL_FIELDS):
            values = [label.get(field) for label in labels]
            if all(value is None for value in values):
                continue
            if field in ("cls", "txt"):
                try:
                    found = from_text(values)
                except ValueError as error:
                    found = Labels(None, (), str(error))
                self.set_labels(found)
            else:
                self.set_labels(values)
            if self.labels is not None and field != _RECORD:
                self.about_labels += f" of .{field}"
            return

    def __len__(self) -> int:
        return len(self._records)

    def read(self, i: int) -> np.ndarray:
        shard, record = self._records[i]
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self._files[shard], np.uint8, mode="r")
        if not self._sound[i]:
            self._check(self._maps[shard], record)
            self._sound[i] = True
        parts = [self._maps[shard][offset : offset + size] for offset, size in record.spans]
        if len(parts) == 1:
            return parts[0]
        magic = np.frombuffer(struct.pack("<I", _RECORDIO_MAGIC), np.uint8)
        joined = [parts[0]]
        for part in parts[1:]:
            joined += [magic, part]
        return np.concatenate(joined)

    def _check(self, data: np.ndarray, record: Record) -> None:
        assert record.checked is not None
        start, length = record.checked
        end = start + length
        stored = int.from_bytes(data[end : end + 4].tobytes(), "little")
        if masked_crc32c(data[start:end]) != stored:
            raise ValueError("the record is damaged: its checksum is wrong")

    def name(self, i: int) -> str:
        shard, record = self._records[i]
        return f"{printable(self.paths[shard])}:{printable(record.key)}"

    def path(self, i: int) -> str:
        return self._records[i][1].key

    def fingerprint(self) -> bytes:
        found = repr([(shard, record.spans) for shard, record in self._records])
        return fingerprint([file_fingerprint(self.paths), found.encode()])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}


def _scan(path: Path, file: Path, account: Account, image_key: str | None) -> Iterator[Record]:
    kind = archive_kind(path.name)
    if kind == "tar":
        return scan_tar(printable(path), file, account, image_key)
    if kind == "tfrecord":
        return scan_tfrecord(path, file, account, image_key)
    return scan_recordio(path, file, account)


def decompressed(path: Path, account: Account) -> Path:
    """`path`, or its decompressed copy in the cache folder if it is a gzip, bzip2 or xz file.

    The copy is made once. Random access needs it.
    """
    with path.open("rb") as file:
        start = file.read(6)
    if start.startswith(_ZSTD):
        raise ValueError(f"{path} is compressed by zstd: decompress it first (zstd -d)")
    opened = next((op for magic, op in _COMPRESSED.items() if start.startswith(magic)), None)
    if opened is None:
        return path
    name = file_fingerprint([path]).hex()
    target = cache_folder() / "unpacked" / name
    with locked(target.with_name(f"{name}.lock")):
        if target.exists():
            return target
        log.info("decompressing %s into %s", printable(path), target)
        cut: list[str] = []

        def write(part: Path) -> None:
            with opened(path, "rb") as packed, part.open("wb") as out:
                try:
                    # read1 gives what it has before it meets the damage.
                    while piece := packed.read1(1 << 20):
                        out.write(piece)
                except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                    cut.append(f"{path} is damaged: {error}")
                    account.damage(cut[0])

        damaged = target.with_name(f"{name}-damaged")
        write_atomic(damaged, write)
        if cut:
            return damaged
        damaged.replace(target)
    return target


def scan_tfrecord(
    path: Path, unpacked: Path, account: Account, image_key: str | None
) -> Iterator[Record]:
    """tf.train.Example records with an image and perhaps a label, under their usual names."""
    names = (image_key,) if image_key else _TFRECORD_IMAGE
    seen: set[str] = set()
    with _mapped(unpacked) as data:
        position, number, images = 0, 0, 0
        while position < len(data):
            if position + 12 > len(data):
                account.damage(f"{path} ends within the header of record {number}")
                break
            length, stored = struct.unpack_from("<QI", data, position)
            if masked_crc32c(data[position : position + 8]) != stored:
                account.damage(f"{path}: the length of record {number} has a wrong checksum")
                break
            start, end = position + 12, position + 12 + length
            if end + 4 > len(data):
                account.damage(f"{path} ends within record {number}")
                break
            try:
                features = _features(data, start, end)
                image = next((features[name] for name in names if name in features), None)
                values = _values(data, image) if image else []
                named = next((features[n] for n in _TFRECORD_LABEL if n in features), None)
                labels = _values(data, named) if named else []
            except (IndexError, ValueError, struct.error) as error:
                account.damage(f"{path}: record {number} is not a tf.train.Example ({error})")
                values, labels, features = [], [], {}
            seen |= set(features)
            if len(values) > 1 or (values and not isinstance(values[0], slice)):
                raise ValueError(
                    f"{path}: record {number} must have one image of bytes in {names[0]}, got "
                    f"{len(values)} values of {type(values[0]).__name__.replace('slice', 'bytes')}"
                )
            if values and values[0].stop > values[0].start:
                span = (values[0].start, values[0].stop - values[0].start)
                label = {_RECORD: _one_label(data, labels, number)}
                yield Record(str(number), (span,), label, (start, length))
                images += 1
            else:
                account.leave_out("records without an image", f"{path}:{number}")
            position, number = end + 4, number + 1
    if number and not images:
        raise ValueError(
            f"{path} has no images in {' or '.join(names)}; its features are "
            f"{', '.join(sorted(seen))}: choose one by image_key (--image-key NAME)"
        )


def scan_recordio(path: Path, unpacked: Path, account: Account) -> Iterator[Record]:
    """Image records of MXNet's im2rec: IRHeader (flag, label, id, id2), then an image file."""
    number = 0
    with _mapped(unpacked) as data:
        position = 0
        while position < len(data):
            try:
                spans, position = _recordio_parts(data, position)
                offset, length = spans[0]
                if length < 24:
                    raise ValueError("has no IRHeader")
                flag, label = struct.unpack_from("<If", data, offset)
                skip = 24 + 4 * flag
                if skip > length:
                    raise ValueError(f"has no room for its {flag} labels")
            except ValueError as error:
                account.damage(f"{path}: record {number} {error}")
                return
            value: Any = label
            if flag == 1:
                (value,) = struct.unpack_from("<f", data, offset + 24)
            elif flag > 1:
                value = ValueError(f"record {number} has {flag} labels")
            spans[0] = (offset + skip, length - skip)
            if sum(length for _, length in spans):
                yield Record(str(number), tuple(spans), {_RECORD: value})
            else:
                account.leave_out("records without an image", f"{path}:{number}")
            number += 1
    index = path.with_suffix(".idx")
    if (
        index.is_file()
        and (listed := len(index.read_text(errors="replace").splitlines())) != number
    ):
        account.damage(f"{path} has {number} records, but {index.name} lists {listed}")


def _recordio_parts(data: mmap.mmap | bytes, position: int) -> tuple[list[tuple[int, int]], int]:
    """The (offset, bytes) of the parts of the record at `position`, and the position behind it."""
    spans = []
    while True:
        if position + 8 > len(data):
            raise ValueError("is cut off")
        magic, header = struct.unpack_from("<II", data, position)
        if magic != _RECORDIO_MAGIC:
            raise ValueError(f"lacks RecordIO's magic number at byte {position}")
        part, length = header >> 29, header & ((1 << 29) - 1)
        if position + 8 + length > len(data):
            raise ValueError("is cut off")
        spans.append((position + 8, length))
        position += 8 + (length + 3) // 4 * 4
        # 0: a whole record; 1, 2, 3: the first, a middle, the last part of one.
        if part in (0, 3):
            return spans, position


def _one_label(data: mmap.mmap | bytes, values: list[Any], number: int) -> Any:
    if len(values) > 1:
        return ValueError(f"record {number} has {len(values)} labels")
    if not values:
        return None
    return bytes(data[values[0]]) if isinstance(values[0], slice) else values[0]


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
            continue
        if wire == 2:
            length, start = _varint(data, start)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if start + length > end:
            raise ValueError("a field leaves its message")
        yield number, wire, start, length
        start += length


def _varint(data: mmap.mmap | bytes, position: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7


def _messages(data: mmap.mmap | bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, start, end) of the messages, strings and bytes in a message."""
    for number, wire, offset, length in _fields(data, start, end):
        if wire == 2:
            yield number, offset, offset + length


def _features(data: mmap.mmap | bytes, start: int, end: int) -> dict[str, tuple[int, int]]:
    """Name → (start, end) of each Feature. Example.features=1 → Features.feature=1 (a map)."""
    found = {}
    for _, *features in _messages(data, start, end):
        for _, *entry in _messages(data, *features):
            parts = {number: (a, b) for number, a, b in _messages(data, *entry)}
            a, b = parts.get(1, (0, 0))
            found[data[a:b].decode("utf-8", "backslashreplace")] = parts.get(2, (0, 0))
    return found


def _values(data: mmap.mmap | bytes, feature: tuple[int, int]) -> list[Any]:
    """A Feature's values: slices of bytes_list=1, floats of float_list=2, integers of int64_list=3.

    Numbers are packed, or each is a field of its own.
    """
    out: list[Any] = []
    for kind, *values in _messages(data, *feature):
        for _, wire, offset, length in _fields(data, *values):
            if kind == 1:
                out.append(slice(offset, offset + length))
            elif kind == 2:
                out += np.frombuffer(data[offset : offset + length], "<f4").tolist()
            elif wire == 0:
                out.append(_signed(offset))
            else:
                position = offset
                while position < offset + length:
                    value, position = _varint(data, position)
                    out.append(_signed(value))
    return out


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
