"""Ranks: joining them, and gathers that allow each a different number of rows."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from simclr_fast.utils.rank_watch import RankFailure, RankWatch


def gather_row_counts(rows: int, device: torch.device, group: dist.ProcessGroup) -> list[int]:
    """Number of rows of every rank, in rank order."""
    own = torch.tensor([rows], dtype=torch.int64, device=device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, own, group=group)
    return torch.cat(counts).tolist()


def all_gather_rows(
    rows: Tensor, group: dist.ProcessGroup, counts: Sequence[int] | None = None
) -> Tensor:
    """Concatenate `rows` [n_r, ...] of every rank r along dim 0, in rank order; no gradient.

    counts: `gather_row_counts` of the same rows, if known: it costs a small gather and, on CUDA,
        a device sync.
    """
    if counts is None:
        counts = gather_row_counts(rows.size(0), rows.device, group)
    longest = max(counts)
    padded = rows.contiguous()
    if rows.size(0) < longest:
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: rows.size(0)] = rows
    gathered = rows.new_empty(len(counts), longest, *rows.shape[1:])
    dist.all_gather(list(gathered.unbind()), padded, group=group)
    if min(counts) == longest:
        return gathered.flatten(0, 1)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])


@dataclass(frozen=True)
class World:
    """This process among those that torchrun started; rank 0 of 1 without it."""

    rank: int
    size: int
    device: torch.device
    watch: RankWatch | None = None

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags.item())

    def least(self, value: float) -> float:
        """The smallest `value` of all ranks."""
        if self.size == 1:
            return value
        values = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MIN)
        return values.item()

    def mark(self, step: int, doing: str) -> None:
        """Tell the other ranks where this one is: `doing` in `step`, counted from 1."""
        if self.watch is not None:
            self.watch.mark(step, doing)

    def leave(self) -> None:
        """Tell the other ranks that this one's end is meant."""
        if self.watch is not None:
            self.watch.leave()


def require_one_process() -> None:
    """ValueError under a launcher that started several: each would do, and write, the same."""
    if (size := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(f"this command is one process, and {size} were started: no torchrun here")


def free_memory(device: torch.device) -> float:
    """Bytes that this process may still use: of the GPU, or its share of the host's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    share = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        return kib * 1024 / share
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / share


@contextmanager
def join_world(device: str, timeout: float = 600) -> Iterator[World]:
    """Join torchrun's process group (NCCL on GPUs, gloo on CPUs), and leave it at the end.

    device: "auto" (a GPU of one's own if torch sees any, else the CPU), "cpu" or "cuda".
    timeout: seconds without progress, a collective included, that end the run.

    Raises:
        RankFailure: another rank died, stalled, raised an error or never joined; it is named. A
            rank that hangs cannot raise: its process prints the same and ends with status 1.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = torch.device(device)
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(chosen)
    if size == 1:
        yield World(0, 1, chosen)
        return
    try:
        store, *_ = next(rendezvous("env://", rank, size, timeout=timedelta(seconds=timeout)))
    except dist.DistError as error:
        raise RankFailure(f"not all {size} ranks joined within {timeout:g} s: {error}") from error
    watch = RankWatch(store, rank, size, timeout)
    lost = False
    try:
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            store=dist.PrefixStore("default_pg", store),
            rank=rank,
            world_size=size,
            # The watch is first to end the run, and says whose fault it was.
            timeout=timedelta(seconds=timeout + 60),
        )
        assert dist.group.WORLD is not None
        watch.watch(dist.group.WORLD)
        yield World(rank, size, chosen, watch)
    except Exception as error:
        explained = watch.explain(error)
        lost = explained is not error
        if lost:
            raise explained from error
        raise
    finally:
        watch.leave()
        # NCCL would wait for the lost rank.
        if dist.is_initialized() and not (lost and chosen.type == "cuda"):
            dist.destroy_process_group()
