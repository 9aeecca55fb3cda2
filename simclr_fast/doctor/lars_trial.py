"""Try out how an optimizer of the LARS family treats biases and the parameters of norm layers."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from simclr_fast.optim.lars import lars_param_groups


@dataclass(frozen=True)
class Trial:
    """One parameter of at most one dimension. adapted: its update does not grow with its gradient.
    decayed: its update depends on the weight decay."""

    name: str
    adapted: bool
    decayed: bool


def is_lars(optimizer: Optimizer) -> bool:
    """Whether the name of the class says so. The LARC wrapper of apex is no optimizer itself."""
    return "lars" in type(optimizer).__name__.lower()


def norms_and_biases(model: nn.Module) -> dict[int, str]:
    """id → name of the parameters that LARS should neither adapt nor decay."""
    rest = {id(p) for p in lars_param_groups(model)[1]["params"]}
    return {id(p): name for name, p in model.named_parameters() if id(p) in rest}


def try_lars(optimizer: Optimizer, model: nn.Module) -> list[Trial]:
    """Let a copy of `optimizer` update copies of one such parameter per group. [] if not LARS."""
    if not is_lars(optimizer):
        return []
    excluded = norms_and_biases(model)
    trials = []
    for group in optimizer.param_groups:
        chosen = next((p for p in group["params"] if id(p) in excluded), None)
        if chosen is None:
            continue
        once, twice = _update(optimizer, group, chosen, 1), _update(optimizer, group, chosen, 2)
        undecayed = _update(optimizer, {**group, "weight_decay": 0.0}, chosen, 1)
        trials.append(
            Trial(
                excluded[id(chosen)],
                # The update of a plain optimizer doubles with its gradient.
                adapted=bool(twice.norm() < 1.5 * once.norm()),
                decayed=group.get("weight_decay", 0) > 0
                and bool((once - undecayed).norm() > 1e-9 * once.norm()),
            )
        )
    return trials


def _update(optimizer: Optimizer, group: dict[str, Any], like: Tensor, scale: float) -> Tensor:
    """The first update of a parameter like `like`, of some fixed numbers."""
    numbers = torch.linspace(0.5, 1.5, like.numel(), dtype=torch.float64, device=like.device)
    p = nn.Parameter(numbers.view(like.shape))
    p.grad = scale * numbers.flip(0).view(like.shape)
    # copy.copy would call __setstate__, which changes the groups of the original.
    twin = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    lr = group["lr"]
    lr = torch.ones_like(lr) if isinstance(lr, Tensor) else 1.0
    twin.param_groups = [{**group, "params": [p], "lr": lr}]
    twin.state = defaultdict(dict)
    before = p.detach().clone()
    # A scheduler replaces `step` of the instance.
    type(optimizer).step(twin)
    return p.detach() - before
