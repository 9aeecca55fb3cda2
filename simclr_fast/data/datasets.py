"""Open images as a Source: by name ("demo", "cifar10:ROOT"), path, list of files or array."""

import logging
import os
import re
import warnings
from collections.abc import Collection, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from simclr_fast.data.account import Account, OnError, printable
from simclr_fast.data.demo import CLASSES, HELD_OUT, PER_CLASS, demo_folder, grainy_images
from simclr_fast.data.folders import archive_kind, find_images, suffix_of
from simclr_fast.data.formats import suffixes, unread
from simclr_fast.data.huggingface import HuggingFaceSource, is_dataset, is_saved, load_saved
from simclr_fast.data.remote import fetched, is_address
from simclr_fast.data.shards import ShardSource
from simclr_fast.data.sources import (
    ArraySource,
    DatasetSource,
    FileSource,
    Source,
    subset,
)
from simclr_fast.utils.extras import need

log = logging.getLogger(__name__)
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
# What to do with files that hold images and are not read.
_INSTEAD = {
    ".npy": "pass np.load(file), or channels= for one array per image",
    ".npz": "pass an array of np.load(file)",
    ".csv": "of labels: pass the images, and this as labels",
    ".txt": "of paths: pass them as a list",
    ".parquet": "pass datasets.load_dataset('parquet', data_files=...)",
    ".zip": "unpack it",
}
# What the parts of a data set are called.
_SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")


@overload
def named_source(
    data: str,
    split: Literal["train"] = "train",
    *,
    labels: Path | None = None,
    image_key: str | None = None,
    on_error: OnError = "raise",
    channels: int = 3,
) -> Source: ...
@overload
def named_source(
    data: str,
    split: Literal["test"],
    *,
    labels: Path | None = None,
    image_key: str | None = None,
    on_error: OnError = "raise",
    channels: int = 3,
) -> Source | None: ...
def named_source(
    data: str,
    split: Literal["train", "test"] = "train",
    *,
    labels: Path | None = None,
    image_key: str | None = None,
    on_error: OnError = "raise",
    channels: int = 3,
) -> Source | None:
    """The images of `data`; None for the test split of a path, which has only one split.

    data: "demo", "demo-grain", "demo-held-out", a path or pattern, or NAME:ROOT with a name from
        TORCHVISION. torchvision reads such a data set from the folder ROOT; nothing is downloaded.
        The training split includes the unlabelled images of STL-10 and the validation images of DTD
        and Flowers-102. "demo-held-out" has the demo's training images only: the last hundred of
        every class are its test split. Recipes are chosen on it.
    labels, image_key, on_error, channels: as for `open_source`.
    """
    name, _, root = data.partition(":")
    source: Source | None
    if data == "demo":
        source = open_source(demo_folder(split))
    elif data == "demo-held-out":
        images = open_source(demo_folder("train"))
        place = np.arange(len(images)) % PER_CLASS["train"]
        first = place < PER_CLASS["train"] - HELD_OUT
        source = subset(images, np.flatnonzero(first == (split == "train")), "in the other split")
    elif data == "demo-grain":
        source = ArraySource(*grainy_images(split))
        source.classes = CLASSES
    elif name in _TORCHVISION and root:
        source = _torchvision_source(name, root, split)
    elif is_saved(folder := Path(data).expanduser()):
        found = load_saved(folder, split)
        source = (
            None if found is None else open_source(found, image_key=image_key, channels=channels)
        )
    elif split == "test":
        return None
    else:
        source = open_source(data, image_key=image_key, on_error=on_error, channels=channels)
    if source is None:
        return None
    source = source.with_channels(channels)
    return source if labels is None else source.with_labels(labels)


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
        source = DatasetSource(part)
        # It was made without a transform.
        source.repeats = True
        return source
    paths, labels = zip(*(pair for part in files for pair in part), strict=True)
    classes = tuple(getattr(parts[0], "classes", ()))
    return FileSource(paths, np.array(labels, np.int64), classes, "classes of the data set")


