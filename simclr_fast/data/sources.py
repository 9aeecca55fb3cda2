"""Sources of images: folders, lists, WebDataset tars, TFRecord, RecordIO, arrays, data sets.

A source returns the bytes or pixels of sample i. The loader decides the order. So shuffling,
sharding and resuming are exact for every storage format.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

# The same as torchvision's ImageFolder reads.
IMAGE_SUFFIXES = frozenset(
    f".{kind}" for kind in ("jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp")
)


class Source:
    """Images by number. `labels` is int64 [n], or None; `classes` names them.

    encoded: True if `read(i)` returns a file's bytes, uint8 [k]; False for pixels, uint8 [H, W, 3].
    """

    encoded = True
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, i: int) -> np.ndarray:
        raise NotImplementedError

    def name(self, i: int) -> str:
        """The name of sample i for messages: its path, or its file and record."""
        raise NotImplementedError

    def fingerprint(self) -> bytes:
        """A hash of the images and their order; for files, of their paths, sizes and dates."""
        images = (self.read(i) for i in range(len(self)))
        return fingerprint(f"{image.shape}".encode() + image.tobytes() for image in images)


def fingerprint(parts: Iterable[bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def file_fingerprint(paths: Iterable[Path]) -> bytes:
    return fingerprint(
        f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()
        for path, stat in ((path, path.stat()) for path in paths)
    )


class FileSource(Source):
    """One image per file."""

    def __init__(
        self,
        paths: Sequence[Path],
        labels: np.ndarray | None = None,
        classes: tuple[str, ...] = (),
    ) -> None:
        self.paths, self.labels, self.classes = paths, labels, classes

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, i: int) -> np.ndarray:
        return np.fromfile(self.paths[i], np.uint8)

    def name(self, i: int) -> str:
        return str(self.paths[i])

    def fingerprint(self) -> bytes:
        return file_fingerprint(self.paths)


class ArraySource(Source):
    """Pixels in memory: uint8 [n, H, W, 3], or any sequence of [H, W, 3]."""

    encoded = False

    def __init__(self, images: Sequence[np.ndarray] | np.ndarray, labels: Any = None) -> None:
        self.images = images
        if labels is not None:
            self.labels = np.asarray(labels, dtype=np.int64)
            if self.labels.shape != (len(images),):
                raise ValueError(
                    f"labels must be [{len(images)}], one per image, got {self.labels.shape}"
                )

    def __len__(self) -> int:
        return len(self.images)

    def read(self, i: int) -> np.ndarray:
        return self.images[i]

    def name(self, i: int) -> str:
        return f"image {i} of the array"


class DatasetSource(Source):
    """A map-style data set of (PIL image, label), such as those of torchvision.datasets."""

    encoded = False

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        # What torchvision's data sets call them.
        for name in ("targets", "labels", "_labels"):
            labels = getattr(dataset, name, None)
            if labels is not None and len(labels) == len(dataset):
                self.labels = np.asarray(labels, dtype=np.int64)
                break
        self.classes = tuple(getattr(dataset, "classes", ()))

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, i: int) -> np.ndarray:
        item = self.dataset[i]
        image = item[0] if isinstance(item, tuple) else item
        if isinstance(image, Tensor):
            raise TypeError("the data set must give PIL images: pass it without a transform")
        return np.array(image.convert("RGB"))

    def name(self, i: int) -> str:
        return f"sample {i} of {type(self.dataset).__name__}"


def subset(source: Source, ids: np.ndarray) -> Source:
    """The samples `ids` of `source`, renumbered from 0."""
    return _Subset(source, np.asarray(ids))


class _Subset(Source):
    def __init__(self, source: Source, ids: np.ndarray) -> None:
        self.source, self.ids = source, ids
        self.encoded, self.classes = source.encoded, source.classes
        self.labels = None if source.labels is None else source.labels[ids]

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int) -> np.ndarray:
        return self.source.read(self.ids[i])

    def name(self, i: int) -> str:
        return self.source.name(self.ids[i])

    def fingerprint(self) -> bytes:
        return fingerprint([self.source.fingerprint(), self.ids.tobytes()])
