"""The op of one LARS step, in place. Schema and CPU kernel are in csrc/lars_cpu.cpp.

On devices without a kernel, optim/lars_torch.py does the step.
"""

from enum import IntFlag

import torch
from torch import Tensor

from simclr_fast.ops.library import has_extension, refuse_mixed_devices


class LarsFlag(IntFlag):
    """Options of a parameter group; csrc/lars.h has the same numbers."""

    NESTEROV = 1
    MAXIMIZE = 2
    ADAPT = 4
    CLIP = 8
    TF_ORDER = 16
    JOINT_NORM = 32
    DECAY_WHEN_ZERO = 64


def lars_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    group_sizes: list[int],
    flags: list[int],
    hyper: list[float],
    lrs: list[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One LARS step in place for all parameters of one device.

    Group i owns the next group_sizes[i] parameters and gradients, and as many momentum buffers
    unless its momentum is 0. flags: the group's LarsFlag. hyper: lr, momentum, dampening,
    weight_decay, trust_coefficient, eps of each group in turn. lrs: empty, or a one-element tensor
    per group used in place of its lr. Tensors of equal shape, dtype (float16, bfloat16, float32 or
    float64) and device; any strides.
    """
    torch.ops.simclr_fast.lars_.default(
        params, grads, momentum_buffers, group_sizes, flags, hyper, lrs, grad_scale, found_inf
    )


if has_extension():
    torch.library.register_fake(
        "simclr_fast::lars_", lambda *arguments: refuse_mixed_devices("lars_", arguments)
    )
