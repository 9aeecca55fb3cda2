"""Data and settings for pretraining runs of a second or two."""

from pathlib import Path

import numpy as np
from PIL import Image

from simclr_fast.augment.params import Augmentation
from simclr_fast.training.config import PretrainConfig

# Options of the command `pretrain`, for runs in processes of their own.
TINY_OPTIONS = {
    "preset": "demo",
    "width": 0.125,
    "augmentation.size": 16,
    "batch-size": 8,
    "log-every": 1,
    "device": "cpu",
    "precision": "float32",
    "workers": 1,
}
TINY = PretrainConfig(
    model="resnet10",
    width=0.125,
    augmentation=Augmentation(size=16),
    batch_size=8,
    warmup_epochs=1,
    log_every=1,
    device="cpu",
    # The same numbers on every CPU.
    precision="float32",
    workers=1,
)


def write_photos(folder: Path, count: int, classes: int = 2) -> Path:
    """Write `count` JPEG files of noise, 24×24, in turn to `classes` folders."""
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)
        path = folder / f"class{i % classes}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder
