"""Two 224² views per 500×375 JPEG, and per 32×32 array, beside the peers; CPU milliseconds.

    python -m benchmarks.bench_augment [--images 24] [--rounds 9] [--only torchvision_pil] [--flush]

All run in one process with one thread each, in turns. The tables show CPU time per source image
(process_time also counts DALI's threads) and wall time. The JPEGs are cut from scikit-learn's two
photographs. A note names the peers that are not installed.

With --device cuda, the peers and ours run epochs of files on the GPU (`augment_epochs.py`).

The corners of torchvision's 23×23 blur kernel are denormal numbers. On Intel CPUs each product with
one costs a hundred cycles or more. DALI's blur has some denormals as well, ours hardly any. So
there are two tables of JPEGs. In the first, denormals are kept, which is torch's default and what
users have. In the second they are flushed to zero (torch.set_flush_denormal), which favours the
peers.
"""

import io
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms import v2

from simclr_fast.augment.params import (
    Augmentation,
    ViewParams,
    covering,
    draw_params,
    draw_views,
)
from simclr_fast.augment.views import SimCLRViews, apply_views
from simclr_fast.benchmarks import harness
from simclr_fast.benchmarks.harness import Options, Table

SIZE, HEIGHT, WIDTH, CIFAR = 224, 375, 500, 32


def jpegs(n: int, width: int = WIDTH, height: int = HEIGHT) -> list[bytes]:
    """n natural images, cut from scikit-learn's two photographs."""
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(load_sample_image(f"{k}.jpg")) for k in ("china", "flower")]
    files = []
    for i in range(n):
        scale = rng.uniform(0.79, 1.0)
        w, h = int(WIDTH * scale * 1.27), int(HEIGHT * scale * 1.13)
        w, h = min(w, 640), min(h, 427)
        x, y = rng.integers(0, 640 - w + 1), rng.integers(0, 427 - h + 1)
        crop = photographs[i % 2].crop((x, y, x + w, y + h)).resize((width, height), Image.BICUBIC)
        buffer = io.BytesIO()
        crop.save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def pipeline(build: Callable, source: Callable, n: int, count: int, dtypes: list):
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(
        batch_size=n,
        num_threads=1,
        device_id=None,
        enable_conditionals=True,
        prefetch_queue_depth=1,
        exec_dynamic=False,
    )
    def graph():
        nodes = fn.external_source(source, batch=True, num_outputs=count, dtype=dtypes)
        return tuple(build(*nodes))

    pipe = graph()
    pipe.build()
    return pipe


def encoded(files: list[bytes]) -> list[np.ndarray]:
    return [np.frombuffer(f, np.uint8) for f in files]


def regions(views: list[ViewParams]) -> list[np.ndarray]:
    """Where the region begins and ends that the views of each image need: int32 [n, 2] each."""
    boxes = covering(views)
    # DALI takes only contiguous arrays.
    return [boxes[:, :2].copy(), boxes[:, :2] + boxes[:, 2:]]


def region_decoder(source: Callable, n: int) -> Callable:
    """source: gives n files, and where the region of each begins and ends."""
    from nvidia.dali import fn, types

    def build(files, start, end):
        return (fn.decoders.image_slice(files, start=start, end=end, axis_names="HW"),)

    return pipeline(build, source, n, 3, [types.UINT8, types.INT32, types.INT32]).run


def decode_only(files: list[bytes]) -> Callable:
    """What ours decodes: the regions that two views need."""
    raw, aug, n = encoded(files), Augmentation(SIZE), len(files)
    sizes = np.tile([[HEIGHT, WIDTH]], (n, 1))
    drawn = (draw_views(aug, 0, epoch, np.arange(n), sizes) for epoch in range(16))
    needed = itertools.cycle([regions(views) for views in drawn])
    return region_decoder(lambda: [raw, *next(needed)], n)


def fused(files: list[bytes]) -> Callable:
    raw, aug, n = encoded(files), Augmentation(SIZE), len(files)
    sizes = np.tile([[HEIGHT, WIDTH]], (n, 1))
    outs = [torch.empty(n, 3, SIZE, SIZE) for _ in range(2)]
    epoch = iter(range(2**31))
    drawn: deque[list[ViewParams]] = deque()

    def source() -> list:
        drawn.append(draw_views(aug, 0, next(epoch), np.arange(n), sizes))
        return [raw, *regions(drawn[-1])]

    decode = region_decoder(source, n)

    def step() -> None:
        (decoded,) = decode()
        images = [torch.from_dlpack(decoded[i]) for i in range(n)]
        views = drawn.popleft()
        corners = covering(views)[:, :2]
        for params, out in zip(views, outs, strict=True):
            params.box[:, :2] -= corners
            apply_views(images, params, aug, out=out)

    return step


