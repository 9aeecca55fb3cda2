"""Epochs of two views from JPEG files on one device: what `bench augment --device cuda` times.

A call is an epoch of a few batches. It begins and ends with empty queues. So no contender
prefetches while another is timed.
"""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from simclr_fast.benchmarks import harness
from simclr_fast.benchmarks.bench_augment import (
    HEIGHT,
    SIZE,
    WIDTH,
    jpegs,
    solo_learn_view,
    torchvision_views,
)
from simclr_fast.benchmarks.harness import Options, Table
from simclr_fast.data import pipelines
from simclr_fast.data.loader import TwoViewLoader

OURS, FLOOR = "simclr_fast, fused", "floor: decoding"
_BATCHES, _READ_AHEAD = 4, 2


def dali_epoch(
    folder: Path, batch: int, batches: int, build: Callable, options: Options
) -> Callable[[], Iterator[list[Tensor]]]:
    """Epochs of a DALI pipeline that reads files: `build(decoded)` gives its outputs."""
    from nvidia.dali import fn, pipeline_def

    gpu = options.device.type == "cuda"

    @pipeline_def(
        batch_size=batch,
        num_threads=options.threads,
        device_id=(options.device.index or 0) if gpu else None,
        seed=0,
        prefetch_queue_depth=_READ_AHEAD,
    )
    def graph():
        raw, _ = fn.readers.file(file_root=str(folder), random_shuffle=True)
        return build(fn.decoders.image(raw, device="mixed" if gpu else "cpu"))

    pipe = graph()
    pipe.build()

    def epoch() -> Iterator[list[Tensor]]:
        # Like pipe.run(), but without prefetching beyond the end of the epoch.
        for _ in range(min(_READ_AHEAD, batches)):
            pipe.schedule_run()
        for number in range(batches):
            outputs = pipe.share_outputs()
            yield [
                torch.from_dlpack(out.as_tensor()).to(options.device, copy=True) for out in outputs
            ]
            pipe.release_outputs()
            if number + _READ_AHEAD < batches:
                pipe.schedule_run()

    return epoch


def solo_learn_epoch(
    folder: Path, size: int, batch: int, batches: int, blur: bool, options: Options
) -> Callable[[], Iterator[list[Tensor]]]:
    """solo-learn's pipeline: two views."""

    def views(images):
        return tuple(solo_learn_view(images, size, blur=blur) for _ in range(2))

    return dali_epoch(folder, batch, batches, views, options)


def exhaust(epoch: Callable[[], Iterator]) -> None:
    for _ in epoch():
        pass


def ours(
    folder: Path, batch: int, options: Options, backend: str, kept: bool = False
) -> Callable[[], None]:
    """kept: as the loader does it for a set that is as small as this one; else as for a large one,
    which is decoded in every epoch."""
    most, pipelines.KEPT_ON_GPU = pipelines.KEPT_ON_GPU, pipelines.KEPT_ON_GPU if kept else 0
    try:
        loader = TwoViewLoader(
            str(folder),
            batch,
            SIZE,
            device=options.device,
            backend=backend,
            num_threads=options.threads,
        )
    finally:
        pipelines.KEPT_ON_GPU = most
    return partial(exhaust, lambda: iter(loader))


def solo_learn(folder: Path, batch: int, options: Options) -> Callable[[], None]:
    return partial(
        exhaust, solo_learn_epoch(folder, SIZE, batch, _BATCHES, blur=True, options=options)
    )


def decoding(folder: Path, batch: int, options: Options) -> Callable[[], None]:
    return partial(exhaust, dali_epoch(folder, batch, _BATCHES, lambda images: images, options))


def _decoded(folder: Path, options: Options) -> list[Tensor]:
    """Every image, uint8 [3, H, W] on the device."""
    from torchvision.io import decode_jpeg, read_file

    files = [read_file(str(path)) for path in sorted(folder.rglob("*.jpg"))]
    return decode_jpeg(files, device=options.device)


def torchvision(folder: Path, batch: int, options: Options) -> Callable[[], None]:
    transform = torchvision_views(SIZE, True, 1.0)

    def epoch() -> None:
        for image in _decoded(folder, options):
            transform(image), transform(image)

    return epoch


def kornia(folder: Path, batch: int, options: Options) -> Callable[[], None]:
    from simclr_fast.benchmarks.bench_augment import kornia_views

    views = kornia_views()

    def epoch() -> None:
        for images in torch.stack(_decoded(folder, options)).split(batch):
            pixels = images / 255
            views(pixels), views(pixels)

    return epoch


CASES = {
    OURS: partial(ours, backend="fused"),
    "simclr_fast, kept images": partial(ours, backend="fused", kept=True),
    "simclr_fast, DALI": partial(ours, backend="dali"),
    "solo-learn's DALI pipeline": solo_learn,
    "torchvision v2 on tensors": torchvision,
    "kornia": kornia,
    FLOOR: decoding,
}


def tables(options: Options, batch: int = 64) -> Iterator[Table]:
    """Milliseconds per source image: the time of an epoch divided by its images."""
    batch = batch // 4 if options.quick else batch
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        for i, file in enumerate(jpegs(batch * _BATCHES)):
            (folder / "images" / f"{i:05d}.jpg").write_bytes(file)
        steps, notes = {}, []
        for case, build in CASES.items():
            try:
                steps[case] = build(folder, batch, options)
            except ImportError as error:
                notes.append(f"{case} left out: {error}")
        if OURS not in steps:
            yield Table(f"two {SIZE}² views per {WIDTH}×{HEIGHT} JPEG", OURS, notes=notes)
            return
        times = harness.measure(steps, options.rounds, options.device)
        images = batch * _BATCHES
        title = (
            f"two {SIZE}² views per {WIDTH}×{HEIGHT} JPEG, {options.device.type}, "
            f"DALI threads {options.threads}, ms per image"
        )
        memory = harness.memory_column(steps, options.device)
        per_image = {name: [t / images for t in values] for name, values in times.items()}
        yield Table(title, OURS, {"wall": per_image}, memory, (FLOOR,), notes)
