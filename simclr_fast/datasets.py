"""Data by name: "demo", "demo-grain", a data set of torchvision as NAME:ROOT, or a path."""

from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from simclr_fast.demo import CLASSES, demo_folder, grainy_images
from simclr_fast.extras import need
from simclr_fast.sources import ArraySource, DatasetSource, FileSource, Source, open_source

# torchvision's class, and its parts for training and for testing.
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


@overload
def named_source(data: str, split: Literal["train"] = "train") -> Source: ...
@overload
def named_source(data: str, split: Literal["test"]) -> Source | None: ...
def named_source(data: str, split: Literal["train", "test"] = "train") -> Source | None:
    """The images of `data`; None for the test split of a path, which has no such thing.

    NAME:ROOT, of TORCHVISION's names, is read by torchvision from where its loaders have put it;
    nothing is downloaded. For training, STL-10 means its labelled and unlabelled images, DTD and
    Flowers-102 mean their training and validation images.
    """
    if data == "demo":
        return open_source(demo_folder(split))
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
    make = getattr(need("torchvision", "train").datasets, kind)
    try:
        parts = [make(root, **part) for part in (training if split == "train" else [testing])]
    except (RuntimeError, FileNotFoundError) as error:
        raise FileNotFoundError(f"no {name} in {root!r}: {error}") from error
    files = [_files(part) for part in parts]
    if not all(files):
        (part,) = parts
        return DatasetSource(part)
    paths, labels = zip(*(pair for part in files for pair in part), strict=True)
    classes = tuple(getattr(parts[0], "classes", ()))
    return FileSource([Path(path) for path in paths], np.array(labels, np.int64), classes)


def _files(dataset: Any) -> list[tuple[str, int]]:
    """Its image files and their labels; [] where it holds pixels. Files are left to DALI."""
    if samples := getattr(dataset, "_samples", None):
        return list(samples)
    paths = getattr(dataset, "_image_files", getattr(dataset, "_images", []))
    return list(zip(paths, dataset._labels, strict=True)) if paths else []
