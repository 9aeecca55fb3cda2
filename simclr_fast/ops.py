"""The one place that loads the native extension and registers torch.library ops."""

import warnings
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

EXTENSION_ERROR: ImportError | None = None
try:
    import_module("simclr_fast._C")
except ImportError as error:
    EXTENSION_ERROR = error


def has_extension() -> bool:
    """Whether the compiled extension is loaded. The first False warns once, with the cause."""
    if EXTENSION_ERROR is not None:
        _warn_once(EXTENSION_ERROR)
    return EXTENSION_ERROR is None


_warned = False


def _warn_once(cause: ImportError) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"simclr_fast's native extension is not loaded ({cause}); the slower plain-torch "
            "paths are used. `pip install .` with a C++17 compiler builds it.",
            RuntimeWarning,
            stacklevel=3,
        )


# LarsFlag of csrc/lars.h.
LARS_NESTEROV, LARS_MAXIMIZE, LARS_ADAPT, LARS_CLIP = 1, 2, 4, 8
LARS_TF_ORDER, LARS_JOINT_NORM, LARS_DECAY_WHEN_ZERO = 16, 32, 64

if EXTENSION_ERROR is None:

    @torch.library.register_fake("simclr_fast::lars_")
    def _(*arguments: object) -> None:
        return None


@cache
def has_lars(device_type: str) -> bool:
    """Whether the fused LARS step runs on devices of this type."""
    if device_type not in ("cpu", "cuda") or not has_extension():
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key("simclr_fast::lars_", device_type.upper())


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
    unless its momentum is 0. hyper: lr, momentum, dampening, weight_decay, trust_coefficient, eps
    of each group in turn. lrs: empty, or a one-element tensor per group used in place of its lr.
    Tensors of equal shape, dtype (float16, bfloat16, float32 or float64) and device; any strides.
    """
    torch.ops.simclr_fast.lars_.default(
        params, grads, momentum_buffers, group_sizes, flags, hyper, lrs, grad_scale, found_inf
    )
