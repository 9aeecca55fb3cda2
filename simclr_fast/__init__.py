"""simclr_fast: the parts of SimCLR, each fast, exact and usable alone."""

from simclr_fast.losses import NTXentLoss, nt_xent_loss
from simclr_fast.sup_con import multi_view_nt_xent_loss, sup_con_loss

__version__ = "0.1.0"
__all__ = ["NTXentLoss", "multi_view_nt_xent_loss", "nt_xent_loss", "sup_con_loss"]
