"""LARS by the native kernels: the arguments of the op, and what is kept between steps."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from simclr_fast import ops
from simclr_fast.optim.lars_torch import Batch

# A group and whether its tensors are set apart → their weight decay, and whether they are adapted.
Rule = Callable[[dict[str, Any], bool], tuple[float, bool]]

_FLAGS = (
    ("nesterov", True, ops.LARS_NESTEROV),
    ("maximize", True, ops.LARS_MAXIMIZE),
    ("trust_clip", True, ops.LARS_CLIP),
    ("momentum_order", "tf", ops.LARS_TF_ORDER),
    ("norm", "joint", ops.LARS_JOINT_NORM),
    ("when_zero", "decay", ops.LARS_DECAY_WHEN_ZERO),
)


def use_native(group: dict[str, Any], params: list[Tensor]) -> bool:
    """params: of one device. Sharded and other wrapped tensors take plain torch's operations."""
    if not wants_native(group):
        return False
    device = params[0].device
    wrapped = next((p for p in params if is_traceable_wrapper_subclass(p)), None)
    if not group["fused"]:
        if wrapped is not None:
            return False
        kernels = ops.implementation_for(device, on_cuda=ops.Implementation.CUDA)
        return kernels is not ops.Implementation.PLAIN
    if wrapped is None:
        reason = ops.why_plain(device, on_cuda=ops.Implementation.CUDA)
    else:
        reason = f"it takes plain tensors, not a {type(wrapped).__name__}"
    if reason is not None:
        raise RuntimeError(
            f"fused=True needs the native LARS kernel, which cannot be used: {reason}"
        ) from ops.EXTENSION_ERROR
    return True


def wants_native(group: dict[str, Any]) -> bool:
    return group["fused"] is not False and group["foreach"] is None


def native_step(
    device: torch.device,
    batches: list[Batch],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Updates the tensors of all batches, which are on this device."""
    params, grads, buffers = [], [], []
    for batch in batches:
        params += batch.params
        grads += batch.grads
        buffers += batch.buffers
    ops.lars_(params, grads, buffers, *_rules(device, batches, grad_scale, found_inf))
    torch.autograd.graph.increment_version(params)


def _rules(
    device: torch.device,
    batches: list[Batch],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> tuple[Any, ...]:
    """What ops.lars_ takes after the lists of tensors."""
    flags, hyper, lrs = [], [], []
    for batch in batches:
        group, lr = batch.group, batch.group["lr"]
        bits = ops.LARS_ADAPT if batch.adapt else 0
        for name, value, bit in _FLAGS:
            if group[name] == value:
                bits |= bit
        flags.append(bits)
        lrs.append(lr)
        hyper += [
            0.0 if isinstance(lr, Tensor) else lr,
            group["momentum"],
            batch.dampening,
            batch.weight_decay,
            group["trust_coefficient"],
            group["eps"],
        ]
    if any(isinstance(lr, Tensor) for lr in lrs):
        lrs = [torch.as_tensor(lr, dtype=torch.float64, device=device).reshape(()) for lr in lrs]
    else:
        lrs = []
    if grad_scale is not None:
        grad_scale = grad_scale.to(device, non_blocking=True)
    if found_inf is not None:
        found_inf = found_inf.to(device, non_blocking=True)
    return [len(batch.params) for batch in batches], flags, hyper, lrs, grad_scale, found_inf


class Held:
    """The tensors of a step, kept by the extension for as long as the next steps' are the same.

    Per step there remain one look at each gradient and comparisons of identity. Hyperparameters are
    read anew, and by the extension the tensors' addresses, shapes, dtypes and devices.
    """

    def __init__(self, optimizer: Optimizer, batches: list[Batch]):
        all_params = [p for group in optimizer.param_groups for p in group["params"]]
        states = list(optimizer.state.values())
        self._batches = [batch._replace(grads=[]) for batch in batches]
        self._params = [p for batch in batches for p in batch.params]
        self._device = self._params[0].device
        updated = set(map(id, self._params))
        # In the order that csrc/lars_python.h names.
        self._lists = (
            list(optimizer.param_groups),
            all_params,
            list(optimizer.state),
            states,
            [state.get("momentum_buffer") for state in states],
            self._params,
            [p for p in all_params if id(p) not in updated],
        )
        number = ops.lars_hold(self._params, [v for batch in batches for v in batch.buffers])
        self._number = number
        weakref.finalize(self, ops.lars_release, number).atexit = False

    @staticmethod
    def can(batches: list[Batch]) -> bool:
        """Whether the next step may be like this one: not after a first, undampened one."""
        return all(
            not batch.buffers or batch.dampening == batch.group["dampening"] for batch in batches
        ) and all(
            type(p).__torch_dispatch__ is Tensor.__torch_dispatch__
            for batch in batches
            for p in batch.params
        )

    def step(
        self, optimizer: Optimizer, rule: Rule, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> bool:
        """False, having changed nothing, if the optimizer's tensors are no longer these."""
        grads = ops.lars_gradients(optimizer.param_groups, optimizer.state, *self._lists)
        if grads is None:
            return False
        batches = []
        for batch in self._batches:
            group = batch.group
            if (group["momentum"] != 0) != bool(batch.buffers) or not wants_native(group):
                return False
            decay, adapt = rule(group, batch.apart)
            batches.append(
                batch._replace(dampening=group["dampening"], weight_decay=decay, adapt=adapt)
            )
        rules = _rules(self._device, batches, grad_scale, found_inf)
        if not ops.lars_held_(self._number, grads, *rules):
            return False
        torch.autograd.graph.increment_version(self._params)
        return True
