"""NT-Xent against its peers, forward and forward+backward.

python -m benchmarks.bench_nt_xent --n 256 1024 --threads 2     the side-by-side table
python -m benchmarks.bench_nt_xent --goals --n 2048 --threads 2 the goals of the CPU kernels
pytest benchmarks/bench_nt_xent.py                              pytest-benchmark, N = 256

All losses run in one process and take turns in each round; the tables show medians over the rounds.
With MALLOC_TOP_PAD_=4294967296 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1 before the command,
malloc reuses memory. Losses that build 2N × 2N matrices then have no page faults.
"""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from statistics import median

import torch

from simclr_fast import multi_view_nt_xent_loss, nt_xent_loss, ops, reference, sup_con_loss
from simclr_fast.benchmarks import harness
from simclr_fast.benchmarks.fma_peak import fma_per_second, multiply_add
from simclr_fast.benchmarks.harness import Options, Table
from simclr_fast.benchmarks.peers import nt_xent_peers, textbook_decoupled, textbook_sup_con
from simclr_fast.ops.nt_xent import kept_size

OURS, MATMUL = "simclr_fast", "torch.mm(Z, Z.T) alone"
FMA = "floor: our multiply-adds on registers"
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


def views(
    n: int, d: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    z1 = torch.randn(n, d)
    return [z.to(device, dtype).requires_grad_() for z in (z1, z1 + torch.randn(n, d))]


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
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Table]:
    """A table per number of pairs. memory: measure it (Linux). others: our other losses instead."""
    for n in sizes[:1] if options.quick else sizes:
        z1, z2 = views(n, dim, options.device)
        z = torch.cat((z1, z2)).detach()
        notes: list[str] = []
        contenders = {OURS: nt_xent_loss, **relatives(n)} if others else losses(n, notes)
        floors = multiply_adds(n, dim, options)
        times = {}
        for column, run in (("forward", forward), ("forward+backward", forward_backward)):
            steps = {k: partial(run, f, z1, z2) for k, f in contenders.items()}
            steps[MATMUL] = partial(torch.mm, z, z.T)
            if column in floors:
                steps[FMA] = floors[column]
            times[column] = harness.measure(steps, options.rounds, options.device, clock)
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
        yield Table(title, OURS, times, facts, (MATMUL, FMA) if floors else (MATMUL,), notes)
        if options.half is not None and not others:
            yield _half_table(n, dim, options, clock)


