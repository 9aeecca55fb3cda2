"""Where images come from: folders, lists, WebDataset tars, TFRecord, RecordIO, arrays, data sets.

A source gives sample i's bytes (or pixels) by number. The loader decides order, so shuffling,
sharding and resuming are exact whatever the storage format.
"""

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

# torchvision's ImageFolder reads the same.
IMAGE_SUFFIXES = frozenset(
    f".{kind}" for kind in ("jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp")
)
# Images that neither reads: a folder that holds some is warned of.
_LEFT_OUT = frozenset(f".{kind}" for kind in ("gif", "heic", "heif", "avif", "jfif", "jp2", "jxl"))


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
        """What to call sample i in a message: a path, or a record of one."""
        raise NotImplementedError

    def fingerprint(self) -> bytes:
        """Changes with the images and their order: for files their paths, sizes and dates."""
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


def open_source(data: Any, labels: Any = None) -> Source:
    """Make a source of whatever holds images.

    data: one of
        - a folder: class/…/image (torchvision's ImageFolder) or images without labels;
        - one image file, `.tar` (WebDataset), `.tfrecord` or `.rec` (RecordIO), or a list of them;
        - a uint8 array or tensor [n, H, W, 3] or [n, 3, H, W], in memory;
        - a data set of PIL images, such as `torchvision.datasets.CIFAR10(root)`;
        - a Source.
    labels: integers [n], for arrays and lists of files.

    Raises:
        FileNotFoundError: nothing at that path. ValueError: no images there.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, Tensor):
        data = data.numpy(force=True)
    if isinstance(data, np.ndarray):
        return ArraySource(_channels_last(data), labels)
    if isinstance(data, str | Path):
        path = Path(data)
        return _open_folder(path) if path.is_dir() else _open_files([path], labels)
    if isinstance(data, Sequence) and len(data) and isinstance(data[0], str | Path):
        return _open_files([Path(p) for p in data], labels)
    if isinstance(data, Sequence) and len(data) and isinstance(data[0], np.ndarray):
        return ArraySource(data, labels)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and len(data):
        return DatasetSource(data)
    raise ValueError(
        f"data must be a folder, files, an array or a data set of images, got {type(data).__name__}"
        + (" without elements" if hasattr(data, "__len__") and not len(data) else "")
    )


def _channels_last(images: np.ndarray) -> np.ndarray:
    if images.dtype != np.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if images.ndim == 4 and images.shape[3] == 3:
        return np.ascontiguousarray(images)
    if images.ndim == 4 and images.shape[1] == 3:
        return np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    raise ValueError(f"images must be [n, H, W, 3] or [n, 3, H, W], got {images.shape}")


def _open_folder(folder: Path) -> Source:
    shards = sorted(p for p in folder.iterdir() if p.suffix in (".tar", ".rec", ".tfrecord"))
    if shards:
        return _open_files(shards, None)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    paths = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
    if left_out := Counter(p.suffix.lower() for p in files if p.suffix.lower() in _LEFT_OUT):
        counted = ", ".join(f"{n} {suffix}" for suffix, n in sorted(left_out.items()))
        warnings.warn(
            f"left out of {folder}, as by torchvision's ImageFolder: {counted}", stacklevel=3
        )
    if not paths:
        raise ValueError(
            f"no images in {folder} (looked for {', '.join(sorted(IMAGE_SUFFIXES))}, and for "
            ".tar, .tfrecord and .rec files)"
        )
    tops = [p.relative_to(folder).parts for p in paths]
    if any(len(parts) == 1 for parts in tops):
        return FileSource(paths)
    classes = sorted({parts[0] for parts in tops})
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[parts[0]] for parts in tops], dtype=np.int64)
    return FileSource(paths, labels, tuple(classes))


def _open_files(paths: Sequence[Path], labels: Any) -> Source:
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no such file or folder: {path}")
    kinds = {path.suffix.lower() for path in paths}
    if kinds & {".tar", ".tfrecord", ".rec"}:
        from simclr_fast.shards import open_shards

        if len(kinds) != 1:
            raise ValueError(f"shards must be of one kind, got {', '.join(sorted(kinds))}")
        return open_shards(paths)
    if unknown := kinds - IMAGE_SUFFIXES:
        raise ValueError(f"not image files by their suffix: {', '.join(sorted(unknown))}")
    if labels is not None:
        labels = np.asarray(labels, dtype=np.int64)
        if labels.shape != (len(paths),):
            raise ValueError(f"labels must be [{len(paths)}], one per file, got {labels.shape}")
    return FileSource(paths, labels)
