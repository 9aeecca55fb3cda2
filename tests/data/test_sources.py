"""Every storage format gives the same bytes and labels, and bad input is named."""

import io
import os
import struct
import tarfile
import time

import numpy as np
import pytest
import torch
import torchvision
from odd_inputs import checksum, tfrecord
from PIL import Image

from simclr_fast.augment.params import Augmentation
from simclr_fast.data.crc32c import crc32c, masked_crc32c
from simclr_fast.data.datasets import open_source
from simclr_fast.data.image_check import in_common_format
from simclr_fast.data.loader import CorruptImageError, ImageLoader, TwoViewLoader
from simclr_fast.data.sources import ArraySource, subset


def picture(i: int, size=(20, 14), kind="JPEG", mode="RGB") -> bytes:
    rng = np.random.default_rng(i)
    pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


FILES = [picture(i) for i in range(5)]
LABELS = [3, 0, 2, 7, 1]


def write_tar(path):
    with tarfile.open(path, "w") as tar:
        for i, data in enumerate(FILES):
            for name, content in (
                (f"d/{i:03d}.cls", str(LABELS[i]).encode()),
                (f"d/{i:03d}.jpg", data),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def write_tfrecord(path, packed=True):
    with path.open("wb") as file:
        for data, label in zip(FILES, LABELS, strict=True):
            integers = field(1, varint(label)) if packed else varint(1 << 3) + varint(label)
            features = b"".join(
                field(1, field(1, name) + field(2, feature))
                for name, feature in (
                    (b"image/class/label", field(3, integers)),
                    (b"image/filename", field(1, field(1, b"x.jpg"))),
                    (b"image/encoded", field(1, field(1, data))),
                )
            )
            example = field(1, features)
            file.write(tfrecord(example))


def write_recordio(path, split=False):
    with path.open("wb") as file:
        for data, label in zip(FILES, LABELS, strict=True):
            record = struct.pack("<IfQQ", 0, label, 0, 0) + data
            parts = [(0, record)]
            if split:
                parts = [(1, record[:40]), (2, record[44:60]), (3, record[64:])]
            for kind, part in parts:
                file.write(struct.pack("<II", 0xCED7230A, kind << 29 | len(part)) + part)
                file.write(bytes(-len(part) % 4))


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.tar", write_tar), ("a.tfrecord", write_tfrecord), ("a.rec", write_recordio)],
)
def test_shards_give_bytes_and_labels(tmp_path, name, write):
    write(tmp_path / name)
    source = open_source(tmp_path)
    assert [source.read(i).tobytes() for i in range(len(source))] == FILES
    assert source.labels.tolist() == LABELS
    assert name in source.name(0)


def test_tfrecord_labels_may_be_unpacked(tmp_path):
    write_tfrecord(tmp_path / "a.tfrecord", packed=False)
    assert open_source(tmp_path / "a.tfrecord").labels.tolist() == LABELS


def test_recordio_joins_split_records_with_the_magic(tmp_path):
    write_recordio(tmp_path / "a.rec", split=True)
    magic = struct.pack("<I", 0xCED7230A)
    for i, data in enumerate(FILES):
        record = bytes(24) + data
        joined = record[:40] + magic + record[44:60] + magic + record[64:]
        assert open_source(tmp_path / "a.rec").read(i).tobytes() == joined[24:]


def write_split_recordio(path):
    write_recordio(path, split=True)


@pytest.mark.parametrize("write", [write_tfrecord, write_recordio, write_split_recordio])
def test_a_cut_shard_names_itself(tmp_path, write):
    path = tmp_path / ("a.tfrecord" if write is write_tfrecord else "a.rec")
    write(path)
    whole = path.read_bytes()
    for cut in (3, 40, len(whole) - 5, len(whole) - 60):
        path.write_bytes(whole[:-cut])
        with pytest.raises(ValueError, match=str(path)):
            open_source(path)


