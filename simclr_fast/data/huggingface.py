"""Data sets of the library `datasets`: a Dataset, or a folder that its save_to_disk wrote."""

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np

from simclr_fast.data.account import Account, printable
from simclr_fast.data.labels import Labels
from simclr_fast.data.sources import Source
from simclr_fast.utils.extras import need

_IMAGE_COLUMNS = ("image", "img", "jpg", "png")
_LABEL_COLUMNS = ("label", "labels", "cls", "class", "target")


def is_saved(folder: Path) -> bool:
    """Whether save_to_disk wrote this folder."""
    if (folder / "dataset_dict.json").is_file():
        return any(folder.glob("*/state.json"))
    return (folder / "state.json").is_file() and any(folder.glob("*.arrow"))


def load_saved(folder: Path, split: str) -> Any:
    """The Dataset in a folder of save_to_disk; None if it lacks the split.

    A folder without splits is the training split.
    """
    data = need("datasets").load_from_disk(str(folder))
    if not isinstance(data, dict):
        return data if split == "train" else None
    if split == "train" and split not in data and len(data) == 1:
        return next(iter(data.values()))
    if split == "train" and split not in data:
        raise ValueError(f"{folder} must have the split 'train', got {', '.join(data)}")
    return data.get(split)


def is_dataset(data: Any) -> bool:
    """Whether `data` is a Dataset. The library is not imported for that."""
    return hasattr(data, "features") and hasattr(data, "column_names") and hasattr(data, "select")


class HuggingFaceSource(Source):
    """The rows of a Dataset: image files if its column has the type Image, which are not decoded
    by the library.

    image_key: the image's column, if there are several.
    """

    def __init__(self, data: Any, account: Account, image_key: str | None = None) -> None:
        self.scanned = account
        self.data = data = data.with_format(None)
        self.column = _image_column(data, image_key)
        feature = data.features[self.column]
        if type(feature).__name__ == "Image":
            files = type(feature)(decode=False)
            self.rows = data.select_columns([self.column]).cast_column(self.column, files)
        else:
            self.rows = data.select_columns([self.column])
        self._read_labels(data)

    def _read_labels(self, data: Any) -> None:
        kinds = {name: type(feature).__name__ for name, feature in data.features.items()}
        columns = [name for name, kind in kinds.items() if kind == "ClassLabel"]
        columns = columns or [name for name in _LABEL_COLUMNS if name in kinds][:1]
        if len(columns) > 1:
            self.set_labels(
                Labels(None, (), f"choose one of the columns {', '.join(columns)} by labels")
            )
        elif columns:
            self._take(columns[0])

    def _take(self, column: str) -> None:
        """Take the labels of a column."""
        self.set_labels(list(self.data[column]))
        names = tuple(getattr(self.data.features[column], "names", ()))
        if names and self.labels is not None:
            self.classes, self.about_labels = names, f"ClassLabel {column}"

    def with_labels(self, labels: Any) -> "HuggingFaceSource":
        """`Source.with_labels`; labels may also be the name of a column."""
        if not isinstance(labels, str | Path) or str(labels) not in self.data.features:
            return super().with_labels(labels)
        labelled = copy.copy(self)
        labelled._take(str(labels))
        labelled.need_labels(f"the column {labels} has no labels")
        return labelled

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, i: int) -> np.ndarray:
        value = self.rows[int(i)][self.column]
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path") is not None:
                return np.fromfile(value["path"], np.uint8)
            value = value.get("bytes")
        if value is None:
            raise ValueError("a row without an image")
        if not isinstance(value, bytes):
            raise ValueError(
                f"the column {self.column} must hold images or the bytes of image files, got "
                f"{type(value).__name__}"
            )
        return np.frombuffer(value, np.uint8)

    def name(self, i: int) -> str:
        return f"row {i} of the data set"

    def path(self, i: int) -> str:
        value = self.rows[int(i)][self.column]
        path = value.get("path") if isinstance(value, dict) else None
        return os.fspath(path) if path else str(i)


def _image_column(data: Any, image_key: str | None) -> str:
    names = list(data.features)
    if image_key is not None:
        if image_key not in names:
            raise ValueError(
                f"image_key must be a column ({', '.join(names)}), got {printable(image_key)}"
            )
        return image_key
    columns = [name for name in names if type(data.features[name]).__name__ == "Image"]
    columns = columns or [name for name in _IMAGE_COLUMNS if name in names][:1]
    if len(columns) != 1:
        raise ValueError(
            f"the data set has {len(columns)} columns of images"
            + (f" ({', '.join(columns)})" if columns else f", only {', '.join(names)}")
            + (": choose one by image_key (--image-key NAME)" if columns else "")
        )
    return columns[0]
