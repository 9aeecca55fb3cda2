"""The op of a batch norm with known statistics, a residual and ReLU: each value is read once.

    y = act(γ (x - mean)·inverse + β + r),    act = ReLU or none,

with r = 0, `other`, or γ' (other - mean')·inverse' + β'. The arithmetic is float32 or wider, and y
is rounded once. x, other, y: [N, C, ...] of one dtype and one dense layout, contiguous or
channels_last. The statistics and parameters: [C], contiguous, in float32, or float64 if x is.

The CPU's kernel is csrc/norm_act_cpu.cpp and the GPU's kernels/norm_act.py.
"""

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from simclr_fast.ops import norm_act_plain
from simclr_fast.ops.library import (
    Implementation,
    define_op,
    goes_straight_to_cuda,
    implementation_for,
)


def norm_act(
    x: Tensor,
    mean: Tensor | None,
    inverse: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    other: Tensor | None = None,
    other_mean: Tensor | None = None,
    other_inverse: Tensor | None = None,
    other_weight: Tensor | None = None,
    other_bias: Tensor | None = None,
    relu: bool = False,
    in_place: bool = False,
) -> Tensor:
    """y. in_place: it overwrites x.

    One of x and other may have no mean: that tensor is added as it is. The kernel is called without
    the dispatcher where that would only pass the call on.
    """
    tensors = x, mean, inverse, weight, bias
    others = other, other_mean, other_inverse, other_weight, other_bias
    if goes_straight_to_cuda(*tensors, *others):
        call: Any = _norm_act_in_place if in_place else _norm_act
    else:
        call = op_in_place if in_place else op
    made: Tensor = call(*tensors, *others, relu)
    return made


def _norm_act(x: Tensor, *rest: Any) -> Tensor:
    if not x.numel():
        return torch.empty_like(x)
    if _on_triton(x):
        return _launch(torch.empty_like(x), x, *rest)
    return norm_act_plain.norm_act(x, *rest)


def _norm_act_in_place(x: Tensor, *rest: Any) -> Tensor:
    if not x.numel():
        return x
    if _on_triton(x):
        return _launch(x, x, *rest)
    return norm_act_plain.norm_act_(x, *rest)


def _on_triton(x: Tensor) -> bool:
    return implementation_for(x.device, x.dtype) is Implementation.TRITON


def _launch(y: Tensor, x: Tensor, mean: Tensor | None, *rest: Any) -> Tensor:
    """Write y, which may be x. The kernel normalises its first tensor."""
    tensors = (x, mean, *rest)
    own, others, relu = tensors[:5], tensors[5:10], tensors[10]
    pair = (*others, *own) if mean is None else (*own, *others)
    _triton_kernels().norm_act(y, *pair, relu)
    return y


@cache
def _triton_kernels() -> Any:
    return import_module("simclr_fast.kernels.norm_act")


_REST = (
    "Tensor? mean, Tensor? inverse, Tensor? weight, Tensor? bias, Tensor? other,"
    " Tensor? other_mean, Tensor? other_inverse, Tensor? other_weight, Tensor? other_bias,"
    " bool relu"
)
op = define_op(
    f"norm_act(Tensor x, {_REST}) -> Tensor",
    kernel=_norm_act,
    shapes=lambda x, *_: torch.empty_like(x),
)
op_in_place = define_op(
    f"norm_act_(Tensor(a!) x, {_REST}) -> Tensor(a!)",
    kernel=_norm_act_in_place,
    shapes=lambda x, *_: x,
)
