"""The one rule for labels of every source: integers and whole floats are kept, strings are classes.

-1, None and the empty string mean "unlabelled".
"""

import codecs
import csv
import io
import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from simclr_fast.data.account import printable

UNLABELLED = -1
_LARGEST = np.iinfo(np.int64).max
_ANY = "surrogateescape"
_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
# What programs write among numbers where one is missing.
_MISSING = ("nan", "na", "n/a", "none", "null")
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "image", "image_id", "id", "name")
_LABEL_COLUMNS = ("label", "class", "category", "target", "species", "breed")


class Labels(NamedTuple):
    """numbers: int64 [n], -1 for unlabelled, or None; classes: their names, () for plain integers.

    about: what the labels are, such as "integers"; without numbers, why there are none.
    """

    numbers: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    about: str = ""


def as_labels(values: Any, count: int) -> Labels:
    """Read `count` labels by their type.

    Integers, booleans and whole floats are class numbers. Strings and bytes are classes, numbered
    in sorted order. -1, None and "" mean unlabelled.

    Raises:
        ValueError: a label is something else or below -1, types are mixed, or there are not `count`
            of them; the message has the value.
    """
    if isinstance(values, dict | set | bytes) or not hasattr(values, "__len__"):
        raise ValueError(
            f"labels must be an array, a tensor or a list with one label per image, got "
            f"{type(values).__name__}"
        )
    if isinstance(values, np.ma.MaskedArray):
        values = values.filled(UNLABELLED)
    if isinstance(values, Tensor):
        values = (values.double() if values.is_floating_point() else values).numpy(force=True)
    shape: tuple[int, ...] = np.shape(values) if hasattr(values, "__array__") else (len(values),)
    if len(shape) != 1 or shape[0] != count:
        hint = ""
        if len(shape) == 2:
            one_hot = "; of one-hot labels pass labels.argmax(1)"
            hint = one_hot if shape[1] > 1 else "; pass labels[:, 0]"
        raise ValueError(f"labels must be [{count}], one per image, got {list(shape)}{hint}")
    if isinstance(values, np.ndarray) and values.dtype.kind in "iu":
        return _integers(values, "integers")
    plain = [_plain(value, i) for i, value in enumerate(values)]
    kinds = {type(value): value for value in plain if value is not None}
    if not kinds:
        return Labels()
    if str in kinds:
        if len(kinds) > 1:
            other = next(value for kind, value in kinds.items() if kind is not str)
            raise ValueError(
                f"labels must be all strings or all numbers, got {kinds[str]!r} and {other!r}"
            )
        return _strings(plain)
    for i, value in enumerate(plain):
        if isinstance(value, float) and not value.is_integer():
            raise ValueError(f"labels must be whole numbers or strings, got {value} for image {i}")
    about = "whole floats" if float in kinds else "integers" if int in kinds else "booleans"
    whole = [UNLABELLED if value is None else int(value) for value in plain]
    return _integers(whole, about)


def from_text(texts: Sequence[str | None]) -> Labels:
    """Labels that were written as text: numbers if all of them are, else classes.

    Raises:
        ValueError: all are numbers, and one is not whole; or one is "nan" or the like.
    """
    texts = [text.strip() or None if text is not None else None for text in texts]
    known = [text for text in texts if text is not None]
    missing = [text for text in known if text.lower() in _MISSING]
    if missing and all(_NUMBER.fullmatch(text) or text.lower() in _MISSING for text in known):
        raise ValueError(
            f"labels must be all numbers or all names, got {missing[0]!r} among numbers: an image "
            "without a label has an empty one"
        )
    for pattern, number in ((_INTEGER, int), (_NUMBER, float)):
        if all(pattern.fullmatch(text) for text in known):
            return as_labels([None if t is None else number(t) for t in texts], len(texts))
    return as_labels(texts, len(texts))


def _plain(value: Any, i: int) -> int | float | str | bool | None:
    """A label as a plain Python value; None for an unlabelled image."""
    if isinstance(value, Tensor | np.generic | np.ndarray):
        if value.ndim:
            raise ValueError(
                f"labels must be one per image, got {list(value.shape)} values for image {i}; of "
                "one-hot labels pass labels.argmax(1)"
            )
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    if isinstance(value, Exception):
        raise ValueError(f"{value} (image {i})")
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        # A word has one class, whatever its Unicode form.
        text = unicodedata.normalize("NFC", printable(value))
        return None if text in ("", str(UNLABELLED)) else text
    raise ValueError(
        f"labels must be whole numbers or strings, got {type(value).__name__} {value!r} for image "
        f"{i}"
    )


def _integers(values: Any, about: str) -> Labels:
    for i in (int(np.argmin(values)), int(np.argmax(values))) if len(values) else ():
        if not UNLABELLED <= values[i] <= _LARGEST:
            raise ValueError(
                f"labels must be from -1 (unlabelled) to {_LARGEST}, got {values[i]} for image {i}"
            )
    return Labels(np.asarray(values, dtype=np.int64), (), about)


def _strings(values: Sequence[Any]) -> Labels:
    classes = tuple(sorted({value for value in values if value is not None}))
    number = {name: i for i, name in enumerate(classes)} | {None: UNLABELLED}
    return Labels(np.array([number[value] for value in values], np.int64), classes, "strings")


