"""CUDA's operations of batch norms on the CPU, with the demands of the kernels as assertions."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from simclr_fast.large_batch import global_batch_norm as gbn


@contextmanager
def cuda_batch_norm() -> Iterator[None]:
    """Within it, batch norms of whole batches take the path of CUDA tensors."""
    before, gbn.on_cuda = gbn.on_cuda, lambda x: True
    try:
        with _Kernels():
            yield
    finally:
        gbn.on_cuda = before


class _Kernels(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.mm.dtype:
            # Products of half precision that are summed and returned in float32.
            assert args[0].dtype == args[1].dtype in (torch.bfloat16, torch.float16)
            assert args[2] is torch.float32
            return args[0].float() @ args[1].float()
        kernel = _KERNELS.get(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {})) if kernel is None else kernel(*args)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check(x: Tensor, *statistics: Tensor) -> None:
    assert x.numel()
    assert x.numel() <= gbn._INT32_MAX
    assert x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    for t in statistics:
        assert t.dtype == _wide(x.dtype)
        assert t.shape == (x.size(1),)
        assert t.is_contiguous()


def strides(x: Tensor) -> list[int]:
    """Of the dimensions whose stride matters."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def _columns(x: Tensor) -> Tensor:
    return x.double().transpose(0, 1).flatten(1)  # [C, values]


def _along(x: Tensor, t: Tensor | None, default: float) -> Tensor:
    t = torch.full((x.size(1),), default) if t is None else t
    return t.double().view(-1, *[1] * (x.dim() - 2))


def _stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check(x)
    columns = _columns(x)
    inverse = (columns.var(1, correction=0) + eps).rsqrt()
    return columns.mean(1).to(_wide(x.dtype)), inverse.to(_wide(x.dtype))


def _gather(
    x: Tensor,
    means: Tensor,
    inverses: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    kind = x.dtype if running_mean is None else running_mean.dtype
    assert counts.dtype == kind
    assert means.dtype == inverses.dtype == _wide(kind)
    assert means.shape == inverses.shape == (len(counts), means.size(1))
    # In the kernel n is an int, and the first part is divided by its own count.
    assert counts.sum() <= gbn._INT32_MAX
    assert counts[0] > 0
    n = counts.double().sum()
    weights = counts.double()[:, None] / n
    mean = (weights * means.double()).sum(0)
    variances = inverses.double() ** -2 - eps
    variance = (weights * (variances + (means.double() - mean) ** 2)).sum(0)
    if running_mean is not None:
        assert running_var is not None
        running_mean.mul_(1 - momentum).add_(momentum * mean)
        running_var.mul_(1 - momentum).add_(momentum * variance * n / (n - 1))
    return mean.to(means.dtype), (variance + eps).rsqrt().to(means.dtype)


def _reduce(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    input_g: bool,
    weight_g: bool,
    bias_g: bool,
) -> tuple[Tensor, ...]:
    _check(x, mean, inverse)
    assert dy.dtype == x.dtype
    assert strides(dy) == strides(x)
    assert weight is not None or not weight_g
    sums = _columns(dy).sum(1)
    products = (_columns(dy) * (_columns(x) - mean.double()[:, None])).sum(1)
    kind = x.dtype if weight is None else weight.dtype
    nothing = mean.new_empty(0)
    return (
        *((t.to(mean.dtype) if input_g else nothing) for t in (sums, products)),
        (products * inverse.double()).to(kind) if weight_g else nothing,
        sums.to(kind) if bias_g else nothing,
    )


def _backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:
    _check(x, mean, inverse, sum_dy, sum_dy_xmu, *(() if weight is None else (weight,)))
    assert dy.dtype == x.dtype
    assert strides(dy) == strides(x)
    assert count.dtype == torch.int32
    assert 0 < count.max() <= gbn._INT32_MAX
    n = count.long().sum()
    inverse = _along(x, inverse, 0)
    projected = (x.double() - _along(x, mean, 0)) * inverse**2 * _along(x, sum_dy_xmu, 0) / n
    dx = (dy.double() - _along(x, sum_dy, 0) / n - projected) * inverse * _along(x, weight, 1)
    return torch.empty_like(x).copy_(dx)


_KERNELS = {
    "batch_norm_stats": _stats,
    "batch_norm_gather_stats_with_counts": _gather,
    "batch_norm_backward_reduce": _reduce,
    "batch_norm_backward_elemt": _backward,
}
