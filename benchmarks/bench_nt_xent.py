"""NT-Xent against its peers, forward and forward+backward.

    python -m benchmarks.bench_nt_xent [--n 256 1024] [--threads 2] [--others]

All losses run in one process and take turns in each round; the tables show medians over the rounds.
With MALLOC_TOP_PAD_=4294967296 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1 before the command,
malloc reuses memory. Losses that build 2N × 2N matrices then have no page faults.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from simclr_fast import multi_view_nt_xent_loss, nt_xent_loss, reference, sup_con_loss
from simclr_fast.benchmarks import harness
from simclr_fast.benchmarks.harness import Options, Table
from simclr_fast.benchmarks.peers import nt_xent_peers, textbook_decoupled, textbook_sup_con

OURS, MATMUL = "simclr_fast", "torch.mm(Z, Z.T) alone"
TEMPERATURE = 0.1
# Above this number of pairs, the matrices of the float64 reference are too large.
LARGEST_CHECKED = 1024
CLASSES = 10


def losses(n: int, notes: list[str] | None = None) -> dict[str, Callable]:
    return {OURS: nt_xent_loss, **nt_xent_peers(n, notes)}


def relatives(n: int) -> dict[str, Callable]:
    """Compare our other losses with their textbook formulas, on the same 2N rows."""
    labels, images = torch.arange(2 * n) % CLASSES, torch.arange(n // 2).repeat(4)
    by_class = f"supervised, {CLASSES} classes"
    return {
        "simclr_fast, decoupled": lambda z1, z2, t: nt_xent_loss(z1, z2, t, decoupled=True),
        "textbook, decoupled": textbook_decoupled,
        f"simclr_fast, {by_class}": lambda z1, z2, t: sup_con_loss(torch.cat((z1, z2)), labels, t),
        f"textbook, {by_class}": lambda z1, z2, t: textbook_sup_con(torch.cat((z1, z2)), labels, t),
        "simclr_fast, 4 views": lambda z1, z2, t: multi_view_nt_xent_loss(
            torch.cat((z1, z2)), 4, t
        ),
        "textbook, 4 views": lambda z1, z2, t: textbook_sup_con(torch.cat((z1, z2)), images, t),
    }


def views(n: int, d: int, device: torch.device | str = "cpu") -> list[torch.Tensor]:
    torch.manual_seed(0)
    z1 = torch.randn(n, d)
    return [z.to(device).requires_grad_() for z in (z1, z1 + torch.randn(n, d))]


def forward(loss, z1, z2) -> None:
    with torch.no_grad():
        loss(z1, z2, TEMPERATURE)


def forward_backward(loss, z1, z2) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss(z1, z2, TEMPERATURE), (z1, z2))


def gradient_error(loss, z1, z2) -> float:
    """Relative L2 error of both gradients against the float64 reference."""
    exact = [z.detach().double().requires_grad_() for z in (z1, z2)]
    wanted = torch.cat(torch.autograd.grad(reference.nt_xent(*exact, TEMPERATURE).mean(), exact))
    actual = torch.cat(forward_backward(loss, z1, z2)).double()
    return ((actual - wanted).norm() / wanted.norm()).item()


def print_memory(name: str, n: int, d: int) -> None:
    """Print `harness.peak_memory` of forward+backward in this process."""
    step = partial(forward_backward, (losses(n) | relatives(n))[name], *views(n, d))
    # The first call compiles and loads libraries.
    step()
    print(harness.peak_memory(step, torch.device("cpu")))


def peak_memory(name: str, n: int, d: int) -> float:
    """`print_memory` in a process of its own, where no other loss has used memory before."""
    command = [sys.executable, "-m", "simclr_fast.benchmarks.bench_nt_xent", "--memory-of", name]
    command += ["--n", str(n), "--d", str(d), "--threads", str(torch.get_num_threads())]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def tables(
    options: Options,
    sizes: tuple[int, ...] = (256, 1024, 4096),
    dim: int = 128,
    memory: bool = True,
    others: bool = False,
) -> Iterator[Table]:
    """A table per number of pairs. memory: measure it (Linux). others: our other losses instead."""
    for n in sizes[:1] if options.quick else sizes:
        z1, z2 = views(n, dim, options.device)
        z = torch.cat((z1, z2)).detach()
        notes: list[str] = []
        contenders = {OURS: nt_xent_loss, **relatives(n)} if others else losses(n, notes)
        times = {}
        for column, run in (("forward", forward), ("forward+backward", forward_backward)):
            steps = {k: partial(run, f, z1, z2) for k, f in contenders.items()}
            steps[MATMUL] = partial(torch.mm, z, z.T)
            times[column] = harness.measure(steps, options.rounds, options.device)
        facts = {}
        if memory and (options.quick or options.device.type == "cuda"):
            calls = {k: partial(forward_backward, f, z1, z2) for k, f in contenders.items()}
            facts = harness.memory_column(calls, options.device)
        elif memory and sys.platform == "linux":
            facts["peak MB"] = {k: f"{peak_memory(k, n, dim):.0f}" for k in contenders}
        if n <= LARGEST_CHECKED and not others:
            facts["gradient error"] = {
                k: f"{gradient_error(f, z1, z2):.0e}" for k, f in losses(n).items()
            }
        title = (
            f"NT-Xent, N = {n}, D = {dim}, float32, temperature {TEMPERATURE}, "
            f"{options.device.type}, threads {options.threads}"
        )
        yield Table(title, OURS, times, facts, (MATMUL,), notes)


@dataclass(frozen=True)
class CommandLine(harness.CommandLine):
    n: tuple[int, ...] = (256, 1024)
    """Pairs of views."""
    d: int = 128
    """Features of each view."""
    memory: bool = True
    """Measure memory too, in subprocesses."""
    others: bool = False
    """Time the decoupled, supervised and four-view losses alone."""
    memory_of: str | None = None
    """Print the peak memory of this loss, and nothing else."""


def main() -> None:
    given = harness.parse(CommandLine, "bench_nt_xent", __doc__)
    options = given.options()
    if given.memory_of:
        print_memory(given.memory_of, given.n[0], given.d)
        return
    for table in tables(options, given.n, given.d, given.memory, given.others):
        print(table.text(), "\n", flush=True)


if __name__ == "__main__":
    main()
