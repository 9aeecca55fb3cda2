"""Four pipelines that make the views of a part of a batch. Device and source decide which is used.

    HostViews   a decoder and the fused op, both on the CPU. For a GPU the loader copies the views.
    KeptViews   a decoder on the CPU, once per image. The GPU keeps the pixels and makes the views.
    DaliCrops   DALI decodes, cuts and resizes on the GPU. Triton kernels do the rest.
    DaliViews   DALI does everything, on the CPU or the GPU.

`run` yields each part with its outputs. `write` turns the outputs into the part's rows of the
views: on the CPU if `on_host`, else on the loader's device.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from simclr_fast import ops
from simclr_fast.augment.dali import (
    CROP_NAMES,
    PART,
    crop_feeds,
    dali_bytes,
    feeds,
    make_crops,
    make_views,
    param_types,
)
from simclr_fast.augment.params import Augmentation, ViewParams, covering
from simclr_fast.augment.views import (
    as_tensors,
    fill_views,
    finish_crops,
    image_sizes,
    pack_params,
    runs_in_threes,
    views_at,
)
from simclr_fast.data.decode import (
    READ_AHEAD,
    Cut,
    DaliRunner,
    FileReader,
    Part,
    PixelReader,
    dali_import_error,
    decode_new,
    image_decoder,
    largest_image,
    single_decoder,
)
from simclr_fast.data.sources import Source
from simclr_fast.utils.extras import need

Backend = Literal["fused", "dali"]
# Draws the parameters of each view from sample ids [n] and image sizes [n, 2]: new ones each time.
Draw = Callable[[np.ndarray, np.ndarray], list[ViewParams]]
_SAMPLED_IMAGES = 64
# KeptViews keeps at most these bytes on the GPU. The planner counts with DALI there, which takes as
# much or more.
KEPT_ON_GPU = 1 << 30
# Pixels of a view that KeptViews makes at a time: small views in larger parts, with fewer launches.
_KEPT_PIXELS = PART * 224**2


class Pipeline(Protocol):
    """Makes the views of one part after the other."""

    on_host: bool
    part_size: int

    def run(self, parts: Iterable[Part]) -> Iterator[tuple[Part, list[Any]]]:
        """Yield each part with its outputs, which stay valid until the next part is requested."""

    def write(self, part: Part, outputs: list[Any], views: list[Tensor]) -> None:
        """Write a part's outputs into its rows of the views, [n, C, size, size] each."""

    def describe(self) -> str: ...


