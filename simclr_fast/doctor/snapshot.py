"""Put everything that a training step changes back, bit for bit."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Snapshot:
    """Copies of modules, optimizers and random states; `restore` writes them back.

    Tensors keep their identity: values are copied into the tensors that were there before.
    """

    def __init__(self) -> None:
        self._modules: dict[nn.Module, dict[str, Any]] = {}
        self._tensors: dict[Tensor, Tensor] = {}
        self._grads: dict[Tensor, tuple[Tensor | None, Tensor | None]] = {}
        self._optimizers: dict[Optimizer, tuple[list[Any], dict[Any, Any]]] = {}
        numpy_state = np.random.get_state()  # noqa: NPY002
        self._random = (random.getstate(), numpy_state, torch.get_rng_state())
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def add_module(self, module: nn.Module) -> None:
        """Copy the module's own parameters and buffers, not those of its children."""
        if module in self._modules:
            return
        self._modules[module] = {
            "parameters": dict(module._parameters),
            "buffers": dict(module._buffers),
            "training": module.training,
        }
        for tensor in [*module._parameters.values(), *module._buffers.values()]:
            if tensor is not None:
                self._add_tensor(tensor)

    def add_optimizer(self, optimizer: Optimizer) -> None:
        """Copy the state, the options and the parameters of an optimizer before its first step."""
        if optimizer in self._optimizers:
            return
        groups = [{key: _copied(v) for key, v in g.items()} for g in optimizer.param_groups]
        state = {
            p: {key: (value, _copied(value)) for key, value in own.items()}
            for p, own in optimizer.state.items()
        }
        self._optimizers[optimizer] = (groups, state)
        for group in optimizer.param_groups:
            for p in group["params"]:
                self._add_tensor(p)

    def _add_tensor(self, tensor: Tensor) -> None:
        if tensor in self._tensors:
            return
        self._tensors[tensor] = tensor.detach().clone()
        if tensor.is_leaf:
            grad = tensor.grad
            self._grads[tensor] = (grad, None if grad is None else grad.detach().clone())

    @torch.no_grad()
    def restore(self) -> None:
        for module, saved in self._modules.items():
            module._parameters.clear()
            module._parameters.update(saved["parameters"])
            module._buffers.clear()
            module._buffers.update(saved["buffers"])
            module.training = saved["training"]
        for tensor, value in self._tensors.items():
            tensor.copy_(value)
        for tensor, (grad, numbers) in self._grads.items():
            if grad is not None and numbers is not None:
                grad.copy_(numbers)
            tensor.grad = grad
        for optimizer, (groups, state) in self._optimizers.items():
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                params, before = group["params"], dict(group)
                group.clear()
                group.update({k: _written_back(before.get(k), v) for k, v in values.items()})
                group["params"] = params
            optimizer.state.clear()
            for p, own in state.items():
                optimizer.state[p] = {k: _written_back(old, new) for k, (old, new) in own.items()}
        random.setstate(self._random[0])
        np.random.set_state(self._random[1])  # noqa: NPY002
        torch.set_rng_state(self._random[2])
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _written_back(before: Any, value: Any) -> Any:
    """`value`, in the tensor object that was there if there was one of that shape."""
    if isinstance(value, Tensor) and isinstance(before, Tensor) and before.shape == value.shape:
        return before.copy_(value)
    return value


@contextmanager
def untouched(model: nn.Module) -> Iterator[Snapshot]:
    """A context after which `model` and all else in the snapshot is as it was before."""
    snapshot = Snapshot()
    for module in model.modules():
        snapshot.add_module(module)
    try:
        yield snapshot
    finally:
        snapshot.restore()
