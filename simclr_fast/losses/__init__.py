"""Contrastive losses that never store the 2N×2N matrix of similarities."""

from simclr_fast.losses.nt_xent import NTXentLoss, NTXentStats, nt_xent_loss
from simclr_fast.losses.queue import KeyQueue, queue_loss
from simclr_fast.losses.sup_con import multi_view_nt_xent_loss, sup_con_loss

__all__ = [
    "KeyQueue",
    "NTXentLoss",
    "NTXentStats",
    "multi_view_nt_xent_loss",
    "nt_xent_loss",
    "queue_loss",
    "sup_con_loss",
]