def multiply_adds(n: int, dim: int, options: Options) -> dict[str, Callable[[], None]]:
    """Column → what computes, on registers, as many float32 multiply-adds as our kernels do.

    Empty on a GPU, and without the extension or a C compiler.
    """
    if options.device.type != "cpu" or not ops.has_extension():
        return {}
    isa = import_module("simclr_fast._C").instruction_set()
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        multiply_add(0, options.threads, isa)
        # The forward pass forms half of the 2N × 2N logits; the backward pass does it again, unless
        # they were kept, and multiplies all of them.
        square = (2 * n) ** 2 * dim
        both = 2 * square - (square // 2 if kept_size(2 * n, dim) else 0)
        counts = {"forward": square // 2, "forward+backward": both}
        return {k: partial(multiply_add, v, options.threads, isa) for k, v in counts.items()}
    return {}


def _half_table(n: int, dim: int, options: Options, clock: Callable[[], float]) -> Table:
    """The table of inputs in options.half. Peers convert them to float32 where that is faster."""
    z1, z2 = views(n, dim, options.device, options.half)
    name = str(options.half).removeprefix("torch.")
    contenders: dict[str, Callable] = {OURS: nt_xent_loss}
    for peer, loss in nt_xent_peers(n).items():

        def converted(a, b, t, loss=loss):
            return loss(a.float(), b.float(), t)

        both = {name: loss, "float32": converted}
        steps = {k: partial(forward_backward, f, z1, z2) for k, f in both.items()}
        best = harness.fastest(steps, options.device)
        contenders[f"{peer}, {best}"] = both[best]
    z = torch.cat((z1, z2)).detach()
    times = {}
    for column, run in (("forward", forward), ("forward+backward", forward_backward)):
        steps = {k: partial(run, f, z1, z2) for k, f in contenders.items()}
        steps[MATMUL] = partial(torch.mm, z, z.T)
        times[column] = harness.measure(steps, options.rounds, options.device, clock)
    facts = {}
    if n <= LARGEST_CHECKED:
        facts["gradient error"] = {
            k: f"{gradient_error(f, z1, z2):.0e}" for k, f in contenders.items()
        }
    title = (
        f"NT-Xent, N = {n}, D = {dim}, {name} inputs, temperature {TEMPERATURE}, "
        f"{options.device.type}, threads {options.threads}"
    )
    return Table(title, OURS, times, facts, (MATMUL,))


def goals(options: Options, n: int, dim: int = 128) -> str:
    """The goals of the CPU kernels and what was measured, as Markdown; up to N = 256 those of small
    batches, above those of large ones."""
    z1, z2 = views(n, dim)
    z = torch.cat((z1, z2)).detach()
    lines = [f"N = {n}, D = {dim}, threads {options.threads}", "", "| | goal | measured |"]
    lines += ["|---|---|---|"]

    def add(what: str, goal: str, value: float, unit: str = "") -> None:
        lines.append(f"| {what} | {goal}{unit} | {value:.2f}{unit} |")

    if n <= 256:
        peers = losses(n)
        steps = {k: partial(forward_backward, peers[k], z1, z2) for k in (OURS, "textbook eager")}
        times = {k: median(v) for k, v in harness.measure(steps, options.rounds).items()}
        add("forward+backward, textbook eager / ours", "≥ 3", times["textbook eager"] / times[OURS])
        return "\n".join(lines)

    isa = import_module("simclr_fast._C").instruction_set()
    steps = {
        "forward": partial(forward, nt_xent_loss, z1, z2),
        "both": partial(forward_backward, nt_xent_loss, z1, z2),
        MATMUL: partial(torch.mm, z, z.T),
        # Keeps this round's peak rate; its time is not used.
        "fma": lambda: peaks.append(fma_per_second(options.threads, isa)),
    }
    peaks: list[float] = []
    t = {k: median(v) for k, v in harness.measure(steps, options.rounds).items()}
    useful = 2 * (2 * n) ** 2 * dim  # multiply-adds: 1/2 forward, 3/2 backward
    add("forward / one torch.mm(Z, Z.T)", "≤ 0.45", t["forward"] / t[MATMUL])
    add("forward+backward / one torch.mm(Z, Z.T)", "≤ 1.75", t["both"] / t[MATMUL])
    share = 1e3 * useful / t["both"] / median(peaks)
    add("forward+backward, share of the multiply-add peak", "≥ 70", 100 * share, " %")

    threads = {}
    for count in (1, 2):
        torch.set_num_threads(count)
        threads[count] = harness.measure({"both": steps["both"]}, options.rounds)["both"]
    torch.set_num_threads(options.threads)
    add("1 thread / 2 threads", "≥ 1.85", median(threads[1]) / median(threads[2]))
    alone = [median(fma_per_second(count, isa) for _ in range(9)) for count in (1, 2)]
    add("the same, of multiply-adds on registers alone", "", alone[1] / alone[0])

    half = views(n // 2, dim)
    steps = {"half": partial(forward_backward, nt_xent_loss, *half), "whole": steps["both"]}
    t = {k: median(v) for k, v in harness.measure(steps, options.rounds).items()}
    add("forward+backward, N / N/2", "≤ 4.2", t["whole"] / t["half"])
    if sys.platform == "linux":
        peak, half_peak = (peak_memory(OURS, k, dim) for k in (n, n // 2))
        add("peak extra memory", "≤ 32" if n == 4096 else "", peak, " MB")
        add("peak extra memory, N / N/2", "≤ 2.1", peak / half_peak)
    return "\n".join(lines)


@dataclass(frozen=True)
class CommandLine(harness.CommandLine):
    n: tuple[int, ...] = (256, 1024)
    """Pairs of views."""
    d: int = 128
    """Features of each view."""
    cpu_time: bool = False
    """Time one thread's CPU time: for a busy machine."""
    memory: bool = True
    """Measure memory too, in subprocesses."""
    others: bool = False
    """Time the decoupled, supervised and four-view losses alone."""
    goals: bool = False
    """Print what the CPU kernels aim at."""
    memory_of: str | None = None
    """Print the peak memory of this loss, and nothing else."""


def main() -> None:
    given = harness.parse(CommandLine, "bench_nt_xent", __doc__)
    options = (replace(given, threads=1) if given.cpu_time else given).options()
    clock = time.thread_time if given.cpu_time else time.perf_counter
    if given.memory_of:
        print_memory(given.memory_of, given.n[0], given.d)
        return
    if given.goals:
        for n in given.n:
            print(goals(options, n, given.d), "\n", flush=True)
        return
    for table in tables(options, given.n, given.d, given.memory, given.others, clock):
        print(table.text(), "\n", flush=True)


def pytest_generate_tests(metafunc) -> None:
    metafunc.parametrize("run", [forward, forward_backward], ids=lambda run: run.__name__)
    metafunc.parametrize("name", losses(256))


def test_nt_xent(benchmark, name, run):
    z = views(256, 128)
    loss = losses(256)[name]
    assert gradient_error(loss, *z) < 1e-4
    benchmark(run, loss, *z)


if __name__ == "__main__":
    main()