def _files(dataset: Any) -> list[tuple[str, int]]:
    """The image files of a data set and their labels; [] if it holds pixels.

    Reading the files directly is faster than through the data set, which decodes with Pillow.
    """
    if samples := getattr(dataset, "_samples", None):
        return list(samples)
    paths = getattr(dataset, "_image_files", getattr(dataset, "_images", []))
    return list(zip(paths, dataset._labels, strict=True)) if paths else []


def open_source(
    data: Any,
    labels: Any = None,
    *,
    image_key: str | None = None,
    on_error: OnError = "raise",
    channels: int = 3,
) -> Source:
    """Open images as a `Source`. `Source.account` has what was found and what was left out.

    data: one of
        - a folder: class/…/image (torchvision's ImageFolder) or images without labels;
        - one image file, `.tar` (WebDataset), `.tfrecord` or `.rec` (RecordIO), a list of them, or
          a pattern: shards/{000..099}.tar, shards/*.tar. gzip, bzip2 and xz are decompressed once,
          into the cache folder;
        - an address of a file, a pattern or, with "/" at its end, a folder, for fsspec:
          s3://bucket/{000..099}.tar, https://host/a.tar. It is copied into the cache folder once;
        - an array or tensor in memory, [n, H, W, 3] or [n, 3, H, W], or gray: [n, H, W, 1],
          [n, 1, H, W] or [n, H, W]; uint8, uint16, or floating in [0, 1];
        - a data set of PIL images, such as `torchvision.datasets.CIFAR10(root)`, or of dicts;
        - a `Dataset` of Hugging Face's `datasets`, or a folder that its save_to_disk wrote;
        - a Source.
    labels: one per image, the path of a CSV file with lines "path,label", or a column of a Dataset.
        They replace the labels that the data have. Integers, whole floats and booleans are class
        numbers, strings are classes in sorted order; -1 means unlabelled.
    image_key: the image of a sample that has several: the field of a tar ("jpg"), the feature of a
        TFRecord, the column of a Dataset. In tars it may be a pattern ("*.jpg": every such field is
        an image of its own) or several with ";" between (the first that a sample has).
    on_error: "raise": an archive that is cut off or damaged, two members of one name, a link that
        leads nowhere or a folder that cannot be read is an error. "skip": it is noted in
        `account.lost`, and the images that are lost are missing.
    channels: of the images. 3 means RGB, to which images of other channels are converted. With
        another number every image must have it; .npy files are read then, and TIFF files of many
        channels with the package tifffile.

    Raises:
        FileNotFoundError: the path does not exist. ValueError: there are no images, data are
            damaged, `labels` are no labels, or a sample has several images and no `image_key`.
    """
    source = _opened(data, image_key, on_error, channels).with_channels(channels)
    for message in source.scanned.lost:
        log.warning("lost: %s", message)
    return source if labels is None else source.with_labels(labels)


