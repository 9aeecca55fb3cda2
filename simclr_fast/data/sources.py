"""Sources of images: folders, lists, WebDataset tars, TFRecord, RecordIO, arrays, data sets.

A source returns the bytes or pixels of sample i. The loader decides the order. So shuffling,
sharding and resuming are exact for every storage format.
"""

import copy
import hashlib
import marshal
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from simclr_fast.augment.channels import as_channels, picture_channels
from simclr_fast.augment.rgb import gray_levels, rgb_array
from simclr_fast.data.account import Account, printable
from simclr_fast.data.image_check import channel_pixels, pillow_pixels
from simclr_fast.data.labels import Labels, as_labels, read_csv

# What torchvision's data sets call their labels, and the usual keys of dicts.
_LABEL_ATTRIBUTES = ("targets", "labels", "_labels")
_IMAGE_KEYS = ("image", "img", "jpg", "png")
_LABEL_KEYS = ("label", "labels", "cls", "class", "target")
_KNOWN = attrgetter("st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")
S = TypeVar("S", bound="Source")


class Source:
    """Images by number. `labels` is int64 [n], -1 for unlabelled, or None; `classes` names them.

    encoded: True if `read(i)` returns a file's bytes, uint8 [k]; False for pixels, uint8 [H, W, 3].
    channels: of the images. With another number than 3, pixels are uint8 or float32 [H, W, C].
    repeats: whether sample i is the same at every read. A data set of the user's may draw it anew.
    about_labels: what the labels are, such as "folder names"; without labels, why.
    """

    encoded = True
    channels = 3
    repeats = True
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    about_labels = ""
    # What opening the source left out. Never changed after that.
    scanned = Account()

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, i: int) -> np.ndarray:
        raise NotImplementedError

    def name(self, i: int) -> str:
        """The name of sample i for messages: its path, or its file and record."""
        raise NotImplementedError

    def path(self, i: int) -> str:
        """The path of sample i in its folder or archive, by which a file of labels finds it."""
        return self.name(i)

    def content(self) -> bytes:
        """A hash of the images and their order, which reads all of them."""
        images = (self.read(i) for i in range(len(self)))
        return fingerprint(
            f"{image.shape} {image.dtype}".encode() + image.tobytes() for image in images
        )

    def fingerprint(self) -> bytes:
        """A hash of the images and their order; of files, it takes names, sizes and dates."""
        return self.content()

    def labels_fingerprint(self) -> bytes:
        """A hash of the labels and the names of their classes."""
        numbers = b"" if self.labels is None else self.labels.tobytes()
        return fingerprint([numbers, *(name.encode() for name in self.classes)])

    @property
    def account(self) -> Account:
        """What was found, used and left out, and the labels."""
        counts: dict[str, int] = {}
        unlabelled = 0
        if self.labels is not None:
            numbers, images = np.unique(self.labels, return_counts=True)
            found = dict(zip(numbers.tolist(), images.tolist(), strict=True))
            unlabelled = found.pop(-1, 0)
            names = dict(enumerate(self.classes))
            counts = {names.get(i, str(i)): n for i, n in found.items()}
        return replace(
            self.scanned,
            used=len(self),
            labels=self.about_labels,
            classes=counts,
            unlabelled=unlabelled,
        )

    def set_labels(self, values: Any) -> None:
        """Take labels that came with the images. If they are no labels, keep the reason.

        Pretraining does not need labels, so they must not end it.
        """
        try:
            self.labels, self.classes, self.about_labels = (
                values if isinstance(values, Labels) else as_labels(values, len(self))
            )
        except ValueError as error:
            self.labels, self.classes, self.about_labels = None, (), str(error)

    def with_labels(self: S, labels: Any) -> S:
        """The same images with these labels: one per image, or a CSV file (`labels.read_csv`).

        Raises:
            ValueError: they are no labels of these images.
        """
        labelled = copy.copy(self)
        if isinstance(labels, str | Path):
            found = read_csv(Path(labels), map(self.path, range(len(self))))
        else:
            found = as_labels(labels, len(self))
        labelled.labels, labelled.classes, labelled.about_labels = found
        return labelled

    def with_channels(self: S, channels: int) -> S:
        """The same images, read as images of this number of channels."""
        if channels == self.channels:
            return self
        changed = copy.copy(self)
        changed.channels = channels
        return changed

    @property
    def has_labels(self) -> bool:
        """Whether any image has a label."""
        return self.labels is not None and bool((self.labels >= 0).any())

    def need_labels(self, problem: str) -> np.ndarray:
        """The labels, int64 [n].

        Raises:
            ValueError: no image has a label. The message is `problem` and the reason.
        """
        if self.labels is None or not self.has_labels:
            why = self.about_labels if self.labels is None else "all are -1"
            why = why or "give a folder that has one folder per class, or --labels FILE.csv"
            raise ValueError(f"{problem}: {why}")
        return self.labels

    def labelled(self, problem: str) -> "Source":
        """The images with a label, which is not -1. Raises as `need_labels`."""
        known = np.flatnonzero(self.need_labels(problem) >= 0)
        return self if len(known) == len(self) else subset(self, known, "unlabelled")


