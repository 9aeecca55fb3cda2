"""Decode the samples of a source on the CPU, with DALI or Pillow; arrays need no decoding.

Every decoder has `run(parts)`, which yields each part with its images, in order, and reads ahead.
"""

import time
import warnings
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from simclr_fast.data.image_check import (
    channel_pixels,
    in_common_format,
    pillow_pixels,
    try_decoding,
)
from simclr_fast.data.sources import Source, evenly
from simclr_fast.utils.extras import need, require

READ_AHEAD = 2
# Where reading a file takes longer than _SLOW_READ seconds on average, as on a network file system,
# _READERS files are read at once, up to _READ_IMAGES or _READ_BYTES before they are decoded.
_SLOW_READ = 1e-3
_READERS = 32
_READ_IMAGES = 256
_READ_BYTES = 1 << 28
# If all decoded images of a data set take less than this, they are kept in memory.
_KEPT_BYTES = 1 << 30
# DALI gives a region the pixels of the whole image, except for one column at the left edge, whose
# chroma it does not interpolate.
_NARROWEST = 16
Result = TypeVar("Result")


class CorruptImageError(ValueError):
    """Images that cannot be read or decoded. samples: number in the source → the reason."""

    def __init__(self, source: Source, samples: dict[int, str]) -> None:
        self.samples = samples
        listed = "; ".join(f"{source.name(i)}: {cause}" for i, cause in samples.items())
        super().__init__(f"corrupt images: {listed}")


class Part(NamedTuple):
    """A part of one step's batch. Its samples are decoded together.

    ids: the sample numbers, int64 [n]. first: the row of the first one in the batch. last: whether
    this is the last part of the batch.
    """

    step: int
    ids: np.ndarray
    first: int = 0
    last: bool = True


class Cut(NamedTuple):
    """A region of a decoded image. pixels: uint8 [h, w, 3]. corner: its (y, x) in the image. size:
    the image's (height, width)."""

    pixels: np.ndarray
    corner: tuple[int, int]
    size: tuple[int, int]


# From sample ids [n] and image sizes [n, 2], the boxes [n, 4] that are needed of the images: y, x,
# height, width.
Regions = Callable[[np.ndarray, np.ndarray], np.ndarray]


class ImageDecoder(Protocol):
    """Decodes images to uint8 [H, W, 3], arrays or tensors; to uint8 or float32 [H, W, C] for other
    numbers of channels. Where only regions are needed, an image may be a `Cut`."""

    def run(self, parts: Iterable[Part]) -> Iterator[tuple[Part, list[Any]]]:
        """Yield each part with its images, which stay valid until the next part is requested.

        Raises:
            CorruptImageError: the next part has an image that cannot be decoded. `run` may be
                called again.
        """

    def describe(self) -> str: ...


