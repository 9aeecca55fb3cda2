"""Find the images of a tar file, with the keys, labels and fields of WebDataset.

A member's name up to the first dot of its base name is the sample's key, and the rest is the name
of the field: "d/000.seg.png" is the field "seg.png" of sample "d/000".
"""

import json
import posixpath
import tarfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from simclr_fast.data.account import Account, DamagedDataError, printable
from simclr_fast.data.folders import HIDDEN, is_hidden, suffix_of
from simclr_fast.data.formats import suffixes

_BLOCK = 512
# Fields with labels; the first that any sample has is used. A longer text is a caption.
LABEL_FIELDS = ("cls", "json", "txt")
_JSON_KEYS = ("label", "cls", "class", "target")
_LONGEST_LABEL = 64
_MOST_LINKS = 40
# The length of a link's target before it is found.
_UNKNOWN = -1


class Record(NamedTuple):
    """One image. key: its name in the archive. spans: (offset, bytes) in the file, more than one if
    it was split. label: of any type, by the name of the field that has it. checked: (offset, bytes)
    of data that a checksum of TFRecord follows, None in other archives."""

    key: str
    spans: tuple[tuple[int, int], ...]
    label: dict[str, Any]
    checked: tuple[int, int] | None = None


class _Sample:
    """images: field → the image's (name, span); labels: field → label."""

    def __init__(self) -> None:
        self.images: dict[str, tuple[str, tuple[int, int]]] = {}
        self.labels: dict[str, Any] = {}


def scan_tar(
    path: str, unpacked: Path, account: Account, image_key: str | None
) -> Iterator[Record]:
    """The images of a tar; `datasets.open_source` describes the rules.

    path: its name in messages. unpacked: the tar itself, or its copy without compression.
    """
    samples: dict[str, _Sample] = {}
    with unpacked.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                links = _read_members(path, tar, samples, account, image_key)
                members = {member.name: member for member in tar.getmembers()} if links else {}
                for member, sample, field in links:
                    span = _target(members, member)
                    if span is None:
                        del sample.images[field]
                        account.damage(
                            f"{path}: {printable(member.name)} is a link to "
                            f"{printable(member.linkname)}, which the archive lacks"
                        )
                    else:
                        sample.images[field] = (member.name, span)
                end = tar.offset
        except DamagedDataError:
            raise
        # tarfile raises ValueError for some damaged pax headers.
        except (tarfile.TarError, ValueError) as error:
            account.damage(f"{path} cannot be read as a tar: {error}")
            end = -1
        size = unpacked.stat().st_size
        if end >= 0 and (message := _damaged_end(file, end, size)):
            account.damage(f"{path} {message}")
    for key, sample in samples.items():
        for name, (offset, length) in _chosen(path, key, sample, account, image_key):
            if length != _UNKNOWN and offset + length <= size:
                yield Record(name, ((offset, length),), sample.labels)


def _read_members(
    path: str,
    tar: tarfile.TarFile,
    samples: dict[str, _Sample],
    account: Account,
    image_key: str | None,
) -> list[tuple[tarfile.TarInfo, _Sample, str]]:
    """Sort the members into `samples`; return the links, whose targets may come later."""
    links = []
    for member in tar:
        folder, slash, base = member.name.rpartition("/")
        if member.isdir():
            continue
        if is_hidden(base) or _in_hidden(folder):
            account.leave_out(HIDDEN, member.name)
            continue
        is_link = member.islnk() or member.issym()
        if not (member.isreg() or is_link) or member.issparse():
            account.leave_out("sparse or special files", member.name)
            continue
        stem, dot, field = base.partition(".")
        if not dot:
            account.leave_out(suffix_of(base) or "without a suffix", member.name)
            continue
        field = field.lower()
        sample = samples.setdefault(folder + slash + stem, _Sample())
        if suffix_of(base) in suffixes() or (image_key and _matches(field, image_key)):
            if field in sample.images:
                account.damage(f"{path} has {printable(member.name)} twice, or in two cases")
            length = _UNKNOWN if is_link else member.size
            sample.images[field] = (member.name, (member.offset_data, length))
            if is_link:
                links.append((member, sample, field))
        elif field in LABEL_FIELDS and not is_link:
            if field in sample.labels:
                account.damage(f"{path} has {printable(member.name)} twice, or in two cases")
            content = tar.extractfile(member).read()  # type: ignore[union-attr]
            sample.labels[field] = _json_label(content) if field == "json" else _text(content)
        else:
            account.leave_out(f".{field}", member.name)
    return links


@lru_cache(maxsize=1024)
def _in_hidden(folder: str) -> bool:
    return any(is_hidden(part) for part in folder.split("/") if part not in (".", ".."))


def _target(members: dict[str, tarfile.TarInfo], member: tarfile.TarInfo) -> tuple[int, int] | None:
    """The (offset, bytes) of the file that a link leads to."""
    for _ in range(_MOST_LINKS):
        name = member.linkname
        if member.issym():
            name = posixpath.normpath(posixpath.join(posixpath.dirname(member.name), name))
        target = members.get(name) or members.get(f"./{name}")
        if target is None:
            return None
        if target.isreg():
            return target.offset_data, target.size
        member = target
    return None


def _damaged_end(file: Any, end: int, size: int) -> str:
    """What is wrong behind the last member, which ends at byte `end`; "" if nothing is."""
    file.seek(end)
    block = file.read(_BLOCK)
    if not block:
        return "ends without the mark of its end: cut off?"
    if len(block) < _BLOCK:
        return f"ends within the header at byte {end}: cut off?"
    if any(block):
        return f"has a damaged header at byte {end}"
    while block := file.read(1 << 20):
        if any(block):
            return (
                f"goes on for {size - end:,} bytes behind the mark of its end: are two archives "
                "joined?"
            )
    return ""


def _chosen(
    path: str, key: str, sample: _Sample, account: Account, image_key: str | None
) -> list[tuple[str, tuple[int, int]]]:
    """The images of a sample that are used; the others are left out."""
    fields = list(sample.images)
    if not fields:
        account.leave_out("samples without an image", key)
        return []
    if image_key is None:
        if len(fields) > 1:
            raise ValueError(
                f"{path}: the sample {printable(key)} has {len(fields)} images: "
                f"{', '.join(map(printable, fields[:5]))}. Choose one by image_key (--image-key "
                f"{printable(fields[0])}); '*.jpg' takes every field that ends in .jpg as an image "
                "of its own"
            )
        return list(sample.images.values())
    chosen: list[str] = []
    for pattern in image_key.split(";"):
        chosen = chosen or [field for field in fields if _matches(field, pattern)]
    for field in fields:
        if field not in chosen:
            account.leave_out(f".{field}", sample.images[field][0])
    if not chosen:
        account.leave_out(f"without {image_key}", key)
    return [sample.images[field] for field in chosen]


def _matches(field: str, patterns: str) -> bool:
    return any(fnmatchcase(field, pattern.lower()) for pattern in patterns.split(";"))


def _text(content: bytes) -> str | None:
    """A label; None for a caption."""
    text = content.decode("utf-8-sig", "backslashreplace").strip()
    return text if len(text) <= _LONGEST_LABEL and "\n" not in text else None


def _json_label(content: bytes) -> Any:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        return ValueError(f"a .json cannot be read: {error}")
    if not isinstance(value, dict):
        return value
    return next((value[key] for key in _JSON_KEYS if key in value), None)