def fingerprint(parts: Iterable[bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def file_fingerprint(paths: Iterable[str | Path]) -> bytes:
    """A hash of what the system knows of the files, so that none is read.

    A file's time of change (ctime) cannot be set back, unlike that of its content (mtime). The
    folder is left out: a link to it is the same folder.
    """
    given = [os.fspath(path) for path in paths]
    names = [path[path.rfind(os.sep) + 1 :] for path in given]
    # Every other way to list the numbers takes longer than the system takes to find them. Version 2
    # writes equal lists as equal bytes.
    known = marshal.dumps(list(map(_KNOWN, map(os.stat, given))), 2)
    return fingerprint([repr(names).encode(), known])


class FileSource(Source):
    """One image per file."""

    def __init__(
        self,
        paths: Sequence[str | Path],
        labels: np.ndarray | None = None,
        classes: tuple[str, ...] = (),
        about: str = "integers",
    ) -> None:
        self.paths, self.labels, self.classes = paths, labels, classes
        self.about_labels = "" if labels is None else about

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, i: int) -> np.ndarray:
        return np.fromfile(self.paths[i], np.uint8)

    def name(self, i: int) -> str:
        return printable(self.paths[i])

    def path(self, i: int) -> str:
        return os.fspath(self.paths[i])

    def fingerprint(self) -> bytes:
        return file_fingerprint(self.paths)


class ArraySource(Source):
    """Pixels in memory: [n, H, W, 3], or any sequence of [H, W, 3]; or gray, [H, W] or [H, W, 1].

    uint8, uint16, or floating in [0, 1], which become uint8 (augment/rgb.py).
    """

    encoded = False

    def __init__(self, images: Sequence[np.ndarray] | np.ndarray, labels: Any = None) -> None:
        self.images = images
        if labels is not None:
            self.labels, self.classes, self.about_labels = as_labels(labels, len(images))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, i: int) -> np.ndarray:
        return _array_pixels(self.images[i], self.channels, f"image {i}")

    def name(self, i: int) -> str:
        return f"image {i} of the array"


class DatasetSource(Source):
    """A map-style data set of PIL images, (PIL image, label) or dicts with an image.

    Such are those of torchvision.datasets, also in torch's Subset and ConcatDataset.
    """

    encoded, repeats = False, False

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        try:
            labels, classes = _dataset_labels(dataset)
        except ValueError as error:
            self.about_labels = str(error)
            return
        if labels is None:
            return
        self.set_labels(labels)
        if self.labels is not None and not self.classes and self.labels.max() < len(classes):
            self.classes, self.about_labels = classes, "classes of the data set"

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, i: int) -> np.ndarray:
        image = _image_of(self.dataset[int(i)])
        # An image of Hugging Face that is not decoded.
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str | os.PathLike):
            image = np.fromfile(image, np.uint8).tobytes()
        if image is None:
            raise ValueError("a sample without an image")
        if isinstance(image, bytes):
            encoded = np.frombuffer(image, np.uint8)
            if self.channels == 3:
                return pillow_pixels(encoded)
            return channel_pixels(encoded, self.channels)
        if isinstance(image, np.ndarray):
            return _array_pixels(image, self.channels, self.name(i))
        if isinstance(image, Tensor):
            raise TypeError(
                "the data set must give PIL images, not tensors: pass it without a transform, or "
                "pass all images as one tensor [n, 3, H, W]"
            )
        if not hasattr(image, "getbands"):
            raise TypeError(
                "the data set must give PIL images, arrays, paths or the bytes of image files, got "
                f"{type(image).__name__}"
            )
        return rgb_array(image) if self.channels == 3 else picture_channels(image, self.channels)

    def name(self, i: int) -> str:
        return f"sample {i} of {type(self.dataset).__name__}"


