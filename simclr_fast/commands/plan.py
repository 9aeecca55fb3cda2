"""simclr-fast plan."""

import json
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch
import tyro

from simclr_fast.augment.params import Augmentation
from simclr_fast.commands.run_options import DEMO_DATA
from simclr_fast.large_batch import planner
from simclr_fast.large_batch.planner import Gpu, Setting, Workload
from simclr_fast.large_batch.refusals import compile_refusal
from simclr_fast.training import setup
from simclr_fast.training.config import PretrainConfig
from simclr_fast.utils.sizes import parse_size

GpuName = Literal[
    "l4", "rtx3090", "rtx4090", "a100-40gb", "l40s", "a100-80gb", "h100", "h200", "b200"
]
# Memory in 1e9 bytes that CUDA can use, as torch reports it: total_memory, or "total capacity" in
# out-of-memory messages. From NVIDIA's data sheets: peak bfloat16 FLOP/s without sparsity, bytes/s.
GPUS: dict[GpuName, tuple[float, Gpu]] = {
    "l4": (23.6, Gpu("L4", 121e12, 0.3e12)),
    "rtx3090": (25.3, Gpu("RTX 3090", 71e12, 0.936e12)),
    "rtx4090": (25.2, Gpu("RTX 4090", 165.2e12, 1.008e12)),
    "a100-40gb": (42.2, Gpu("A100 40GB", 312e12, 1.555e12)),
    "l40s": (47.6, Gpu("L40S", 362e12, 0.864e12)),
    "a100-80gb": (84.9, planner.A100_80GB),
    "h100": (84.9, Gpu("H100 80GB SXM", 989.4e12, 3.35e12, planner.PCIE5)),
    "h200": (150.1, Gpu("H200", 989.4e12, 4.8e12, planner.PCIE5)),
    "b200": (191.4, Gpu("B200", 2250e12, 7.7e12, planner.PCIE5)),
}
# The cases of `--fits`: model, width, number and kind of GPUs, RAM per GPU for kept values in GB.
CASES: tuple[tuple[str, float, int, GpuName, int], ...] = (
    ("resnet50", 1, 1, "rtx4090", 15),
    ("resnet50", 1, 1, "a100-40gb", 0),
    ("resnet50", 1, 1, "a100-40gb", 7),
    ("resnet50", 1, 1, "h100", 0),
    ("resnet50", 1, 2, "rtx4090", 0),
    ("resnet50", 1, 4, "rtx4090", 0),
    ("resnet50", 1, 8, "rtx4090", 0),
    ("resnet50", 2, 1, "h100", 0),
    ("resnet50", 2, 1, "h100", 23),
    ("resnet50", 2, 2, "h100", 0),
    ("resnet50", 4, 2, "h100", 0),
    ("resnet50", 4, 4, "h100", 0),
    ("resnet34", 1, 1, "rtx4090", 15),
)

# Options that `pretrain` has as well, about what else than two views of an image is in a step.
_VIEWS = ("views", "small_crops", "small_size", "queue", "ema")