def dali_only(files: list[bytes]) -> Callable:
    from nvidia.dali import fn, types

    from simclr_fast.augment import dali as dali_views

    raw, aug, n = encoded(files), Augmentation(SIZE), len(files)
    sizes = np.tile([[HEIGHT, WIDTH]], (n, 1))
    epoch = iter(range(2**31))

    def source() -> list:
        number = next(epoch)
        params = [draw_params(aug, 0, number, np.arange(n), view, sizes) for view in (0, 1)]
        return [raw, *(f for p in params for f in dali_views.feeds(p, aug))]

    def build(raw_node, *nodes):
        return dali_views.make_views(fn.decoders.image(raw_node), list(nodes), aug, "cpu")

    kinds = [types.UINT8, *dali_views.param_types(aug) * 2]
    return pipeline(build, source, n, len(kinds), kinds).run


def solo_learn_view(x, size: int, blur: bool = True):
    """The operators and blends of solo-learn's DALI pipeline: color_twist, one blur of 23 taps."""
    from nvidia.dali import fn, types

    def coin(p):
        return fn.cast(fn.random.coin_flip(probability=p), dtype=types.FLOAT)

    def blend(p, yes, no):
        c = coin(p)
        return fn.cast(c * yes + (1 - c) * no, dtype=types.UINT8)

    x = fn.random_resized_crop(
        x, size=[size, size], random_area=[0.08, 1.0], interp_type=types.INTERP_CUBIC
    )
    jittered = fn.color_twist(
        x,
        brightness=fn.random.uniform(range=[0.2, 1.8]),
        contrast=fn.random.uniform(range=[0.2, 1.8]),
        saturation=fn.random.uniform(range=[0.2, 1.8]),
        hue=fn.random.uniform(range=[-72.0, 72.0]),
    )
    x = blend(0.8, jittered, x)
    gray = fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)
    x = blend(0.2, fn.cat(gray, gray, gray, axis=2), x)
    if blur:
        blurred = fn.gaussian_blur(x, window_size=23, sigma=fn.random.uniform(range=[0.1, 2.0]))
        x = blend(0.5, blurred, x)
    return fn.crop_mirror_normalize(
        x,
        mirror=fn.random.coin_flip(),
        mean=[0.485 * 255, 0.456 * 255, 0.406 * 255],
        std=[0.229 * 255, 0.224 * 255, 0.225 * 255],
        dtype=types.FLOAT,
        output_layout="CHW",
    )


def solo_learn(files: list[bytes]) -> Callable:
    from nvidia.dali import fn, types

    raw = encoded(files)

    def build(raw_node):
        images = fn.decoders.image(raw_node)
        return solo_learn_view(images, SIZE), solo_learn_view(images, SIZE)

    return pipeline(build, lambda: [raw], len(files), 1, [types.UINT8]).run