def _array_pixels(image: np.ndarray, channels: int, name: str) -> np.ndarray:
    """The pixels of an array: uint8 [H, W, 3], or as `as_channels` gives them."""
    if channels != 3:
        return as_channels(image, channels)
    if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return image
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim != 3 or image.shape[2] not in (1, 3):
        raise TypeError(f"{name} must be [H, W], [H, W, 1] or [H, W, 3], got {list(image.shape)}")
    pixels = gray_levels(image, str(image.dtype))
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _image_of(item: Any) -> Any:
    """The image of a data set's item."""
    if isinstance(item, dict):
        key = next((key for key in _IMAGE_KEYS if key in item), None)
        if key is None:
            raise ValueError(
                f"an item must have one of the keys {', '.join(_IMAGE_KEYS)}, got "
                f"{', '.join(map(str, item))}"
            )
        return item[key]
    return item[0] if isinstance(item, tuple | list) else item


def _dataset_labels(dataset: Any) -> tuple[Any, tuple[str, ...]]:
    """The labels of a data set's images, None without any, and the names of the classes.

    Raises:
        ValueError: parts of it have different classes.
    """
    inner, indices = getattr(dataset, "dataset", None), getattr(dataset, "indices", None)
    if inner is not None and indices is not None:
        labels, classes = _dataset_labels(inner)
        return None if labels is None else [labels[i] for i in indices], classes
    if isinstance(parts := getattr(dataset, "datasets", None), list):
        found = [_dataset_labels(part) for part in parts]
        if any(labels is None for labels, _ in found):
            return None, ()
        if len({classes for _, classes in found}) > 1:
            raise ValueError("the joined data sets have different classes")
        return [label for labels, _ in found for label in labels], found[0][1]
    classes = tuple(map(str, getattr(dataset, "classes", None) or ()))
    for name in _LABEL_ATTRIBUTES:
        labels = getattr(dataset, name, None)
        if labels is not None and hasattr(labels, "__len__") and len(labels) == len(dataset):
            change = getattr(dataset, "target_transform", None)
            return (labels, classes) if change is None else ([*map(change, labels)], ())
    if isinstance(dataset, list | tuple):
        return _labels_of_items(dataset), classes
    return None, ()


def _labels_of_items(items: Sequence[Any]) -> list[Any] | None:
    if all(isinstance(item, tuple) and len(item) == 2 for item in items):
        return [item[1] for item in items]
    if all(isinstance(item, dict) for item in items):
        key = next((key for key in _LABEL_KEYS if all(key in item for item in items)), None)
        return None if key is None else [item[key] for item in items]
    return None


def subset(source: Source, ids: np.ndarray, why: str = "not in this part") -> Source:
    """The samples `ids` of `source`, renumbered from 0. why: the others are left out."""
    return _Subset(source, np.asarray(ids), why)


def evenly(source: Source, count: int) -> np.ndarray:
    """The numbers of at most `count` samples, int64, evenly spaced: a folder holds one class after
    another."""
    return np.linspace(0, len(source) - 1, min(count, len(source))).astype(np.int64)


class _Subset(Source):
    def __init__(self, source: Source, ids: np.ndarray, why: str) -> None:
        self.source, self.ids = source, ids
        self.encoded, self.channels, self.classes = source.encoded, source.channels, source.classes
        self.repeats = source.repeats
        self.about_labels = source.about_labels
        self.labels = None if source.labels is None else source.labels[ids]
        self.scanned = copy.deepcopy(source.scanned)
        if len(ids) < len(source):
            self.scanned.left_out[why] += len(source) - len(ids)

    def with_channels(self, channels: int) -> "_Subset":
        changed = super().with_channels(channels)
        changed.source = self.source.with_channels(channels)
        return changed

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int) -> np.ndarray:
        return self.source.read(self.ids[i])

    def name(self, i: int) -> str:
        return self.source.name(self.ids[i])

    def path(self, i: int) -> str:
        return self.source.path(self.ids[i])

    def fingerprint(self) -> bytes:
        return fingerprint([self.source.fingerprint(), self.ids.tobytes()])
