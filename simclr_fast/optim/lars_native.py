"""LARS by the native kernels: when they can be used, and the arguments of their op."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from simclr_fast import ops
from simclr_fast.ops.lars import LarsFlag
from simclr_fast.optim.lars_torch import Batch

# Option of a parameter group, the value that sets a flag, the flag. Plain integers: each operator
# on an IntFlag makes an object, and a step makes several per group.
_FLAGS = (
    ("nesterov", True, int(LarsFlag.NESTEROV)),
    ("maximize", True, int(LarsFlag.MAXIMIZE)),
    ("trust_clip", True, int(LarsFlag.CLIP)),
    ("momentum_order", "tf", int(LarsFlag.TF_ORDER)),
    ("norm", "joint", int(LarsFlag.JOINT_NORM)),
    ("when_zero", "decay", int(LarsFlag.DECAY_WHEN_ZERO)),
)
_ADAPT = int(LarsFlag.ADAPT)
# Checked first: the general check for wrappers takes longer than the update of a small tensor.
_PLAIN_TYPES = frozenset((nn.Parameter, Tensor))


def use_native(group: dict[str, Any], params: list[Tensor]) -> bool:
    """Whether the native kernels update `params`, which are on one device.

    Sharded and other wrapped tensors are updated by plain torch's operations.
    """
    if not wants_native(group):
        return False
    device = params[0].device
    if not group["fused"]:
        if has_wrapped(params):
            return False
        kernels = ops.implementation_for(device, on_cuda=ops.Implementation.CUDA)
        return kernels is not ops.Implementation.PLAIN
    if has_wrapped(params):
        wrapped = next(p for p in params if is_traceable_wrapper_subclass(p))
        reason: str | None = f"it takes plain tensors, not a {type(wrapped).__name__}"
    else:
        reason = ops.why_plain(device, on_cuda=ops.Implementation.CUDA)
    if reason is not None:
        raise RuntimeError(
            f"fused=True needs the native LARS kernel, which cannot be used: {reason}"
        ) from ops.EXTENSION_ERROR
    return True


def has_wrapped(params: list[Tensor]) -> bool:
    """Whether one of them is not a plain tensor, such as a DTensor."""
    return not _PLAIN_TYPES.issuperset(map(type, params)) and any(
        map(is_traceable_wrapper_subclass, params)
    )


def wants_native(group: dict[str, Any]) -> bool:
    return group["fused"] is not False and group["foreach"] is None


def native_step(
    device: torch.device,
    batches: list[Batch],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Update the tensors of all batches. All must be on `device`."""
    params: list[Tensor] = []
    grads: list[Tensor] = []
    buffers: list[Tensor] = []
    flags: list[int] = []
    hyper: list[float] = []
    for batch in batches:
        params += batch.params
        grads += batch.grads
        buffers += batch.buffers
        flags.append(_flags(batch))
        hyper += _hyperparameters(batch)
    ops.lars.lars_(
        params,
        grads,
        buffers,
        [len(batch.params) for batch in batches],
        flags,
        hyper,
        _lr_tensors(batches, device),
        None if grad_scale is None else grad_scale.to(device, non_blocking=True),
        None if found_inf is None else found_inf.to(device, non_blocking=True),
    )
    torch.autograd.graph.increment_version(params)


def _flags(batch: Batch) -> int:
    flags = _ADAPT if batch.adapt else 0
    for option, value, flag in _FLAGS:
        if batch.group[option] == value:
            flags |= flag
    return flags


def _hyperparameters(batch: Batch) -> list[float]:
    """The numbers of csrc/lars.h's LarsGroup, in its order."""
    group, lr = batch.group, batch.group["lr"]
    return [
        0.0 if isinstance(lr, Tensor) else lr,
        group["momentum"],
        batch.dampening,
        batch.weight_decay,
        group["trust_coefficient"],
        group["eps"],
    ]


def _lr_tensors(batches: list[Batch], device: torch.device) -> list[Tensor]:
    """The learning rates of all batches as tensors if one of them is a tensor, else []."""
    lrs = [batch.group["lr"] for batch in batches]
    if not any(isinstance(lr, Tensor) for lr in lrs):
        return []
    return [torch.as_tensor(lr, dtype=torch.float64, device=device).reshape(()) for lr in lrs]
