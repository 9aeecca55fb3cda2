"""Calls of norm_act and their results in float64."""

from typing import NamedTuple

import torch
from torch import Tensor

LAST, DENSE = torch.channels_last, torch.contiguous_format
# What the second tensor is: nothing, added as it is, normalised as well; or added to, the first as
# it is.
PATTERNS = ("alone", "plain", "both", "plain first")


class Case(NamedTuple):
    shape: tuple[int, ...]
    layout: torch.memory_format = DENSE
    dtype: torch.dtype = torch.float32
    pattern: str = "alone"
    affine: bool = True
    relu: bool = True

    def __str__(self):
        words = (*self.shape, self.layout, self.dtype, self.pattern, self.affine, self.relu)
        return "-".join(str(word).replace("torch.", "") for word in words)

    def made(self, generator):
        """The arguments of norm_act, and y in float64."""
        wide, channels = torch.promote_types(self.dtype, torch.float32), self.shape[1]
        count = 1 if self.pattern == "alone" else 2
        given: list[Tensor | None] = []
        exact = torch.zeros(self.shape, dtype=torch.float64)
        for i in range(count):
            x = torch.randn(self.shape, generator=generator) * 3 + 1
            x = x.to(self.dtype).contiguous(memory_format=self.layout)
            if i == (0 if self.pattern == "plain first" else 1) and self.pattern != "both":
                given += [x, None, None, None, None]
                exact += x.double()
                continue
            mean, inverse, weight, bias = torch.randn(4, channels, generator=generator).to(wide)
            inverse = inverse.abs() + 0.3
            rest = (weight, bias) if self.affine else (None, None)
            given += [x, mean, inverse, *rest]
            view = [None if t is None else along(t, x) for t in (mean, inverse, *rest)]
            made = (x.double() - view[0]) * view[1]
            exact += made * view[2] + view[3] if self.affine else made
        given += [None] * 5 * (2 - count)
        return [*given, self.relu], exact.relu() if self.relu else exact


def along(t, x):
    return t.double().view(-1, *[1] * (x.dim() - 2))


def relative(found, exact):
    """The largest error, relative to the largest value."""
    if not exact.numel():
        return 0.0
    return ((found.double() - exact).abs().max() / exact.abs().max().clamp_min(1)).item()
