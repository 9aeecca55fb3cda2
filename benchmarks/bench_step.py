"""Whole pretraining steps: load → augment → encoder → loss → backward → LARS, ours and two peers.

    python -m benchmarks.bench_step [--sizes 32,64] [--threads 2] [--rounds 5]

The encoder (a narrow ResNet) and projector, batch, images and number of threads are the same. The
peers are loops as their users write them: lightly's transform in a DataLoader, loss and LARS; and
solo-learn's DALI pipeline, loss formula and LARS formula. A round is an epoch of a few steps of
each contender in turn, begun with empty queues. JPEG files cut from scikit-learn's photographs.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from simclr_fast import nt_xent_loss
from simclr_fast.augment_params import Augmentation
from simclr_fast.benchmarks import harness
from simclr_fast.benchmarks.bench_augment import jpegs, solo_learn_view
from simclr_fast.benchmarks.bench_lars import SoloLearnFormula
from simclr_fast.benchmarks.harness import Options, Table
from simclr_fast.benchmarks.peers import solo_learn
from simclr_fast.data import TwoViewLoader
from simclr_fast.models import SimCLR, build_encoder, build_projector
from simclr_fast.optim import LARS, lars_param_groups

OURS = "simclr_fast"
PARTS = ("data wait", "encoder and projector", "loss", "optimizer")
TEMPERATURE, LR, DECAY = 0.5, 0.3, 1e-6
# JPEG sides for each size of view: CIFAR's and STL-10's.
_FILE_SIDE = {32: 32, 64: 96}


def _p_blur(size: int) -> float:
    """The paper leaves blur out on CIFAR, and so do the peers' configurations."""
    return 0.5 if size > 32 else 0.0


def model() -> SimCLR:
    torch.manual_seed(0)
    encoder, dim = build_encoder("resnet18", width=0.25, image_size=32, stem="cifar-stride2")
    return SimCLR(encoder, build_projector("nonlinear", dim, 128))


