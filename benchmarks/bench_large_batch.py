"""A full batch on CPU ranks: 8192 views of 32² pixels, each memory mode in separate processes.

    python -m benchmarks.bench_large_batch [--batch-size 4096] [--ranks 2] [--micro-batch 256]
    python -m benchmarks.bench_large_batch --modes lockstep --compile
    python -m benchmarks.bench_large_batch --modes plain lockstep --gpu-memory 1

All modes train the same small ResNet (stem with stride 2) on the same views. Printed are:

- the growth of resident memory since before the first step, its peak, of the rank with the most;
- the median seconds of a step after the first; both also as ratios to the first mode;
- the seconds of the first step, in which compiled modes compile;
- the loss of each step.

Lockstep keeps what fits into --gpu-memory. grad-cache uses the statistics of micro-batches, so its
loss differs.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import distributed as dist

from simclr_fast.benchmarks import harness
from simclr_fast.large_batch import LargeBatch
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
    mode: str | None = None
    """Run one rank of this mode in this process and print JSON; for internal use."""


def one(mode: str, given: "CommandLine") -> dict:
    """Run `steps` steps in this process, one rank."""
    with join_world("cpu") as world:
        torch.manual_seed(0)
        encoder, dim = build_encoder(
            given.model, width=given.width, image_size=32, stem="cifar-stride2"
        )
        model = SimCLR(encoder, build_projector("nonlinear", dim)).train()
        model = model.to(memory_format=torch.channels_last)
        optimizer = LARS(lars_param_groups(model, 1e-6), lr=0.1)
        group = dist.group.WORLD if world.size > 1 else None
        options = dict(MODES[mode])
        if options["memory"] == "lockstep" and given.gpu_memory is not None:
            options["gpu_memory"] = 1e9 * given.gpu_memory
        step = LargeBatch(model, micro_batch=given.micro_batch, group=group, **options)
        images = torch.randn(given.batch_size, 3, 32, 32)[world.rank :: world.size]
        views = [
            (images + 0.3 * torch.randn_like(images)).contiguous(memory_format=torch.channels_last)
            for _ in range(2)
        ]
        del images
        before = harness.reset_peak()
        losses, seconds = [], []
        for _ in range(given.steps):
            began = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            loss = step.backward(views, lambda o: nt_xent_loss(o[1], temperature=0.5, group=group))
            optimizer.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - began)
        return {
            "losses": losses,
            "gb": (harness.resident("VmHWM") - before) / 1e3,
            "seconds": statistics.median(seconds[1:] or seconds),
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
    largest = {key: max(row[key] for row in found) for key in ("gb", "seconds", "first")}
    return largest | {"losses": found[0]["losses"]}


def main() -> None:
    given = harness.parse(CommandLine, "bench_large_batch", __doc__)
    if given.mode:
        print(json.dumps(one(given.mode, given)))
        return
    print(
        f"{given.model} ×{given.width:g}: {2 * given.batch_size} views on {given.ranks} ranks, "
        f"micro-batch {given.micro_batch}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}\n"
    )
    titles = ("peak GB", "of first", "s/step", "of first", "1st step")
    print(f"{'mode':<19} " + " ".join(f"{title:>8}" for title in titles) + "  losses")
    modes = []
    for mode in given.modes:
        modes += [mode] + [f"{mode} compiled"] * (given.compile and f"{mode} compiled" in MODES)
    first = None
    for mode in modes:
        found = measure(mode, given)
        first = first or found
        print(
            f"{mode:<19} {found['gb']:8.2f} {found['gb'] / first['gb']:8.2f} "
            f"{found['seconds']:8.2f} {found['seconds'] / first['seconds']:8.2f} "
            f"{found['first']:8.1f}  " + " ".join(f"{loss:.6f}" for loss in found["losses"]),
            flush=True,
        )


if __name__ == "__main__":
    main()
