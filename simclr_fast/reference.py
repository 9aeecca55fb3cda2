"""Plain torch, float64-clean definitions that every fast path is tested and benchmarked against."""

import math

import torch
from torch import Tensor


def nt_xent(z1: Tensor, z2: Tensor | None = None, temperature: float | Tensor = 0.5) -> Tensor:
    """NT-Xent of each row, [2N], view 1's rows first (Chen et al. 2020, equation 1).

    The positive stays outside the sum, log(1 + exp(lse(negatives) - positive)), so that neither
    the loss nor its gradient subtracts two nearly equal numbers when views are aligned.

    z1, z2: [N, D]; or z1 is [2N, D], view 1 first, and z2 is None. O(N²) memory, any autograd.
    """
    z = z1 if z2 is None else torch.cat((z1, z2))
    u = torch.nn.functional.normalize(z, dim=1)
    rows = torch.arange(len(z), device=z.device)
    positive = rows.roll(len(z) // 2)
    s = u @ u.T / temperature
    pair = (rows[:, None] == rows) | (positive[:, None] == rows)
    negatives = s.masked_fill(pair, -math.inf).logsumexp(1)
    if len(z) == 2:
        return 0 * s[rows, positive]
    return torch.logaddexp(s.new_zeros(()), negatives - s[rows, positive])
