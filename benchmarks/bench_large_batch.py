"""A full batch on CPU ranks: 8192 views of 32² pixels, each memory mode in separate processes.

    python -m benchmarks.bench_large_batch [--batch-size 4096] [--ranks 2] [--micro-batch 256]
    python -m benchmarks.bench_large_batch --modes lockstep --compile
    python -m benchmarks.bench_large_batch --modes plain lockstep --gpu-memory 1
    python -m benchmarks.bench_large_batch --schedules

All modes train the same small ResNet on the same views. Printed are:

- the growth of resident memory since before the first step, its peak, of the rank with the most;
- the median seconds of a step after the first, and its seconds of CPU time, which other programs
  disturb less; each also as a ratio to the first mode;
- the seconds of the first step, in which lockstep plans and compiled modes compile;
- the loss of each step.

Lockstep keeps what fits into --gpu-memory. grad-cache uses the statistics of micro-batches, so its
loss differs.

--schedules instead runs a few schedules that the planner finds for less and less memory, in turns
in one process, and compares their CPU time with the predicted time.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import distributed as dist

from simclr_fast.benchmarks import harness
from simclr_fast.large_batch import LargeBatch, planner
from simclr_fast.large_batch.planner import Workload
from simclr_fast.losses.nt_xent import nt_xent_loss
from simclr_fast.models.encoders import SimCLR, build_encoder, build_projector
from simclr_fast.optim.lars import LARS, lars_param_groups
from simclr_fast.utils.distributed import join_world

MODES: dict[str, dict[str, Any]] = {
    "plain": {"memory": "plain"},
    "replay": {"memory": "replay"},
    "lockstep": {"memory": "lockstep"},
    "grad-cache": {"memory": "grad-cache", "allow_ghost_bn": True},
    "lockstep compiled": {"memory": "lockstep", "compile": True},
}


# Of plain's memory, for --schedules.
SHARES = (0.8, 0.55, 0.35, 0.25, 0.18)


@dataclass(frozen=True)
class CommandLine:
    batch_size: int = 4096
    """Images over all ranks."""
    ranks: int = 2
    """Processes that share the batch."""
    micro_batch: int = 256
    """Views at a time in lockstep and grad-cache."""
    steps: int = 3
    """Steps of each mode; the first is not among those whose median is printed."""
    model: str = "resnet34"
    """A ResNet."""
    width: float = 0.25
    """Channel multiplier of the ResNet."""
    image_size: int = 32
    """Side of a view in pixels."""
    stem: Literal["imagenet", "cifar", "cifar-stride2"] = "cifar-stride2"
    """First layers of the ResNet."""
    modes: tuple[Literal["plain", "replay", "lockstep", "grad-cache"], ...] = (
        "plain",
        "replay",
        "lockstep",
        "grad-cache",
    )
    """What to run."""
    gpu_memory: float | None = None
    """GB that lockstep may use in each process, with the model and the views. None: what is
    free."""
    compile: bool = False
    """Run lockstep's modes compiled as well."""
    schedules: bool = False
    """Compare predicted and measured times of schedules instead."""
    out: Path | None = None
    """Put the results into the machine's JSON file in this folder."""
    mode: str | None = None
    """Run one rank of this mode in this process and print JSON; for internal use."""


def build(given: "CommandLine") -> SimCLR:
    encoder, dim = build_encoder(
        given.model, width=given.width, image_size=given.image_size, stem=given.stem
    )
    return SimCLR(encoder, build_projector("nonlinear", dim))


def draw(given: "CommandLine", rank: int, ranks: int) -> list[torch.Tensor]:
    """Both views of this rank's images."""
    images = torch.randn(given.batch_size, 3, given.image_size, given.image_size)[rank::ranks]
    return [
        (images + 0.3 * torch.randn_like(images)).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    ]


def one(mode: str, given: "CommandLine") -> dict:
    """Run `steps` steps in this process, one rank."""
    with join_world("cpu") as world:
        torch.manual_seed(0)
        model = build(given).train().to(memory_format=torch.channels_last)
        optimizer = LARS(lars_param_groups(model, 1e-6), lr=0.1)
        group = dist.group.WORLD if world.size > 1 else None
        options = dict(MODES[mode])
        if options["memory"] == "lockstep" and given.gpu_memory is not None:
            options["gpu_memory"] = 1e9 * given.gpu_memory
        step = LargeBatch(model, micro_batch=given.micro_batch, group=group, **options)
        views = draw(given, world.rank, world.size)
        before = harness.reset_peak()
        losses, seconds, cpu = [], [], []
        for _ in range(given.steps):
            began, computed = time.perf_counter(), time.process_time()
            optimizer.zero_grad(set_to_none=True)
            loss = step.backward(views, lambda o: nt_xent_loss(o[1], temperature=0.5, group=group))
            optimizer.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - began)
            cpu.append(time.process_time() - computed)
        return {
            "losses": losses,
            "gb": (harness.resident("VmHWM") - before) / 1e3,
            "seconds": statistics.median(seconds[1:] or seconds),
            "cpu": statistics.median(cpu[1:] or cpu),
            "first": seconds[0],
        }


