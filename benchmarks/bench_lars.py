"""Milliseconds per LARS step on the CPU, beside the optimizers that people use for it.

    python benchmarks/bench_lars.py --model resnet50 --threads 2 --rounds 20

All run in one process, one step each in turn, so that they share whatever else the machine does;
the table gives minimum, median and the ratio of medians to ours. The floor is measured in the same
turns: reading weights and gradients once, and the five arrays that any SGD with momentum must move.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from simclr_fast.optim import LARS

WEIGHT_DECAY, MOMENTUM, LR = 1e-6, 0.9, 0.1
# NVIDIA's data sheets, bytes per second.
GPUS = {"A100 80GB": 2.039e12, "H100 SXM": 3.35e12, "B200": 8.0e12}


def shapes_of(model: str) -> list[tuple[int, ...]]:
    if model == "small":
        return [(64 + 7 * (i % 100),) if i % 2 else (16, 16 + i % 50) for i in range(2000)]
    import torchvision

    builder = {"resnet50": torchvision.models.resnet50, "vit_b_16": torchvision.models.vit_b_16}
    with torch.device("meta"):
        return [tuple(p.shape) for p in builder[model]().parameters()]


def parameters(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.randn(shape) * 0.05) for shape in shapes]
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


def contenders(shapes: list[tuple[int, ...]], compiled: bool) -> dict[str, Callable[[], object]]:
    kwargs = {"lr": LR, "momentum": MOMENTUM}
    steps: dict[str, Callable[[], object]] = {
        "simclr_fast": LARS(groups(parameters(shapes), adapt=False), **kwargs).step,
        "simclr_fast foreach": LARS(
            groups(parameters(shapes), adapt=False), foreach=True, **kwargs
        ).step,
        "SGD fused": torch.optim.SGD(groups(parameters(shapes)), fused=True, **kwargs).step,
        "solo-learn's formula": SoloLearnFormula(groups(parameters(shapes))).step,
        "LARC-style wrapper": LarcStyle(groups(parameters(shapes))).step,
    }
    try:
        from lightly.utils.lars import LARS as LightlyLARS

        steps["lightly"] = LightlyLARS(groups(parameters(shapes)), **kwargs).step
    except ImportError:
        print("lightly is not installed and left out")
    try:
        from timm.optim.lars import Lars

        steps["timm foreach"] = Lars(groups(parameters(shapes)), foreach=True, **kwargs).step
        steps["timm loop"] = Lars(groups(parameters(shapes)), foreach=False, **kwargs).step
        if compiled:
            optimizer = Lars(groups(parameters(shapes)), foreach=True, **kwargs)
            steps["torch.compile(timm foreach)"] = torch.compile(optimizer.step)
    except ImportError:
        print("timm is not installed and left out")
    elements = sum(p.numel() for p in parameters(shapes))
    a, b, c = (torch.randn(elements) for _ in range(3))

    def five_arrays() -> None:
        torch.add(a, b, out=a)
        c.neg_()

    steps["floor: read p and g"] = lambda: (a.sum(), b.sum())
    steps["floor: five arrays"] = five_arrays
    return steps


def measure(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench lars", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("resnet50", "vit_b_16", "small"), default="resnet50")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="torch.compile timm's, a minute")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    shapes = shapes_of(options.model)
    times = measure(contenders(shapes, options.compile), options.rounds)
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    print(
        f"{options.model}: {len(shapes)} tensors, {elements / 1e6:.1f} M float32 parameters, "
        f"{options.threads} threads, torch {torch.__version__}, {options.rounds} rounds"
    )
    ours = statistics.median(times["simclr_fast"])
    fastest = min(times["simclr_fast"])
    print(f"{'':30s}{'min ms':>9s}{'median':>9s}{'x ours (median)':>17s}{'(min)':>7s}")
    for name, values in sorted(times.items(), key=lambda item: statistics.median(item[1])):
        low, middle = min(values), statistics.median(values)
        print(f"{name:30s}{low:9.2f}{middle:9.2f}{middle / ours:17.2f}{low / fastest:7.2f}")
    print("predicted on GPUs, two launches, at the data sheet's bandwidth (five to seven arrays):")
    for name, bandwidth in GPUS.items():
        low, high = (1e6 * arrays * 4 * elements / bandwidth for arrays in (5, 7))
        print(f"  {name}: {low:.0f} to {high:.0f} µs")


if __name__ == "__main__":
    main()
