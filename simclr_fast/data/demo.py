"""The demo data: Fashion-MNIST garments, each in a random tint on a random background.

The images are a fixed, class-balanced part of Fashion-MNIST (Xiao, Rasul, Vollgraf 2017,
arXiv:1708.07747, MIT licence, notice in assets/): the first 600 training and the first 100 test
images of every class, packed in one file. `demo_folder` writes them as JPEG files, one folder per
class. Tint and background do not depend on the class. So colour identifies an image but says
nothing about its class. SimCLR's colour distortion exists to remove this shortcut
(arXiv:2002.05709, 3.1).
"""

import lzma
import os
import shutil
import tempfile
from importlib.resources import files
from pathlib import Path

import numpy as np

from simclr_fast.utils.extras import need

CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)
PER_CLASS = {"train": 600, "test": 100}
# "demo-held-out" keeps this many training images of each class for comparing recipes.
HELD_OUT = 100
SIZE = 32
_SIDE = 28
# The least distance of tint and background in RGB, from 0 to 1, that leaves the garment visible.
_MIN_DISTANCE = 0.25
# The grain changes brightness, from 0 to 1, by at most this.
_GRAIN = 0.1
_ASSET = "fashion_mnist_7000.xz"
# Part of the folder's name. Raise it when the images of a seed change.
_VERSION = 2


def demo_garments(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The grey garments of `split` ("train" or "test").

    Returns:
        images: uint8 [n, 28, 28], 0 = background; labels: int64 [n], sorted, indices of CLASSES.
    """
    if split not in PER_CLASS:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    packed = lzma.decompress((files("simclr_fast") / "assets" / _ASSET).read_bytes())
    pixels = np.frombuffer(packed, np.uint8).reshape(-1, _SIDE, _SIDE)
    n_train = PER_CLASS["train"] * len(CLASSES)
    images = pixels[:n_train] if split == "train" else pixels[n_train:]
    return images, np.repeat(np.arange(len(CLASSES)), PER_CLASS[split])


def demo_images(split: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The coloured images of `split`: uint8 [n, 32, 32, 3], and labels int64 [n]."""
    garments, labels = demo_garments(split)
    rng = np.random.Generator(np.random.Philox(key=[seed, len(garments)]))
    gray = np.zeros((len(garments), SIZE, SIZE, 1))
    margin = (SIZE - _SIDE) // 2
    gray[:, margin:-margin, margin:-margin, 0] = garments / 255.0
    tint, background = _colour_pairs(rng, len(garments))
    colour = gray * tint[:, None, None] + (1 - gray) * background[:, None, None]
    return np.round(colour * 255).astype(np.uint8), labels


def grainy_images(split: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`demo_images` with the grain of a photograph: random brightness, smooth over 2 pixels.

    Figure 5 of the paper (arXiv:2002.05709, 3.1) needs such a grain. In photographs, fine detail
    identifies an image whatever its colours and says nothing about its class. If views are not
    cropped, both have the same detail in the same place. `demo_images` have no detail except the
    garment, so uncropped views can only be matched by the garment.
    """
    image = need("PIL.Image")
    images, labels = demo_images(split, seed)
    rng = np.random.Generator(np.random.Philox(key=[seed, len(images) + 1]))
    steps = rng.integers(0, 256, (len(images), SIZE // 2, SIZE // 2), dtype=np.uint8)
    for pixels, coarse in zip(images, steps, strict=True):
        smooth = image.fromarray(coarse).resize((SIZE, SIZE), image.Resampling.BICUBIC)
        grain = (np.asarray(smooth)[..., None] - 127.5) * (2 * _GRAIN)
        pixels[:] = np.round((pixels + grain).clip(0, 255))
    return images, labels


def _colour_pairs(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """n tints and n backgrounds, float [n, 3] in [0, 1], far enough apart to see the garment."""
    pairs = rng.random((n, 2, 3))
    while (close := np.linalg.norm(pairs[:, 0] - pairs[:, 1], axis=1) < _MIN_DISTANCE).any():
        pairs[close] = rng.random((close.sum(), 2, 3))
    return pairs[:, 0], pairs[:, 1]


def cache_folder() -> Path:
    """The folder for generated data: $SIMCLR_FAST_CACHE, or simclr_fast in $XDG_CACHE_HOME or
    ~/.cache."""
    if explicit := os.environ.get("SIMCLR_FAST_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "simclr_fast"


def demo_folder(split: str, seed: int = 0) -> Path:
    """The folder with one subfolder of JPEG files per class. The first call writes it.

    Raises:
        ImportError: Pillow, which writes the files, is missing.
    """
    target = cache_folder() / f"demo-v{_VERSION}-seed{seed}" / split
    if target.is_dir():
        return target
    image_module = need("PIL.Image")
    images, labels = demo_images(split, seed)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{split}-", dir=target.parent))
    try:
        for name in CLASSES:
            (unfinished / name).mkdir()
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = unfinished / CLASSES[label] / f"{i:05d}.jpg"
            image_module.fromarray(image).save(path, quality=95, subsampling=0)
        unfinished.rename(target)
    except OSError:
        # Another process may have written the same folder first. Anything else is an error.
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def pack(idx_folder: Path) -> None:
    """Rebuild the packed file from the four IDX files of Fashion-MNIST (for maintainers)."""
    import gzip

    chosen = []
    for stem, split in (("train", "train"), ("t10k", "test")):
        raw = gzip.decompress((idx_folder / f"{stem}-images-idx3-ubyte.gz").read_bytes())
        images = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, _SIDE, _SIDE)
        raw = gzip.decompress((idx_folder / f"{stem}-labels-idx1-ubyte.gz").read_bytes())
        labels = np.frombuffer(raw, np.uint8, offset=8)
        for label in range(len(CLASSES)):
            chosen.append(images[labels == label][: PER_CLASS[split]])
    # A pixel is predicted best from the byte before it: four literal context bits, no alignment.
    lzma2 = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}
    packed = lzma.compress(np.concatenate(chosen).tobytes(), filters=[lzma2])
    (Path(__file__).parents[1] / "assets" / _ASSET).write_bytes(packed)


if __name__ == "__main__":
    import sys

    pack(Path(sys.argv[1]))