class Clock:
    """Milliseconds per part of the steps since the last reset."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.spent = device, dict.fromkeys(PARTS, 0.0)

    def start(self) -> None:
        self._synchronize()
        self.since = time.perf_counter()

    def lap(self, part: str) -> None:
        self._synchronize()
        now = time.perf_counter()
        self.spent[part] += 1e3 * (now - self.since)
        self.since = now

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def epoch(
    batches: Iterator,
    run: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    clock: Clock,
) -> None:
    """`run(batch, clock)` returns the loss; everything else is the same for all contenders."""
    clock.start()
    for batch in batches:
        clock.lap("data wait")
        loss = run(batch, clock)
        optimizer.zero_grad(set_to_none=True)
        clock.lap("loss")
        loss.backward()
        clock.lap("encoder and projector")
        optimizer.step()
        clock.lap("optimizer")


def ours(folder: Path, size: int, batch: int, steps: int, options: Options) -> Callable:
    loader = TwoViewLoader(
        str(folder),
        batch,
        augmentation=Augmentation(size, p_blur=_p_blur(size)),
        device=options.device,
        channels_last=True,
        num_threads=options.threads,
    )
    net = model().to(options.device, memory_format=torch.channels_last)
    optimizer = LARS(lars_param_groups(net, DECAY), LR, momentum_order="tf", norm="joint", eps=0.0)

    def run(views: tuple, clock: Clock) -> Tensor:
        _, z = net(torch.cat(views[:2]))
        clock.lap("encoder and projector")
        return nt_xent_loss(z, temperature=TEMPERATURE)

    return lambda clock: epoch(islice(iter(loader), steps), run, optimizer, clock)


def lightly_style(folder: Path, size: int, batch: int, steps: int, options: Options) -> Callable:
    from lightly.loss import NTXentLoss
    from lightly.transforms import SimCLRTransform
    from lightly.utils.lars import LARS as LightlyLARS
    from torchvision.datasets import ImageFolder

    transform = SimCLRTransform(input_size=size, gaussian_blur=_p_blur(size))
    loader = torch.utils.data.DataLoader(
        ImageFolder(folder, transform),
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=options.threads,
        persistent_workers=True,
        pin_memory=options.device.type == "cuda",
    )
    net = model().to(options.device)
    optimizer = LightlyLARS(lars_param_groups(net, DECAY), lr=LR, momentum=0.9)
    criterion = NTXentLoss(TEMPERATURE)

    def run(views: list, clock: Clock) -> Tensor:
        (view1, view2), _ = views
        z1, z2 = (net(v.to(options.device, non_blocking=True))[1] for v in (view1, view2))
        clock.lap("encoder and projector")
        return criterion(z1, z2)

    return lambda clock: epoch(islice(iter(loader), steps), run, optimizer, clock)


def solo_learn_style(folder: Path, size: int, batch: int, steps: int, options: Options) -> Callable:
    from nvidia.dali import fn, pipeline_def

    gpu = options.device.type == "cuda"

    @pipeline_def(
        batch_size=batch,
        num_threads=options.threads,
        device_id=options.device.index or 0 if gpu else None,
        seed=0,
    )
    def graph():
        raw, _ = fn.readers.file(file_root=str(folder), random_shuffle=True)
        images = fn.decoders.image(raw, device="mixed" if gpu else "cpu")
        return tuple(solo_learn_view(images, size, blur=_p_blur(size) > 0) for _ in range(2))

    pipe = graph()
    pipe.build()
    net = model().to(options.device)
    optimizer = SoloLearnFormula(lars_param_groups(net, DECAY))
    indexes = torch.arange(batch, device=options.device).repeat(2)

    def batches() -> Iterator[list[Tensor]]:
        for _ in range(steps):
            yield [
                torch.from_dlpack(out.as_tensor()).to(options.device, copy=True)
                for out in pipe.run()
            ]

    def run(views: list[Tensor], clock: Clock) -> Tensor:
        z = torch.cat([net(view)[1] for view in views])
        clock.lap("encoder and projector")
        return solo_learn(z, indexes, TEMPERATURE)

    return lambda clock: epoch(batches(), run, optimizer, clock)


CONTENDERS = {
    OURS: ours,
    "lightly-style loop": lightly_style,
    "solo-learn-style loop": solo_learn_style,
}


def write_images(folder: Path, size: int, n: int) -> Path:
    (folder / "images").mkdir(parents=True)
    for i, file in enumerate(jpegs(n, _FILE_SIDE[size], _FILE_SIDE[size])):
        (folder / "images" / f"{i:05d}.jpg").write_bytes(file)
    return folder


def tables(options: Options, sizes: tuple[int, ...] = (32, 64)) -> Iterator[Table]:
    batch, steps = (128, 3) if options.quick else (256, 4)
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            files = write_images(Path(folder) / str(size), size, batch * steps)
            yield _table(files, size, batch, steps, options)


def _table(files: Path, size: int, batch: int, steps: int, options: Options) -> Table:
    clocks: dict[str, Clock] = {}
    runs, notes = {}, []
    for name, build in CONTENDERS.items():
        try:
            run = build(files, size, batch, steps, options)
        except ImportError as error:
            notes.append(f"{name} left out: {error}")
            continue
        clock = clocks[name] = Clock(options.device)
        runs[name] = lambda run=run, clock=clock: run(clock)
    times = harness.measure(runs, options.rounds, options.device)
    flops = model_flops(size)
    facts: dict[str, dict[str, str]] = {"images/s": {}, "model GFLOP/s": {}}
    facts |= {part: {} for part in PARTS}
    facts["peak MB"] = {}
    per_step = {name: [t / steps for t in values] for name, values in times.items()}
    table = Table(
        f"pretraining step, batch {batch}, {size}×{size}, {options.threads} threads",
        OURS,
        {"step": per_step},
        facts,
        notes=notes,
    )
    for name, clock in clocks.items():
        seconds = table.median("step", name) / 1e3
        facts["images/s"][name] = f"{batch / seconds:.0f}"
        facts["model GFLOP/s"][name] = f"{2 * batch * flops / seconds / 1e9:.0f}"
        whole = sum(clock.spent.values())
        for part in PARTS:
            facts[part][name] = f"{clock.spent[part] / whole:.1%}"
        facts["peak MB"][name] = f"{peak_memory(name, files, size, batch, steps, options):.0f}"
    return table


def model_flops(size: int) -> int:
    """Multiply-adds count twice; forward and backward of one view, nothing recomputed."""
    from torch.utils.flop_counter import FlopCounterMode

    net: nn.Module = model()
    with FlopCounterMode(display=False) as counter:
        net(torch.randn(2, 3, size, size))[1].sum().backward()
    return counter.get_total_flops() // 2


def peak_memory(
    name: str, files: Path, size: int, batch: int, steps: int, options: Options
) -> float:
    """MB: peak resident set of a process that runs one epoch; on a GPU, its peak allocation.

    The workers of a DataLoader are processes of their own and are not counted.
    """
    arguments = [name, str(files), str(size), str(batch), str(steps), str(options.device)]
    program = f"from simclr_fast.benchmarks.bench_step import print_peak; print_peak(*{arguments})"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": str(options.threads)},
    )
    return float(done.stdout.split()[-1])


def print_peak(name: str, files: str, size: str, batch: str, steps: str, device: str) -> None:
    options = Options(torch.device(device), torch.get_num_threads(), 1, False)
    run = CONTENDERS[name](Path(files), int(size), int(batch), int(steps), options)
    run(Clock(options.device))
    if options.device.type == "cuda":
        print(torch.cuda.max_memory_allocated() / 1e6)
        return
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1e3)


def main() -> None:
    parser = harness.parser("bench step", __doc__)
    parser.add_argument("--sizes", default="32,64")
    given = parser.parse_args()
    options = harness.options(given)
    for table in tables(options, tuple(map(int, given.sizes.split(",")))):
        print(table.text(), "\n")


if __name__ == "__main__":
    main()
