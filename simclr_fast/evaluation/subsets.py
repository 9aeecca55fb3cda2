"""Which training images a protocol may see: class-balanced parts, and lists of file names."""

from pathlib import Path, PurePath

import numpy as np

from simclr_fast.sources import Source


def balanced_subset(labels: np.ndarray, fraction: float, seed: int = 0) -> np.ndarray:
    """Sorted indices of `fraction` of every class, at least one image of each: int64 [m].

    The images of a class are ranked once per seed: a smaller fraction is a part of a larger one.
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

    A line is a file's name, with or without folders: google-research/simclr's
    imagenet_subsets/1percent.txt and 10percent.txt are such lists.

    Raises:
        ValueError: a name that the source does not have or has twice, or an empty list.
    """
    wanted = listing.read_text().split("\n")
    names = [line.strip() for line in wanted if line.strip()]
    if not names:
        raise ValueError(f"no names in {listing}")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{listing} lists {twice} twice")
    where: dict[str, list[int]] = {}
    depths = {len(PurePath(name).parts) for name in names}
    for i in range(len(source)):
        # Shards name a record SHARD:KEY.
        parts = PurePath(source.name(i).rpartition(":")[2]).parts
        for depth in depths:
            where.setdefault("/".join(parts[-depth:]), []).append(i)
    if missing := [name for name in names if name not in where]:
        raise ValueError(
            f"{len(missing)} of the {len(names)} names in {listing} are not in the data, "
            f"{missing[0]} first"
        )
    if double := [name for name in names if len(where[name]) > 1]:
        raise ValueError(f"{listing}: {double[0]} is {len(where[double[0]])} images of the data")
    return np.sort(np.array([where[name][0] for name in names], dtype=np.int64))
