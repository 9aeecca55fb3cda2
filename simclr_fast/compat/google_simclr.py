"""google-research/simclr: `from simclr_fast.compat.google_simclr import add_contrastive_loss`."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from simclr_fast.losses.nt_xent import NTXentStats, nt_xent_loss


def add_contrastive_loss(
    hidden: Tensor, hidden_norm: bool = True, temperature: float = 1.0
) -> tuple[Tensor, NTXentStats | None]:
    """The sum of both views' losses, each a mean over N rows. It is twice `nt_xent_loss`.

    hidden: [2N, D], view 1 first.
    hidden_norm: False: do not normalise the rows. This needs O(N²) memory and has no statistics.

    Returns:
        The loss and `NTXentStats`. Its contrastive_accuracy and contrastive_entropy are the values
        that the original computes from its logits.
    """
    if hidden_norm:
        loss, stats = nt_xent_loss(hidden, temperature=temperature, return_stats=True)
        return 2 * loss, stats
    logits = (hidden @ hidden.T / temperature).fill_diagonal_(-math.inf)
    labels = torch.arange(len(hidden), device=hidden.device).roll(len(hidden) // 2)
    return 2 * F.cross_entropy(logits, labels), None
