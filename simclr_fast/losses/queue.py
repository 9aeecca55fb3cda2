"""NT-Xent against a queue of keys: many negatives with a small batch.

He et al. 2020, "Momentum Contrast for Unsupervised Visual Representation Learning"
(arXiv:1911.05722), equation 1 and section 3.2.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from simclr_fast.losses.nt_xent import (
    _check_matrix,
    _reduction_code,
    _temperature_tensor,
    refuse_transforms,
)
from simclr_fast.losses.ranks import RankRows
from simclr_fast.ops import nt_xent, queue
from simclr_fast.utils.numbers import as_int


class KeyQueue(nn.Module):
    """The newest `size` keys of past batches, of the dimension `dim`, oldest replaced first.

    keys: a buffer, float32 [size, dim], unit vectors. At first they are random, as in MoCo, drawn
        from torch's current random state.

    Its state_dict also holds the place of the oldest key, so that a resumed run continues exactly.
    """

    keys: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        size, dim = as_int("size", size, 1), as_int("dim", dim, 1)
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))
        self.oldest = 0

    @torch.no_grad()
    def push(
        self,
        keys: Tensor,
        group: dist.ProcessGroup | None = None,
        row_counts: Sequence[int] | None = None,
    ) -> None:
        """Replace the oldest keys by `keys` [n, dim], which are normalised first.

        Of more than `size` keys the last ones are taken.

        group: the keys of all ranks are pushed, in rank order, so all ranks have the same queue if
            they started with the same. row_counts: as in `queue_loss`.
        """
        _check_matrix("keys", keys, least=0)
        size, dim = self.keys.shape
        if keys.size(1) != dim:
            raise ValueError(f"keys must be [n, {dim}], got {list(keys.shape)}")
        new = F.normalize(keys.to(self.keys.device, self.keys.dtype), dim=1)
        if group is not None:
            new = RankRows.exchange(len(new), new.device, group, row_counts).gather(new)
        new = new[-size:]
        # The rows up to the end, then those from the start on.
        end = min(len(new), size - self.oldest)
        self.keys[self.oldest : self.oldest + end] = new[:end]
        self.keys[: len(new) - end] = new[end:]
        self.oldest = (self.oldest + len(new)) % size

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.oldest)

    def set_extra_state(self, state: Tensor) -> None:
        self.oldest = int(state)

    def extra_repr(self) -> str:
        return f"size={len(self.keys)}, dim={self.keys.size(1)}"


def queue_loss(
    z: Tensor,
    keys: Tensor,
    queue: Tensor | KeyQueue,
    temperature: float | Tensor = 0.2,
    *,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
    row_counts: Sequence[int] | None = None,
) -> Tensor:
    """Each row of z must find its own key among the K keys of a queue (MoCo, equation 1).

    Row i's loss is -log(exp(z_i·keys_i / τ) / (exp(z_i·keys_i / τ) + Σ exp(z_i·queue_j / τ))), with
    unit vectors. The [R, K] logits exist one tile at a time, also in the backward. Memory is
    O((R + K)·D). There is no double backward.

    z: [R, D], any strides; float64, float32, bfloat16 or float16; arithmetic and loss are float32
        or wider. z is normalised here.
    keys: [R, D], of another view of the same images, such as of a momentum encoder
        (`simclr_fast.models.WeightAverage`). They are normalised here, and get no gradient.
    queue: a `KeyQueue`, or unit vectors [K, D]. It is not changed: call `KeyQueue.push(keys)` after
        the backward, which reads the queue again.
    temperature: as in `nt_xent_loss`.
    reduction: "mean" or "sum" over the R rows, or "none": [R].
    group: ranks whose rows form one batch. As in `nt_xent_loss`, every rank returns the loss of the
        whole batch, and its gradients are multiplied by the number of ranks. All ranks need the
        same queue.
    row_counts: the number of rows of every rank of the group, in rank order, if known.
    """
    others = queue.keys if isinstance(queue, KeyQueue) else queue
    refuse_transforms(z, temperature)
    _check_matrix("z", z, least=1 if group is None else 0)
    _check_matrix("keys", keys, least=0)
    _check_matrix("queue", others)
    if keys.shape != z.shape:
        raise ValueError(f"keys must have z's shape {list(z.shape)}, got {list(keys.shape)}")
    if others.size(1) != z.size(1):
        raise ValueError(f"queue must be [K, {z.size(1)}] as z, got {list(others.shape)}")
    for name, given in (("keys", keys), ("queue", others)):
        if given.device != z.device:
            raise ValueError(f"{name} must be on z's device, {z.device}, got {given.device}")
        if given.requires_grad:
            raise ValueError(f"{name} gets no gradient, but requires one: detach it")
    code = _reduction_code(reduction, group)
    tau = _temperature_tensor(temperature, z)
    ranks = None
    if group is not None:
        ranks = RankRows.exchange(z.size(0), z.device, group, row_counts)
    return _QueueLoss.apply(z, tau, keys, others, code, ranks)


class _QueueLoss(torch.autograd.Function):
    """With ranks, sums the loss over them in the forward. The backward does not communicate."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        temperature: Tensor,
        keys: Tensor,
        others: Tensor,
        reduction: int,
        ranks: RankRows | None,
    ) -> Tensor:
        row_loss, lse = queue.row_loss(z, keys, others, temperature)
        ctx.save_for_backward(z, keys, others, temperature, row_loss, lse)
        ctx.num_ranks = 1 if ranks is None else len(ranks.counts)
        total = len(row_loss) if ranks is None else ranks.total
        ctx.divisor = total if reduction == nt_xent.MEAN else 1
        if reduction == nt_xent.NONE:
            return row_loss
        loss = row_loss.sum() / ctx.divisor
        if ranks is not None:
            dist.all_reduce(loss, group=ranks.group)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, keys, others, temperature, row_loss, lse = ctx.saved_tensors
        grad = (grad * (ctx.num_ranks / ctx.divisor)).expand(len(row_loss))
        arguments = (z, keys, others, temperature, row_loss, lse)
        return *queue.backward(grad, *arguments), None, None, None, None
