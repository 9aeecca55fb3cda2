"""NT-Xent against its peers, forward and forward+backward.

python -m benchmarks.bench_nt_xent --n 256,1024 --threads 2     the side-by-side table
pytest benchmarks/bench_nt_xent.py                              pytest-benchmark, N = 256

Every loss takes its turn in each round of one process; the table has medians over the rounds.
MALLOC_TOP_PAD_=4294967296 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1 before the command makes
malloc reuse memory, which spares the losses that build 2N × 2N matrices their page faults.
"""

import argparse
import ctypes
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest
import torch

from simclr_fast import nt_xent_loss, reference
from simclr_fast.benchmarks.peers import nt_xent_peers

OURS, MATMUL = "simclr_fast", "torch.mm(Z, Z.T) alone"
TEMPERATURE = 0.1
# Beyond this the float64 reference's own matrices are too large.
LARGEST_CHECKED = 1024


def losses(n: int) -> dict:
    return {OURS: nt_xent_loss, **nt_xent_peers(n)}


def views(n: int, d: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    z1 = torch.randn(n, d)
    return [z.requires_grad_() for z in (z1, z1 + torch.randn(n, d))]


def forward(loss, z1, z2) -> None:
    with torch.no_grad():
        loss(z1, z2, TEMPERATURE)


def forward_backward(loss, z1, z2) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss(z1, z2, TEMPERATURE), (z1, z2))


def interleaved(steps: dict, rounds: int, clock=time.perf_counter) -> dict[str, float]:
    """Median milliseconds of each step, one call per round, after one call to warm up."""
    times = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = clock()
            step()
            times[name].append(1e3 * (clock() - start))
    return {name: median(values) for name, values in times.items()}


def gradient_error(loss, z1, z2) -> float:
    """Relative L2 error of both gradients against the float64 reference."""
    exact = [z.detach().double().requires_grad_() for z in (z1, z2)]
    wanted = torch.cat(torch.autograd.grad(reference.nt_xent(*exact, TEMPERATURE).mean(), exact))
    actual = torch.cat(forward_backward(loss, z1, z2)).double()
    return ((actual - wanted).norm() / wanted.norm()).item()


def _resident(key: str) -> float:
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3


def print_memory(name: str, n: int, d: int) -> None:
    """Peak MB of forward+backward beyond what was resident before; runs in its own process."""
    loss, z = losses(n)[name], views(n, d)
    forward_backward(loss, *z)  # compiles, loads libraries
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    forward_backward(loss, *z)
    print(_resident("VmHWM") - before)


def peak_memory(name: str, n: int, d: int) -> float:
    command = [sys.executable, "-m", "benchmarks.bench_nt_xent", "--memory", name]
    command += ["--n", str(n), "--d", str(d), "--threads", str(torch.get_num_threads())]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def table(n: int, d: int, rounds: int, memory: bool, clock=time.perf_counter) -> str:
    z1, z2 = views(n, d)
    z = torch.cat((z1, z2)).detach()
    matmul = {MATMUL: lambda: torch.mm(z, z.T)}
    times = []
    for run in (forward, forward_backward):
        steps = {k: lambda f=f, run=run: run(f, z1, z2) for k, f in losses(n).items()}
        times.append(interleaved(steps | matmul, rounds, clock))
    time_of = "CPU time" if clock is time.thread_time else "wall time"
    lines = [
        f"N = {n}, D = {d}, float32, temperature {TEMPERATURE}, {torch.get_num_threads()} threads, "
        f"{time_of}",
        "| loss | forward ms | × ours | forward+backward ms | × ours | peak MB | gradient error |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in times[0]:
        cells = [f"{t[name]:.2f} | {t[name] / t[OURS]:.2f}" for t in times]
        is_loss = name != MATMUL
        peak = f"{peak_memory(name, n, d):.0f}" if memory and is_loss else "-"
        checked = is_loss and n <= LARGEST_CHECKED
        error = f"{gradient_error(losses(n)[name], z1, z2):.1e}" if checked else "-"
        lines.append(f"| {name} | {' | '.join(cells)} | {peak} | {error} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", default="256,1024", help="pairs, separated by commas")
    parser.add_argument("--d", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread's CPU time: for a busy machine"
    )
    parser.add_argument("--no-memory", action="store_true", help="skip the subprocesses")
    parser.add_argument("--memory", metavar="LOSS", help="print one loss's peak memory and stop")
    arguments = parser.parse_args()
    clock = time.thread_time if arguments.cpu_time else time.perf_counter
    torch.set_num_threads(1 if arguments.cpu_time else arguments.threads)
    for n in map(int, arguments.n.split(",")):
        if arguments.memory:
            print_memory(arguments.memory, n, arguments.d)
        else:
            print(table(n, arguments.d, arguments.rounds, not arguments.no_memory, clock), "\n")


@pytest.mark.parametrize("run", [forward, forward_backward], ids=lambda run: run.__name__)
@pytest.mark.parametrize("name", losses(256))
def test_nt_xent(benchmark, name, run):
    z = views(256, 128)
    loss = losses(256)[name]
    assert gradient_error(loss, *z) < 1e-4
    benchmark(run, loss, *z)


if __name__ == "__main__":
    main()
