"""Loaders: from a source to batches of two views, of one view, or of images without augmentation.

    for view1, view2, index in TwoViewLoader("photos/", batch_size=256, size=224): ...

Order and views depend only on (seed, epoch, sample id). So the batch over all ranks is the same for
every number of ranks and threads, and a restored loader continues bit for bit.
"""

import logging
import os
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from simclr_fast.augment.params import Augmentation, ViewParams, draw_params, draw_views, philox
from simclr_fast.data.datasets import open_source
from simclr_fast.data.decode import CorruptImageError, Part
from simclr_fast.data.pipelines import Backend, make_pipeline
from simclr_fast.data.prefetch import PinnedViews, Slot, Slots, ahead
from simclr_fast.data.sources import Source, fingerprint
from simclr_fast.utils.device import usable_cores
from simclr_fast.utils.numbers import as_int
from simclr_fast.utils.pinned import pinned_empty

__all__ = ["CorruptImageError", "ImageLoader", "OneViewLoader", "TwoViewLoader"]

log = logging.getLogger(__name__)
# Evaluation crops the central 224 of 256 pixels of each side (arXiv:2002.05709, B.5), unless its
# output has at most _SMALL pixels.
_CENTER = 224 / 256
_SMALL = 64
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ORDER_STREAM = 0x6F726465
# A filled batch: the step, the slot with the views, their number of rows, the sample ids.
_Filled = tuple[int, Slot, int, np.ndarray]


