"""How embeddings are spread: effective rank, alignment, uniformity."""

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def effective_rank(x: Tensor) -> float:
    """exp(entropy of the normalised singular values) of x [n, D]; RankMe, arXiv:2210.02885.

    From 1 (all rows on one line) to min(n, D).

    The singular values come from the smaller of the two Gram matrices, a tenth of the time of an
    SVD. In float64 that leaves them 8 digits below the largest one, which is enough: 1e-7 is added
    to each of their shares.
    """
    x = _exact(x)
    gram = x @ x.T if x.size(0) <= x.size(1) else x.T @ x
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = values / values.sum().clamp_min(1e-30) + 1e-7
    return float((-(p * p.log()).sum()).exp())


@torch.no_grad()
def alignment(u: Tensor, v: Tensor) -> float:
    """Mean squared distance of the two views' unit vectors, [N, D] each; arXiv:2005.10242, eq. 1.

    0: equal. 2: unrelated.
    """
    return float((F.normalize(_exact(u)) - F.normalize(_exact(v))).square().sum(1).mean())


@torch.no_grad()
def uniformity(x: Tensor) -> float:
    """log of the mean of exp(-2·|u - v|²) over pairs of unit vectors; arXiv:2005.10242, eq. 2.

    0: all rows have one direction. About -4: spread over the sphere.
    """
    u = F.normalize(_exact(x))
    # |u - v|² = 2 - 2·u·v. The pairs of a row with itself are left out.
    kernel = (4 * (u @ u.T - 1)).exp()
    pairs = len(u) * (len(u) - 1)
    return float(((kernel.sum() - kernel.diagonal().sum()) / pairs).log())


def _exact(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64)
