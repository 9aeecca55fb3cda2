"""A batch of 4096 on one GPU: LargeBatch in memory that is limited to that of smaller cards.

    python -m benchmarks.large_batch_gpu [--out benchmarks/results]

ResNet-50 at 224², bfloat16, LARS, two views of 4096 images. Each case runs in a process of its own,
in which torch may use only as much memory as the planner had, without what it sets aside for CUDA
and DALI. So a case fails if the prediction is too low. Printed are:

- the bytes and seconds that the planner predicts for this GPU, and the work of the convolutions;
- the most bytes that tensors had, and that torch's allocator had reserved;
- the median seconds of a step after the first, and the ratio to plain with endless memory: to the
  time of as many views in steps of --plain-images images.
"""

import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from simclr_fast.benchmarks import harness
from simclr_fast.large_batch import LargeBatch
from simclr_fast.large_batch.planner import Gpu, Setting, Workload
from simclr_fast.losses.nt_xent import nt_xent_loss
from simclr_fast.models.encoders import SimCLR, build_encoder, build_projector
from simclr_fast.optim.lars import LARS, lars_param_groups
from simclr_fast.utils.pinned import pinned_empty

SIZE = 224
# What the planner sets aside for CUDA's context and DALI.
BESIDE = 3e9


@dataclass(frozen=True)
class CommandLine:
    batch_size: int = 4096
    """Images per step."""
    limits: tuple[str, ...] = ("150.1", "84.9", "42.2", "25.2+15")
    """GB of GPU memory that a case may use, and after a plus sign GB of RAM for kept values."""
    plain_images: int = 1024
    """Images per step of plain."""
    compile: bool = False
    """Also run plain compiled."""
    steps: int = 4
    """Steps of each case. The median is that of all but the first."""
    bandwidth: float = 4.8e12
    """Bytes per second of the GPU's memory, from its data sheet: for the prediction."""
    flops: float = 989.4e12
    """Dense bfloat16 FLOP/s of the GPU, from its data sheet: for the prediction."""
    bus: float = 44e9
    """Bytes per second to and from RAM, for the prediction."""
    out: Path | None = None
    """Folder for the JSON file of this GPU."""
    case: Path | None = None
    """Run the pickled case in this process and print JSON; for internal use."""


def build() -> SimCLR:
    encoder, dim = build_encoder("resnet50", image_size=SIZE)
    return SimCLR(encoder, build_projector("nonlinear", dim))


def plan(given: CommandLine, limit: str) -> Setting:
    memory, _, host = limit.partition("+")
    gpu = Gpu("this GPU", given.flops, given.bandwidth, given.bus)
    shape = (3, SIZE, SIZE)
    work = Workload(build, shape, given.batch_size, dtype=torch.bfloat16, gpu=gpu)
    return work.lockstep(1e9 * float(memory), 1e9 * float(host or 0))


def views(images: int, on_host: bool) -> list[torch.Tensor]:
    """Two views of smooth random images, channels_last, in pinned memory or on the GPU."""
    like: dict[str, Any] = {"dtype": torch.bfloat16, "memory_format": torch.channels_last}
    shape = (images, 3, SIZE, SIZE)
    both = [pinned_empty(shape, **like) if on_host else torch.empty(shape, **like, device="cuda")]
    both.append(torch.empty_like(both[0], pin_memory=on_host) if on_host else both[0].clone())
    for first in range(0, images, 256):
        coarse = torch.randn(min(256, images - first), 3, 14, 14, device="cuda")
        for view in both:
            noisy = coarse + 0.3 * torch.randn_like(coarse)
            view[first : first + 256] = torch.nn.functional.interpolate(noisy, SIZE)
    torch.cuda.synchronize()
    return both


def run(given: CommandLine, case: dict[str, Any]) -> dict[str, Any]:
    """Some steps of one case, in this process."""
    torch.manual_seed(0)
    if case["memory"] == "lockstep":
        total = torch.cuda.get_device_properties(0).total_memory
        limit = min(1e9 * float(case["limit"].partition("+")[0]), total)
        torch.cuda.set_per_process_memory_fraction((limit - BESIDE) / total)
    images = given.batch_size if case["memory"] == "lockstep" else given.plain_images
    both = views(images, case["memory"] == "lockstep")
    torch.cuda.empty_cache()
    model = build().train().to("cuda", memory_format=torch.channels_last)
    optimizer = LARS(lars_param_groups(model, 1e-6), lr=0.1)
    step = LargeBatch(model, autocast=torch.bfloat16, memory=case["memory"], **case["options"])
    torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for _ in range(given.steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = step.backward(both, lambda outputs: nt_xent_loss(outputs[1], temperature=0.1))
        optimizer.step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        losses.append(loss.item())
    return {
        "first": seconds[0],
        "seconds": statistics.median(seconds[1:] or seconds) * given.batch_size / images,
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "losses": losses,
    }


def apart(case: dict[str, Any]) -> dict[str, Any]:
    """`run` in another process."""
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
    with tempfile.NamedTemporaryFile(suffix=".pickle") as file:
        file.write(pickle.dumps(case))
        file.flush()
        command = [sys.executable, "-m", "benchmarks.large_batch_gpu", *sys.argv[1:]]
        command += ["--case", file.name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    given = harness.parse(CommandLine, "large_batch_gpu", __doc__)
    if given.case is not None:
        print(json.dumps(run(given, pickle.loads(given.case.read_bytes()))))
        return
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA GPU")
    with ProcessPoolExecutor() as pool:
        settings = list(pool.map(plan, [given] * len(given.limits), given.limits))
    cases: list[dict[str, Any]] = [{"name": "plain", "memory": "plain", "options": {}}]
    if given.compile:
        cases.append({"name": "plain compiled", "memory": "plain", "options": {"compile": True}})
    for limit, setting in zip(given.limits, settings, strict=True):
        case: dict[str, Any] = {"name": f"lockstep, {limit} GB", "memory": "lockstep"}
        case |= {"limit": limit, "options": {"schedule": setting.schedule}}
        case["predicted"] = {
            "device_bytes": setting.device_bytes,
            "host_bytes": setting.host_bytes,
            "seconds": setting.seconds,
            "work": setting.compute,
        }
        cases.append(case)
    print(f"{'':<22}   predicted: GB   RAM  work     s   measured: GB  reserved     s  of plain")
    rows: list[dict[str, Any]] = []
    for case in cases:
        found = apart(case)
        predicted = case.get("predicted")
        rows.append({"name": case["name"], "predicted": predicted, **found})
        text = f"{case['name']:<22}"
        if predicted:
            text += f"{predicted['device_bytes'] / 1e9:16.1f}{predicted['host_bytes'] / 1e9:6.1f}"
            text += f"{predicted['work']:6.2f}{predicted['seconds']:6.2f}"
        else:
            text += " " * 34
        if "error" in found:
            text += f"   {found['error']}"
        else:
            text += f"{found['allocated'] / 1e9:15.1f}{found['reserved'] / 1e9:10.1f}"
            text += f"{found['seconds']:6.2f}"
            if "seconds" in rows[0]:
                text += f"{found['seconds'] / rows[0]['seconds']:10.2f}"
        print(text, flush=True)
    if given.out is not None:
        where = harness.environment(torch.device("cuda"), "python -m benchmarks.large_batch_gpu")
        harness.save("limits", {"rows": rows}, where, given.out)


if __name__ == "__main__":
    main()
