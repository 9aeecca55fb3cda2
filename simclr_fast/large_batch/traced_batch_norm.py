"""Batch norms over ranks in operations that `torch.compile` traces, for memory plain.

`global_batch_norm` gives each pass to a kernel of its own. Here the passes are written out, so that
the compiler fuses them with the convolution's neighbours: sums, ReLU, casts. The collectives are
functional ones, which a graph may hold: one gather of (mean, M2, n) per layer in the forward, one
sum of (Σdy, Σdy·x̂) in the backward. The compiler keeps their order, which is then the same on all
ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from simclr_fast.large_batch import global_batch_norm as gbn
from simclr_fast.large_batch.batch_norms import (
    Replaced,
    after_norm,
    batch_norms,
    replaced_forwards,
)
from simclr_fast.ops import widest_float

_collectives = torch.ops._c10d_functional


class TracedNorms:
    """Gives the batch norms of a model a forward that can be compiled.

    torch.compile recognises a function by its identity, so the forwards are made once and kept.
    """

    def __init__(self, batch: gbn.WholeBatch) -> None:
        assert batch.group is not None
        self._ranks, self._group = batch.ranks, batch.group.group_name
        self._forwards: dict[nn.Module, Replaced] = {}

    @contextmanager
    def during(self, model: nn.Module) -> Iterator[None]:
        """A context in which the batch norms of `model` use the statistics of the whole batch."""
        norms = batch_norms(model).values()
        for norm in norms:
            self._forwards.setdefault(norm, Replaced(self._forward, norm))
        with replaced_forwards({norm: self._forwards[norm] for norm in norms}):
            yield

    def _forward(self, norm: Any, x: Tensor) -> Tensor:
        mean, inverse, n = _statistics(norm, x, self._ranks, self._group)
        y = _Normalize.apply(x, norm.weight, norm.bias, mean, inverse, n, self._group)
        for name in after_norm(norm):
            y = getattr(norm, name)(y)
        return y


@torch.no_grad()
def _statistics(norm: Any, x: Tensor, ranks: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """The mean [C], (variance + eps)^-½ [C] and values per channel [1] of all ranks."""
    wide, widest = gbn.wide_dtype(x), widest_float(x.device)
    variance, mean = torch.var_mean(x.to(wide), _axes(x), correction=0)
    n = x.numel() // x.size(1)
    row = torch.cat([mean.to(widest), variance.to(widest) * n, x.new_full((1,), n, dtype=widest)])
    table = _collectives.all_gather_into_tensor(row, ranks, group)
    table = _collectives.wait_tensor(table).view(ranks, -1)
    row = gbn.merge(table.unbind())  # [2C + 1]
    (mean, squares), count = row[:-1].unflatten(0, (2, -1)).unbind(), row[-1:]
    variance = squares / count
    # The compiled graph counts the batch itself: what Python counts would be done only once.
    gbn.update_running(norm, mean, variance, count, None)
    return mean.to(wide), (variance + norm.eps).rsqrt().to(wide), count.to(wide)


class _Normalize(torch.autograd.Function):
    """γ x̂ + β with x̂ = (x - mean)·inverse, rounded once.

    The gradient includes the dependence of the statistics on x:
    dx = γ·inverse (dy - Σdy / n - x̂·Σdy·x̂ / n), with sums over all ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        inverse: Tensor,
        n: Tensor,
        group: str,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, inverse, n)
        ctx.group = group
        y = _normalized(x, mean, inverse)
        if weight is not None:
            y = y * _per_channel(weight, y)
        if bias is not None:
            y = y + _per_channel(bias, y)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, n = ctx.saved_tensors
        normalized = _normalized(x, mean, inverse)
        wide_dy = dy.to(normalized.dtype)
        # [2, C]: Σdy and Σdy·x̂
        own = torch.stack([wide_dy.sum(_axes(x)), (wide_dy * normalized).sum(_axes(x))])
        whole = _collectives.wait_tensor(_collectives.all_reduce(own, "sum", ctx.group)) / n
        scale = inverse if weight is None else inverse * weight.to(inverse.dtype)
        center, slope = (_per_channel(mean_of, x) for mean_of in whole.unbind())
        dx = (wide_dy - center - normalized * slope) * _per_channel(scale, x)
        # The gradients of γ and β are this rank's part, which is averaged over ranks elsewhere.
        slopes = [None if weight is None else own[1].to(weight.dtype)]
        slopes.append(None if weight is None else own[0].to(weight.dtype))
        return dx.to(x.dtype), *slopes, None, None, None, None


def _normalized(x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    return (x.to(mean.dtype) - _per_channel(mean, x)) * _per_channel(inverse, x)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """`values` [C] in float32 or wider, shaped so that they apply to x [N, C, ...]."""
    return values.to(gbn.wide_dtype(x)).view(-1, *[1] * (x.dim() - 2))


def _axes(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]