def test_nested_and_flat_folders_give_images_and_labels(tmp_path):
    for i, label in enumerate(("b", "a", "b")):
        (tmp_path / label / "deep").mkdir(parents=True, exist_ok=True)
        (tmp_path / label / "deep" / f"{i}.JPG").write_bytes(FILES[i])
    (tmp_path / "notes.txt").write_text("not an image")
    source = open_source(tmp_path)
    assert source.classes == ("a", "b")
    assert source.labels.tolist() == [0, 1, 1]
    assert source.read(0).tobytes() == FILES[1]
    (tmp_path / "9.png").write_bytes(picture(9, kind="PNG"))
    assert open_source(str(tmp_path)).labels.tolist() == [0, 1, 1, -1]
    assert len(open_source([tmp_path / "9.png"], labels=[4])) == 1


def test_arrays_tensors_and_data_sets_give_images_and_labels():
    images = np.random.default_rng(0).integers(0, 255, (4, 6, 5, 3), dtype=np.uint8)
    for given in (images, torch.from_numpy(images), images.transpose(0, 3, 1, 2), list(images)):
        source = open_source(given)
        assert np.array_equal(source.read(2), images[2])
        assert not source.encoded

    class Data(list):
        targets = (1, 0)

    source = open_source(Data([(Image.fromarray(images[0]), 1), (Image.fromarray(images[1]), 0)]))
    assert np.array_equal(source.read(1), images[1])
    assert source.labels.tolist() == [1, 0]
    part = subset(ArraySource(images, [5, 6, 7, 8]), np.array([3, 1]))
    assert part.labels.tolist() == [8, 6]
    assert np.array_equal(part.read(0), images[3])


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        ("/nowhere/at/all", FileNotFoundError, "/nowhere/at/all"),
        (np.zeros((2, 4, 4, 2), np.uint8), ValueError, r"\(2, 4, 4, 2\)"),
        ([], ValueError, "without elements"),
        (7, ValueError, "int"),
    ],
)
def test_bad_data_is_named(data, error, says):
    with pytest.raises(error, match=says):
        open_source(data)


def test_labels_of_a_folder_equal_torchvisions(tmp_path):
    known = torchvision.datasets.folder.IMG_EXTENSIONS
    names = [f"{c}/{i}{e}" for i, e in enumerate((*known, ".TIF")) for c in "ab"]
    for name in (*names, "a/note.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    source = open_source(tmp_path)
    folder = torchvision.datasets.ImageFolder(tmp_path)
    pairs = zip(map(str, source.paths), source.labels.tolist(), strict=True)
    assert sorted(pairs) == sorted(folder.samples)
    assert list(source.classes) == folder.classes


def tree(folder, files=300, seed=0):
    """Image files under names that sort differently as text and as parts of a path."""
    rng = np.random.default_rng(seed)
    for i in range(files):
        parts = rng.choice(
            ["a", "a-b", "a b", "B", "b.c", "1", "10", "2", "é", "z_"], rng.integers(1, 4)
        )
        path = folder.joinpath(*map(str, parts), f"{rng.integers(40)}{'.PNG' if i % 3 else '.jpg'}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def test_the_order_is_that_of_image_folder(tmp_path):
    (tree(tmp_path) / "linked").symlink_to(tmp_path / "a")
    source, folder = open_source(tmp_path), torchvision.datasets.ImageFolder(tmp_path)
    assert list(zip(source.paths, source.labels.tolist(), strict=True)) == folder.samples
    assert list(source.classes) == folder.classes


def test_no_file_is_asked_for_anything_when_a_folder_is_opened(tmp_path, monkeypatch):
    """One stat per folder. The fingerprint takes one per file, and reads none."""
    tree(tmp_path)
    folders = 1 + sum(path.is_dir() for path in tmp_path.rglob("*"))
    asked, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, **kw: asked.append(path) or stat(path, **kw))
    source = open_source(tmp_path)
    # And a few more to tell what kind of folder the root is.
    assert len(asked) <= folders + 4
    assert len(source) > 200
    assert not {*map(str, asked)} & {*source.paths}
    asked.clear()
    monkeypatch.setattr(np, "fromfile", None)
    source.fingerprint()
    assert sorted(asked) == sorted(source.paths)


@pytest.mark.parametrize("change", ["content", "time set back", "another file", "order"])
def test_a_fingerprint_is_of_exactly_these_images(tmp_path, change):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(i, kind="PNG"))
    before, last = open_source(tmp_path).fingerprint(), tmp_path / "2.png"
    assert open_source(tmp_path).fingerprint() == before
    linked = tmp_path.with_name(f"{tmp_path.name}-link")
    linked.symlink_to(tmp_path)
    assert open_source(linked).fingerprint() == before
    status = last.stat()
    if change == "content":
        last.write_bytes(picture(7, kind="PNG"))
    elif change == "time set back":
        time.sleep(0.02)
        last.write_bytes(last.read_bytes()[::-1])
        os.utime(last, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert last.stat().st_size == status.st_size
        assert last.stat().st_mtime_ns == status.st_mtime_ns
    elif change == "another file":
        (tmp_path / "3.png").write_bytes(picture(3, kind="PNG"))
    else:
        last.rename(tmp_path / "1b.png")
        (tmp_path / "0.png").rename(last)
    assert open_source(tmp_path).fingerprint() != before


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "P")),
        *(("BMP", "RGB"), ("WEBP", "RGB"), ("WEBP", "RGBA")),
    ],
)
def test_header_gives_the_size_and_a_cut_file_is_refused(kind, mode):
    data = np.frombuffer(picture(1, (37, 21), kind, mode), np.uint8)
    assert in_common_format(data)[1] == (21, 37)
    for share in (0, 0.02, 0.3, 0.9):
        with pytest.raises(ValueError, match=r"cut off|empty|neither|checksum|without|header"):
            in_common_format(data[: int(len(data) * share)])


