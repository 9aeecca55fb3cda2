"""The images of a protocol: class-balanced parts, lists of file names, training and test sets."""

from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from simclr_fast.data.account import OnError
from simclr_fast.data.datasets import named_source
from simclr_fast.data.labels import normal_path
from simclr_fast.data.sources import Source
from simclr_fast.data.whole import whole_images

UNLABELLED_CLASS = "unlabelled"


def balanced_subset(labels: np.ndarray, fraction: float, seed: int = 0) -> np.ndarray:
    """Sorted indices of `fraction` of every class, at least one image of each: int64 [m].

    For the same seed, a smaller fraction is a part of a larger one.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    labels = np.asarray(labels)
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels):
        mine = rng.permutation(np.flatnonzero(labels == label))
        chosen.append(mine[: max(round(fraction * len(mine)), 1)])
    return np.sort(np.concatenate(chosen))


def listed_subset(source: Source, listing: Path) -> np.ndarray:
    """Sorted indices of the images that a file lists, one file name per line: int64 [m].

    A line is a file's name, with or without folders. imagenet_subsets/1percent.txt and
    10percent.txt of google-research/simclr are such lists.

    Raises:
        ValueError: the list is empty, or the source lacks a name or has it twice.
    """
    wanted = listing.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    names = [normal_path(line) for line in wanted if line.strip()]
    if not names:
        raise ValueError(f"no names in {listing}")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{listing} lists {twice} twice")
    where: dict[str, list[int]] = {}
    depths = {len(PurePath(name).parts) for name in names}
    for i in range(len(source)):
        parts = PurePath(normal_path(source.path(i))).parts
        for depth in depths:
            where.setdefault("/".join(parts[-depth:]), []).append(i)
    if missing := [name for name in names if name not in where]:
        raise ValueError(
            f"{len(missing)} of the {len(names)} names in {listing} are not in the data; the first "
            f"is {missing[0]}"
        )
    if double := [name for name in names if len(where[name]) > 1]:
        raise ValueError(
            f"{listing}: the data has {len(where[double[0]])} images named {double[0]}"
        )
    return np.sort(np.array([where[name][0] for name in names], dtype=np.int64))


@dataclass(frozen=True)
class LabelledPair:
    """Training and test images; labels: int64 [n] and [m], indices of classes."""

    train: Source
    train_labels: np.ndarray
    test: Source
    test_labels: np.ndarray
    classes: tuple[str, ...]


def labelled_pair(data: str, test: str | None, **opening: Any) -> LabelledPair:
    """Training and test images that have labels.

    data: the training images, as for `named_source`.
    test: the test images; by default the test split of `data`. If `test` itself has a test split,
        that split is used.
    opening: `labels`, `image_key` and `on_error` of `named_source`, for both. With
        on_error="skip", images that cannot be decoded are left out, and so are their labels.
    Images labelled -1 (STL-10's unlabelled ones) are left out.

    Raises:
        ValueError: there are no test images, they are the training images, labels are missing, or
            there are test images of a class without training images.
    """
    on_error = opening.get("on_error", "raise")
    train, labels = _labelled(named_source(data, **opening), data, on_error)
    given = _test_source(test, opening) if test else named_source(data, "test", **opening)
    if given is None:
        raise ValueError(f"{data!r} has no test split: pass --test")
    if test and given.fingerprint() == train.fingerprint():
        raise ValueError(f"--test {test!r} holds the training images: give other images")
    tested, test_labels = _labelled(given, test or data, on_error)
    if train.classes and tested.classes and train.classes != tested.classes:
        if only := sorted(set(tested.classes) - set(train.classes)):
            raise ValueError(
                f"{test} has classes without training images in {data}: {', '.join(only[:5])}"
            )
        # Classes without test images: their numbers are those of the training images.
        number = {name: i for i, name in enumerate(train.classes)}
        test_labels = np.array([number[name] for name in tested.classes])[test_labels]
    classes = train.classes or tuple(str(i) for i in range(int(labels.max()) + 1))
    if int(test_labels.max()) >= len(classes):
        raise ValueError(
            f"{test or data} has label {int(test_labels.max())}, but {data} has only "
            f"{len(classes)} classes"
        )
    return LabelledPair(train, labels, tested, test_labels, classes)


def shown_source(data: str, test: str | None, **opening: Any) -> Source:
    """The images to show: those of `test`, else the test split of `data`, else `data`."""
    return _test_source(test or data, opening)


def labels_or_none(source: Source) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels and classes to show: images without labels are of a class of their own, the last."""
    if source.labels is None or not source.has_labels:
        return np.zeros(len(source), np.int64), ("image",)
    classes = source.classes or tuple(str(i) for i in range(int(source.labels.max()) + 1))
    if (source.labels >= 0).all():
        return source.labels, classes
    return np.where(source.labels < 0, len(classes), source.labels), (*classes, UNLABELLED_CLASS)


def _test_source(data: str, opening: dict[str, Any]) -> Source:
    return named_source(data, "test", **opening) or named_source(data, **opening)


def _labelled(source: Source, name: str, on_error: OnError) -> tuple[Source, np.ndarray]:
    known = whole_images(source.labelled(f"{name!r} has no labels"), on_error)
    assert known.labels is not None
    return known, known.labels