@cache
def dali_import_error() -> ImportError | None:
    """Why DALI cannot be used; None if it can."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        return error
    return None


def image_decoder(
    source: Source, batch_size: int, num_threads: int, regions: Regions | None = None
) -> ImageDecoder:
    """The decoder for a source: that of `single_decoder`, which decodes every image only once if
    the source is small.

    batch_size: the largest number of samples in a part. regions: what is needed of the images; the
        whole images by default.
    """
    decoder = single_decoder(source, batch_size, num_threads, regions)
    return KeepingDecoder(source, decoder) if source.encoded else decoder


def single_decoder(
    source: Source, batch_size: int, num_threads: int, regions: Regions | None = None
) -> ImageDecoder:
    """DALI for files, Pillow if DALI is missing or the images are not RGB, none for pixels."""
    if not source.encoded:
        return PixelReader(source, num_threads)
    reader = FileReader(source, num_threads)
    if source.channels == 3:
        if dali_import_error() is None:
            return DaliDecoder(reader, batch_size, regions)
        _check_pillow()
    return PillowDecoder(reader)


def largest_image(source: Source, samples: int) -> int:
    """The pixels of the largest of `samples` images, evenly spaced in the source; 0 if all are
    corrupt."""

    def pixels(i: int) -> int:
        try:
            read = source.read(i)
            height, width = in_common_format(read)[1] if source.encoded else read.shape[:2]
        except (OSError, ValueError):
            return 0
        return height * width

    ids = evenly(source, samples).tolist()
    if not source.encoded:
        return max(map(pixels, ids))
    with ThreadPoolExecutor(_READERS) as pool:
        return max(pool.map(pixels, ids))


def decode_new(
    decoder: ImageDecoder, parts: Iterable[Part], known: Container[int]
) -> Iterator[tuple[Part, dict[int, Any]]]:
    """Each part with the images, by number, of those samples that are not `known`.

    The images stay valid until the next part is requested. A sample may come twice, since parts are
    read ahead.
    """
    # Parts in order, each with a part of only its new images, which may be empty.
    waiting: deque[tuple[Part, Part]] = deque()

    def new_images() -> Iterator[Part]:
        for part in parts:
            ids = np.array([i for i in part.ids.tolist() if i not in known], np.int64)
            new = part._replace(ids=ids)
            waiting.append((part, new))
            if len(ids):
                yield new

    for new, decoded in decoder.run(new_images()):
        while waiting[0][1] is not new:
            yield waiting.popleft()[0], {}
        fresh = dict(zip(new.ids.tolist(), decoded, strict=True))
        yield waiting.popleft()[0], fresh
        # Drop references to images in the decoder's memory, so that it can be freed.
        fresh.clear()
        decoded.clear()
    for part, _ in waiting:
        yield part, {}


@cache
def _check_pillow() -> None:
    require(["PIL"], also=["nvidia.dali"])
    warnings.warn(
        f"Pillow decodes the image files, since DALI cannot be imported ({dali_import_error()})",
        RuntimeWarning,
        stacklevel=6,
    )


class PixelReader:
    """Images of a source that holds pixels. num_threads: used by DALI if it makes the views."""

    def __init__(self, source: Source, num_threads: int) -> None:
        self.source, self.num_threads = source, num_threads

    def describe(self) -> str:
        return "pixels in memory"

    def run(self, parts: Iterable[Part]) -> Iterator[tuple[Part, list[np.ndarray]]]:
        for part in parts:
            yield part, self.read(part.ids)[0]

    def read(self, ids: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """The images, uint8 [H, W, 3] each (or as `as_channels` gives them), and their sizes, int64
        [n, 2].

        Raises:
            CorruptImageError: an image cannot be read. TypeError: it has another shape or dtype.
        """
        images: list[np.ndarray] = []
        corrupt: dict[int, str] = {}
        for i in ids.tolist():
            try:
                image = self.source.read(i)
            except (OSError, ValueError) as error:
                corrupt[i] = str(error)
                continue
            channels = self.source.channels
            kinds = ("uint8",) if channels == 3 else ("uint8", "float32")
            if image.dtype.name not in kinds or image.ndim != 3 or image.shape[2] != channels:
                raise TypeError(
                    f"{self.source.name(i)} must be {' or '.join(kinds)} [H, W, {channels}], got "
                    f"{image.dtype} {list(image.shape)}"
                )
            images.append(image)
        if corrupt:
            raise CorruptImageError(self.source, corrupt)
        sizes = np.array([image.shape[:2] for image in images], dtype=np.int64)
        return images, sizes.reshape(-1, 2)


class ReadAhead:
    """Reads the samples of coming parts before they are asked for, where reading is slow.

    While a network file system answers, no core is busy, so more threads read than decode. Where a
    read takes less than _SLOW_READ, they would only cost time, and nothing is read ahead.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[int, Future[Any]] = {}
        # Of the last reads. Threads add to them without a lock: a lost read does not matter.
        self._reads, self._seconds, self._bytes = 0, 0.0, 0

    def read(self, i: int) -> Any:
        """What the source has for sample i."""
        coming = self._coming.pop(i, None)
        return self._timed(i) if coming is None else coming.result()

    def parts(self, parts: Iterable[Part]) -> Iterator[Part]:
        """Yield the parts, each after its samples and those of parts after it are being read."""
        for i in list(self._coming):
            self._drop(i)
        waiting: deque[Part] = deque()
        try:
            for part in parts:
                waiting.append(part)
                if self._slow():
                    self._start(part.ids)
                while waiting and not (self._slow() and self._has_room(waiting)):
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for part in waiting:
                for i in part.ids.tolist():
                    self._drop(i)

    def _timed(self, i: int) -> Any:
        start = time.perf_counter()
        encoded = self._source.read(i)
        if self._reads >= 1000:
            self._reads, self._seconds = self._reads // 2, self._seconds / 2
            self._bytes //= 2
        self._reads += 1
        self._seconds += time.perf_counter() - start
        self._bytes += len(encoded)
        return encoded

    def _slow(self) -> bool:
        return self._seconds > _SLOW_READ * self._reads

    def _has_room(self, waiting: Iterable[Part]) -> bool:
        images = sum(len(part.ids) for part in waiting)
        return images < _READ_IMAGES and images * self._bytes < _READ_BYTES * self._reads

    def _start(self, ids: np.ndarray) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="read-ahead")
        for i in ids.tolist():
            if i not in self._coming:
                self._coming[i] = self._pool.submit(self._timed, i)

    def _drop(self, i: int) -> None:
        if coming := self._coming.pop(i, None):
            coming.cancel()


