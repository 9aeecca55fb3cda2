"""norm_act's plain-torch path, for every device and dtype without a kernel."""

from typing import Any

import torch
from torch import Tensor

# Some values are made beside the result, in so many parts, as they need memory.
_PARTS = 8


def norm_act(
    x: Tensor,
    mean: Tensor | None,
    inverse: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    other: Tensor | None,
    other_mean: Tensor | None,
    other_inverse: Tensor | None,
    other_weight: Tensor | None,
    other_bias: Tensor | None,
    relu: bool,
) -> Tensor:
    y = _normalize(x, mean, inverse, weight, bias)
    if other is None:
        pass
    elif other_mean is None:
        y += other
    else:
        rows = max(-(-len(y) // _PARTS), 1)
        for part, added in zip(y.split(rows), other.split(rows), strict=True):
            part += _normalize(added, other_mean, other_inverse, other_weight, other_bias)
    return y.relu_() if relu else y


def norm_act_(
    x: Tensor,
    mean: Tensor | None,
    inverse: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    other: Tensor | None,
    *rest: Any,
) -> Tensor:
    """The same into x."""
    rows = max(-(-len(x) // _PARTS), 1)
    parts = x.split(rows)
    others = [None] * len(parts) if other is None else other.split(rows)
    for part, added in zip(parts, others, strict=True):
        part.copy_(norm_act(part, mean, inverse, weight, bias, added, *rest))
    return x


def _normalize(
    x: Tensor,
    mean: Tensor | None,
    inverse: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """A new tensor."""
    if mean is None or inverse is None:
        return x.clone()
    # F.batch_norm refuses an eps of 0 in torch 2.10 and 2.11.
    return torch.batch_norm(x, weight, bias, mean, inverse.pow(-2), False, 0.0, 0.0, True)
