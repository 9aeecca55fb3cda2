"""A batch norm in training with a residual and ReLU, and its gradients: few passes over memory.

    y = act(γ (x - mean)·inverse + β + r),    inverse = 1 / √(variance + eps),

with the mean and variance of x over all but the channels, r = 0 or `other`, act = ReLU or none.
torch's batch norm, sum and ReLU are three operations, of which each reads and writes every value,
and rounds it. Here x is read twice, and y is written and rounded once. The backward reads dy, y
and x twice and writes the gradients of x and `other`. Sums are in float32 over up to 64 values, and
of these in float64. They do not depend on the number of threads.

There is a kernel for the CPU only, csrc/norm_act_cpu.cpp, and no plain form: `fits` says when to
call torch's operations instead.
"""

from typing import Any

import torch
from torch import Tensor

from simclr_fast.ops.library import Implementation, define_op, implementation_for

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fits(x: Tensor, other: Tensor | None = None) -> bool:
    """Whether the kernel takes x: float32 or narrower, [N, C] or [N, C, H, W] in channels_last, on
    the CPU; and `other`, of the same kind."""
    if x.device.type != "cpu" or x.dtype not in _DTYPES or torch.compiler.is_compiling():
        return False
    if x.dim() == 2:
        dense = x.is_contiguous()
    else:
        dense = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if not dense or x.numel() <= x.size(1):
        return False
    if other is not None and (
        other.shape != x.shape or other.dtype != x.dtype or other.stride() != x.stride()
    ):
        return False
    return implementation_for(x.device, x.dtype) is Implementation.NATIVE


def norm_train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    other: Tensor | None = None,
    eps: float = 1e-5,
    relu: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the mean and variance, float32 [C], through which no gradient flows.

    x, other: as `fits` says. weight, bias: float32 [C].
    """
    y, mean, variance = _NormTrain.apply(x, weight, bias, other, eps, relu)
    return y, mean, variance


class _NormTrain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        other: Tensor | None,
        eps: float,
        relu: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, variance, inverse = op(x, weight, bias, other, eps, relu)
        ctx.save_for_backward(x, y if relu else None, mean, inverse, weight)
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        return y, mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 6
        x, y, mean, inverse, weight = ctx.saved_tensors
        layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
        dy = dy.contiguous(memory_format=layout)
        wants_other = ctx.needs_input_grad[3]
        dx, g, dweight, dbias = op_backward(
            dy, x, y, mean, inverse, weight, wants_other and y is not None
        )
        if wants_other and y is None:
            g = dy
        wanted = ctx.needs_input_grad
        return (
            dx if wanted[0] else None,
            dweight if wanted[1] else None,
            dbias if wanted[2] else None,
            g if wants_other else None,
            None,
            None,
        )


def _unreachable(x: Tensor, *_: Any) -> Any:
    raise NotImplementedError(f"simclr_fast::norm_train has no kernel for {x.device} tensors")


def _per_channel(x: Tensor) -> Tensor:
    return x.new_empty(x.size(1), dtype=torch.float32)


op = define_op(
    "norm_train(Tensor x, Tensor? weight, Tensor? bias, Tensor? other, float eps, bool relu)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_unreachable,
    shapes=lambda x, *_: (torch.empty_like(x), *(_per_channel(x) for _ in range(3))),
)
op_backward = define_op(
    "norm_train_backward(Tensor dy, Tensor x, Tensor? y, Tensor mean, Tensor inverse,"
    " Tensor? weight, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_unreachable,
    shapes=lambda dy, x, y, mean, inverse, weight, keep: (
        torch.empty_like(x),
        torch.empty_like(x) if keep else x.new_empty(0, dtype=torch.float32),
        _per_channel(x),
        _per_channel(x),
    ),
)
