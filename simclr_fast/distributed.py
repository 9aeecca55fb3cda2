"""Ranks: joining them, and gathers that allow each a different number of rows."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


def gather_row_counts(rows: int, device: torch.device, group: dist.ProcessGroup) -> list[int]:
    """Number of rows of every rank, in rank order."""
    own = torch.tensor([rows], dtype=torch.int64, device=device)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, own, group=group)
    return torch.cat(counts).tolist()


def all_gather_rows(
    rows: Tensor, group: dist.ProcessGroup, counts: list[int] | None = None
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

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags.item())


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Join torchrun's process group (NCCL on GPUs, gloo on CPUs), and leave it at the end.

    device: "auto" (a GPU of one's own if torch sees any, else the CPU), "cpu" or "cuda".
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
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield World(rank, size, chosen)
    finally:
        dist.destroy_process_group()