def test_the_size_of_a_lossless_webp():
    buffer = io.BytesIO()
    Image.new("RGB", (33, 12)).save(buffer, "WEBP", lossless=True)
    assert in_common_format(np.frombuffer(buffer.getvalue(), np.uint8))[1] == (12, 33)


def test_decompression_bomb_is_refused():
    data = bytearray(picture(0, kind="BMP"))
    data[18:26] = struct.pack("<ii", 60000, 60000)
    data[30] = 1  # compressed, so that its length says nothing
    with pytest.raises(ValueError, match="60000"):
        in_common_format(np.frombuffer(bytes(data), np.uint8))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [15000, 60000])
def test_decompression_bomb_for_pillow_is_refused(side):
    data = np.frombuffer(b"P5 %d %d 255\n\0" % (side, side), np.uint8)
    with pytest.raises(ValueError, match=f"{side} × {side}|decompression bomb"):
        in_common_format(data)


def test_a_changed_png_is_found_by_its_checksum():
    data = np.frombuffer(picture(0, kind="PNG"), np.uint8).copy()
    data[len(data) // 2] ^= 1
    with pytest.raises(ValueError, match="checksum"):
        in_common_format(data)


def test_torchvision_data_sets_work_unchanged():
    data = torchvision.datasets.FakeData(3, (3, 12, 10))
    source = open_source(data)
    assert np.array_equal(source.read(1), np.array(data[1][0]))
    with pytest.raises(TypeError, match="PIL"):
        open_source(
            torchvision.datasets.FakeData(3, transform=torchvision.transforms.ToTensor())
        ).read(0)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 66, 67, 1000, 4099])
def test_crc32c_equals_the_definition(size):
    """masked_crc32c equals the checksum that odd_inputs computes bit by bit."""
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    assert struct.pack("<I", masked_crc32c(data)) == checksum(data.tobytes())
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720's polynomial, its usual check value


def test_a_damaged_tfrecord_is_named_or_skipped(tmp_path):
    """A flipped bit of a pixel or of a label is found when the image is read; in a length, at the
    start."""
    path = tmp_path / "a.tfrecord"
    write_tfrecord(path)
    whole = path.read_bytes()
    # The header of record 1, its label, the middle of its image.
    first = 16 + struct.unpack_from("<Q", whole)[0]
    label = whole.index(b"image/class/label", first) + 23
    for place in (label, whole.index(FILES[1]) + 400):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CorruptImageError, match=r"a\.tfrecord:1: .*checksum"):
            list(ImageLoader(path, 5, Augmentation(size=8)))
        loader = TwoViewLoader(path, 4, size=8, on_error="skip")
        list(loader)
        list(loader)
        assert loader.skipped == {1}
    path.write_bytes(whole[:first] + bytes([whole[first] ^ 1]) + whole[first + 1 :])
    with pytest.raises(ValueError, match=r"a\.tfrecord: the length of record 1 has a wrong"):
        open_source(path)
    source = open_source(path, on_error="skip")
    assert len(source) == 1
    assert "length of record 1" in source.account.line()
