"""Whole pretraining steps: load → augment → forward → loss → backward → LARS, ours and two peers.

    python -m benchmarks.bench_step [--sizes 32 64] [--model resnet10] [--batch 256] [--threads 2]

The encoder (a narrow ResNet), projector, batch, images and number of threads are the same. The
peers are loops as their users write them. The lightly-style loop has lightly's transform in a
DataLoader, its loss and its LARS. The solo-learn-style loop has its DALI pipeline and the formulas
of its loss and its LARS. In each round every contender runs one epoch of a few steps, in turn.
Queues are empty at the start and at the end of an epoch, so that no contender prefetches while
another is timed.
The images are JPEG files cut from scikit-learn's photographs.

No loop can be faster than the floors: forward and backward of the encoder on a batch in memory,
once in our memory format (channels last) and once in the peers' (contiguous, view by view).
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from simclr_fast import nt_xent_loss
from simclr_fast.augment.params import Augmentation
from simclr_fast.benchmarks import harness, machine
from simclr_fast.benchmarks.augment_epochs import exhaust, solo_learn_epoch
from simclr_fast.benchmarks.bench_augment import jpegs
from simclr_fast.benchmarks.bench_lars import SoloLearnFormula
from simclr_fast.benchmarks.harness import Options, Table
from simclr_fast.benchmarks.peers import solo_learn
from simclr_fast.data.loader import TwoViewLoader
from simclr_fast.models.encoders import SimCLR, build_encoder, build_projector
from simclr_fast.models.fused_norms import fused_norms
from simclr_fast.optim.lars import LARS, lars_param_groups
from simclr_fast.utils.device import keep_freed_memory

OURS = "simclr_fast"
FLOOR, PEERS_FLOOR = "floor: the encoder alone", "floor: the encoder alone, as the peers call it"
PARTS = ("data wait", "forward", "loss", "backward", "optimizer")
TEMPERATURE, LR, DECAY = 0.5, 0.3, 1e-6
# JPEG sides for each size of view: CIFAR's and STL-10's.
_FILE_SIDE = {32: 32, 64: 96}


def _p_blur(size: int) -> float:
    """The blur's probability: 0 at 32 pixels, as in the paper's and the peers' CIFAR recipes."""
    return 0.5 if size > 32 else 0.0


def model(name: str) -> SimCLR:
    """A ResNet of a quarter of the width with the demo's stem; resnet10 is the demo's encoder."""
    torch.manual_seed(0)
    encoder, dim = build_encoder(name, width=0.25, image_size=32, stem="cifar-stride2")
    return SimCLR(encoder, build_projector("nonlinear", dim, 128))


@dataclass(frozen=True)
class Case:
    """folder: JPEG files; size: of the views; batch: images a step; steps: in an epoch."""

    folder: Path
    size: int
    batch: int
    steps: int
    model: str