def read_csv(path: Path, names: Iterable[str]) -> Labels:
    """Labels of the images `names` from a file of lines "path,label", with a header or not.

    A path in the file may have any number of folders before the file's name, or lack its suffix.
    Images that the file does not name are unlabelled. The classes are those of the whole file, so
    that training and test images may share one.

    Raises:
        ValueError: the file is not understood, labels an image twice, names none of the images, or
            a name in it belongs to several images.
    """
    names = list(names)
    rows = _rows(path, names)
    of_row: dict[str, int] = {}
    for number, (name, text) in enumerate(rows):
        before = rows[of_row.setdefault(name, number)][1]
        if before != text:
            raise ValueError(f"{path} labels {name} twice: {before!r} and {text!r}")
    depths = sorted({name.count("/") + 1 for name in of_row}, reverse=True)
    found = [_row_of(name, of_row, depths) for name in names]
    used: dict[int, int] = {}
    for i, row in enumerate(found):
        if row is not None and used.setdefault(row, i) != i:
            raise ValueError(
                f"{path}: {rows[row][0]} may be {printable(names[used[row]])} or "
                f"{printable(names[i])}: write more of the path"
            )
    if not used:
        raise ValueError(
            f"{path} names none of the images; its first name is {rows[0][0]!r}, the first image "
            f"is {printable(names[0])!r}"
        )
    if (unlabelled := found.count(None)) and (unknown := len(of_row) - len(used)):
        name = next(name for name, row in of_row.items() if row not in used)
        warnings.warn(
            f"{path}: {unknown} names are of no image, such as {name!r}, and {unlabelled} images "
            f"have no label, such as {printable(names[found.index(None)])!r}",
            stacklevel=4,
        )
    try:
        every = from_text([text for _, text in rows])
    except ValueError as error:
        raise ValueError(f"{path}: {error} (images counted from 0 in the file)") from error
    if every.numbers is None:
        raise ValueError(f"{path} has no labels")
    numbers = [UNLABELLED if row is None else every.numbers[row] for row in found]
    return every._replace(numbers=np.array(numbers, np.int64))


def _rows(path: Path, names: Sequence[str]) -> list[tuple[str, str]]:
    """The (name, label) of every line, without the header. names: of the images."""
    content = path.read_bytes()
    # Excel writes UTF-16 as "Unicode text".
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = content.decode("utf-16" if wide else "utf-8-sig", "replace" if wide else _ANY)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    delimiter = next((d for d in ("\t", ";") if d in text.partition("\n")[0]), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows = [row for row in reader if any(cell.strip() for cell in row)]
    if not rows:
        raise ValueError(f"{path} is empty")
    first = [cell.strip().lower() for cell in rows[0]]
    columns = [
        next((first.index(name) for name in wanted if name in first), -1)
        for wanted in (_PATH_COLUMNS, _LABEL_COLUMNS)
    ]
    has_header = len(first) != 2 or columns != [-1, -1] or _unlike_the_rest(rows)
    if len(first) == 2 and has_header:
        # A line whose label looks unlike the others may still be that of an image.
        only = {normal_path(rows[0][0]): 0}
        depth = [next(iter(only)).count("/") + 1]
        has_header = all(_row_of(name, only, depth) is None for name in names)
    if len(first) == 2 and -1 in columns:
        columns = [0, 1]
    if len(first) < 2 or -1 in columns:
        raise ValueError(
            f"{path} must have two columns, path and label, or a header with {_PATH_COLUMNS[0]!r} "
            f"and {_LABEL_COLUMNS[0]!r}; its first line is {delimiter.join(rows[0])!r}"
        )
    rows = rows[has_header:]
    if short := next((row for row in rows if len(row) <= max(columns)), None):
        raise ValueError(f"{path}: a line without a label: {delimiter.join(short)!r}")
    if not rows:
        raise ValueError(f"{path} has a header and no lines")
    return [(normal_path(row[columns[0]]), row[columns[1]].strip()) for row in rows]


def _unlike_the_rest(rows: list[list[str]]) -> bool:
    """Whether the first line alone has a name without a suffix, or a label that is no number."""
    (name, label), rest = rows[0][:2], [row for row in rows[1:] if len(row) > 1]
    only_name = "." not in name and all("." in row[0] for row in rest)
    numbers = [bool(_NUMBER.fullmatch(row[1].strip())) for row in rest]
    only_label = not _NUMBER.fullmatch(label.strip()) and all(numbers)
    return bool(rest) and (only_name or only_label)


def normal_path(name: str) -> str:
    """A path with slashes, without "./", in Unicode's composed form."""
    path = PurePosixPath(name.strip().replace("\\", "/")).as_posix()
    return unicodedata.normalize("NFC", path)


def _row_of(name: str, of_row: dict[str, int], depths: list[int]) -> int | None:
    """The row of an image: the most folders before its name that match, then without suffix."""
    parts = normal_path(name).split("/")
    stem = parts[-1].rpartition(".")[0] or parts[-1]
    for last in (parts[-1], stem):
        for depth in depths:
            if depth <= len(parts):
                wanted = "/".join([*parts[-depth:-1], last])
                if wanted in of_row:
                    return of_row[wanted]
    return None
