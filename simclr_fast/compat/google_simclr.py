"""google-research/simclr: `from simclr_fast.compat.google_simclr import add_contrastive_loss`."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from simclr_fast.losses.nt_xent import NTXentStats, nt_xent_loss


def add_contrastive_loss(
    hidden: Tensor, hidden_norm: bool = True, temperature: float = 1.0
) -> tuple[Tensor, NTXentStats | None]:
    """Sum of both views' losses, each a mean over N rows: twice `nt_xent_loss`.

    hidden: [2N, D], view 1 first.
    hidden_norm: False takes the rows as they are, in O(N²) memory, without statistics.

    Returns the loss and `NTXentStats`, whose contrastive_accuracy and contrastive_entropy are
    those that the original reports from the logits it returns.
    """
    if hidden_norm:
        loss, stats = nt_xent_loss(hidden, temperature=temperature, return_stats=True)
        return 2 * loss, stats
    logits = (hidden @ hidden.T / temperature).fill_diagonal_(-math.inf)
    labels = torch.arange(len(hidden), device=hidden.device).roll(len(hidden) // 2)
    return 2 * F.cross_entropy(logits, labels), None
