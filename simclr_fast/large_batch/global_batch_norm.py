"""Batch normalisation over micro-batches and ranks, on any device and backend.

Statistics of parts are (mean, sum of squared deviations M2, count), merged by the exact formula of
Chan, Golub and LeVeque (1979): mean = Σ n_i·mean_i / Σ n_i, M2 = Σ (M2_i + n_i (mean_i - mean)²).
Each direction costs one collective: forward a gather of these, backward a sum of Σdy and Σdy·x̂.
Parts may hold different numbers of rows, also none. torch's SyncBatchNorm refuses CPU tensors, and
on CUDA indexes a layer's whole input with 32 bits.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

_BatchNorm = nn.modules.batchnorm._BatchNorm


class Statistics(NamedTuple):
    """Of the whole batch. mean, variance (biased), inverse = (variance + eps)^-½: [C], float32 or
    wider; n: 0-dim float64, the values per channel."""

    mean: Tensor
    variance: Tensor
    inverse: Tensor
    n: Tensor
    eps: float


def on_cuda(x: Tensor) -> bool:
    """Whether `x` goes through CUDA's own batch norm operations."""
    return x.is_cuda


def moments(x: Tensor, eps: float) -> Tensor:
    """(mean, M2, count) of x [N, C, ...] as float64 [2C + 1]; zeros for N = 0. One pass over x."""
    if not x.numel():
        return x.new_zeros(2 * x.size(1) + 1, dtype=torch.float64)
    if on_cuda(x):
        return merge([_cuda_moments(part, eps) for part in _parts(x)])
    # With momentum 0 these stay zeros; their dtype is that of the result.
    unused = x.new_zeros(2, x.size(1), dtype=_wide(x))
    mean, variance = torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0)
    return _row(mean, variance, x)


def merge(rows: Sequence[Tensor]) -> Tensor:
    """The `moments` of all parts together."""
    if len(rows) == 1:
        return rows[0]
    table = torch.stack(list(rows))  # [parts, 2C + 1]
    counts = table[:, -1:]
    means, squares = table[:, :-1].unflatten(1, (2, -1)).unbind(1)
    mean = (counts * means).sum(0) / counts.sum().clamp_min(1)
    squares = (squares + counts * (means - mean) ** 2).sum(0)
    return torch.cat([mean, squares, counts.sum(0)])


def global_statistics(
    row: Tensor, eps: float, dtype: torch.dtype, group: dist.ProcessGroup | None
) -> Statistics:
    """Merge this rank's `moments` with those of `group`: one gather, none if it is None."""
    if group is not None:
        rows = [torch.empty_like(row) for _ in range(dist.get_world_size(group))]
        dist.all_gather(rows, row, group=group)
        row = merge(rows)
    mean, squares = row[:-1].unflatten(0, (2, -1)).unbind()
    variance = squares / row[-1].clamp_min(1)
    inverse = (variance + eps).rsqrt()
    return Statistics(mean.to(dtype), variance.to(dtype), inverse.to(dtype), row[-1], eps)


