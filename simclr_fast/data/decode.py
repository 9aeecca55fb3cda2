"""Encoded images → pixels, or whole views, through one DALI pipeline that reads ahead."""

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from simclr_fast.augment.params import Augmentation, ViewParams
from simclr_fast.augment.views import pack_params
from simclr_fast.data.image_check import checked_size, in_common_format, try_decoding
from simclr_fast.data.sources import Source
from simclr_fast.utils.extras import need

_READ_AHEAD = 2
# Data sets whose decoded images take less than this together stay in memory, decoded once.
_KEPT_BYTES = 1 << 30


class CorruptImageError(ValueError):
    """Images that cannot be read or decoded. samples: number in the source → what is wrong."""

    def __init__(self, source: Source, samples: dict[int, str]) -> None:
        self.samples = samples
        listed = "; ".join(f"{source.name(i)}: {cause}" for i, cause in samples.items())
        super().__init__(f"corrupt images: {listed}")


@dataclass
class Batch:
    """A part of one step's request: sample ids int64 [n], and how to draw their parameters.

    first: its first row in the step's batch. last: whether it is the step's last part.
    """

    step: int
    ids: np.ndarray
    draw: Callable[[np.ndarray, np.ndarray], list[ViewParams]]
    first: int = 0
    last: bool = True


def import_dali() -> Any:
    return need("nvidia.dali")


