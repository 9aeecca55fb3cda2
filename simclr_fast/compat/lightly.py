"""lightly.loss.NTXentLoss: `from simclr_fast.compat.lightly import NTXentLoss`."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from simclr_fast.distributed import all_gather_rows
from simclr_fast.losses import nt_xent_loss


class NTXentLoss(nn.Module):
    """NT-Xent, or with a memory bank the loss of MoCo (He et al. 2020), on projections [N, D].

    temperature: divides the cosines.
    memory_bank_size: (rows, features) of a queue of negatives, or 0 for the batch's own negatives.
    gather_distributed: negatives from all ranks. Gradients under DDP are lightly's; the value is
        the whole batch's loss on every rank, of which lightly returns each rank its own part.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ):
        super().__init__()
        size = (memory_bank_size,) if isinstance(memory_bank_size, int) else tuple(memory_bank_size)
        if size != (0,) and (len(size) != 2 or min(size) < 1):
            raise ValueError(
                f"memory_bank_size must be 0 or (rows, features), got {memory_bank_size!r}"
            )
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature!r}")
        self.temperature, self.gather_distributed = temperature, gather_distributed
        bank = F.normalize(torch.randn(size), dim=1) if len(size) == 2 else torch.empty(0)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=False)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        distributed = self.gather_distributed and dist.is_initialized()
        group = dist.group.WORLD if distributed and dist.get_world_size() > 1 else None
        if len(self.bank) == 0:
            return nt_xent_loss(out0, out1, self.temperature, group=group)
        z0, z1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        negatives = self.bank.clone()
        if out0.requires_grad:
            self._enqueue(z1.detach() if group is None else all_gather_rows(z1.detach(), group))
        positive = (z0 * z1).sum(1, keepdim=True)
        logits = torch.cat((positive, z0 @ negatives.T.to(z0.dtype)), 1) / self.temperature
        return F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.long))

    @torch.no_grad()
    def _enqueue(self, rows: Tensor) -> None:
        # Like lightly, a batch that reaches the end is cut there and the next starts at 0.
        start = int(self.bank_ptr)
        end = min(start + len(rows), len(self.bank))
        self.bank[start:end] = rows[: end - start].to(self.bank.dtype)
        self.bank_ptr[0] = 0 if end == len(self.bank) else end