class Clock:
    """Milliseconds per part of each epoch. A part lasts from the end of the part before to its own.

    On a GPU these are CUDA events on the stream; the host does not wait for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.epochs: list[dict[str, float]] = []

    def start(self) -> None:
        self.marks: list[tuple[str, float | torch.cuda.Event]] = [("", self._now())]

    def lap(self, part: str) -> None:
        self.marks.append((part, self._now()))

    def stop(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        spent = dict.fromkeys(PARTS, 0.0)
        for (_, start), (part, end) in zip(self.marks, self.marks[1:], strict=False):
            spent[part] += self._between(start, end)
        self.epochs.append(spent)

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def _between(start, end) -> float:
        return 1e3 * (end - start) if isinstance(end, float) else start.elapsed_time(end)


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


class Loop:
    """A contender: `batches()` of an epoch, `forward(batch)` → z of both views, `criterion(z)`.

    half: the dtype of autocast for the forward pass and the loss, or None.
    """

    half: torch.dtype | None = None

    def __init__(
        self,
        batches: Callable[[], Iterator],
        forward: Callable[..., Tensor],
        criterion: Callable[[Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.batches, self.forward = batches, forward
        self.criterion, self.optimizer = criterion, optimizer

    def epoch(self, clock: Clock) -> None:
        """The loss's backward stops at z, so that it can be timed apart from the encoder's."""
        clock.start()
        for batch in self.batches():
            clock.lap("data wait")
            with autocast(clock.device, self.half):
                z = self.forward(batch)
            clock.lap("forward")
            self.optimizer.zero_grad(set_to_none=True)
            leaf = z.detach().requires_grad_()
            with autocast(clock.device, self.half):
                loss = self.criterion(leaf)
            loss.backward()
            clock.lap("loss")
            z.backward(leaf.grad)
            clock.lap("backward")
            self.optimizer.step()
            clock.lap("optimizer")
        clock.lap("data wait")
        clock.stop()


def ours(case: Case, options: Options) -> Loop:
    loader = TwoViewLoader(
        str(case.folder),
        case.batch,
        augmentation=Augmentation(case.size, p_blur=_p_blur(case.size)),
        device=options.device,
        channels_last=True,
        num_threads=options.threads,
    )
    net = model(case.model).to(options.device, memory_format=torch.channels_last)
    optimizer = LARS(lars_param_groups(net, DECAY), LR, momentum_order="tf", norm="joint", eps=0.0)

    def forward(views: list[Tensor]) -> Tensor:
        with fused_norms(net):
            z: Tensor = net(torch.cat(views[:2]))[1]
        return z

    return Loop(
        lambda: iter(loader),
        forward,
        lambda z: nt_xent_loss(z, temperature=TEMPERATURE),
        optimizer,
    )


def lightly_style(case: Case, options: Options) -> Loop:
    from lightly.loss import NTXentLoss
    from lightly.transforms import SimCLRTransform
    from lightly.utils.lars import LARS as LightlyLARS
    from torchvision.datasets import ImageFolder

    transform = SimCLRTransform(input_size=case.size, gaussian_blur=_p_blur(case.size))
    loader = torch.utils.data.DataLoader(
        ImageFolder(case.folder, transform),
        case.batch,
        shuffle=True,
        drop_last=True,
        num_workers=options.threads,
        persistent_workers=True,
        pin_memory=options.device.type == "cuda",
    )
    net = model(case.model).to(options.device)
    criterion = NTXentLoss(TEMPERATURE)

    def forward(batch: list) -> Tensor:
        views, _ = batch
        return torch.cat([net(v.to(options.device, non_blocking=True))[1] for v in views])

    return Loop(
        lambda: iter(loader),
        forward,
        lambda z: criterion(*z.chunk(2)),
        LightlyLARS(lars_param_groups(net, DECAY), lr=LR, momentum=0.9),
    )


def solo_learn_style(case: Case, options: Options) -> Loop:
    net = model(case.model).to(options.device)
    indexes = torch.arange(case.batch, device=options.device).repeat(2)
    batches = solo_learn_epoch(
        case.folder, case.size, case.batch, case.steps, _p_blur(case.size) > 0, options
    )
    return Loop(
        batches,
        lambda views: torch.cat([net(view)[1] for view in views]),
        lambda z: solo_learn(z, indexes, TEMPERATURE),
        SoloLearnFormula(lars_param_groups(net, DECAY)),
    )


CONTENDERS = {
    OURS: ours,
    "lightly-style loop": lightly_style,
    "solo-learn-style loop": solo_learn_style,
}


def encoder_alone(
    case: Case, options: Options, ours: bool, half: torch.dtype | None = None
) -> Callable[[], None]:
    """Forward and backward of both views of a batch that is already in memory.

    ours: one call for both views, with fused batch norms on the CPU.
    """
    layout = torch.channels_last if ours else torch.contiguous_format
    net = model(case.model).to(options.device, memory_format=layout)
    views = torch.randn(2 * case.batch, 3, case.size, case.size, device=options.device)
    views = views.contiguous(memory_format=layout)
    upstream = torch.randn(2 * case.batch, 128, device=options.device)

    def step() -> None:
        net.zero_grad(set_to_none=True)
        calls = [views] if ours else views.chunk(2)
        with autocast(options.device, half), fused_norms(net) if ours else nullcontext():
            z = torch.cat([net(v)[1] for v in calls])
        z.backward(upstream.to(z.dtype))

    return step


def write_images(folder: Path, size: int, n: int) -> Path:
    (folder / "images").mkdir(parents=True)
    for i, file in enumerate(jpegs(n, _FILE_SIDE[size], _FILE_SIDE[size])):
        (folder / "images" / f"{i:05d}.jpg").write_bytes(file)
    return folder


def tables(
    options: Options,
    sizes: tuple[int, ...] = (32, 64),
    batch: int = 256,
    name: str = "resnet10",
) -> Iterator[Table]:
    """A table per size of view; `batch` images a step, a quarter of them when quick.

    With options.half a second one, where that is the dtype of autocast. The peers may keep float32.
    """
    batch, steps = (max(batch // 4, 1), 3) if options.quick else (batch, 4)
    if options.device.type == "cpu":
        # As `pretrain` does; all contenders gain by it.
        keep_freed_memory()
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            files = write_images(Path(folder) / str(size), size, batch * steps)
            case = Case(files, size, batch, steps, name)
            yield _table(case, options)
            if options.half is not None:
                yield _table(case, options, options.half)


def _table(case: Case, options: Options, half: torch.dtype | None = None) -> Table:
    steps, batch = case.steps, case.batch
    loops: dict[str, Loop] = {}
    model_flops = 2 * batch * flops_per_view(case)
    notes = [f"Model: {model_flops / 1e9:.4g} GFLOP a step, multiply-adds counted twice."]
    for name, build in CONTENDERS.items():
        try:
            loops[name] = build(case, options)
        except ImportError as error:
            notes.append(f"{name} left out: {error}")
    for name, loop in loops.items():
        loop.half = half if name == OURS else _faster_dtype(loop, half, options.device)
        if half is not None:
            notes.append(f"{name}: autocast to {_name(loop.half)}.")
    title = (
        f"pretraining step, {case.model}, width 1/4, batch {batch}, {case.size}×{case.size}, "
        f"{_name(half)}, {options.device.type}, threads {options.threads}"
    )
    if OURS not in loops:
        return Table(title, OURS, notes=notes)
    clocks = {name: Clock(options.device) for name in loops}
    epochs: dict[str, Callable[[], object]] = {
        name: partial(loop.epoch, clocks[name]) for name, loop in loops.items()
    }
    floors = {
        FLOOR: partial(repeat, encoder_alone(case, options, True, half), steps),
        PEERS_FLOOR: partial(repeat, encoder_alone(case, options, False, half), steps),
    }
    times = harness.measure(epochs | floors, options.rounds, options.device)
    shares = {name: parts(clocks[name].epochs[-options.rounds :]) for name in loops}
    loading = harness.measure(
        {name: partial(exhaust, loop.batches) for name, loop in loops.items()},
        options.rounds,
        options.device,
    )
    per_step = {name: [t / steps for t in values] for name, values in times.items()}
    facts: dict[str, dict[str, str]] = {
        name: {} for name in ("images/s", "views/s", "model GFLOP/s", "hardware GFLOP/s", *PARTS)
    }
    facts["loading alone ms"] = {n: f"{median(v) / steps:.3g}" for n, v in loading.items()}
    facts |= harness.memory_column(epochs, options.device)
    table = Table(title, OURS, {"step": per_step}, facts, (FLOOR, PEERS_FLOOR), notes)
    for name, loop in loops.items():
        seconds = table.median("step", name) / 1e3
        facts["images/s"][name] = f"{batch / seconds:.0f}"
        facts["views/s"][name] = f"{2 * batch / seconds:.0f}"
        facts["model GFLOP/s"][name] = f"{model_flops / seconds / 1e9:.3g}"
        facts["hardware GFLOP/s"][name] = f"{hardware_flops(loop) / seconds / 1e9:.3g}"
        for part in PARTS:
            facts[part][name] = f"{shares[name][part]:.1%}"
    other = 1 - table.ratio("step", FLOOR)
    notes.append(f"Share of our step beyond the encoder alone: {other:.1%}.")
    return table


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype or torch.float32).removeprefix("torch.")


def _faster_dtype(loop: Loop, half: torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """Whether a peer's epochs are faster with autocast to `half`, or without: half or None."""
    if half is None:
        return None

    def epoch(dtype: torch.dtype | None) -> None:
        loop.half = dtype
        loop.epoch(Clock(device))

    dtypes = {_name(dtype): dtype for dtype in (half, None)}
    steps = {name: partial(epoch, dtype) for name, dtype in dtypes.items()}
    return dtypes[harness.fastest(steps, device)]