class FileReader:
    """Encoded samples of a source, read and checked by several threads."""

    def __init__(self, source: Source, num_threads: int) -> None:
        self.source, self.num_threads = source, num_threads
        self.ahead = ReadAhead(source)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="read-images")
        self._tried = np.zeros(len(source), dtype=bool)

    def read(self, ids: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """The samples' bytes in a format that DALI reads, uint8 [k] each, and sizes, int64 [n, 2].

        Raises:
            CorruptImageError: a file cannot be read or is damaged.
        """
        checked = self.finish(ids, self.start(ids, self._checked_file))
        sizes = np.array([size for _, size in checked], dtype=np.int64).reshape(-1, 2)
        return [encoded for encoded, _ in checked], sizes

    def start(self, ids: np.ndarray, work: Callable[[int], Result]) -> "list[Future[Result]]":
        """Call `work` with every id in the threads."""
        return [self._pool.submit(work, i) for i in ids.tolist()]

    def finish(self, ids: np.ndarray, futures: "list[Future[Result]]") -> list[Result]:
        """The results of `start`.

        Raises:
            CorruptImageError: `work` failed for some samples; the error has all of them.
        """
        results, corrupt = [], {}
        for i, future in zip(ids.tolist(), futures, strict=True):
            try:
                results.append(future.result())
            except (OSError, ValueError) as error:
                corrupt[i] = str(error) or type(error).__name__
        if corrupt:
            raise CorruptImageError(self.source, corrupt)
        return results

    def decoded(self, i: int) -> np.ndarray:
        """Sample i, decoded with Pillow: uint8 [H, W, 3]; or by `channel_pixels`."""
        encoded = self.ahead.read(i)
        if self.source.channels != 3:
            return channel_pixels(encoded, self.source.channels)
        return pillow_pixels(encoded)

    def check(self, ids: np.ndarray) -> None:
        """Raise CorruptImageError if one of the samples cannot be decoded."""
        if self.source.channels == 3:
            self.read(ids)
        else:
            self.finish(ids, self.start(ids, self.decoded))

    def check_again(self, ids: np.ndarray) -> None:
        """Try to decode the samples with Pillow again; raise CorruptImageError if one fails."""
        self._tried[ids] = False
        self.read(ids)

    def _checked_file(self, i: int) -> tuple[np.ndarray, tuple[int, int]]:
        encoded, size = in_common_format(self.ahead.read(i))
        if not self._tried[i]:
            try_decoding(encoded)
            self._tried[i] = True
        return encoded, size


class PillowDecoder:
    """Decodes files with Pillow in threads, READ_AHEAD parts ahead.

    The images equal those of `DaliDecoder`. A JPEG takes 1.4 times as much CPU time as with DALI.
    """

    def __init__(self, reader: FileReader) -> None:
        self.reader = reader

    def describe(self) -> str:
        channels = self.reader.source.channels
        what = "files" if channels == 3 else f"files of {channels} channels"
        how = " by Pillow" if channels == 3 else ""
        return f"{what} decoded on the CPU{how} in {self.reader.num_threads} threads"

    def run(self, parts: Iterable[Part]) -> Iterator[tuple[Part, list[np.ndarray]]]:
        ahead: deque[tuple[Part, list[Future[np.ndarray]]]] = deque()
        try:
            for part in self.reader.ahead.parts(parts):
                ahead.append((part, self.reader.start(part.ids, self.reader.decoded)))
                if len(ahead) > READ_AHEAD:
                    yield self._finish(*ahead.popleft())
            while ahead:
                yield self._finish(*ahead.popleft())
        finally:
            for _, futures in ahead:
                for future in futures:
                    future.cancel()

    def _finish(
        self, part: Part, futures: "list[Future[np.ndarray]]"
    ) -> tuple[Part, list[np.ndarray]]:
        return part, self.reader.finish(part.ids, futures)


class DaliRunner:
    """Feeds parts to a DALI pipeline, which reads ahead, and yields its outputs part by part.

    Subclasses define the pipeline (`build`), its inputs for a part (`feed`) and the conversion of
    its outputs (`unpack`).
    """

    def __init__(self, reader: FileReader | PixelReader, batch_size: int) -> None:
        self.reader, self.batch_size = reader, batch_size
        self._parts: Iterator[Part] = iter(())
        self._in_flight: deque[Part] = deque()
        self._pipeline: Any = None

    def feed(self, part: Part) -> list[Any]:
        raise NotImplementedError

    def build(self) -> Any:
        raise NotImplementedError

    def unpack(self, outputs: Any) -> list[Any]:
        raise NotImplementedError

    def run(self, parts: Iterable[Part]) -> Iterator[tuple[Part, list[Any]]]:
        if isinstance(self.reader, FileReader):
            parts = self.reader.ahead.parts(parts)
        self._parts, self._in_flight = iter(parts), deque()
        pipeline, self._pipeline = self._pipeline or self.build(), None
        while (outputs := self._next_outputs(pipeline)) is not None:
            unpacked = self.unpack(outputs)
            yield self._in_flight.popleft(), unpacked
            # Drop references to DALI's memory: the pipeline may fail next and be destroyed.
            unpacked.clear()
            del outputs
        pipeline.reset()
        # Keep the pipeline for the next run. One that was left halfway still holds old parts.
        self._pipeline = pipeline

    def next_feed(self) -> list[Any]:
        """DALI calls this for its next input. StopIteration ends the pipeline's epoch."""
        part = next(self._parts)
        fed = self.feed(part)
        self._in_flight.append(part)
        return fed

    def run_pipeline(self, pipeline: Any) -> Any:
        return pipeline.run()

    def _next_outputs(self, pipeline: Any) -> Any:
        """The next outputs, None at the end.

        If DALI fails, it does not name the image. Pillow then decodes the images in flight to find
        it.
        """
        try:
            return self.run_pipeline(pipeline)
        except StopIteration:
            return None
        except RuntimeError:
            if isinstance(self.reader, FileReader) and self._in_flight:
                self.reader.check_again(np.concatenate([part.ids for part in self._in_flight]))
            raise


class DaliDecoder(DaliRunner):
    """Decodes files with DALI on the CPU.

    regions: what is needed of the images. Pixels outside of it are not computed, and the lines of a
        JPEG below it are not even read. None, and `whole` at any time, mean the whole images.
    """

    reader: FileReader
    whole = False

    def __init__(self, reader: FileReader, batch_size: int, regions: Regions | None = None) -> None:
        super().__init__(reader, batch_size)
        self.regions = regions

    def describe(self) -> str:
        return f"files decoded on the CPU by DALI in {self.reader.num_threads} threads"

    def feed(self, part: Part) -> list[Any]:
        encoded, sizes = self.reader.read(part.ids)
        corners, ends = np.zeros_like(sizes), sizes
        if self.regions is not None and not self.whole:
            boxes = self.regions(part.ids, sizes)
            corners, ends = boxes[:, :2].copy(), boxes[:, :2] + boxes[:, 2:]
            corners[:, 1] = np.minimum(corners[:, 1], np.maximum(sizes[:, 1] - _NARROWEST, 0))
            ends[:, 1] = np.maximum(ends[:, 1], np.minimum(corners[:, 1] + _NARROWEST, sizes[:, 1]))
        return [encoded, *(x.astype(np.int32) for x in (corners, ends, sizes))]

    def build(self) -> Any:
        dali = need("nvidia.dali")
        fn, types = dali.fn, dali.types
        pipeline = dali.Pipeline(
            self.batch_size,
            self.reader.num_threads,
            # Without a device, DALI makes no CUDA context and needs no driver.
            device_id=None,
            prefetch_queue_depth=READ_AHEAD,
        )
        with pipeline:
            encoded, corners, ends, sizes = fn.external_source(
                self.next_feed, num_outputs=4, dtype=[types.UINT8, *[types.INT32] * 3]
            )
            # `in_common_format` leaves at most an orientation, which turns the image upright. The
            # region is one of the upright image.
            images = fn.decoders.image_slice(
                encoded,
                start=corners,
                end=ends,
                axis_names="HW",
                output_type=types.RGB,
                adjust_orientation=True,
            )
            pipeline.set_outputs(images, corners, sizes)
        pipeline.build()
        return pipeline

    def unpack(self, outputs: Any) -> list[np.ndarray | Cut]:
        images = [np.asarray(outputs[0].at(i)) for i in range(len(outputs[0]))]
        corners, sizes = (map(tuple, x.as_array().tolist()) for x in outputs[1:])
        return [
            image if image.shape[:2] == size else Cut(image, corner, size)
            for image, corner, size in zip(images, corners, sizes, strict=True)
        ]


class KeepingDecoder:
    """Keeps the decoded images of a small data set in memory, so that each is decoded once.

    `decoder` decodes only the images that are not in memory yet. It decodes them whole as long as
    they are kept.
    """

    def __init__(self, source: Source, decoder: ImageDecoder) -> None:
        self.source, self.decoder = source, decoder
        self._set_keeps(True)
        self._kept: dict[int, torch.Tensor] = {}
        self._kept_bytes = 0

    def describe(self) -> str:
        return self.decoder.describe()

    def run(self, parts: Iterable[Part]) -> Iterator[tuple[Part, list[Any]]]:
        if not self._keeps:
            self._kept = {}
        for part, fresh in decode_new(self.decoder, parts, self._kept):
            images = [fresh[i] if i in fresh else self._kept[i] for i in part.ids.tolist()]
            if self._keeps:
                self._keep(fresh)
            yield part, images
            images.clear()

    def _keep(self, fresh: dict[int, np.ndarray]) -> None:
        for i, image in fresh.items():
            if i not in self._kept:
                self._kept[i] = torch.from_numpy(image.copy())
                self._kept_bytes += image.nbytes
        # Estimate the size of all images from those seen. If it is too large, the images are
        # dropped when the next run starts, because parts in flight may still need them.
        self._set_keeps(self._kept_bytes * len(self.source) <= _KEPT_BYTES * len(self._kept))

    def _set_keeps(self, keeps: bool) -> None:
        self._keeps = keeps
        if isinstance(self.decoder, DaliDecoder):
            self.decoder.whole = keeps


def decode_some(source: Source, ids: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """Decode the images `ids` of a source: uint8 [H, W, 3] each, or as `as_channels` gives them."""
    decoder = image_decoder(source, len(ids), 1)
    part = Part(0, np.asarray(ids, dtype=np.int64))
    return [np.array(image) for _, images in decoder.run([part]) for image in images]