def measure(mode: str, given: "CommandLine") -> dict:
    """`one` in `ranks` processes: the largest memory and time, and the ranks' common losses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.bench_large_batch", "--mode", mode, *sys.argv[1:]]
    threads = max(1, torch.get_num_threads() // given.ranks)
    runs = []
    for rank in range(given.ranks):
        place = {"RANK": rank, "WORLD_SIZE": given.ranks, "LOCAL_WORLD_SIZE": given.ranks}
        place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": threads}
        environment = os.environ | {key: str(value) for key, value in place.items()}
        runs.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    found = []
    for process in runs:
        printed, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{mode} failed with status {process.returncode}")
        found.append(json.loads(printed))
    names = ("gb", "seconds", "cpu", "first")
    largest = {key: max(row[key] for row in found) for key in names}
    return largest | {"losses": found[0]["losses"]}


def compare_schedules(given: "CommandLine") -> dict:
    """Predicted and measured time of a few schedules, as ratios to plain: medians over rounds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = (3, given.image_size, given.image_size)
    work = Workload(partial(build, given), shape, given.batch_size, cuda=False, loader=False)
    plain = work.setting("plain")
    ways: dict[str, tuple[float, dict[str, Any]]] = {"plain": (1, {"memory": "plain"})}
    for share in SHARES:
        way = work.lockstep(share * plain.device_bytes / planner.USABLE, 0, given.micro_batch)
        predicted = way.seconds / plain.seconds
        ways[f"{way.device_bytes / plain.device_bytes:.2f}"] = predicted, {"schedule": way.schedule}
    views = draw(given, 0, 1)
    steps = {}
    for name, (_, options) in ways.items():
        model = build(given).train().to(memory_format=torch.channels_last)
        step = LargeBatch(model, **options)
        steps[name] = partial(step.backward, views, lambda o: nt_xent_loss(o[1], temperature=0.5))
    times = harness.measure(steps, given.steps, clock=time.process_time)
    rows = [
        {
            "memory": name,
            "predicted": predicted,
            "measured": statistics.median(
                own / base for own, base in zip(times[name], times["plain"], strict=True)
            ),
        }
        for name, (predicted, _) in ways.items()
    ]
    places = [np.argsort(np.argsort([r[k] for r in rows])) for k in ("predicted", "measured")]
    return {"rows": rows, "rank_correlation": float(np.corrcoef(*places)[0, 1])}


def save(given: "CommandLine", kind: str, title: str, result: dict) -> None:
    if given.out is None:
        return
    where = harness.environment(torch.device("cpu"), "python -m benchmarks.bench_large_batch")
    harness.save(f"{kind}: {title}", result, where, given.out)


def main() -> None:
    given = harness.parse(CommandLine, "bench_large_batch", __doc__)
    if given.mode:
        print(json.dumps(one(given.mode, given)))
        return
    kind = f"{given.model} ×{given.width:g}, {given.image_size}²"
    if given.schedules:
        result = compare_schedules(given)
        title = f"{kind}: {2 * given.batch_size} views, micro-batch {given.micro_batch}"
        print(f"{title}\n\nmemory  predicted  measured")
        for row in result["rows"]:
            print(f"{row['memory']:<6} {row['predicted']:10.2f} {row['measured']:9.2f}")
        print(f"rank correlation {result['rank_correlation']:.2f}")
        save(given, "schedules", title, result)
        return
    title = (
        f"{kind}: {2 * given.batch_size} views on {given.ranks} ranks, micro-batch "
        f"{given.micro_batch}"
    )
    print(f"{title}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    titles = ("peak GB", "of first", "s/step", "of first", "CPU s", "of first", "1st step")
    print(f"{'mode':<19} " + " ".join(f"{title:>8}" for title in titles) + "  losses")
    modes = []
    for mode in given.modes:
        modes += [mode] + [f"{mode} compiled"] * (given.compile and f"{mode} compiled" in MODES)
    rows: list[dict] = []
    for mode in modes:
        found = measure(mode, given)
        rows.append({"mode": mode, **found})
        numbers = [n for k in ("gb", "seconds", "cpu") for n in (found[k], found[k] / rows[0][k])]
        print(
            f"{mode:<19} "
            + " ".join(f"{number:8.2f}" for number in numbers)
            + f" {found['first']:8.1f}  "
            + " ".join(f"{loss:.6f}" for loss in found["losses"]),
            flush=True,
        )
        save(given, "modes", title, {"gpu_memory": given.gpu_memory, "rows": rows})


if __name__ == "__main__":
    main()