@dataclass(frozen=True)
class Plan:
    """Predict the memory of a batch in each memory mode, and print the pretrain command to use.

    Nothing runs on a GPU. Memory and time are computed from the model's operations.
    """

    model: str = "resnet50"
    """A torchvision or timm model."""
    width: float = 1
    """Channel multiplier of ResNets."""
    stem: Literal["imagenet", "cifar", "cifar-stride2"] | None = None
    """First layers of ResNets. By default chosen by the image size."""
    projector_dim: int = 128
    """Width of the projector's output."""
    projector_depth: int = 2
    """Layers of the projector. SimCLR: 2, SimCLR v2: 3."""
    image_size: int = 224
    """Side of a view in pixels."""
    batch_size: int = 4096
    """Images per step over all GPUs."""
    views: int = 2
    """Views of each image. Other numbers than two are predicted as two views of more or fewer
    images, with as many pixels in all."""
    small_crops: int = 0
    """Smaller views of each image beside them."""
    small_size: int = 96
    """Height and width of the small crops in pixels."""
    queue: int | None = None
    """Keys of past batches that are the negatives; a momentum encoder makes them."""
    ema: float | None = None
    """Decay of an average of the encoder's weights, kept beside them."""
    gpus: int = 1
    """Number of GPUs, in one machine."""
    gpu: GpuName | None = None
    """The kind of GPU, which determines memory and speed."""
    gpu_memory: str | None = None
    """Memory of each GPU, such as 80GB or 24GiB. By default that of --gpu, else 80GB."""
    host_memory: str | None = None
    """RAM of the machine in which lockstep may keep values, such as 64GB. By default none. The
    views are in RAM as well, beside it."""
    precision: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """The precision of autocast."""
    optimizer: Literal["lars", "sgd", "adamw", "adam"] = "lars"
    """The optimizer, whose state also needs memory."""
    compile: bool = False
    """Predict lockstep with --compile. The other modes are predicted as without it. The printed
    command has --compile where its mode can compile."""
    data: str = "photos"
    """The value of --data in the printed command."""
    fits: bool = False
    """Print a table of usual models and GPUs instead. Takes minutes."""
    json: bool = False
    """Print JSON instead of a table."""

    @property
    def config(self) -> PretrainConfig:
        return PretrainConfig(
            data=self.data,
            model=self.model,
            width=self.width,
            stem=self.stem,
            projector_dim=self.projector_dim,
            projector_depth=self.projector_depth,
            augmentation=Augmentation(size=self.image_size),
            batch_size=self.batch_size,
            **{name: getattr(self, name) for name in _VIEWS},
            precision=self.precision,
            optimizer=self.optimizer,
            # SGD has no default. Memory and time do not depend on it.
            lr=0.05 if self.optimizer == "sgd" else None,
            compile=self.compile,
        )

    @property
    def memory(self) -> str:
        """The memory of one GPU, as text."""
        return self.gpu_memory or (f"{GPUS[self.gpu][0]}GB" if self.gpu else "80GB")


def run(arguments: list[str]) -> int:
    """Predict every mode; return 1 if no mode with the gradient of the whole batch fits."""
    given = tyro.cli(Plan, args=arguments, prog="simclr-fast plan")
    config = given.config
    host = parse_size(given.host_memory) if given.host_memory else 0.0
    limit = parse_size(given.memory)
    if given.fits:
        _print_fits(given, config)
        return 0
    gpu = GPUS[given.gpu][1] if given.gpu else planner.gpu_of(limit)
    work = workload(config, given.gpus, gpu)
    # This builds the model, so a wrong model or width raises here, before any output.
    ghost = work.has_batch_norms
    size, small = given.image_size, given.small_size
    crops = f" and {given.small_crops} of {small}×{small}" if given.small_crops else ""
    title = (
        f"{config.model}, width {config.width:g}, {config.batch_size} images in {given.views} "
        f"views of {size}×{size}{crops}, {config.precision}, {given.gpus} × {gpu.name} with "
        f"{given.memory}"
    )
    if given.json:
        print(f"predicting {title}: less than a minute", file=sys.stderr, flush=True)
    else:
        print(f"{title}\nEverything here is predicted; nothing ran.")
        print("Each row takes some seconds to compute.\n")
        print("mode        micro-batch  GPU GB  host GB  PCIe GB   work  step s", flush=True)
    found: list[Setting] = []
    for setting in _settings(work, limit, host / given.gpus):
        found.append(setting)
        if not given.json:
            print(_row(setting, _verdict(work, setting, limit), given.gpus), flush=True)
    best = _best(work, found, limit)
    command = None if best is None else _command(given, best)
    if given.json:
        print(_to_json(given, gpu, work, found, limit, command))
        return int(best is None)
    if best is not None and best.schedule is not None:
        print(f"\n{_explanation(best, given.gpus)}")
    print(f"\n{_rates(gpu, given.compile)}")
    few, more = planner.SIMULATED
    print(
        f"\nplain and replay are simulated with all {work.rows} views of a GPU. lockstep is "
        f"counted from its schedule.\ngrad-cache is simulated with {few} and {more} micro-batches "
        "and extrapolated linearly"
    )
    if ghost:
        print(
            "\ngrad-cache normalises each micro-batch by its own statistics, so its gradient is "
            "not that of the batch: it is used only with --allow-ghost-bn"
        )
    if command is None:
        least = min((s for s in found if planner.exact(work, s)), key=lambda s: s.device_bytes)
        print(f"\n{planner.does_not_fit(work, least, limit, host / given.gpus)}")
        return 1
    print(f"\n{command}")
    return 0


