"""Data by name: "demo", "demo-grain", "cifar10:ROOT", "stl10:ROOT", or a path."""

from typing import Literal, overload

from simclr_fast.demo import CLASSES, demo_folder, grainy_images
from simclr_fast.extras import need
from simclr_fast.sources import ArraySource, DatasetSource, Source, open_source


@overload
def named_source(data: str, split: Literal["train"] = "train") -> Source: ...
@overload
def named_source(data: str, split: Literal["test"]) -> Source | None: ...
def named_source(data: str, split: Literal["train", "test"] = "train") -> Source | None:
    """The images of `data`; None for the test split of a path, which has no such thing.

    cifar10:ROOT and stl10:ROOT are read by torchvision from where its loaders have put them (for
    training, STL-10 means its labelled and unlabelled images); nothing is downloaded.
    """
    if data == "demo":
        return open_source(demo_folder(split))
    if data == "demo-grain":
        source = ArraySource(*grainy_images(split))
        source.classes = CLASSES
        return source
    name, _, root = data.partition(":")
    if name in ("cifar10", "stl10") and root:
        datasets = need("torchvision", "train").datasets
        try:
            if name == "cifar10":
                return DatasetSource(datasets.CIFAR10(root, train=split == "train"))
            part = "train+unlabeled" if split == "train" else "test"
            return DatasetSource(datasets.STL10(root, split=part))
        except RuntimeError as error:
            raise FileNotFoundError(f"no {name} in {root!r}: {error}") from error
    return open_source(data) if split == "train" else None