class Decoder:
    """Decodes batches on the CPU: `run` gives (batch, [uint8 [H, W, 3], …]).

    Images of small data sets are kept, as tensors; only the others of a batch, which come as
    arrays, go through DALI again.
    """

    _keeps = True

    def __init__(self, source: Source, batch_size: int, num_threads: int) -> None:
        self.source, self.batch_size, self.num_threads = source, batch_size, num_threads
        self._requests: Iterator[Batch] = iter(())
        self._in_flight: deque[tuple[Batch, np.ndarray]] = deque()
        self._pipeline: Any = None
        self._kept: dict[int, torch.Tensor] = {}
        self._kept_bytes = 0
        self._tried = np.zeros(len(source), dtype=bool)
        if self._needs_dali:
            import_dali()

    @property
    def _needs_dali(self) -> bool:
        return self.source.encoded

    def run(self, requests: Iterator[Batch]) -> Iterator[tuple[Batch, list[Any]]]:
        """The outputs of one batch stay valid until the next is asked for.

        Raises CorruptImageError before a batch with such an image; a new `run` may follow.
        """
        if not self._needs_dali:
            for batch in requests:
                yield batch, self._read(batch.ids)[0]
            return
        self._requests, self._in_flight = requests, deque()
        if not self._keeps:
            self._kept = {}
        pipeline, self._pipeline = self._pipeline or self._build(self.batch_size), None
        while True:
            try:
                outputs = self._run_once(pipeline)
            except StopIteration:
                outputs = None
            except RuntimeError as error:
                if corrupt := self._find_corrupt():
                    raise CorruptImageError(self.source, corrupt) from error
                raise
            # Batches without a new image did not go through the pipeline.
            while self._in_flight and not len(self._in_flight[0][1]):
                batch, _ = self._in_flight.popleft()
                yield batch, self._with_kept(batch.ids, {})
            if outputs is None:
                break
            batch, new = self._in_flight.popleft()
            unpacked = self._complete(batch, new, self._unpack(outputs))
            yield batch, unpacked
            # DALI's memory must not be referred to when a failing pipeline is taken down.
            unpacked.clear()
            del outputs
        pipeline.reset()
        # Kept only when a whole epoch went through: a half-read pipeline holds stale batches.
        self._pipeline = pipeline

    def _complete(self, batch: Batch, new: np.ndarray, decoded: list[Any]) -> list[Any]:
        """What `run` gives of a batch of whose images only `new` were decoded now."""
        if not self._keeps and len(new) == len(batch.ids):
            return decoded
        fresh = dict(zip(new.tolist(), decoded, strict=True))
        images = self._with_kept(batch.ids, fresh)
        if self._keeps:
            added = {
                i: torch.from_numpy(image.copy())
                for i, image in fresh.items()
                if i not in self._kept
            }
            self._kept |= added
            self._kept_bytes += sum(image.nbytes for image in added.values())
            # By the mean of those seen; batches on their way may still need them in this run.
            self._keeps = self._kept_bytes * len(self.source) <= _KEPT_BYTES * len(self._kept)
        return images

    def _with_kept(self, ids: np.ndarray, fresh: dict[int, np.ndarray]) -> list[Any]:
        return [fresh[i] if i in fresh else self._kept[i] for i in ids.tolist()]

    def _read(self, ids: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """The samples' bytes or pixels, and their sizes [n, 2]."""
        samples, sizes, corrupt = [], [], {}
        for i in ids.tolist():
            try:
                sample = self.source.read(i)
                if self.source.encoded:
                    sample = in_common_format(sample)
                    size = checked_size(sample)
                elif sample.dtype != np.uint8 or sample.ndim != 3 or sample.shape[2] != 3:
                    raise TypeError(
                        f"{self.source.name(i)} must be uint8 [H, W, 3], got {sample.dtype} "
                        f"{list(sample.shape)}"
                    )
                else:
                    size = sample.shape[:2]
            except (OSError, ValueError) as error:
                corrupt[i] = str(error)
                continue
            samples.append(sample)
            sizes.append(size)
        if self.source.encoded:
            whole = [i for i in ids.tolist() if i not in corrupt]
            corrupt |= self._try(whole, samples)
        if corrupt:
            raise CorruptImageError(self.source, corrupt)
        return samples, np.array(sizes).reshape(-1, 2)

    def _feed(self, batch: Batch) -> list[Any]:
        return [self._read(batch.ids)[0]]

    def _next_feed(self) -> list[Any]:
        while True:
            batch = next(self._requests)
            new = np.array([i for i in batch.ids.tolist() if i not in self._kept], np.int64)
            feed = self._feed(replace(batch, ids=new)) if len(new) else []
            self._in_flight.append((batch, new))
            if feed:
                return feed

    def _try(self, ids: list[int], samples: list[np.ndarray]) -> dict[int, str]:
        """What is wrong with those samples that are met for the first time."""
        new = [(i, sample) for i, sample in zip(ids, samples, strict=True) if not self._tried[i]]
        if not new:
            return {}

        def cause(sample: np.ndarray) -> str | None:
            try:
                try_decoding(sample)
            except ValueError as error:
                return str(error)
            return None

        with ThreadPoolExecutor(self.num_threads) as pool:
            causes = list(pool.map(cause, [sample for _, sample in new]))
        corrupt = {i: c for (i, _), c in zip(new, causes, strict=True) if c is not None}
        self._tried[[i for i, _ in new if i not in corrupt]] = True
        return corrupt

    def _find_corrupt(self) -> dict[int, str]:
        """Which images of the batches under way Pillow finds damaged now: DALI does not say."""
        corrupt: dict[int, str] = {}
        for _, new in self._in_flight:
            ids = new.tolist()
            self._tried[ids] = False
            corrupt |= self._try(ids, [self.source.read(i) for i in ids])
        return corrupt

    def _build(self, batch_size: int) -> Any:
        dali = import_dali()
        fn, types = dali.fn, dali.types
        # device_id=None: no CUDA context, and no driver needed.
        pipeline = dali.Pipeline(
            batch_size,
            self.num_threads,
            device_id=None,
            prefetch_queue_depth=_READ_AHEAD,
        )
        with pipeline:
            (encoded,) = fn.external_source(
                self._next_feed, num_outputs=1, dtype=[types.UINT8], ndim=[1]
            )
            # As stored, like PIL's open and TensorFlow's decode_jpeg: EXIF is not looked at.
            images = fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False)
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline

    def _run_once(self, pipeline: Any) -> Any:
        return pipeline.run()

    def _unpack(self, outputs: Any) -> list[Any]:
        (images,) = outputs
        return [np.asarray(images.at(i)) for i in range(len(images))]


