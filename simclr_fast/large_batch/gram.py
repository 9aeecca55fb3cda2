"""Batch norms after 1×1 convolutions, without the convolution's output.

Let x = W y + b at every place, with y of C_in channels, x of C_out. Write E for the mean over the
whole batch. Then

    μ = E[x] = W E[y] + b,    σ² = diag(W Cov(y) Wᵀ).

So the Gram matrix Σ y yᵀ, C_in × C_in, gives the statistics of all C_out channels. For an expanding
convolution it is cheaper than the convolution, and x is never made.

The backward needs no x either. Let g be the gradient of the batch norm's output, r = (σ² + eps)^-½,
k = γ r, n the number of values per channel, s = Σ g and t = Σ g x̂ with x̂ = r (x - μ). The gradient
of x is k (g - s/n - x̂ t/n), as in `lockstep`. Multiplied with Wᵀ this is

    ∂L/∂y = Wᵀ (k g) - B y - c,    B = Wᵀ diag(k r t / n) W,
    c = Wᵀ (k s / n + (k r t / n) (b - μ)).

Over the rows of one rank (index R), with m its mean of y, C = Σ_R (y - m)(y - m)ᵀ,
A = Σ_R g (y - m)ᵀ and δ = W m + b - μ,

    t_R = r (rowsum(A ⊙ W) + s_R δ),
    ∂L/∂W = k (A + (s_R - s n_R / n) mᵀ - (r t / n) (W C + n_R δ mᵀ)),
    ∂L/∂b = k (s_R - s n_R / n - (r t / n) n_R δ).

s, t, n and μ are those of all ranks. With a single rank δ and s_R - s n_R / n are zero.

Products of a micro-batch are summed in float32 or wider, and merged in float64.
"""

from typing import Any

import torch
from torch import Tensor

from simclr_fast.large_batch import global_batch_norm as gbn
from simclr_fast.large_batch.pointwise import of_rows, rows_of
from simclr_fast.ops import widest_float


