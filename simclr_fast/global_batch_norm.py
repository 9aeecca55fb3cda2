"""Batch normalisation over the batch of all ranks, on any device and backend.

torch's SyncBatchNorm refuses CPU tensors. Here each direction costs one collective: forward, a
gather of (count, mean, sum of squared deviations) per rank, merged by Chan's formula; backward, a
sum of Σdy and Σdy·x̂. Ranks may hold different numbers of images.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
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
        y, mean, variance, count = _Normalize.apply(x, self.weight, self.bias, self.eps)
        if self.running_mean is not None:
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                momentum = self.momentum
                if momentum is None:
                    momentum = 1 / float(self.num_batches_tracked)
                unbiased = variance * (count / (count - 1).clamp_min(1))
                self.running_mean.lerp_(mean.to(self.running_mean), momentum)
                self.running_var.lerp_(unbiased.to(self.running_var), momentum)
        return y


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rest = [0, *range(2, x.dim())]
        count = wide.new_tensor(float(x.numel() // x.size(1)))
        if x.size(0):
            mean, squares = wide.mean(rest), wide.var(rest, correction=0) * count
        else:
            mean = squares = wide.new_zeros(x.size(1))
        own = torch.cat([mean, squares, count[None]])
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        table = torch.stack(parts)  # [ranks, 2C + 1]
        counts = table[:, -1:]
        means, squared = table[:, :-1].unflatten(1, (2, -1)).unbind(1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        variance = (squared + counts * (means - mean) ** 2).sum(0) / total
        inverse = (variance + eps).rsqrt()
        shape = (1, -1, *[1] * (x.dim() - 2))
        normal = (wide - mean.view(shape)) * inverse.view(shape)
        y = normal
        if weight is not None:
            y = normal * weight.view(shape) + bias.view(shape)
        ctx.save_for_backward(normal, weight, inverse, total)
        ctx.shape, ctx.rest = shape, rest
        ctx.mark_non_differentiable(mean, variance, total)
        return y.to(x.dtype), mean, variance, total

    @staticmethod
    def backward(ctx, grad, *_):
        normal, weight, inverse, total = ctx.saved_tensors
        wide = grad.to(normal.dtype)
        own = torch.stack([wide.sum(ctx.rest), (wide * normal).sum(ctx.rest)])  # [2, C]
        sums = own.clone()
        dist.all_reduce(sums)
        center, slope = (s.view(ctx.shape) / total for s in sums)
        scale = inverse if weight is None else inverse * weight
        dx = (wide - center - normal * slope) * scale.view(ctx.shape)
        # The parameters' gradients are this rank's share: DistributedDataParallel adds them up.
        if weight is None:
            return dx.to(grad.dtype), None, None, None
        return dx.to(grad.dtype), own[1].to(weight.dtype), own[0].to(weight.dtype), None


def convert_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """Make every batch norm of `module` global: torch's SyncBatchNorm on CUDA, ours elsewhere."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, GlobalBatchNorm(child))
        else:
            convert_batch_norm(child, device)
    return module