def repeat(step: Callable[[], object], times: int) -> None:
    for _ in range(times):
        step()


def parts(epochs: list[dict[str, float]]) -> dict[str, float]:
    """The share of each part in the time of all epochs."""
    whole = sum(sum(epoch.values()) for epoch in epochs)
    return {part: sum(epoch[part] for epoch in epochs) / whole for part in PARTS}


def flops_per_view(case: Case) -> int:
    """FLOPs of the model's forward and backward for one view, without recomputation and loss."""
    net: nn.Module = model(case.model)
    with FlopCounterMode(display=False) as counter:
        net(torch.randn(2, 3, case.size, case.size))[1].sum().backward()
    return counter.get_total_flops() // 2


def hardware_flops(loop: Loop) -> int:
    """FLOPs of all that a step of this loop computes, recomputation and the loss included.

    Convolutions and matrix products count, and the products inside our loss's kernels: the forward
    forms half of the 2N × 2N logits; the backward needs 1.5 products of that size, or one where
    the forward kept the exponentials.
    """

    def square(z_shape, *_, out_shape=None, **__) -> int:
        rows, dim = z_shape
        return rows * rows * dim

    def backward(grad, mean, u_all, *rest, out_shape=None, **__) -> int:
        kept = rest[-1]
        return (2 if kept and kept[0] else 3) * square(u_all)

    ours = {torch.ops.simclr_fast.nt_xent: square, torch.ops.simclr_fast.nt_xent_backward: backward}
    total = 0
    for batch in loop.batches():
        if not total:
            with FlopCounterMode(display=False, custom_mapping=ours) as counter:
                loop.criterion(loop.forward(batch)).backward()
            total = counter.get_total_flops()
    return total


@dataclass(frozen=True)
class CommandLine(harness.CommandLine):
    sizes: tuple[int, ...] = (32, 64)
    """Pixels of a view: a table for each."""
    batch: int = 256
    """Images in a step."""
    model: str = "resnet10"
    """resnet10, resnet18, ..., with a fourth of the channels."""


def main() -> None:
    given = harness.parse(CommandLine, "bench_step", __doc__)
    options = given.options()
    print(machine.text(machine.floors(options)), "\n")
    for table in tables(options, given.sizes, given.batch, given.model):
        print(table.text(), "\n", flush=True)


if __name__ == "__main__":
    main()