class DaliViews(Decoder):
    """Decodes and augments inside DALI: `run` gives (batch, [view [n, 3, size, size], …]).

    The views are DALI's memory: on the device, valid until the next batch is asked for, and ordered
    after the current stream's work by then.
    """

    _needs_dali = True
    _keeps = False

    def __init__(
        self,
        source: Source,
        batch_size: int,
        num_threads: int,
        augmentation: Augmentation,
        device: torch.device,
        n_views: int,
        *,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        super().__init__(source, batch_size, num_threads)
        self.augmentation, self.device, self.n_views = augmentation, device, n_views
        self.dtype, self.channels_last = dtype, channels_last

    def _feed(self, batch: Batch) -> list[Any]:
        samples, sizes = self._read(batch.ids)
        return [samples, *(a for p in batch.draw(batch.ids, sizes) for a in self._view_feeds(p))]

    def _view_feeds(self, params: ViewParams) -> list[np.ndarray]:
        """What one view's parameters are fed as, and `_view_types` the DALI types of it."""
        from simclr_fast.augment.dali import feeds

        return feeds(params, self.augmentation)

    def _view_types(self) -> list[Any]:
        from simclr_fast.augment.dali import param_types

        return param_types()

    def _graph(self, pixels: Any, nodes: list[Any], device: str) -> list[Any]:
        """Decoded pixels and the nodes of `_view_feeds` → the pipeline's outputs."""
        from simclr_fast.augment.dali import make_views

        types = import_dali().types
        return make_views(
            pixels,
            nodes,
            self.augmentation,
            device,
            dtype=types.FLOAT16 if self.dtype == torch.float16 else types.FLOAT,
            channels_last=self.channels_last,
        )

    def _build(self, batch_size: int) -> Any:
        pipeline = self._define(batch_size)
        with warnings.catch_warnings():
            # Parameters of steps that are switched off are fed and not used.
            warnings.filterwarnings("ignore", message=".*produces .* outputs, but")
            pipeline.build()
        return pipeline

    def _define(self, batch_size: int) -> Any:
        dali = import_dali()
        fn, types = dali.fn, dali.types
        device = "gpu" if self.device.type == "cuda" else "cpu"
        kinds = [types.UINT8, *self._view_types() * self.n_views]

        @dali.pipeline_def(enable_conditionals=True)
        def views() -> Any:
            pixels, *nodes = fn.external_source(
                self._next_feed, num_outputs=len(kinds), dtype=kinds
            )
            if self.source.encoded:
                pixels = fn.decoders.image(
                    pixels,
                    device="mixed" if device == "gpu" else "cpu",
                    output_type=types.RGB,
                    adjust_orientation=False,
                    # The CPU decoder always interpolates chroma; the GPU's must be told.
                    jpeg_fancy_upsampling=True,
                )
            elif device == "gpu":
                pixels = pixels.gpu()
            return tuple(self._graph(pixels, nodes, device))

        return views(
            batch_size=batch_size,
            num_threads=self.num_threads,
            device_id=(self.device.index or 0) if device == "gpu" else None,
            prefetch_queue_depth=_READ_AHEAD,
            # Needed for outputs in the order of a stream, without a wait on the host.
            exec_dynamic=True,
        )

    def _run_once(self, pipeline: Any) -> Any:
        if self.device.type == "cpu":
            return pipeline.run()
        return pipeline.run(torch.cuda.current_stream(self.device))

    def _unpack(self, outputs: Any) -> list[Any]:
        views = [torch.from_dlpack(view.as_tensor()) for view in outputs]
        return [v.permute(0, 3, 1, 2) if self.channels_last else v for v in views]


class DaliCrops(DaliViews):
    """Decodes, cuts and resizes inside DALI: `run` gives (batch, [(crops, ints, floats), …]).

    One triple per view, as `finish_crops` takes them; for how long, see `DaliViews`.
    """

    def _view_feeds(self, params: ViewParams) -> list[np.ndarray]:
        from simclr_fast.augment.dali import crop_feeds

        no_flip = np.zeros(len(params), bool)
        return [*crop_feeds(params, self.augmentation, no_flip), *pack_params(params)]

    def _view_types(self) -> list[Any]:
        from simclr_fast.augment.dali import CROP_NAMES, param_types

        types = import_dali().types
        return [*param_types()[: len(CROP_NAMES)], types.INT32, types.FLOAT]

    def _graph(self, pixels: Any, nodes: list[Any], device: str) -> list[Any]:
        from simclr_fast.augment.dali import make_crops

        outputs = []
        count = len(self._view_types())
        for first in range(0, len(nodes), count):
            *crop, ints, floats = nodes[first : first + count]
            (crops,) = make_crops(pixels, crop, self.augmentation, device)
            outputs += [crops, ints, floats]
        return [node.gpu() for node in outputs] if device == "gpu" else outputs

    def _unpack(self, outputs: Any) -> list[Any]:
        tensors = [torch.from_dlpack(output.as_tensor()) for output in outputs]
        return [tuple(tensors[i : i + 3]) for i in range(0, len(tensors), 3)]
