"""The position of this rank's rows among the rows of all ranks of a group."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from simclr_fast.utils.distributed import all_gather_rows, row_counts_of


@dataclass(frozen=True)
class RankRows:
    """The number of rows of every rank, in rank order. Some may be 0, but not all."""

    group: dist.ProcessGroup
    counts: tuple[int, ...]

    @classmethod
    def exchange(
        cls,
        num_rows: int,
        device: torch.device,
        group: dist.ProcessGroup,
        row_counts: Sequence[int] | None = None,
    ) -> "RankRows":
        """Exchange the numbers of rows between the ranks, unless `row_counts` has them.

        On CUDA the exchange waits for the device.

        Raises:
            ValueError: no rank has any row (raised on every rank), or row_counts does not agree
                with num_rows (raised on this rank).
        """
        counts = tuple(row_counts_of(num_rows, device, group, row_counts))
        if not any(counts):
            raise ValueError("a group's batch needs rows on at least one rank, got none on any")
        return cls(group, counts)

    @property
    def offset(self) -> int:
        """The index of the first row of this rank."""
        return sum(self.counts[: dist.get_rank(self.group)])

    @property
    def total(self) -> int:
        return sum(self.counts)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, in rank order; no gradient."""
        return all_gather_rows(rows, self.group, self.counts)