def _opened(data: Any, image_key: str | None, on_error: OnError, channels: int) -> Source:
    if isinstance(data, Source):
        return data
    if isinstance(data, Tensor):
        data = (data.float() if data.dtype == torch.bfloat16 else data).numpy(force=True)
    if isinstance(data, np.ndarray) and data.dtype.kind in "OSU":
        data = data.tolist()
    if isinstance(data, np.ndarray):
        return ArraySource(_channels_last(data, channels))
    if isinstance(data, str) and is_address(data):
        addresses = [one for part in data.split("::") for one in _braces(part)]
        data = [path for one in addresses for path in fetched(one)]
        data = data[0] if len(data) == 1 else data
    if isinstance(data, str | os.PathLike):
        path = Path(_local(os.fspath(data))).expanduser()
        if not path.is_dir():
            paths = [path] if path.exists() else _matching(str(path))
            return _open_files(paths, Account(on_error), image_key, channels)
        if is_saved(path):
            return _opened(load_saved(path, "train"), image_key, on_error, channels)
        return _open_folder(path, Account(on_error), image_key, channels)
    first = data[0] if isinstance(data, list | tuple) and data else None
    if isinstance(first, str | os.PathLike):
        paths = [Path(_local(os.fspath(p))) for p in data]
        return _open_files(paths, Account(on_error), image_key, channels)
    if isinstance(first, np.ndarray):
        if first.ndim > 3:
            raise ValueError(
                f"a list must hold one image after the other, got {list(first.shape)} first: pass "
                "labels by labels="
            )
        return ArraySource(data)
    if isinstance(data, dict):
        names = ", ".join(map(str, list(data)[:5]))
        raise ValueError(f"data must be one data set, got a dict of {names}: pass one of them")
    if hasattr(data, "iloc"):
        raise ValueError(
            f"data must be images or their paths, got {type(data).__name__}: pass a list of one "
            "column, and labels="
        )
    if isinstance(data, IterableDataset) or type(data).__name__ == "IterableDataset":
        raise ValueError(
            f"data must have a length and images by number; {type(data).__name__} streams them. "
            "Load it without streaming"
        )
    if is_dataset(data) and len(data):
        return HuggingFaceSource(data, Account(on_error), image_key)
    is_sequence = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if is_sequence and not isinstance(data, bytes) and len(data):
        return DatasetSource(data)
    raise ValueError(
        f"data must be a folder, files, an array or a data set of images, got {type(data).__name__}"
        + (" without elements" if hasattr(data, "__len__") and not len(data) else "")
    )


def _local(name: str | bytes) -> str:
    """The name of a path on this machine."""
    text = os.fsdecode(name)
    if not text:
        raise ValueError("data must be a path, got an empty text")
    if text.startswith("pipe:") or is_address(text):
        raise ValueError(
            f"data must be on this machine, got {printable(text)}: download it first, or give one "
            "address or pattern as text"
        )
    return text


def _matching(pattern: str) -> list[Path]:
    """The paths that a pattern stands for: {000..099} and {a,b}, *, ? and [ ], and :: between."""
    paths: list[Path] = []
    for text in (text for part in pattern.split("::") for text in _braces(part)):
        found = sorted(glob(text)) if has_magic(text) else [text]
        if not found:
            raise FileNotFoundError(f"no file matches {printable(text)}")
        paths += map(Path, found)
    return paths


def _braces(text: str) -> list[str]:
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", text)
    if match is None:
        return [text]
    first, last, listed = match.groups()
    if listed is None:
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        step = 1 if int(first) <= int(last) else -1
        choices = [f"{i:0{width}}" for i in range(int(first), int(last) + step, step)]
    else:
        choices = listed.split(",")
    rest = _braces(text[match.end() :])
    return [text[: match.start()] + choice + end for choice in choices for end in rest]


def _channels_last(images: np.ndarray, channels: int) -> np.ndarray:
    allowed = (1, 3) if channels == 3 else (channels,)
    if len(images) and 0 in images.shape:
        raise ValueError(f"images must have pixels, got {images.shape}")
    if images.ndim == 3 and channels == 3 and images.shape[2] in (3, 4):
        raise ValueError(
            f"images must be [n, H, W, C], got one image of {images.shape}: pass images[None], or "
            "gray images of that width as [n, H, W, 1]"
        )
    if images.ndim == 3 and 1 in allowed:
        return images[..., None]
    if images.ndim == 4 and images.shape[3] in allowed:
        return np.ascontiguousarray(images)
    if images.ndim == 4 and images.shape[1] in allowed:
        return np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    numbers = "1 or 3 channels, or [n, H, W]" if channels == 3 else f"{channels} channels"
    raise ValueError(
        f"images must be [n, H, W, C] or [n, C, H, W] of {numbers}, got {images.shape}; for others "
        "pass their number: channels=C (--augmentation.channels C)"
    )


