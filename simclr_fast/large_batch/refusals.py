"""What lockstep cannot run, or would silently change: refused by name, with the mode that can.

`flags` says when to look again.
"""

import inspect
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.fx import Node

_RANDOM = ("dropout", "bernoulli", "rand", "multinomial", "stochastic_depth", "normal_", "uniform_")


def flags(model: nn.Module) -> tuple[Any, ...]:
    """A value that changes when a `Graph` must be built again: modules, settings and hooks."""
    modules = (
        (id(m), id(vars(m).get("forward")), m.training, _has_hooks(m)) for m in model.modules()
    )
    parameters = ((id(p), p.requires_grad, _has_gradient_hooks(p)) for p in model.parameters())
    return (*modules, *parameters)


def refuse_hooks(model: nn.Module) -> None:
    """Refuse hooks: lockstep calls functions instead of some modules, and adds gradients itself."""
    for name, module in model.named_modules():
        if _has_hooks(module):
            what = f"{name or type(module).__name__!r} has forward or backward hooks"
            raise refusal(f"{what}, which it would not always call")
    for name, parameter in model.named_parameters():
        if _has_gradient_hooks(parameter):
            raise refusal(f"{name} has gradient hooks, which it would not call")


def refuse_random(node: Node, module: Any) -> None:
    """Refuse an operation that draws random numbers. module: what it calls, if it is a module."""
    if module is not None:
        probability = getattr(module, "p", getattr(module, "dropout", 0))
        kind = isinstance(module, (nn.modules.dropout._DropoutNd, nn.MultiheadAttention))
        active = module.training and ((kind and probability > 0) or isinstance(module, nn.RReLU))
    else:
        name = getattr(node.target, "__name__", str(node.target))
        options = arguments(node)
        active = options.get("dropout_p", 0) != 0 or (
            any(word in name for word in _RANDOM)
            and options.get("training", True)
            and options.get("p", 1) != 0
        )
        if name == "batch_norm" and options.get("training"):
            raise refusal("it calls torch.nn.functional.batch_norm without a module")
    if active:
        raise refusal(
            f"{node.format_node()} is random, and a recomputation would draw other numbers"
        )


def _has_hooks(m: nn.Module) -> bool:
    kinds = m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks
    return any(kinds)


def _has_gradient_hooks(p: nn.Parameter) -> bool:
    return bool(p._backward_hooks) or bool(getattr(p, "_post_accumulate_grad_hooks", None))


def arguments(node: Node) -> dict[str, Any]:
    """The arguments by name for functions of torch.nn.functional; else the keyword arguments."""
    if node.op == "call_function" and getattr(F, getattr(node.target, "__name__", ""), None):
        function: Any = node.target
        try:
            bound = inspect.signature(function).bind(*node.args, **node.kwargs)
        except ValueError:
            return dict(node.kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)
    return dict(node.kwargs)


def refusal(why: str) -> ValueError:
    return ValueError(f"memory='lockstep' cannot run this model: {why}; memory='replay' can")
