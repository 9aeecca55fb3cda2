"""Drop path (stochastic depth, arXiv:1603.09382): a residual branch is left out for some images.

A recomputation must leave out the same. So lockstep draws for all rows of a step at its beginning,
one number per row and module, in the order of the modules in the forward. These are the numbers
that the modules themselves draw in that order.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class DropPath(NamedTuple):
    """A module that keeps each row with probability `keep`, divided by `divisor`, else zeroes it.

    alike: it does the same to all rows. active: it is training, and keep < 1.
    """

    keep: float
    divisor: float
    alike: bool
    active: bool

    def draw(self, rows: int, dims: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The factors of all rows, for values with `dims` dimensions: [rows, 1, ...]."""
        shape = (1 if self.alike else rows, *[1] * (dims - 1))
        factors = torch.empty(shape, dtype=dtype, device=device).bernoulli_(self.keep)
        return factors.div_(self.divisor).expand(rows, *shape[1:])


def drop_path(module: nn.Module) -> DropPath | None:
    """The settings of timm's DropPath or torchvision's StochasticDepth; None for other modules."""
    kind = type(module)
    given: Any = module
    if kind.__name__ == "DropPath" and kind.__module__.startswith("timm."):
        keep, alike = 1 - given.drop_prob, False
        scaled = given.scale_by_keep
    elif kind.__name__ == "StochasticDepth" and kind.__module__.startswith("torchvision."):
        keep, alike, scaled = 1 - given.p, given.mode == "batch", True
    else:
        return None
    divisor = keep if scaled and keep else 1
    return DropPath(keep, divisor, alike, module.training and keep < 1)
