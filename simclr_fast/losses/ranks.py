"""The rows of this rank among the rows of all ranks of a group."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from simclr_fast.utils.distributed import all_gather_rows, row_counts_of


@dataclass(frozen=True)
class RankRows:
    """Every rank's number of rows, in rank order; a rank may have none, but not all of them."""

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
        """Tell all ranks how many rows this one has, unless the caller knows all `row_counts`.

        On CUDA telling waits for the device.

        Raises:
            ValueError: on every rank, if no rank has any row; on this one, if row_counts says
                otherwise than num_rows.
        """
        counts = tuple(row_counts_of(num_rows, device, group, row_counts))
        if not any(counts):
            raise ValueError("a group's batch needs rows on at least one rank, got none on any")
        return cls(group, counts)

    @property
    def offset(self) -> int:
        """Number of the first row of this rank."""
        return sum(self.counts[: dist.get_rank(self.group)])

    @property
    def total(self) -> int:
        return sum(self.counts)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, in rank order; no gradient."""
        return all_gather_rows(rows, self.group, self.counts)
