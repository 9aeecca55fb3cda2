"""Open images as a Source: by name ("demo", "cifar10:ROOT"), path, list of files or array."""

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from torch import Tensor

from simclr_fast.data.demo import CLASSES, HELD_OUT, PER_CLASS, demo_folder, grainy_images
from simclr_fast.data.shards import open_shards
from simclr_fast.data.sources import IMAGE_SUFFIXES, ArraySource, DatasetSource, FileSource, Source
from simclr_fast.utils.extras import need

# Name → torchvision's class, and the arguments of its training and test splits.
_TORCHVISION: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "aircraft": ("FGVCAircraft", [{"split": "trainval"}], {"split": "test"}),
    "cars": ("StanfordCars", [{"split": "train"}], {"split": "test"}),
    "cifar10": ("CIFAR10", [{"train": True}], {"train": False}),
    "cifar100": ("CIFAR100", [{"train": True}], {"train": False}),
    "dtd": ("DTD", [{"split": "train"}, {"split": "val"}], {"split": "test"}),
    "flowers102": ("Flowers102", [{"split": "train"}, {"split": "val"}], {"split": "test"}),
    "food101": ("Food101", [{"split": "train"}], {"split": "test"}),
    "pets": ("OxfordIIITPet", [{"split": "trainval"}], {"split": "test"}),
    "stl10": ("STL10", [{"split": "train+unlabeled"}], {"split": "test"}),
    "svhn": ("SVHN", [{"split": "train"}], {"split": "test"}),
}
TORCHVISION = tuple(_TORCHVISION)
# Image files that are not read, nor by torchvision's ImageFolder. A folder with them is warned of.
_LEFT_OUT = frozenset(f".{kind}" for kind in ("gif", "heic", "heif", "avif", "jfif", "jp2", "jxl"))


@overload
def named_source(data: str, split: Literal["train"] = "train") -> Source: ...
@overload
def named_source(data: str, split: Literal["test"]) -> Source | None: ...
def named_source(data: str, split: Literal["train", "test"] = "train") -> Source | None:
    """The images of `data`; None for the test split of a path, which has only one split.

    data: "demo", "demo-grain", "demo-held-out", a path, or NAME:ROOT with a name from TORCHVISION.
        torchvision reads such a data set from the folder ROOT; nothing is downloaded. The training
        split includes the unlabelled images of STL-10 and the validation images of DTD and
        Flowers-102. "demo-held-out" has the demo's training images only: the last hundred of every
        class are its test split. Recipes are chosen on it.
    """
    if data == "demo":
        return open_source(demo_folder(split))
    if data == "demo-held-out":
        images = open_source(demo_folder("train"))
        assert isinstance(images, FileSource)
        assert images.labels is not None
        place = np.arange(len(images)) % PER_CLASS["train"]
        ids = np.flatnonzero((place < PER_CLASS["train"] - HELD_OUT) == (split == "train"))
        return FileSource([images.paths[i] for i in ids], images.labels[ids], images.classes)
    if data == "demo-grain":
        source = ArraySource(*grainy_images(split))
        source.classes = CLASSES
        return source
    name, _, root = data.partition(":")
    if name in _TORCHVISION and root:
        return _torchvision_source(name, root, split)
    return open_source(data) if split == "train" else None


def _torchvision_source(name: str, root: str, split: Literal["train", "test"]) -> Source:
    kind, training, testing = _TORCHVISION[name]
    make = getattr(need("torchvision").datasets, kind)
    try:
        parts = [make(root, **part) for part in (training if split == "train" else [testing])]
    except (RuntimeError, FileNotFoundError) as error:
        raise FileNotFoundError(f"torchvision finds no {name} in {root!r}: {error}") from error
    files = [_files(part) for part in parts]
    if not all(files):
        (part,) = parts
        return DatasetSource(part)
    paths, labels = zip(*(pair for part in files for pair in part), strict=True)
    classes = tuple(getattr(parts[0], "classes", ()))
    return FileSource([Path(path) for path in paths], np.array(labels, np.int64), classes)


def _files(dataset: Any) -> list[tuple[str, int]]:
    """The image files of a data set and their labels; [] if it holds pixels.

    Reading the files directly is faster than through the data set, which decodes with Pillow.
    """
    if samples := getattr(dataset, "_samples", None):
        return list(samples)
    paths = getattr(dataset, "_image_files", getattr(dataset, "_images", []))
    return list(zip(paths, dataset._labels, strict=True)) if paths else []


def open_source(data: Any, labels: Any = None) -> Source:
    """Open images as a `Source`.

    data: one of
        - a folder: class/…/image (torchvision's ImageFolder) or images without labels;
        - one image file, `.tar` (WebDataset), `.tfrecord` or `.rec` (RecordIO), or a list of them;
        - a uint8 array or tensor [n, H, W, 3] or [n, 3, H, W], in memory;
        - a data set of PIL images, such as `torchvision.datasets.CIFAR10(root)`;
        - a Source.
    labels: integers [n], for arrays and lists of files.

    Raises:
        FileNotFoundError: the path does not exist. ValueError: there are no images.
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
            f"files in {folder} that are not read: {counted}; convert them to JPEG or PNG",
            stacklevel=3,
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
        if len(kinds) != 1:
            raise ValueError(f"all shards must have one suffix, got {', '.join(sorted(kinds))}")
        return open_shards(paths)
    if unknown := kinds - IMAGE_SUFFIXES:
        raise ValueError(
            f"files must have a suffix of {', '.join(sorted(IMAGE_SUFFIXES))}, got "
            f"{', '.join(sorted(unknown))}"
        )
    if labels is not None:
        labels = np.asarray(labels, dtype=np.int64)
        if labels.shape != (len(paths),):
            raise ValueError(f"labels must be [{len(paths)}], one per file, got {labels.shape}")
    return FileSource(paths, labels)
