"""Features of a frozen encoder: in memory, or in a file that is written once and mapped."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simclr_fast.augment.params import Augmentation
from simclr_fast.data.demo import cache_folder
from simclr_fast.data.loader import ImageLoader
from simclr_fast.data.sources import Source, subset
from simclr_fast.models.encoders import encode
from simclr_fast.utils.checkpoint import write_atomic
from simclr_fast.utils.extras import need
from simclr_fast.utils.locks import locked

_SECONDS_BETWEEN_SAVES = 10.0


def features(
    encoder: nn.Module,
    source: Source,
    augmentation: Augmentation,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
) -> Tensor:
    """h of every image, undistorted: float32 [n, feature_dim] on the CPU, in the source's order."""
    was_training = encoder.training
    loader = ImageLoader(source, batch_size, augmentation, channels_last=True)
    try:
        return encode(encoder, loader, torch.device(device))
    finally:
        encoder.train(was_training)


def pixels(source: Source, augmentation: Augmentation) -> Tensor:
    """Every image, undistorted, as a row of its values: float32 [n, 3·size·size]."""
    loader = ImageLoader(source, min(256, len(source)), augmentation)
    return torch.cat([images.flatten(1).clone() for images, _ in loader])


def cached_features(
    encoder: nn.Module,
    source: Source,
    augmentation: Augmentation,
    *,
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    workers: int | None = None,
    name: str = "features",
) -> Tensor:
    """`features` kept on disk: float32 [n, feature_dim], mapped read-only into memory.

    folder: of the files; by default "features" in the cache folder of the embedded data. A file's
        name is the fingerprint of weights, images and preprocessing: nothing else is ever read.
    name: on the progress bar.

    An interrupted extraction goes on where it stopped. Two processes that want the same features
    take turns. Raises ValueError if a feature is not finite: nothing is kept then.
    """
    folder = folder or cache_folder() / "features"
    path = folder / f"{fingerprint(encoder, source, augmentation)}.npy"
    if not path.exists():
        with locked(path.with_suffix(".lock")):
            if not path.exists():
                _extract(encoder, source, augmentation, path, device, batch_size, workers, name)
    # Copy-on-write: torch wants writable memory, the file never changes.
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def fingerprint(encoder: nn.Module, source: Source, augmentation: Augmentation) -> str:
    """32 hex digits that change with the weights, the module, the images or the preprocessing."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{encoder}\n{augmentation}\n".encode())
    for key, value in encoder.state_dict().items():
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    digest.update(source.fingerprint())
    return digest.hexdigest()


def _extract(
    encoder: nn.Module,
    source: Source,
    augmentation: Augmentation,
    path: Path,
    device: torch.device | str,
    batch_size: int,
    workers: int | None,
    name: str,
) -> None:
    partial, progress = path.with_suffix(".partial"), path.with_suffix(".json")
    done = json.loads(progress.read_text())["rows"] if progress.exists() else 0
    n, device = len(source), torch.device(device)
    was_training = encoder.training
    encoder.eval()
    rows = np.load(partial, mmap_mode="r+") if done else None
    rest = subset(source, np.arange(done, n)) if done else source
    loader = ImageLoader(
        rest, batch_size, augmentation, channels_last=True, device=device, num_threads=workers
    )
    saved = time.monotonic()
    try:
        with torch.inference_mode(), _bar(name, n, done) as bar:
            for images, _ in loader:
                h = encoder(images).float().cpu().numpy()
                if not np.isfinite(h).all():
                    raise ValueError("the features are not finite: the encoder has diverged")
                if rows is None:
                    rows = np.lib.format.open_memmap(
                        partial, mode="w+", dtype=np.float32, shape=(n, h.shape[1])
                    )
                rows[done : done + len(h)] = h
                done += len(h)
                bar.update(len(h))
                if time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                    _note(rows, done, progress)
                    saved = time.monotonic()
    except KeyboardInterrupt:
        if rows is not None:
            _note(rows, done, progress)
        raise
    finally:
        encoder.train(was_training)
    assert rows is not None
    rows.flush()
    partial.replace(path)
    progress.unlink(missing_ok=True)


def _note(rows: np.ndarray, done: int, progress: Path) -> None:
    """The rows reach the disk before the note that they are there."""
    assert isinstance(rows, np.memmap)
    rows.flush()
    write_atomic(progress, lambda p: p.write_text(json.dumps({"rows": done})))


def _bar(name: str, total: int, done: int) -> Any:
    return need("tqdm").tqdm(
        total=total, initial=done, unit="images", unit_scale=True, desc=name, leave=False
    )
