"""Batch norms of a ResNet and a projector in fewer passes over memory, for training on the CPU.

    with fused_norms(model):
        loss = ...(model(views))
    loss.backward()

In a small ResNet in bfloat16, batch norms, sums and ReLUs take two fifths of a step. In this
context each batch norm and the sum and ReLU after it are one operation (`ops.norm_train`), which
rounds once. The model is unchanged: its modules, parameters and running statistics.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from simclr_fast.models.encoders import ResNet
from simclr_fast.ops import norm_train

_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    "forward",
)


@contextmanager
def fused_norms(model: nn.Module) -> Iterator[None]:
    """A context in which torchvision's residual blocks, `ResNet` and Sequentials of `model` run
    their batch norms fused, where that gives the same: in training, on the CPU, in float32 or
    narrower, in channels_last, without hooks. Everything else runs as always."""
    changed = []
    for module in model.modules():
        forward = _forward_of(module)
        if forward is not None and "forward" not in vars(module):
            module.forward = MethodType(forward, module)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _forward_of(module: nn.Module) -> Any:
    kind = type(module)
    if kind is ResNet:
        return _resnet
    if kind is nn.Sequential:
        return _sequential if nn.BatchNorm1d in map(type, module.children()) else None
    if kind.__module__ == "torchvision.models.resnet":
        return {"BasicBlock": _basic, "Bottleneck": _bottleneck}.get(kind.__name__)
    return None


def _basic(block: Any, x: Tensor) -> Tensor:
    """torchvision's BasicBlock.forward."""
    y = _norm(block.bn1, block.conv1(x), block.relu)
    return _norm(block.bn2, block.conv2(y), block.relu, _identity(block, x))


def _bottleneck(block: Any, x: Tensor) -> Tensor:
    """torchvision's Bottleneck.forward."""
    y = _norm(block.bn1, block.conv1(x), block.relu)
    y = _norm(block.bn2, block.conv2(y), block.relu)
    return _norm(block.bn3, block.conv3(y), block.relu, _identity(block, x))


def _identity(block: Any, x: Tensor) -> Tensor:
    short = block.downsample
    if short is None:
        return x
    if type(short) is nn.Sequential and len(short) and not _watched(short):
        *before, last = short
        for layer in before:
            x = layer(x)
        return _norm(last, x)
    shortened: Tensor = short(x)
    return shortened


def _resnet(resnet: ResNet, images: Tensor) -> Tensor:
    """`ResNet.forward`."""
    x = resnet.maxpool(_norm(resnet.bn1, resnet.conv1(images), resnet.relu))
    for stage in range(4):
        x = resnet.get_submodule(f"layer{stage + 1}")(x)
    return resnet.avgpool(x).flatten(1)


def _sequential(layers: nn.Sequential, x: Tensor) -> Tensor:
    """nn.Sequential.forward, of a projector."""
    waiting = list(layers)
    while waiting:
        layer = waiting.pop(0)
        if type(layer) is nn.BatchNorm1d:
            relu = waiting.pop(0) if waiting and type(waiting[0]) is nn.ReLU else None
            x = _norm(layer, x, relu)
        else:
            x = layer(x)
    return x


def _norm(
    norm: Any, x: Tensor, act: nn.Module | None = None, other: Tensor | None = None
) -> Tensor:
    """act(norm(x) + other), fused if it can be. Without act there is no activation."""
    relu = type(act) is nn.ReLU
    knows_act = act is None or (relu and not _watched(act))
    if not (knows_act and _is_plain(norm) and norm_train.fits(x, other)):
        y: Tensor = norm(x)
        if other is not None:
            y += other
        return y if act is None else act(y)
    y, mean, variance = norm_train.norm_train(x, norm.weight, norm.bias, other, norm.eps, relu)
    _update(norm, mean, variance, x.numel() // x.size(1))
    return y


def _is_plain(norm: Any) -> bool:
    """A batch norm in training, with float32 parameters and running statistics, as torch makes."""
    return (
        type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d)
        and norm.training
        and norm.affine
        and norm.weight.dtype == norm.bias.dtype == torch.float32
        and norm.running_mean is not None
        and norm.running_mean.dtype == torch.float32
        and not _watched(norm)
    )


def _watched(module: nn.Module) -> bool:
    """Whether something is called, or stands in, when the module runs."""
    if _has_any_global_hook():
        return True
    own = vars(module)
    return module._compiled_call_impl is not None or any(own.get(name) for name in _HOOKS)


@torch.no_grad()
def _update(norm: Any, mean: Tensor, variance: Tensor, rows: int) -> None:
    """The running statistics, as torch's batch norm updates them."""
    norm.num_batches_tracked.add_(1)
    momentum = norm.momentum
    if momentum is None:
        momentum = 1.0 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean, momentum)
    norm.running_var.lerp_(variance * (rows / (rows - 1)), momentum)
