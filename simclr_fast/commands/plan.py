"""simclr-fast plan."""

import argparse
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch

from simclr_fast.augment.params import Augmentation
from simclr_fast.large_batch import planner
from simclr_fast.training.config import PretrainConfig
from simclr_fast.training.setup import build_model

_WIDTHS, _GPUS, _SIZES = (1, 2, 4), (1, 2, 4, 8), (24, 40, 80)


def run(arguments: list[str]) -> int:
    """Every way of computing the batch's gradient, what it needs, and the flags of the best."""
    given = _parser().parse_args(arguments)
    config = PretrainConfig(
        model=given.model,
        width=given.width,
        stem=given.stem,
        projector_dim=given.projector_dim,
        projector_depth=given.projector_depth,
        augmentation=Augmentation(size=given.image_size),
        batch_size=given.batch_size,
        precision=given.precision,
        optimizer=given.optimizer,
    )
    host = planner.parse_size(given.host_memory) if given.host_memory else 0.0
    if given.fits:
        _print_fits(config, host)
        return 0
    limit = planner.parse_size(given.gpu_memory)
    work = workload(config, given.gpus, limit)
    # Builds the model: what it cannot be ends here, not in every row.
    ghost = work.has_batch_norms
    print(
        f"{config.model} ×{config.width:g}, {config.batch_size} images in two views of "
        f"{given.image_size}², {config.precision}: {work.rows} views on each of {given.gpus} GPUs "
        f"of {given.gpu_memory}"
    )
    print(f"predicted, not measured; step times for {work.gpu.name}\n")
    print("mode         micro-batch  GPU GB host GB compute  step s")
    found = []
    for setting in planner.settings(work, limit, host / given.gpus):
        found.append(setting)
        print(_row(setting, planner.fits(setting, limit), given.gpus), flush=True)
    if ghost:
        print("\ngrad-cache: each micro-batch its own batch statistics, another gradient")
    best = _best(work, found, limit)
    if best is None:
        exact = [s for s in found if planner.exact(work, s)]
        least = min(exact, key=lambda s: s.device_bytes)
        print(
            f"\nnothing fits {given.gpu_memory}: the least is {least.device_bytes / 1e9:.1f} GB; "
            "more GPUs, more --host-memory or a smaller batch would do"
        )
        return 1
    print(f"\nsimclr-fast pretrain {best.flags}")
    return 0


def workload(config: PretrainConfig, ranks: int, limit: float) -> planner.Workload:
    return planner.Workload(
        partial(build_model, config),
        config.augmentation.size,
        config.batch_size,
        ranks,
        None if config.precision == "float32" else getattr(torch, config.precision),
        2 if config.optimizer == "adam" else 1,
        gpu=planner.gpu_of(limit),
    )


def _best(
    work: planner.Workload, ways: Iterable[planner.Setting], limit: float
) -> planner.Setting | None:
    """The first that fits and gives the whole batch's gradient."""
    return next((s for s in ways if planner.fits(s, limit) and planner.exact(work, s)), None)


def _row(s: planner.Setting, fits: bool, gpus: int) -> str:
    size = "" if s.micro_batch is None else str(s.micro_batch)
    name = _name(s)
    if s.refusal:
        return f"{name:<12} {size:>11} {s.refusal}"
    return (
        f"{name:<12} {size:>11} {s.device_bytes / 1e9:7.1f} "
        f"{s.offload_bytes * gpus / 1e9:7.1f} "
        f"{s.compute:6.2f}× {s.seconds:7.2f}  {'fits' if fits else 'does not fit'}"
    )


def _print_fits(config: PretrainConfig, host: float) -> None:
    """A Markdown table: the first setting that fits, by width, number and memory of GPUs."""
    sizes = " | ".join(f"{size} GB" for size in _SIZES)
    print(f"| width | GPUs | plain needs | {sizes} |")
    print("|---" * (3 + len(_SIZES)) + "|")
    for width in _WIDTHS:
        wide = replace(config, width=width)
        for gpus in _GPUS:
            cells = []
            # No times are shown, so one GPU's do for all.
            work = workload(wide, gpus, _SIZES[-1] * 1e9)
            for size in _SIZES:
                limit = size * 1e9
                ways = planner.settings(work, limit, host / gpus)
                best = _best(work, ways, limit)
                cells.append("–" if best is None else _cell(best, gpus))
            plain = f"{work.setting('plain').device_bytes / 1e9:.0f} GB"
            print(f"| {width}× | {gpus} | {plain} | " + " | ".join(cells) + " |", flush=True)


def _name(s: planner.Setting) -> str:
    return s.memory if s.keep_every == 1 else f"{s.memory}/{s.keep_every}"


def _cell(s: planner.Setting, gpus: int) -> str:
    host = f" + {s.offload_bytes * gpus / 1e9:.0f} host" if s.offload_bytes else ""
    return f"{_name(s)} {s.device_bytes / 1e9:.0f}{host}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="simclr-fast plan",
        allow_abbrev=False,
        description=run.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="resnet50", help="of torchvision or timm")
    add("--width", type=float, default=1, help="channel multiplier of ResNets")
    stems = ("imagenet", "cifar", "cifar-stride2")
    add("--stem", choices=stems, help="of ResNets; None: by the image size")
    add("--projector-dim", type=int, default=128, help="size of z")
    add("--projector-depth", type=int, default=2, help="2: SimCLR, 3: SimCLR v2")
    add("--image-size", type=int, default=224, help="pixels")
    add("--batch-size", type=int, default=4096, help="images over all GPUs")
    add("--gpus", type=int, default=1, help="one rank each")
    add("--gpu-memory", default="80GB", help="of each: 80GB, 24GiB")
    add("--host-memory", help="of the machine, for block inputs: 128GB")
    precisions = ("bfloat16", "float16", "float32")
    add("--precision", choices=precisions, default="bfloat16", help="of autocast")
    add("--optimizer", choices=("lars", "adam"), default="lars", help="its state counts")
    add("--fits", action="store_true", help="a table over widths, numbers and memory of GPUs")
    return parser
