"""Milliseconds per step of our LARS and of other LARS optimizers.

    python -m benchmarks.bench_lars [--models resnet50 vit_b_16 small overhead] [--busy 2]

All optimizers run in one process and take one step each in turn, on the same parameters and
gradients. Lower bounds are timed in the same turns: reading weights and gradients once, moving the
five arrays that any SGD with momentum must move, and on the CPU moving what LARS must move. It
needs the norms of a whole tensor before it can change the first weight. So it reads weights and
gradients twice from memory where they exceed the second-level caches.

`overhead` is ResNet-50 with one element per tensor, so it shows the cost of a call. "cold" means
taking turns, so that data of the others fill the caches. "warm" repeats the steps of one optimizer,
with new gradient tensors each time, as a backward pass makes them. --busy starts that many
processes that compute at the same time.
"""

import contextlib
import inspect
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from simclr_fast.benchmarks import harness, machine
from simclr_fast.benchmarks.harness import Options, Table
from simclr_fast.optim.lars import LARS

WEIGHT_DECAY, MOMENTUM, LR = 1e-6, 0.9, 0.1
MODELS = ("resnet50", "vit_b_16", "small", "overhead")
OURS = "simclr_fast"
FLOORS = ("floor: read p and g", "floor: five arrays", "floor: five arrays, p and g again")
# NVIDIA's data sheets, bytes per second.
GPUS = {"A100 80GB": 2.039e12, "H100 SXM": 3.35e12, "B200": 8.0e12}

Step = Callable[[], object]


def shapes_of(model: str) -> list[tuple[int, ...]]:
    if model == "small":
        return [(64 + 7 * (i % 100),) if i % 2 else (16, 16 + i % 50) for i in range(2000)]
    if model == "overhead":
        return [(1,) * len(shape) for shape in shapes_of("resnet50")]
    import torchvision

    builder = {"resnet50": torchvision.models.resnet50, "vit_b_16": torchvision.models.vit_b_16}
    if model not in builder:
        raise ValueError(f"models must be among {MODELS}, got {model!r}")
    with torch.device("meta"):
        return [tuple(p.shape) for p in builder[model]().parameters()]


def parameters(shapes: list[tuple[int, ...]], device: torch.device) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.randn(shape, device=device) * 0.05) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 0.01
    return params


def groups(params: list[nn.Parameter], **excluded: bool) -> list[dict]:
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0, **excluded},
    ]


def trust(p: Tensor, g: Tensor, decay: float, coefficient: float) -> Tensor | None:
    w_norm, g_norm = p.norm(), g.norm()
    if w_norm == 0 or g_norm == 0:
        return None
    return coefficient * w_norm / (g_norm + decay * w_norm + 1e-8)


class SoloLearnFormula(torch.optim.Optimizer):
    """One tensor at a time, branching on the host, as solo-learn does."""

    def __init__(self, params: list[dict]):
        super().__init__(params, {"weight_decay": 0.0})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            decay = group["weight_decay"]
            for p in group["params"]:
                d = p.grad
                ratio = trust(p, d, decay, 1e-3) if p.ndim > 1 else None
                if ratio is not None:
                    d = d.add(p, alpha=decay).mul_(ratio)
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = d.clone()
                else:
                    state["momentum_buffer"].mul_(MOMENTUM).add_(d)
                p.add_(state["momentum_buffer"], alpha=-LR)


class LarcStyle:
    """A wrapper that scales the gradients in place and then calls SGD, as apex's LARC does."""

    def __init__(self, params: list[dict]):
        self.sgd = torch.optim.SGD(params, lr=LR, momentum=MOMENTUM)

    @torch.no_grad()
    def step(self) -> None:
        decays = [group["weight_decay"] for group in self.sgd.param_groups]
        for group, decay in zip(self.sgd.param_groups, decays, strict=True):
            group["weight_decay"] = 0.0
            for p in group["params"]:
                if (ratio := trust(p, p.grad, decay, 0.02)) is not None:
                    p.grad.add_(p, alpha=decay).mul_(torch.clamp(ratio / LR, max=1.0))
        self.sgd.step()
        for group, decay in zip(self.sgd.param_groups, decays, strict=True):
            group["weight_decay"] = decay