def _open_folder(folder: Path, account: Account, image_key: str | None, channels: int) -> Source:
    """Images in class folders, else images without labels, else archives."""
    found = find_images(str(folder), account, suffixes(channels))
    unreadable = {suffix: unread(suffix) for suffix in sorted(account.left_out)}
    if counted := [f"{account.left_out[k]} {k} ({pip})" for k, pip in unreadable.items() if pip]:
        warnings.warn(f"files in {folder} that are not read: {', '.join(counted)}", stacklevel=4)
    archives = [] if found.paths else found.archives
    if splits := _splits(found.classes) or _splits_of_archives(archives):
        choice = os.path.join(folder, splits[0])
        if archives:
            first = next(path for path in archives if os.path.basename(path).startswith(splits[0]))
            choice = f"{os.path.join(os.path.dirname(first), splits[0])}*"
        warnings.warn(
            f"{printable(folder)} holds several parts of a data set ({', '.join(splits)}), and all "
            f"of them are used: choose one, such as '{printable(choice)}' (in eval: --data for the "
            "training part, --test for another)",
            stacklevel=4,
        )
    if found.archives and not found.paths:
        return _open_files([Path(path) for path in found.archives], account, image_key, channels)
    if found.archives and not found.classes:
        raise ValueError(
            f"{printable(folder)} has both images ({len(found.paths)}) and archives "
            f"({len(found.archives)}), and no class folders: choose by a pattern, such as "
            f"'{printable(folder)}/*{suffix_of(found.paths[0])}' or "
            f"'{printable(folder)}/*{suffix_of(found.archives[0])}'"
        )
    for path in found.archives:
        account.leave_out(suffix_of(path), path)
    if not found.paths:
        arrays = channels == 3 and account.left_out.get(".npy")
        advice = "; .npy files are read with --augmentation.channels N" if arrays else ""
        raise ValueError(
            f"no images in {folder} (looked for {', '.join(sorted(suffixes(channels)))}, and for "
            f".tar, .tfrecord and .rec files); {account.line()}{advice}"
        )
    source = FileSource(found.paths, found.labels, found.classes, "folder names")
    source.scanned = account
    return source


def _splits(names: Collection[str]) -> list[str]:
    """The names if all are parts of a data set, the training part first; else []."""
    parts = [name for name in names if name.lower() in _SPLITS]
    return sorted(parts, key=_place) if parts and len(parts) == len(names) else []


def _splits_of_archives(paths: Sequence[str]) -> list[str]:
    """The first words of the archives' names if they are several parts of a data set."""
    names = map(os.path.basename, paths)
    parts = _splits({re.split(r"[-_.0-9]", name, maxsplit=1)[0] for name in names})
    return parts if len(parts) > 1 else []


def _place(name: str) -> int:
    return _SPLITS.index(name.lower())


def _open_files(
    paths: Sequence[Path], account: Account, image_key: str | None, channels: int
) -> Source:
    for path in paths:
        if path.is_dir():
            raise ValueError(f"data must be one folder or files, got the folder {path} in a list")
        if not path.is_file():
            raise FileNotFoundError(f"no such file or folder: {printable(path)}")
    kinds = {archive_kind(path.name) for path in paths}
    if kinds != {""}:
        if len(kinds) != 1:
            found = sorted({path.suffix for path in paths})
            raise ValueError(f"all shards must have one suffix, got {', '.join(found)}")
        return ShardSource(paths, account, image_key)
    if unknown := {path.suffix.lower() for path in paths} - suffixes(channels):
        hints = {s: unread(s) or _INSTEAD.get(s) for s in sorted(unknown)}
        named = (f"{s} ({hint})" if hint else s for s, hint in hints.items())
        known = ", ".join(sorted(suffixes(channels)))
        raise ValueError(f"files must have a suffix of {known}, got {', '.join(named)}")
    source = FileSource(paths)
    source.scanned = account
    return source