def normalize(x: Tensor, s: Statistics, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """γ (x - mean)·inverse + β in x's dtype; one pass."""
    return F.batch_norm(x, s.mean, s.variance, _as(weight, s), _as(bias, s), False, 0.0, s.eps)


def gradient_sums(dy: Tensor, x: Tensor, s: Statistics) -> Tensor:
    """Σdy and Σdy·x̂ over these rows: [2, C], β's and γ's gradients. One pass over dy and x."""
    if not x.numel():
        return s.mean.new_zeros(2, x.size(1))
    if on_cuda(x):
        total = s.mean.new_zeros(2, x.size(1))
        for part, grad in zip(_parts(x), _parts(_laid_out_as(dy, x)), strict=True):
            sum_dy, sum_dy_xmu, _, _ = torch.batch_norm_backward_reduce(
                grad, part, s.mean, s.inverse, None, True, False, False
            )
            total += torch.stack([sum_dy, sum_dy_xmu * s.inverse])
        return total
    # The gradients of weight and bias, without that of the input, are the sums.
    _, slope, center = torch.ops.aten.native_batch_norm_backward(
        dy, x, None, None, None, s.mean, s.inverse, True, s.eps, [False, True, True]
    )
    return torch.stack([center, slope])


def input_gradient(
    dy: Tensor, x: Tensor, s: Statistics, weight: Tensor | None, sums: Tensor
) -> Tensor:
    """dx = γ·inverse (dy - Σdy / n - x̂·Σdy·x̂ / n), `sums` and n those of the whole batch."""
    weight = _as(weight, s)
    if on_cuda(x) and x.numel():
        count = s.n.to(torch.int32).view(1)
        sum_dy, sum_dy_xmu = sums[0], sums[1] / s.inverse
        parts = [
            torch.batch_norm_backward_elemt(
                grad, part, s.mean, s.inverse, weight, sum_dy, sum_dy_xmu, count
            )
            for part, grad in zip(_parts(x), _parts(_laid_out_as(dy, x)), strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    scale = s.inverse if weight is None else s.inverse * weight
    center, slope = -scale * sums / s.n.to(scale.dtype)
    wide = _wide(x)
    correction = F.batch_norm(x.to(wide), s.mean, s.variance, slope, center, False, 0.0, s.eps)
    channels = scale.view(-1, *[1] * (x.dim() - 2))
    return correction.addcmul_(dy.to(wide), channels).to(dy.dtype)


@torch.no_grad()
def update_running(norm: Any, s: Statistics) -> None:
    """Move a batch norm's buffers towards `s`, the variance unbiased, as its own forward would."""
    if norm.running_mean is None or not norm.track_running_stats:
        return
    norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:
        momentum = 1 / float(norm.num_batches_tracked)
    unbiased = s.variance * (s.n / (s.n - 1).clamp_min(1)).to(s.variance.dtype)
    norm.running_mean.lerp_(s.mean.to(norm.running_mean), momentum)
    norm.running_var.lerp_(unbiased.to(norm.running_var), momentum)


class NormalizeFunction(torch.autograd.Function):
    """`normalize` with the gradient of the statistics: (x, weight, bias, Statistics, group)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Statistics,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.statistics, ctx.group = statistics, group
        return normalize(x, statistics, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        own = gradient_sums(dy, x, ctx.statistics)
        sums = own
        if ctx.group is not None:
            sums = own.clone()
            dist.all_reduce(sums, group=ctx.group)
        dx = input_gradient(dy, x, ctx.statistics, weight, sums)
        # The parameters' gradients are this rank's share: DistributedDataParallel adds them up.
        if weight is None:
            return dx, None, None, None, None
        return dx, own[1].to(weight.dtype), own[0].to(weight.dtype), None, None


class GlobalBatchNorm(_BatchNorm):
    """Drop-in for BatchNorm1d/2d: x [N, C, ...], statistics over all ranks' N."""

    def __init__(self, like: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__(
            like.num_features, like.eps, like.momentum, like.affine, like.track_running_stats
        )
        for tensor in (like.weight, like.running_mean):
            if tensor is not None:
                self.to(device=tensor.device, dtype=tensor.dtype)
        self.load_state_dict(like.state_dict())
        for own, given in zip(self.parameters(), like.parameters(), strict=True):
            own.requires_grad_(given.requires_grad)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2 or x.size(1) != self.num_features:
            raise ValueError(f"x must be [N, {self.num_features}, ...], got {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if not self.training:
            return super().forward(x)
        with torch.no_grad():
            statistics = global_statistics(
                moments(x, self.eps), self.eps, _wide(x), dist.group.WORLD
            )
            update_running(self, statistics)
        return NormalizeFunction.apply(x, self.weight, self.bias, statistics, dist.group.WORLD)


def convert_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Make every batch norm of `module` global: torch's SyncBatchNorm on CUDA, ours elsewhere."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, GlobalBatchNorm(child))
        else:
            convert_batch_norm(child, device)
    return module


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _as(parameter: Tensor | None, s: Statistics) -> Tensor | None:
    return None if parameter is None else parameter.to(s.mean.dtype)


def _row(mean: Tensor, variance: Tensor, x: Tensor) -> Tensor:
    count = x.numel() // x.size(1)
    mean, variance = mean.double(), variance.double()
    return torch.cat([mean, variance * count, mean.new_full((1,), count)])


def _cuda_moments(x: Tensor, eps: float) -> Tensor:
    mean, inverse = torch.batch_norm_stats(x, eps)
    return _row(mean, (inverse.double() ** -2 - eps).clamp_min(0), x)


def _parts(x: Tensor) -> Sequence[Tensor]:
    """Runs of rows that 32-bit indices can address, each dense."""
    rows = max(1, (2**31 - 1) // max(1, x[0].numel()))
    if not x.is_contiguous(memory_format=_layout(x)):
        x = x.contiguous()
    return x.split(rows)


def _laid_out_as(dy: Tensor, x: Tensor) -> Tensor:
    return dy.contiguous(memory_format=_layout(x))


def _layout(x: Tensor) -> torch.memory_format:
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if channels_last is not None and x.is_contiguous(memory_format=channels_last):
        return channels_last
    return torch.contiguous_format