def torchvision_views(size: int, blur: bool, jitter: float) -> v2.Compose:
    steps = [
        v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomApply(
            [v2.ColorJitter(0.8 * jitter, 0.8 * jitter, 0.8 * jitter, 0.2 * jitter)], p=0.8
        ),
        v2.RandomGrayscale(0.2),
    ]
    if blur:
        steps.append(v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], p=0.5))
    return v2.Compose([*steps, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


def torchvision_pil(files: list[bytes]) -> Callable:
    transform = torchvision_views(SIZE, True, 1.0)

    def step() -> None:
        for f in files:
            image = Image.open(io.BytesIO(f)).convert("RGB")
            transform(image), transform(image)

    return step


def torchvision_tensor(files: list[bytes]) -> Callable:
    from torchvision.io import decode_jpeg

    transform = torchvision_views(SIZE, True, 1.0)
    raw = [torch.frombuffer(bytearray(f), dtype=torch.uint8) for f in files]

    def step() -> None:
        for f in raw:
            image = decode_jpeg(f)
            transform(image), transform(image)

    return step


def lightly(files: list[bytes]) -> Callable:
    from lightly.transforms import SimCLRTransform

    transform = SimCLRTransform(input_size=SIZE)

    def step() -> None:
        for f in files:
            transform(Image.open(io.BytesIO(f)).convert("RGB"))

    return step


def kornia_views() -> torch.nn.Module:
    import kornia.augmentation as K

    return torch.nn.Sequential(
        K.RandomResizedCrop((SIZE, SIZE), scale=(0.08, 1.0), resample="bicubic"),
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((23, 23), (0.1, 2.0), p=0.5),
    )


def kornia(files: list[bytes]) -> Callable:
    views = kornia_views()

    def step() -> None:
        images = [np.array(Image.open(io.BytesIO(f)).convert("RGB")) for f in files]
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
        views(batch), views(batch)

    return step


def small_ours(batch: torch.Tensor) -> Callable:
    views = SimCLRViews(CIFAR, s=0.5, p_blur=0.0)
    return lambda: views(batch)


def small_torchvision(batch: torch.Tensor) -> Callable:
    transform = torchvision_views(CIFAR, False, 0.5)
    return lambda: [(transform(image), transform(image)) for image in batch]


JPEG_CASES = (
    decode_only,
    fused,
    dali_only,
    solo_learn,
    torchvision_pil,
    torchvision_tensor,
    lightly,
    kornia,
)
SMALL_CASES = (small_ours, small_torchvision)


def measure(steps: dict[str, Callable], images: int, rounds: int) -> dict[str, dict]:
    """CPU and wall milliseconds per source image of each round, interleaved, after a warm-up."""
    times: dict[str, dict] = {"CPU": {n: [] for n in steps}, "wall": {n: [] for n in steps}}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            cpu, wall = time.process_time(), time.perf_counter()
            step()
            times["CPU"][name].append((time.process_time() - cpu) / images * 1e3)
            times["wall"][name].append((time.perf_counter() - wall) / images * 1e3)
    return times


def tables(
    options: Options,
    images: int = 24,
    only: frozenset[str] = frozenset(),
    modes: tuple[bool, ...] = (False, True),
) -> Iterator[Table]:
    """Milliseconds per source image. only: cases beside ours; all by default. modes: of flushing
    denormals. One thread each."""
    if options.device.type == "cuda":
        from simclr_fast.benchmarks import augment_epochs

        yield from augment_epochs.tables(options)
        return
    torch.set_num_threads(1)
    files = jpegs(8 if options.quick else images)
    batch = torch.randint(256, (256, 3, CIFAR, CIFAR), dtype=torch.uint8)
    jpeg, small = f"two {SIZE}² views per {WIDTH}×{HEIGHT} JPEG", f"two {CIFAR}² views per array"
    plans = [
        (f"{jpeg}, denormals {'flushed' if flush else 'kept'}", JPEG_CASES, files, fused, flush)
        for flush in modes
    ]
    for title, cases, data, ours, flush in [*plans, (small, SMALL_CASES, batch, small_ours, False)]:
        chosen = [c for c in cases if not only or c.__name__ in only]
        if not chosen:
            continue
        # DALI's threads inherit the mode of the thread that starts them.
        torch.set_flush_denormal(flush)
        try:
            steps, notes = {}, []
            for case in dict.fromkeys([ours, *chosen]):
                try:
                    steps[case.__name__] = case(data)
                except ImportError as error:
                    notes.append(f"{case.__name__} left out: {error}")
            if ours.__name__ not in steps:
                yield Table(title, ours.__name__, notes=notes)
                continue
            times = measure(steps, len(data), options.rounds)
            memory = harness.memory_column(steps, options.device)
        finally:
            torch.set_flush_denormal(False)
        yield Table(title, ours.__name__, times, memory, ("decode_only",), notes)


@dataclass(frozen=True)
class CommandLine(harness.CommandLine):
    images: int = 24
    """Images in a round."""
    only: tuple[str, ...] = ()
    """Names of the cases to time; by default all."""
    flush: bool = False
    """Time only with denormal numbers flushed to zero."""


def main() -> None:
    given = harness.parse(CommandLine, "bench_augment", __doc__)
    modes = (True,) if given.flush else (False, True)
    for table in tables(given.options(), given.images, frozenset(given.only), modes):
        print(table.text(), "\n", flush=True)


if __name__ == "__main__":
    main()
