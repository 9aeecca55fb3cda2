"""Features of a frozen encoder: in memory, or in a file that is written once and mapped."""

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simclr_fast.augment.params import Augmentation
from simclr_fast.data.demo import cache_folder
from simclr_fast.data.loader import ImageLoader
from simclr_fast.data.sources import Source, subset
from simclr_fast.utils.checkpoint import write_json
from simclr_fast.utils.device import autocast_dtype
from simclr_fast.utils.distributed import World, all_gather_rows
from simclr_fast.utils.extras import need
from simclr_fast.utils.locks import locked

log = logging.getLogger(__name__)
_SECONDS_BETWEEN_SAVES = 10.0
# Autocast is used if it keeps the cosine similarity to float32 features above 1 minus this.
_COSINE_ERROR = 1e-3
_ALONE = World(0, 1, torch.device("cpu"))


class Inference:
    """An encoder in eval mode: images [N, 3, H, W] → float32 features [N, feature_dim].

    On the CPU it computes in float32. On GPUs it computes under autocast, and the first batch in
    float32 as well; if the two features of any image have a cosine similarity below 1 - 1e-3, all
    batches use float32.
    """

    def __init__(self, encoder: nn.Module, device: torch.device) -> None:
        self.encoder, self.device = encoder.to(device).eval(), device
        self.dtype = _autocast_dtype(device)
        self.checked = self.dtype is None
        # Of the features; 0 until a batch of any rank was computed.
        self.width = 0

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True)
        if not self.checked:
            self.checked = True
            exact = self.encoder(images).float()
            cosine = nn.functional.cosine_similarity(exact, self(images), dim=1)
            # "not all(<=)" instead of "any(>)": it also catches NaN.
            if not bool((1 - cosine <= _COSINE_ERROR).all()):
                log.info("features in float32: %s changes them too much", self.dtype)
                self.dtype = None
            return exact
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            return self.encoder(images).float()


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    return None if device.type == "cpu" else autocast_dtype("auto", device)


def features(
    encoder: nn.Module,
    source: Source,
    augmentation: Augmentation,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
) -> Tensor:
    """h of every image without augmentation, in order: float32 [n, feature_dim] on the CPU."""
    was_training, device = encoder.training, torch.device(device)
    loader = ImageLoader(source, batch_size, augmentation, channels_last=True, device=device)
    infer = Inference(encoder, device)
    try:
        with torch.no_grad():
            return torch.cat([infer(images).cpu() for images, _ in loader])
    finally:
        encoder.train(was_training)


def pixels(source: Source, augmentation: Augmentation) -> Tensor:
    """The pixels of every image without augmentation, one row each: float32 [n, 3·size·size]."""
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

    folder: where the files are; by default "features" in the cache folder of the demo data. A
        file's name is the fingerprint of weights, images and preprocessing, plus autocast's dtype
        on a GPU, so features of other weights or images are never read.
    name: the progress bar's label.

    An interrupted extraction continues where it stopped. If two processes want the same features,
    the second waits for the first.

    Raises:
        ValueError: a feature is not finite. No finished file is written then.
    """
    path = extract_features(
        encoder,
        source,
        augmentation,
        folder=folder,
        device=device,
        batch_size=batch_size,
        workers=workers,
        name=name,
    )
    # Copy-on-write: torch wants writable memory, and the file must never change.
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def extract_features(
    encoder: nn.Module,
    source: Source,
    augmentation: Augmentation,
    *,
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    workers: int | None = None,
    name: str = "features",
    world: World = _ALONE,
) -> Path:
    """Compute the file of `cached_features`, unless it exists: NumPy's float32 [n, feature_dim].

    world: ranks that share the work, each on its own device: they take the batches in turn, so the
        features have the same bits as those of one process. Only rank 0 looks at the folder.
    """
    folder = folder or cache_folder() / "features"
    name_of_file = fingerprint(encoder, source, augmentation)
    if dtype := _autocast_dtype(torch.device(device)):
        name_of_file += f"-{str(dtype).removeprefix('torch.')}"
    path = folder / f"{name_of_file}.npy"
    with ExitStack() as stack:
        if world.rank == 0 and not path.exists():
            stack.enter_context(locked(path.with_suffix(".lock")))
        if not world.share(path.exists):
            _extract(encoder, source, augmentation, path, device, batch_size, workers, name, world)
    return path


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
    world: World,
) -> None:
    partial, progress = path.with_suffix(".partial"), path.with_suffix(".json")
    n, device = len(source), torch.device(device)
    done = world.share(lambda: json.loads(progress.read_text())["rows"] if progress.exists() else 0)
    was_training = encoder.training
    infer = Inference(encoder, device)
    rows = np.load(partial, mmap_mode="r+") if done and world.rank == 0 else None
    starts = range(done, n, batch_size)
    own = [np.arange(i, min(i + batch_size, n)) for i in starts[world.rank :: world.size]]
    whole = not done and world.size == 1
    rest = source if whole else subset(source, np.concatenate([np.arange(0), *own]))
    batches: Iterator[Any] = iter(())
    if own:
        options: dict[str, Any] = {"channels_last": True, "device": device, "num_threads": workers}
        batches = iter(ImageLoader(rest, batch_size, augmentation, **options))
    saved = time.monotonic()
    try:
        with torch.inference_mode(), _bar(name, n, done, world.rank == 0) as bar:
            for round_, start in enumerate(starts[:: world.size]):
                world.mark(round_ + 1, "computing features")
                found = _of_all_ranks(infer, batches, start, n, batch_size, world)
                if world.rank != 0:
                    continue
                h = found.cpu().numpy()
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
    if world.rank == 0:
        assert rows is not None
        rows.flush()
        partial.replace(path)
        progress.unlink(missing_ok=True)


def _of_all_ranks(
    infer: Inference,
    batches: Iterator[Any],
    start: int,
    n: int,
    batch_size: int,
    world: World,
) -> Tensor:
    """The features of one batch of every rank, in order: float32 [rows, feature_dim].

    start: the first image of rank 0's batch. n: the number of all images.
    """
    own = _next_features(infer, batches) if world.rank == 0 or infer.width else None
    if world.group is None:
        assert own is not None
        return own
    if not infer.width:
        # Rank 0's first batch decides for all whether autocast is exact enough.
        width = 0 if own is None else own.size(1)
        infer.width, exact = world.share(lambda: (width, infer.dtype is None))
        infer.checked = True
        if exact:
            infer.dtype = None
        own = own if world.rank == 0 else _next_features(infer, batches)
    if own is None:
        own = torch.empty(0, infer.width, device=infer.device)
    counts = [
        min(max(n - first, 0), batch_size)
        for first in range(start, start + world.size * batch_size, batch_size)
    ]
    return all_gather_rows(own, world.group, counts)


def _next_features(infer: Inference, batches: Iterator[Any]) -> Tensor | None:
    images, _ = next(batches, (None, None))
    return None if images is None else infer(images)


def _note(rows: np.ndarray, done: int, progress: Path) -> None:
    """Record that `done` rows are computed, after those rows have reached the disk."""
    assert isinstance(rows, np.memmap)
    rows.flush()
    write_json(progress, {"rows": done}, indent=None)


def _bar(name: str, total: int, done: int, shown: bool) -> Any:
    return need("tqdm").tqdm(
        total=total,
        initial=done,
        unit="images",
        unit_scale=True,
        desc=name,
        leave=False,
        disable=not shown,
    )