def warm(steps: dict[str, Step], params: list[nn.Parameter], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a step: the median of nine in a row of the same optimizer."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            row = []
            for _ in range(9):
                for p in params:
                    p.grad = torch.full_like(p, 0.01)
                start = time.perf_counter()
                step()
                row.append(1e3 * (time.perf_counter() - start))
            times[name].append(statistics.median(row))
    return times


def contenders(params: list[nn.Parameter], compiled: bool, notes: list[str]) -> dict[str, Step]:
    kwargs = {"lr": LR, "momentum": MOMENTUM}
    steps: dict[str, Step] = {
        OURS: LARS(groups(params, adapt=False), **kwargs).step,
        "simclr_fast foreach": LARS(groups(params, adapt=False), foreach=True, **kwargs).step,
        "SGD fused": torch.optim.SGD(groups(params), fused=True, **kwargs).step,
        "solo-learn's formula": SoloLearnFormula(groups(params)).step,
        "LARC-style wrapper": LarcStyle(groups(params)).step,
    }
    try:
        from lightly.utils.lars import LARS as LightlyLARS
    except ImportError:
        notes.append("lightly is not installed and left out.")
    else:
        steps["lightly"] = LightlyLARS(groups(params), **kwargs).step
    try:
        from timm.optim.lars import Lars
    except ImportError:
        notes.append("timm is not installed and left out.")
    else:
        if "foreach" in inspect.signature(Lars).parameters:
            for name, foreach in (("timm foreach", True), ("timm loop", False)):
                steps[name] = Lars(groups(params), foreach=foreach, **kwargs).step
            if compiled:
                step = Lars(groups(params), foreach=True, **kwargs).step
                steps["torch.compile(timm foreach)"] = torch.compile(step)
        else:
            # Until timm 1.0.29.
            steps["timm loop"] = Lars(groups(params), **kwargs).step
            notes.append("this timm has no foreach.")
    return steps


def floors(shapes: list[tuple[int, ...]], device: torch.device) -> dict[str, Step]:
    sizes = [torch.Size(shape).numel() for shape in shapes]
    a, b, c = (torch.randn(sum(sizes), device=device) for _ in range(3))

    def read(count: int) -> None:
        torch.dot(a[:count], b[:count])

    def five_arrays() -> None:
        torch.add(a, b, out=a)
        c.neg_()

    found: list[Step] = [lambda: read(sum(sizes)), five_arrays]
    twice = read_twice(sizes) if device.type == "cpu" else None
    if twice is not None:
        found.append(lambda: (five_arrays(), read(twice)))
    return dict(zip(FLOORS, found, strict=False))


def read_twice(sizes: list[int]) -> int | None:
    """How many float32 weights the caches of all threads do not keep beside their gradients.

    None where the size of the caches is not known.
    """
    if not (cache := machine.second_level_cache()):
        return None
    kept = cache * torch.get_num_threads() // (2 * 4)
    return sum(max(size - kept, 0) for size in sizes)


@contextlib.contextmanager
def load(processes: int) -> Iterator[None]:
    """Runs other processes that compute at the same time."""
    program = "import torch\nx = torch.randn(512, 512)\nwhile True: x = (x @ x).clamp(-1, 1)"
    running = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def tables(
    options: Options,
    models: tuple[str, ...] = MODELS,
    compiled: bool = False,
    busy: int = 0,
) -> Iterator[Table]:
    """A table per model. compiled: also timm's under torch.compile (a minute). busy: as --busy."""
    for model in models[:1] if options.quick else models:
        shapes, notes = shapes_of(model), []
        elements = sum(torch.Size(shape).numel() for shape in shapes)
        params = parameters(shapes, options.device)
        steps, bounds = contenders(params, compiled, notes), {}
        if model != "overhead":
            bounds = floors(shapes, options.device)
        with load(busy):
            cold = harness.measure(steps | bounds, options.rounds, options.device)
            times = {"step": cold}
            if model == "overhead":
                times = {"warm": warm(steps, params, options.rounds), "cold": cold}
        title = (
            f"LARS step, {model}: {len(shapes)} tensors, {elements / 1e6:.3g} M float32, "
            f"{options.device.type}, threads {options.threads}, busy processes {busy}"
        )
        facts: dict[str, dict[str, str]] = {}
        for column, values in times.items():
            least = {name: min(values[name]) for name in values}
            facts[f"{column}, least ms"] = {name: f"{least[name]:.3g}" for name in least}
            facts[f"{column}, × ours, least"] = {
                name: f"{least[name] / least[OURS]:.2f}" for name in least
            }
        facts |= harness.memory_column(steps, options.device)
        if FLOORS[2] in bounds:
            twice = read_twice([torch.Size(shape).numel() for shape in shapes]) or 0
            notes.append(
                f"LARS moves at least {5 + 2 * twice / elements:.2f} arrays: for its norms "
                f"{twice / elements:.0%} of p and g are read once more, as they exceed the caches."
            )
        if options.device.type == "cpu" and elements > 1e6:
            notes.append(prediction(elements))
        yield Table(title, OURS, times, facts, tuple(bounds), notes)


def prediction(elements: int) -> str:
    """A step moves seven arrays; five where the last-level cache keeps weights and gradients."""
    low, high = 5 * 4 * elements, 7 * 4 * elements
    times = (
        f"{name} {1e6 * low / rate:.0f} to {1e6 * high / rate:.0f} µs"
        for name, rate in GPUS.items()
    )
    return (
        f"Predicted on GPUs: two launches, {low / 1e6:.0f} to {high / 1e6:.0f} MB a step; with the "
        f"data sheet's bandwidth {', '.join(times)}."
    )


@dataclass(frozen=True)
class CommandLine(harness.CommandLine):
    models: tuple[Literal["resnet50", "vit_b_16", "small", "overhead"], ...] = ("resnet50",)
    """Models whose parameters are updated. small: 2,000 small tensors. overhead: 161 tensors of one
    element, which show what a call costs apart from the arithmetic."""
    busy: int = 0
    """Processes that compute meanwhile."""
    compile: bool = False
    """Time timm's under torch.compile too, which takes a minute."""


def main() -> None:
    given = harness.parse(CommandLine, "bench_lars", __doc__)
    for table in tables(given.options(), given.models, given.compile, given.busy):
        print(table.text(), "\n", flush=True)


if __name__ == "__main__":
    main()