class _Loader:
    """Batches of views: their samples, their order and their device. Subclasses draw the views."""

    n_views: int

    def __init__(
        self,
        source: Any,
        batch_size: int,
        augmentation: Augmentation,
        *,
        labels: Any = None,
        image_key: str | None = None,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        backend: Backend | None = None,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        on_error: Literal["raise", "skip"] = "raise",
        num_threads: int | None = None,
        prefetch: bool | None = None,
        views_on_host: bool = False,
        small_crops: int = 0,
        small: Augmentation | None = None,
    ) -> None:
        given = locals()
        apart = ("self", "source", "augmentation", "labels", "image_key")
        self._options = {name: given[name] for name in given if name not in apart}
        self.source: Source = open_source(
            source,
            labels,
            image_key=image_key,
            on_error=on_error,
            channels=augmentation.channels,
        )
        if len(self.source) == 0:
            raise ValueError("source holds no images")
        batch_size, seed = as_int("batch_size", batch_size, 1), as_int("seed", seed)
        if drop_last and batch_size > len(self.source):
            n = len(self.source)
            raise ValueError(
                f"batch_size must be at most {n}, the number of images, got {batch_size}: for "
                f"example --batch-size {1 << n.bit_length() - 1}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size={world_size}), got {rank}")
        if batch_size < world_size:
            raise ValueError(
                f"batch_size must be at least {world_size}, the number of ranks, got {batch_size}"
            )
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        if backend not in ("fused", "dali", None):
            raise ValueError(f"backend must be 'fused', 'dali' or None, got {backend!r}")
        if dtype not in _DTYPES:
            raise TypeError(f"dtype must be {', '.join(map(str, _DTYPES))}, got {dtype}")
        self.device = _with_index(torch.device(device))
        self.batch_size, self.augmentation = batch_size, augmentation
        # Of every view. The small crops come last.
        self.augmentations = [augmentation] * (self.n_views - small_crops)
        self.augmentations += [small or augmentation] * small_crops
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.rank, self.world_size = rank, world_size
        self.dtype, self.channels_last = dtype, channels_last
        self.on_error = on_error
        self.prefetch = self.device.type == "cuda" if prefetch is None else prefetch
        self.epoch = 0
        self.skipped: set[int] = set()
        self._position = 0
        self._resumed = False
        self._names_hash: bytes | None = None
        self._pipeline = make_pipeline(
            self.source,
            self.rows,
            num_threads or min(8, usable_cores()),
            self.augmentations,
            lambda ids, sizes: self._draw(ids, sizes),
            self.device,
            backend,
            dtype=dtype,
            channels_last=channels_last,
        )
        self.place_views(views_on_host)
        self._stream: torch.cuda.Stream | None = None

    def place_views(self, on_host: bool) -> None:
        """Yield the views in pinned host memory, or on the device. Only before the first batch."""
        self.views_on_host = on_host and self.device.type == "cuda"
        self._slots = Slots(self.empty_views, self.device, self.views_on_host)
        self._pinned: PinnedViews | None = None
        if self._pipeline.on_host and not self.views_on_host and self.device.type != "cpu":
            self._pinned = PinnedViews(
                lambda: self._new_views(self._pipeline.part_size, torch.device("cpu")), self.device
            )

    def empty_views(self) -> list[Tensor]:
        """Uninitialised views, as large as those of a whole batch, where the views are yielded."""
        home = torch.device("cpu") if self.views_on_host else self.device
        return self._new_views(self.rows, home)

    def describe(self) -> str:
        """One line for a log: what decodes the images and makes the views, and where."""
        copied = f", copied to {self.device}" if self._pinned is not None else ""
        if self.views_on_host:
            copied = ", kept in host memory"
        early = ", one batch ahead" if self.prefetch else ""
        return f"{self._pipeline.describe()}{copied}{early}"

    @property
    def rows(self) -> int:
        """The largest number of images per batch on this rank."""
        return -(-self.batch_size // self.world_size)

    def __len__(self) -> int:
        n = len(self.source)
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, which determines order and views. Start at its first batch."""
        if epoch < 0:
            raise ValueError(f"epoch must be at least 0, got {epoch}")
        self.epoch, self._position, self._resumed = epoch, 0, False

    def row_counts(self) -> list[int]:
        """The rows of the last batch on every rank, in rank order, summed over the views."""
        n = min(self.batch_size, len(self.source) - (self._position - 1) * self.batch_size)
        each, more = divmod(n, self.world_size)
        return [self.n_views * (each + (rank < more)) for rank in range(self.world_size)]

    def state_dict(self) -> dict[str, Any]:
        """The loader's position. All batches that were returned count as consumed."""
        return {
            "epoch": self.epoch,
            "position": self._position,
            "seed": self.seed,
            "images": len(self.source),
            "names": self._names(),
            "batch_size": self.batch_size,
            "skipped": sorted(self.skipped),
        }

    def _names(self) -> str:
        """A hash of the images' names in order: of each the file and its folder."""
        if self._names_hash is None:
            names = (self.source.name(i) for i in range(len(self.source)))
            ends = ("/".join(name.replace(os.sep, "/").rsplit("/", 2)[-2:]) for name in names)
            self._names_hash = fingerprint(end.encode(errors="surrogateescape") for end in ends)
        return self._names_hash.hex()

    def __reduce__(self) -> Any:
        # A copy opens its own pipeline and threads, and continues from the same position.
        made_of = self.source, self.augmentation, self._options
        return _copied, (type(self), self.n_views, *made_of, self.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`. The number of ranks and threads may differ."""
        here = self.state_dict()
        for key in ("seed", "images", "batch_size"):
            if state[key] != here[key]:
                raise ValueError(
                    f"the state is from a loader with {key}={state[key]}; this one has {here[key]}"
                )
        if state.get("names", here["names"]) != here["names"]:
            raise ValueError(
                f"the state is from a loader with {state['images']} images of other names or in "
                "another order, so batches would repeat some images and miss others"
            )
        self.epoch, self._position = state["epoch"], state["position"]
        self.skipped = set(state["skipped"])
        self._resumed = True

    def _order(self) -> np.ndarray:
        n = len(self.source)
        if not self.shuffle:
            return np.arange(n)
        ids = np.arange(n, dtype=np.uint64)
        zero = np.zeros(n, dtype=np.uint64)
        words = [ids & 0xFFFFFFFF, ids >> np.uint64(32), zero + self.epoch, zero + _ORDER_STREAM]
        counter = (np.stack(words) & 0xFFFFFFFF).astype(np.uint32)
        key = np.array([self.seed & 0xFFFFFFFF, self.seed >> 32 & 0xFFFFFFFF], dtype=np.uint32)
        high, low, *_ = philox(key, counter).astype(np.uint64)
        return np.argsort(high << np.uint64(32) | low, kind="stable")

    def _batch_ids(self, order: np.ndarray, step: int) -> np.ndarray:
        """This rank's sample ids of a step. Corrupt samples are replaced.

        A replacement comes from half an epoch later, so that it is rarely in the same batch. It
        depends only on the order and on which samples are corrupt, not on when that was found.
        """
        n = len(order)
        positions = np.arange(step * self.batch_size, min((step + 1) * self.batch_size, n))
        mine = np.array_split(positions, self.world_size)[self.rank]
        ids = order[mine]
        if self.skipped:
            for k, position in enumerate(mine):
                if ids[k] in self.skipped:
                    later = (order[(position + n // 2 + j) % n] for j in range(n))
                    ids[k] = next(i for i in later if i not in self.skipped)
        return ids

    def _draw(self, ids: np.ndarray, sizes: np.ndarray) -> list[ViewParams]:
        raise NotImplementedError

    def _parts(self, order: np.ndarray, start: int) -> Iterator[Part]:
        size = self._pipeline.part_size
        for step in range(start, len(self)):
            ids = self._batch_ids(order, step)
            # No ids if the last batch is smaller than the number of ranks.
            for first in range(0, len(ids), size):
                part = ids[first : first + size]
                yield Part(step, part, first, first + size >= len(ids))

    def _batches(self, order: np.ndarray, start: int) -> Generator[_Filled]:
        """The batches from step `start` on. They are made on the current stream."""
        for part, outputs in self._pipeline.run(self._parts(order, start)):
            if part.first == 0:
                slot, ids = self._slots.fill_next(), []
            rows = part.first + len(part.ids)
            views = [view[part.first : rows] for view in slot.views]
            if self.views_on_host and not self._pipeline.on_host:
                made = self._new_views(len(part.ids), self.device)
                self._pipeline.write(part, outputs, made)
                for view, new in zip(views, made, strict=True):
                    view.copy_(new, non_blocking=True)
            elif self._pinned is None:
                self._pipeline.write(part, outputs, views)
            else:
                on_host = self._pinned.next()
                self._pipeline.write(part, outputs, [view[: len(part.ids)] for view in on_host])
                self._pinned.send(on_host, views)
            ids.append(part.ids)
            if part.last:
                slot.end()
                yield part.step, slot, rows, np.concatenate(ids)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        start = self._position if self._resumed else 0
        self._resumed = False
        order = self._order()
        self._position = start
        # The caller may have left the last epoch's loop while it held a batch.
        self._slots.take_back()
        while True:
            batches = self._batches(order, self._position)
            try:
                for step, slot, rows, ids in (
                    ahead(batches, self._on_own_stream) if self.prefetch else batches
                ):
                    self._position = step + 1
                    views = self._slots.hand_out(slot)
                    yield *(view[:rows] for view in views), torch.from_numpy(ids)
                    self._slots.take_back()
                break
            except CorruptImageError as error:
                if self.on_error == "raise":
                    raise
                for i, cause in error.samples.items():
                    log.warning("skipping %s: %s", self.source.name(i), cause)
                self.skipped |= set(error.samples)
                if len(self.skipped) == len(self.source):
                    raise ValueError("every image of the source is corrupt") from error
        self.epoch, self._position = self.epoch + 1, 0

    def _on_own_stream(self) -> AbstractContextManager[Any]:
        """A context in which a thread queues its GPU work on the loader's stream.

        All epochs share the stream, so that the work of one epoch waits for that of the one before.
        """
        if self.device.type != "cuda":
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        stack = ExitStack()
        # In a new thread the current device is GPU 0.
        stack.enter_context(torch.cuda.device(self.device))
        stack.enter_context(torch.cuda.stream(self._stream))
        return stack

    def _new_views(self, rows: int, device: torch.device) -> list[Tensor]:
        """Uninitialised views. CPU memory is pinned if the loader's device is a GPU."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        pinned = device.type == "cpu" and self.device.type == "cuda"
        make = pinned_empty if pinned else partial(torch.empty, device=device)
        return [
            make((rows, aug.channels, aug.size, aug.size), dtype=self.dtype, memory_format=layout)
            for aug in self.augmentations
        ]


def _with_index(device: torch.device) -> torch.device:
    """The device with its index. "cuda" means the current GPU, which may differ between threads."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _copied(
    kind: type[_Loader],
    n_views: int,
    source: Source,
    augmentation: Augmentation,
    options: dict[str, Any],
    state: dict[str, Any],
) -> _Loader:
    made = kind.__new__(kind)
    made.n_views = n_views
    _Loader.__init__(made, source, augmentation=augmentation, **options)
    made.load_state_dict(state)
    return made


class TwoViewLoader(_Loader):
    """Yields (view1, view2, index): two random views of each image, and the images' numbers.

    view1, view2: [N, 3, size, size] on `device`, or with augmentation.channels in place of 3;
    index: int64 [N] on the CPU, into the source.
    A batch is overwritten when the next one is requested: clone it to keep it. Each iteration is
    one epoch, with its own order and views. `set_epoch` chooses the epoch.

    source: anything that `open_source` takes: a folder, files, shards, an array, a data set.
        `labels` and `image_key` are as there, and `loader.source.account` says what was found.
    batch_size: images per step over all ranks. Each rank gets an equal share of a batch.
    size: side of the views in pixels; or pass a whole `augmentation` instead.
    device: the device of the views. "cuda" means the GPU that is current at construction.
    backend: what makes the views. `describe()` says in one line what was chosen.
        "dali": DALI does everything, on the CPU or an NVIDIA GPU.
        "fused": DALI or Pillow decodes files on the CPU, and one native op does the rest there. For
        a GPU without Triton, the views are copied from pinned memory, asynchronously. With Triton,
        all images that take up to 1 GiB are kept on the GPU when they have been decoded once, and
        kernels make the views. For more images and an NVIDIA GPU with DALI, it decodes, cuts and
        resizes on the GPU to uint8 crops, and Triton kernels do the rest. Rounding the crops to 8
        bits cuts off the bicubic overshoot of spec="simclr" before the jitter, while TensorFlow
        keeps it until the first clip. This changes a view's values by 0.1/255 on average, and one
        value in 2,000 by more than 2/255.
        Default: "fused". On a GPU, DALI's graph of operators moves six times the bytes.
    channels_last: memory format of the views. dtype: float32, float16 or bfloat16.
    on_error: "raise": a corrupt image raises `CorruptImageError`, which names it, and a damaged
        archive ValueError. "skip": the image is logged, counted in `skipped` and replaced by
        another; of the archive, what is whole is read.
    prefetch: make the next batch in a thread while this one is in use. Default: only for a GPU.
    views_on_host: for a GPU, yield the views in pinned memory of the CPU, which saves two batches
        of memory on the GPU. `LargeBatch` copies what it needs.

    Raises:
        ValueError, TypeError: an argument is out of range.
        FileNotFoundError: the path does not exist.
        ImportError: the source has files, but neither DALI nor Pillow is installed; or
            backend="dali" without DALI.
    """

    n_views = 2

    def __init__(
        self,
        source: Any,
        batch_size: int,
        size: int | None = None,
        *,
        augmentation: Augmentation | None = None,
        **options: Any,
    ) -> None:
        if augmentation is None:
            augmentation = Augmentation(size=224 if size is None else size)
        elif size is not None and size != augmentation.size:
            raise ValueError(f"size={size} contradicts augmentation.size={augmentation.size}")
        super().__init__(source, batch_size, augmentation, **options)

    def _draw(self, ids: np.ndarray, sizes: np.ndarray) -> list[ViewParams]:
        full = self.n_views - self._options["small_crops"]
        views = draw_views(self.augmentation, self.seed, self.epoch, ids, sizes, full)
        for view in range(full, self.n_views):
            aug = self.augmentations[view]
            views.append(draw_params(aug, self.seed, self.epoch, ids, view, sizes))
        return views


class MultiViewLoader(TwoViewLoader):
    """`TwoViewLoader` for any number of views: yields (view1, ..., view of n_views, index).

    The first two views are those of `TwoViewLoader`. The loss for more than two is
    `multi_view_nt_xent_loss`.

    small_crops: the number of further views, which come last and are made as `small` says, such as
        `replace(augmentation, size=96, area=(0.05, 0.14), min_covered=0)` (multi-crop,
        arXiv:2006.09882). Nothing else may differ from `augmentation`.
    """

    def __init__(
        self,
        source: Any,
        batch_size: int,
        size: int | None = None,
        *,
        n_views: int,
        small_crops: int = 0,
        small: Augmentation | None = None,
        **options: Any,
    ) -> None:
        small_crops = as_int("small_crops", small_crops, 0)
        if (small is None) != (small_crops == 0):
            raise ValueError(
                f"small_crops and small go together, got small_crops={small_crops}, small={small}"
            )
        self.n_views = as_int("n_views", n_views, 2) + small_crops
        aug = options.get("augmentation") or Augmentation(size=224 if size is None else size)
        own: dict[str, Any] = {"size": aug.size, "area": aug.area, "min_covered": aug.min_covered}
        if small is not None and replace(small, **own) != aug:
            raise ValueError(
                "small may differ from the augmentation in size, area and min_covered, got "
                f"{small} and {aug}"
            )
        super().__init__(source, batch_size, size, small_crops=small_crops, small=small, **options)


class OneViewLoader(_Loader):
    """Yields (view, index): one random view of each image, for training a classifier.

    Arguments as for `TwoViewLoader`; `augmentation` is required.
    """

    n_views = 1

    def _draw(self, ids: np.ndarray, sizes: np.ndarray) -> list[ViewParams]:
        return [draw_params(self.augmentation, self.seed, self.epoch, ids, 0, sizes)]


class ImageLoader(_Loader):
    """Yields (images, index) in order, without augmentation, for evaluation.

    images: [n, C, size, size], n ≤ batch_size. For size > 64 the central square, 7/8 of the shorter
    side, is resized; for smaller sizes the whole image (the protocol for CIFAR). Arguments as for
    `TwoViewLoader`.
    """

    n_views = 1

    def __init__(
        self, source: Any, batch_size: int, augmentation: Augmentation, **options: Any
    ) -> None:
        plain = Augmentation(
            size=augmentation.size,
            spec=augmentation.spec,
            interpolation=augmentation.interpolation,
            mean=augmentation.mean,
            std=augmentation.std,
            channels=augmentation.channels,
            p_flip=0,
            p_jitter=0,
            p_gray=0,
            p_blur=0,
        )
        super().__init__(source, batch_size, plain, shuffle=False, drop_last=False, **options)

    def _draw(self, ids: np.ndarray, sizes: np.ndarray) -> list[ViewParams]:
        params = draw_params(self.augmentation, 0, 0, ids, 0, sizes)
        if self.augmentation.size > _SMALL:
            side = np.maximum(np.rint(sizes.min(axis=1, keepdims=True) * _CENTER), 1)
            side = np.repeat(side, 2, axis=1)
        else:
            side = sizes
        params.box = np.concatenate([(sizes - side) // 2, side], axis=1).astype(np.int32)
        return [params]