def workload(config: PretrainConfig, ranks: int, gpu: Gpu) -> Workload:
    """Describe a run on `ranks` GPUs to the planner."""
    work = setup.workload(config, ranks, torch.device("cuda"), config.all_views)
    return replace(work, gpu=gpu)


def _settings(work: Workload, limit: float, host: float) -> Iterable[Setting]:
    """The planner's settings. On a terminal, a line says that the next one is being computed."""
    ways = iter(planner.settings(work, limit, host))
    while True:
        if sys.stderr.isatty():
            print("computing the next row ...", end="\r", file=sys.stderr, flush=True)
        setting = next(ways, None)
        if sys.stderr.isatty():
            print(end="\x1b[2K\r", file=sys.stderr, flush=True)
        if setting is None:
            return
        yield setting


def _best(work: Workload, ways: Iterable[Setting], limit: float) -> Setting | None:
    """The first setting that fits and gives the gradient of the whole batch."""
    return next((s for s in ways if planner.fits(s, limit) and planner.exact(work, s)), None)


def _verdict(work: Workload, setting: Setting, limit: float) -> str:
    if not planner.fits(setting, limit):
        return "does not fit"
    return "fits" if planner.exact(work, setting) else "fits, but another gradient"


def _row(s: Setting, verdict: str, gpus: int) -> str:
    size = "" if s.micro_batch is None else str(s.micro_batch)
    if s.refusal:
        return f"{s.memory:<11} {size:>11} {s.refusal}"
    host = f"{(s.host_bytes + s.view_bytes) * gpus / 1e9:.1f}" if s.view_bytes else ""
    bus = f"{s.bus_bytes * gpus / 1e9:.0f}" if s.bus_bytes else ""
    return (
        f"{s.memory:<11} {size:>11} {s.device_bytes / 1e9:7.1f}  {host:>7}  {bus:>7}  "
        f"{s.compute:4.2f}× {s.seconds:7.2f}  {verdict}"
    )


def _explanation(s: Setting, gpus: int) -> str:
    """What the schedule of lockstep keeps, and where."""
    assert s.schedule is not None
    names = [field.name for field in fields(s.schedule.stages[0])]
    lines = [
        "lockstep's schedule, from the first blocks to the last. kept: from the forward to the "
        "backward.",
        "once: made again when the backward of these blocks begins. again: made for each use.",
        "".join(f"{name:>8}" for name in names),
        *("".join(f"{value:>8}" for value in vars(stage).values()) for stage in s.schedule.stages),
    ]
    each = " each" if gpus > 1 else ""
    peaks = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in s.phases.items())
    lines.append(f"peak of GPU memory{each}: {peaks}")
    if s.view_bytes:
        lines.append(
            f"host memory: {s.host_bytes * gpus / 1e9:.1f} GB of kept values and "
            f"{s.view_bytes * gpus / 1e9:.1f} GB of views, of this batch and the next"
        )
    return "\n".join(lines)


def _rates(gpu: Gpu, compiled: bool) -> str:
    fused = (
        "\nOf lockstep, normalisations, activations and sums between two convolutions are compiled "
        "into one pass over memory.\nOther modes are predicted without --compile."
    )
    return (
        f"Times assume {planner.FLOPS_SHARE:.0%} of {gpu.flops / 1e12:.0f} TFLOP/s for products, "
        f"{planner.BANDWIDTH_SHARE:.0%} of {gpu.bandwidth / 1e9:.0f} GB/s for other operations "
        "(NVIDIA's data sheet;\nthe shares were measured with plain ResNet-50 on an H200), and "
        "copies over PCIe at\n"
        f"{gpu.bus / 1e9:.0f} GB/s in each direction (70% of the standard's rate)."
        f"{fused if compiled else ''}"
    )