class Gram:
    """Statistics and gradients of one batch norm and the convolution before it, over one step.

    conv: 1×1, unpadded, ungrouped. dtype: in which the convolution computes.
    """

    def __init__(self, conv: Any, norm: Any, dtype: torch.dtype) -> None:
        self.conv, self.norm, self.dtype = conv, norm, dtype
        self.wide = widest_float(conv.weight.device)
        # Rounded as in the convolution, whose output the statistics describe.
        self.weight = conv.weight.detach().flatten(1).to(dtype)  # [C_out, C_in]
        self.bias = None if conv.bias is None else conv.bias.detach().to(dtype).to(self.wide)
        self.n = 0
        self.mean = self.weight.new_zeros(conv.in_channels, dtype=self.wide)
        self.squares = self.mean.new_zeros(conv.in_channels, conv.in_channels)
        # Made in the backward.
        self.cross: Tensor | None = None
        self.sum: Tensor | None = None

    def sampled(self, y: Tensor) -> Tensor:
        """The places of y that the convolution reads."""
        strides = (1, 1, *self.conv.stride)
        return y[tuple(slice(None, None, stride) for stride in strides)]

    def see(self, y: Tensor) -> None:
        """Add a micro-batch of the convolution's input, [N, C_in, ...], to the statistics."""
        rows = rows_of(self.sampled(y).to(self.dtype))
        n = len(rows)
        if not n:
            return
        mean = rows.mean(0, dtype=gbn.wide_dtype(rows)).to(self.wide)
        squares = _product(rows, rows).to(self.wide).addr_(mean, mean, alpha=-n)
        # Chan, Golub and LeVeque (1979).
        apart, total = mean - self.mean, self.n + n
        self.squares += squares.addr_(apart, apart, alpha=self.n * n / total)
        self.mean += apart * (n / total)
        self.n = total

    def row(self) -> Tensor:
        """(mean, M2, n) of the convolution's output on this rank: [2 C_out + 1]."""
        weight = self.weight.to(self.wide)
        squares = (weight @ self.squares * weight).sum(1).clamp_min(0)
        return torch.cat([self._own_mean(), squares, squares.new_full((1,), self.n)])

    def _own_mean(self) -> Tensor:
        mean = self.weight.to(self.wide) @ self.mean
        return mean if self.bias is None else mean + self.bias

    def add_gradient(self, g: Tensor, y: Tensor) -> None:
        """Add a micro-batch to Σ g and Σ g yᵀ. g: [N, C_out, ...], y: as for `see`."""
        rows = rows_of(g)
        total = rows.sum(0, dtype=gbn.wide_dtype(rows)).to(self.wide)
        cross = _product(rows, rows_of(self.sampled(y).to(g.dtype))).to(self.wide)
        self.sum = total if self.sum is None else self.sum.add_(total)
        self.cross = cross if self.cross is None else self.cross.add_(cross)

    def own_sums(self, s: gbn.Statistics) -> Tensor:
        """(Σ g, Σ g x̂) over this rank's rows: [2, C_out]."""
        weight, inverse = self.weight.to(self.wide), s.inverse.to(self.wide)
        assert self.cross is not None
        assert self.sum is not None
        self.cross.addr_(self.sum, self.mean, alpha=-1)
        # Zero on a rank without rows, whose own mean is not one.
        self.shift = (self._own_mean() - s.mean) * bool(self.n)
        slope = inverse * ((self.cross * weight).sum(1) + self.sum * self.shift)
        return torch.stack([self.sum, slope])

    def finish(self, s: gbn.Statistics, whole: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's gradients of the convolution's weight and bias.

        whole: `own_sums` of all ranks. Afterwards `input_gradient` can be called.
        """
        assert self.cross is not None
        assert self.sum is not None
        weight, n = self.weight.to(self.wide), max(s.n, 1)
        inverse, gamma = s.inverse.to(self.wide), self.norm.weight
        scale = inverse if gamma is None else inverse * gamma.detach()
        mean_gradient, slope = whole[0] / n, inverse * whole[1] / n
        rest = self.sum - mean_gradient * self.n
        spread = weight @ self.squares  # [C_out, C_in]
        centred = self.cross.addr_(rest, self.mean)
        centred -= slope[:, None] * spread.addr_(self.shift, self.mean, alpha=self.n)
        bias = scale * (rest - slope * self.n * self.shift)
        center = -s.mean.to(self.wide)
        center = center if self.bias is None else center + self.bias
        self.forth = (scale[:, None] * weight).to(self.dtype)  # [C_out, C_in]
        self.back = weight.T @ ((scale * slope)[:, None] * weight)  # [C_in, C_in]
        self.constant = weight.T @ (scale * (mean_gradient + slope * center))  # [C_in]
        self.back, self.constant = self.back.to(self.dtype), self.constant.to(self.dtype)
        self.cross = None
        return (scale[:, None] * centred).view_as(self.conv.weight), bias

    def input_gradient(self, g: Tensor, y: Tensor) -> Tensor:
        """The gradient of y, given that of the batch norm's output."""
        sampled = self.sampled(y)
        rows = rows_of(sampled.to(self.dtype))
        found = torch.addmm(self.constant, rows_of(g.to(self.dtype)), self.forth, beta=-1)
        found = found.addmm_(rows, self.back, alpha=-1).to(y.dtype)
        found = of_rows(found, sampled)
        if found.stride() == y.stride():
            return found
        whole = torch.zeros_like(y)
        self.sampled(whole).copy_(found)
        return whole


def _product(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b, summed in float32 or wider."""
    wide = gbn.wide_dtype(a)
    if a.dtype is not wide and gbn.on_cuda(a):
        return torch.mm(a.T, b, out_dtype=wide)
    return a.to(wide).T @ b.to(wide)
