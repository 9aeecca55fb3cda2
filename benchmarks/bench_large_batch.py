"""The full global batch on the CPU: 8192 views of 32², each mode in a process of its own.

    python -m benchmarks.bench_large_batch [--batch-size 4096] [--micro-batch 256] [--steps 2]

A small ResNet (resnet10, stem with stride 2), the same weights and views in every mode. Printed:
peak resident memory of the process above what it held before the first step, seconds of the last
step, both also as ratios to plain's, and the loss of each step. grad-cache has micro-batches' own
batch statistics, so its loss is another.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from simclr_fast.large_batch import LargeBatch
from simclr_fast.losses import nt_xent_loss
from simclr_fast.models import SimCLR, build_encoder, build_projector
from simclr_fast.optim import LARS, lars_param_groups

MODES = ("plain", "replay", "lockstep", "grad-cache")


def one(memory: str, given: argparse.Namespace) -> dict:
    """Run `steps` steps in this process."""
    torch.manual_seed(0)
    encoder, dim = build_encoder("resnet10", width=given.width, image_size=32, stem="cifar-stride2")
    model = SimCLR(encoder, build_projector("nonlinear", dim)).train()
    model = model.to(memory_format=torch.channels_last)
    optimizer = LARS(lars_param_groups(model, 1e-6), lr=0.1)
    step = LargeBatch(model, memory=memory, micro_batch=given.micro_batch, allow_ghost_bn=True)
    images = torch.randn(given.batch_size, 3, 32, 32)
    views = torch.cat([images + 0.3 * torch.randn_like(images) for _ in range(2)])
    views = views.contiguous(memory_format=torch.channels_last)
    del images
    before = _peak()
    losses = []
    for _ in range(given.steps):
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        losses.append(step.backward(views, lambda o: nt_xent_loss(o[1], temperature=0.5)).item())
        optimizer.step()
        seconds = time.perf_counter() - began
    return {"losses": losses, "gb": (_peak() - before) / 1e9, "seconds": seconds}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--width", type=float, default=1)
    parser.add_argument("--mode", choices=MODES, help="this mode in this process: prints JSON")
    given = parser.parse_args()
    if given.mode:
        print(json.dumps(one(given.mode, given)))
        return
    print(
        f"{2 * given.batch_size} views, micro-batch {given.micro_batch}, {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}\n"
    )
    print(f"{'mode':<12} {'peak GB':>8} {'of plain':>8} {'s/step':>8} {'of plain':>8}  losses")
    plain = None
    for mode in MODES:
        run = [sys.executable, "-m", "benchmarks.bench_large_batch", "--mode", mode, *sys.argv[1:]]
        found = json.loads(subprocess.run(run, check=True, capture_output=True).stdout)
        plain = plain or found
        print(
            f"{mode:<12} {found['gb']:8.2f} {found['gb'] / plain['gb']:8.2f} "
            f"{found['seconds']:8.1f} {found['seconds'] / plain['seconds']:8.2f}  "
            + " ".join(f"{loss:.6f}" for loss in found["losses"]),
            flush=True,
        )


if __name__ == "__main__":
    main()
