"""Gathers over ranks that allow a different number of rows on every rank."""

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
