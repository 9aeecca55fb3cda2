"""Find the images that cannot be decoded before they are evaluated.

Training replaces a corrupt image by another one. An evaluation must not: it needs features and
labels of the same images, and counts the images of a class.
"""

import json
import logging
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from simclr_fast.data.account import EXAMPLES, OnError
from simclr_fast.data.decode import CorruptImageError, FileReader, PixelReader
from simclr_fast.data.demo import cache_folder
from simclr_fast.data.formats import suffixes
from simclr_fast.data.sources import Source, fingerprint, subset
from simclr_fast.utils.checkpoint import write_json
from simclr_fast.utils.device import usable_cores
from simclr_fast.utils.extras import need

log = logging.getLogger(__name__)
CORRUPT = "corrupt"
_PART = 256


def whole_images(source: Source, on_error: OnError = "skip", workers: int | None = None) -> Source:
    """The images of `source` that can be read and decoded.

    The others are logged by name and counted in the account as "corrupt". Files are checked once:
    the answer is kept in the cache folder, under the fingerprint of the images.

    on_error: with "raise" nothing is checked, and `source` is returned.
    workers: threads. By default the number of cores, at most 8.

    Raises:
        ValueError: every image is corrupt.
    """
    if on_error == "raise":
        return source
    corrupt = _corrupt_files(source, workers) if source.encoded else _corrupt(source, workers)
    if not corrupt:
        return source
    names = [source.name(i) for i in corrupt]
    for name, cause in zip(names, corrupt.values(), strict=True):
        log.warning("skipping %s: %s", name, cause)
    if len(corrupt) == len(source):
        cause = next(iter(corrupt.values()))
        raise ValueError(f"every image is corrupt, such as {names[0]}: {cause}")
    part = subset(source, np.setdiff1d(np.arange(len(source)), list(corrupt)), CORRUPT)
    part.scanned.examples[CORRUPT] = names[:EXAMPLES]
    return part


def _corrupt_files(source: Source, workers: int | None) -> dict[int, str]:
    """`_corrupt`, kept in the cache folder."""
    # What can be decoded depends on Pillow and on the packages that add formats to it.
    readers = f"{_pillow()} {sorted(suffixes(source.channels))} {source.channels}"
    key = fingerprint([source.fingerprint(), readers.encode()]).hex()
    kept = cache_folder() / "corrupt" / f"{key}.json"
    if kept.exists():
        return {int(i): cause for i, cause in json.loads(kept.read_text()).items()}
    corrupt = _corrupt(source, workers)
    write_json(kept, corrupt, indent=None)
    return corrupt


def _corrupt(source: Source, workers: int | None) -> dict[int, str]:
    """The numbers of the images that cannot be decoded, and why."""
    threads = workers or min(8, usable_cores())
    check = FileReader(source, threads).check if source.encoded else PixelReader(source, 1).read
    found: dict[int, str] = {}
    with need("tqdm").tqdm(total=len(source), unit="images", desc="checking", leave=False) as bar:
        for first in range(0, len(source), _PART):
            ids = np.arange(first, min(first + _PART, len(source)))
            try:
                check(ids)
            except CorruptImageError as error:
                found |= error.samples
            bar.update(len(ids))
    return found


def _pillow() -> str:
    try:
        return version("pillow")
    except PackageNotFoundError:
        return "none"