def make_pipeline(
    source: Source,
    rows: int,
    num_threads: int,
    augmentations: list[Augmentation],
    draw: Draw,
    device: torch.device,
    backend: Backend | None,
    *,
    dtype: torch.dtype,
    channels_last: bool,
) -> Pipeline:
    """Choose the pipeline for a device and a source.

    rows: the largest number of images per batch on this rank. augmentations: of every view. They
    differ in size and area only.
    backend: as for `TwoViewLoader`. "fused", or None, means on a GPU with Triton KeptViews for a
        small data set, and DaliCrops for other files if DALI is there; else HostViews.
    """
    size, channels = augmentations[0].size, augmentations[0].channels
    triton_on_gpu = device.type == "cuda" and ops.why_plain(device) is None
    if backend != "dali" and triton_on_gpu and _fits_on_gpu(source):
        part = min(rows, max(PART, _KEPT_PIXELS // size**2))
        return KeptViews(source, part, num_threads, augmentations, draw, device)
    if backend != "dali" and not (triton_on_gpu and _dali_on_gpu(source, device)):
        return HostViews(source, min(rows, PART), num_threads, augmentations, draw)
    if channels != 3:
        raise ValueError(f'backend="dali" needs RGB images, got channels={channels}')
    if device.type not in ("cpu", "cuda") or torch.version.hip:
        raise ValueError(f'backend="dali" needs the CPU or an NVIDIA GPU, got device {device}')
    need("nvidia.dali")
    reader = (FileReader if source.encoded else PixelReader)(source, num_threads)
    where = (reader, min(rows, dali_part(reader, size)), augmentations, draw, device)
    if backend == "dali":
        return DaliViews(*where, dtype=dtype, channels_last=channels_last)
    return DaliCrops(*where)


def _dali_on_gpu(source: Source, device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and not torch.version.hip
        and source.encoded
        and source.channels == 3
        and dali_import_error() is None
    )


def _fits_on_gpu(source: Source) -> bool:
    """Whether KeptViews can keep all images, if they are as large as the largest of a sample."""
    if source.channels != 3 or not source.repeats:
        return False
    pixels = largest_image(source, _SAMPLED_IMAGES)
    return 0 < 3 * pixels * len(source) <= KEPT_ON_GPU


def dali_part(reader: FileReader | PixelReader, size: int) -> int:
    """The number of images per part for which DALI needs no more than `dali_bytes(size)`.

    It follows from the largest image of a sample. The size of parts does not change the views, so
    it may differ between ranks.
    """
    if isinstance(reader, PixelReader):
        return PART
    pixels = max(largest_image(reader.source, _SAMPLED_IMAGES), 1)
    return max(1, min(PART, dali_bytes(size) // dali_bytes(size, pixels, 1)))


class HostViews:
    """Decodes images and makes views by the fused op, both on the CPU.

    Of an image that is not kept, only the region is decoded that its views need together.
    """

    on_host = True

    def __init__(
        self,
        source: Source,
        part_size: int,
        num_threads: int,
        augmentations: list[Augmentation],
        draw: Draw,
    ) -> None:
        self.part_size, self.augmentations, self.draw = part_size, augmentations, draw
        self.channels = augmentations[0].channels
        self.fused = self.channels == 3 or runs_in_threes(augmentations[0])
        self.decoder = image_decoder(source, part_size, num_threads, self._regions)

    def describe(self) -> str:
        how = "the fused op" if self.fused else "plain torch"
        return f"{self.decoder.describe()}; views by {how} on the CPU"

    def run(self, parts: Iterable[Part]) -> Iterator[tuple[Part, list[Any]]]:
        return self.decoder.run(parts)

    def write(self, part: Part, outputs: list[Any], views: list[Tensor]) -> None:
        pixels = [image.pixels if isinstance(image, Cut) else image for image in outputs]
        images = as_tensors(_one_dtype(pixels), self.channels)
        sizes = image_sizes(images)
        corners = np.zeros_like(sizes)
        for i, image in enumerate(outputs):
            if isinstance(image, Cut):
                corners[i], sizes[i] = image.corner, image.size
        params_of_views = self.draw(part.ids, sizes)
        for params, aug, view in zip(params_of_views, self.augmentations, views, strict=True):
            params.box[:, :2] -= corners
            fill_views(images, params, aug, view)

    def _regions(self, ids: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        return covering(self.draw(ids, sizes))


def _one_dtype(images: list[Any]) -> list[Any]:
    """Make all images floating in [0, 1] if some are. Only those that are not RGB may be."""
    tensors = [torch.as_tensor(image) for image in images]
    if len({tensor.dtype for tensor in tensors}) < 2:
        return images
    return [t if t.is_floating_point() else t.float() / 255 for t in tensors]


class KeptViews:
    """Decodes each image once, on the CPU, and keeps its pixels on a GPU, where Triton makes the
    views: equal to those of `HostViews` up to rounding."""

    on_host = False

    def __init__(
        self,
        source: Source,
        part_size: int,
        num_threads: int,
        augmentations: list[Augmentation],
        draw: Draw,
        device: torch.device,
    ) -> None:
        self.part_size, self.augmentations, self.draw = part_size, augmentations, draw
        self.device = device
        self.decoder = single_decoder(source, part_size, num_threads)
        # Pixels of some images each, uint8 [k].
        self._pixels: list[Tensor] = []
        # Of each image that is kept: its address, and the elements of a row; height and width.
        self._known: set[int] = set()
        self._where = np.zeros((2, len(source)), np.int64)
        self._sizes = np.zeros((len(source), 2), np.int64)

    def describe(self) -> str:
        once = "" if isinstance(self.decoder, PixelReader) else ", each once"
        return f"{self.decoder.describe()}{once}, kept on {self.device}; views by Triton"

    def run(self, parts: Iterable[Part]) -> Iterator[tuple[Part, list[Any]]]:
        for part, fresh in decode_new(self.decoder, parts, self._known):
            self._keep({i: image for i, image in fresh.items() if i not in self._known})
            yield part, []

    def _keep(self, images: dict[int, np.ndarray]) -> None:
        if not images:
            return
        flat = np.concatenate([image.reshape(-1) for image in images.values()])
        pixels = torch.from_numpy(flat).to(self.device)
        self._pixels.append(pixels)
        address = pixels.data_ptr()
        for i, image in images.items():
            self._where[:, i] = address, 3 * image.shape[1]
            self._sizes[i] = image.shape[:2]
            address += image.size
        self._known.update(images)

    def write(self, part: Part, outputs: list[Any], views: list[Tensor]) -> None:
        where = self._where.take(part.ids, axis=1)
        params_of_views = self.draw(part.ids, self._sizes[part.ids])
        for params, aug, view in zip(params_of_views, self.augmentations, views, strict=True):
            views_at(where, True, params, aug, view)


class DaliViews(DaliRunner):
    """Decodes and augments inside DALI. The outputs are the views, [n, 3, size, size] each.

    They lie in DALI's memory on the device, and are ordered after the work of the current stream.
    """

    on_host = False

    def __init__(
        self,
        reader: FileReader | PixelReader,
        part_size: int,
        augmentations: list[Augmentation],
        draw: Draw,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        super().__init__(reader, part_size)
        self.part_size = part_size
        self.augmentations, self.draw, self.device = augmentations, draw, device
        self.dtype, self.channels_last = dtype, channels_last

    def describe(self) -> str:
        return f"images decoded and views made by DALI on {self.device}, {self.part_size} at a time"

    def write(self, part: Part, outputs: list[Any], views: list[Tensor]) -> None:
        for made, view in zip(outputs, views, strict=True):
            view.copy_(made)

    def feed(self, part: Part) -> list[Any]:
        samples, sizes = self.reader.read(part.ids)
        views = zip(self.draw(part.ids, sizes), self.augmentations, strict=True)
        return [samples, *(f for params, aug in views for f in self.view_feeds(params, aug))]

    def view_feeds(self, params: ViewParams, aug: Augmentation) -> list[np.ndarray]:
        """The inputs of DALI's graph for one view. `view_types` gives their DALI types."""
        return feeds(params, aug)

    def view_types(self) -> list[Any]:
        return param_types(self.augmentations[0])

    def graph(self, pixels: Any, nodes: list[Any], aug: Augmentation, device: str) -> list[Any]:
        """Decoded pixels and the nodes of `view_feeds` of one view → its outputs."""
        return make_views(
            pixels,
            nodes,
            aug,
            device,
            half=self.dtype == torch.float16,
            channels_last=self.channels_last,
        )

    def build(self) -> Any:
        pipeline = self.define()
        with warnings.catch_warnings():
            # DALI warns of unused inputs: the parameters of steps with probability 0.
            warnings.filterwarnings("ignore", message=".*produces .* outputs, but")
            pipeline.build()
        return pipeline

    def define(self) -> Any:
        """Define DALI's pipeline without building it."""
        dali = need("nvidia.dali")
        fn, types = dali.fn, dali.types
        device = "gpu" if self.device.type == "cuda" else "cpu"
        view_types = self.view_types()
        kinds = [types.UINT8, *view_types * len(self.augmentations)]

        @dali.pipeline_def(enable_conditionals=True)
        def views() -> Any:
            pixels, *nodes = fn.external_source(self.next_feed, num_outputs=len(kinds), dtype=kinds)
            if isinstance(self.reader, FileReader):
                pixels = fn.decoders.image(
                    pixels,
                    device="mixed" if device == "gpu" else "cpu",
                    output_type=types.RGB,
                    # `in_common_format` leaves at most an orientation in a file.
                    adjust_orientation=True,
                    # The CPU decoder always interpolates chroma, the GPU decoder only with this.
                    jpeg_fancy_upsampling=True,
                    # Between 0 and 1, an image's place in the part would choose between two
                    # decoders, whose pixels differ a little. Then the views would depend on the
                    # batch size and on the number of ranks.
                    hw_decoder_load=0.0,
                )
            elif device == "gpu":
                pixels = pixels.gpu()
            outputs = []
            for i, aug in enumerate(self.augmentations):
                own = nodes[i * len(view_types) : (i + 1) * len(view_types)]
                outputs += self.graph(pixels, own, aug, device)
            return tuple(outputs)

        return views(
            batch_size=self.batch_size,
            num_threads=self.reader.num_threads,
            device_id=self.device.index if device == "gpu" else None,
            prefetch_queue_depth=READ_AHEAD,
            # Orders the outputs on a stream instead of waiting on the host.
            exec_dynamic=True,
        )

    def run_pipeline(self, pipeline: Any) -> Any:
        if self.device.type == "cpu":
            return pipeline.run()
        return pipeline.run(torch.cuda.current_stream(self.device))

    def unpack(self, outputs: Any) -> list[Any]:
        views = [torch.from_dlpack(view.as_tensor()) for view in outputs]
        return [v.permute(0, 3, 1, 2) if self.channels_last else v for v in views]


class DaliCrops(DaliViews):
    """Decodes, cuts and resizes inside DALI; `finish_crops` does the rest.

    An output is (crops, ints, floats) for each view, with the lifetime of the outputs of
    `DaliViews`.
    """

    def describe(self) -> str:
        return (
            f"files decoded, cut and resized by DALI on {self.device}, {self.part_size} at a time; "
            "the rest of the views by Triton"
        )

    def write(self, part: Part, outputs: list[Any], views: list[Tensor]) -> None:
        for made, aug, view in zip(outputs, self.augmentations, views, strict=True):
            crops, ints, floats = made
            finish_crops(crops, ints, floats, aug, view)

    def view_feeds(self, params: ViewParams, aug: Augmentation) -> list[np.ndarray]:
        no_flip = np.zeros(len(params), bool)
        return [*crop_feeds(params, aug, no_flip), *pack_params(params)]

    def view_types(self) -> list[Any]:
        types = need("nvidia.dali").types
        crop_types = param_types(self.augmentations[0])[: len(CROP_NAMES)]
        return [*crop_types, types.INT32, types.FLOAT]

    def graph(self, pixels: Any, nodes: list[Any], aug: Augmentation, device: str) -> list[Any]:
        *crop, ints, floats = nodes
        outputs = [*make_crops(pixels, crop, aug, device), ints, floats]
        return [node.gpu() for node in outputs] if device == "gpu" else outputs

    def unpack(self, outputs: Any) -> list[Any]:
        tensors = [torch.from_dlpack(output.as_tensor()) for output in outputs]
        return [tuple(tensors[i : i + 3]) for i in range(0, len(tensors), 3)]