def _command(given: Plan, setting: Setting) -> str:
    """The command to run, with every option that affects the prediction and is not a default."""
    config, plain = given.config, PretrainConfig()
    start = "simclr-fast pretrain"
    parts = []
    if given.gpus > 1:
        start = f"torchrun --nproc-per-node {given.gpus} -m simclr_fast pretrain"
        # Several processes must agree on the folder.
        parts.append("--out runs/pretrain")
    data = shlex.quote(config.data) + (" --preset imagenet" if config.data in DEMO_DATA else "")
    parts = [f"--data {data}", f"--model {config.model}", *parts]
    parts.append(f"--batch-size {config.batch_size}")
    shape = ("width", "stem", "projector_dim", "projector_depth")
    for name in (*shape, *_VIEWS, "optimizer", "lr"):
        if (value := getattr(config, name)) != getattr(plain, name):
            parts.append(f"--{name.replace('_', '-')} {value}")
    if config.augmentation.size != plain.augmentation.size:
        parts.append(f"--augmentation.size {config.augmentation.size}")
    # On these GPUs "auto" means bfloat16.
    if config.precision != "bfloat16":
        parts.append(f"--precision {config.precision}")
    for name in ("gpu_memory", "host_memory"):
        if (size := getattr(given, name)) is not None and setting.memory == "lockstep":
            parts.append(f"--{name.replace('_', '-')} {size}")
    if config.compile and not compile_refusal(setting.memory):
        parts.append("--compile")
    return " ".join([start, *parts, setting.flags])


def _to_json(
    given: Plan, gpu: Gpu, work: Workload, found: list[Setting], limit: float, command: str | None
) -> str:
    def row(setting: Setting) -> dict[str, Any]:
        empty: tuple[Any, ...] = (float("inf"), "", None, {})
        numbers = {k: v for k, v in asdict(setting).items() if v not in empty}
        fits = planner.fits(setting, limit)
        return {**numbers, "fits": fits, "exact_gradient": planner.exact(work, setting)}

    content = {
        "predicted": True,
        "options": asdict(given),
        "gpu": asdict(gpu)
        | {"flops_share": planner.FLOPS_SHARE, "bandwidth_share": planner.BANDWIDTH_SHARE},
        "gpu_bytes": limit,
        "rows": [row(setting) for setting in found],
        "command": command,
    }
    return json.dumps(content, indent=1)


def fits_table(config: PretrainConfig) -> Iterator[dict[str, Any]]:
    """What lockstep and plain need in each of `CASES`."""
    works: dict[tuple[str, float], Workload] = {}
    for model, width, gpus, card, host in CASES:
        given = replace(config, model=model, width=width)
        # One for all cases of a model, so that the planner counts each operation once.
        work = works.setdefault((model, width), workload(given, 1, GPUS[card][1]))
        gb, gpu = GPUS[card]
        work = replace(work, ranks=gpus, gpu=gpu)
        plain = work.setting("plain")
        way = plain
        if not planner.fits(plain, gb * 1e9):
            way = work.lockstep(gb * 1e9, host * 1e9)
        names = ("memory", "device_bytes", "host_bytes", "view_bytes", "bus_bytes", "compute")
        yield {
            "model": model,
            "width": width,
            "gpus": gpus,
            "gpu": gpu.name,
            "gpu_gb": gb,
            "host_gb": host,
            "plain_bytes": plain.device_bytes,
            "plain_seconds": plain.seconds,
            "fits": planner.fits(way, gb * 1e9),
            "seconds": way.seconds,
            **{name: getattr(way, name) for name in names},
        }


def _print_fits(given: Plan, config: PretrainConfig) -> None:
    """Print `fits_table` as JSON, or as a Markdown table."""
    print(f"Predicting {len(CASES)} cases: minutes.", file=sys.stderr, flush=True)
    rows = list(fits_table(config))
    if given.json:
        content = {"predicted": True, "options": asdict(given), "rows": rows}
        print(json.dumps(content, indent=1))
    else:
        print("\n".join(fits_lines(rows)))


def fits_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The Markdown table of `fits_table`. Bytes are those of one GPU."""
    lines = [
        "| model | GPUs | GB of each | plain: GB | RAM: GB | PCIe: GB | work | s/step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ram = row["host_bytes"] + row["view_bytes"]
        name = f"{row['model']}, {row['width']:g}×"
        lines.append(
            f"| {name} | {row['gpus']} × {row['gpu']} | {row['device_bytes'] / 1e9:.1f} | "
            f"{row['plain_bytes'] / 1e9:.0f} | {ram / 1e9:.1f} | {row['bus_bytes'] / 1e9:.0f} | "
            f"{row['compute']:.2f}× | {row['seconds']:.1f} |"
        )
    return lines
