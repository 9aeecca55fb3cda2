"""simclr_fast: the parts of SimCLR, each fast, exact and usable alone."""

from simclr_fast.losses import NTXentLoss, nt_xent_loss

__version__ = "0.1.0"
__all__ = ["NTXentLoss", "nt_xent_loss"]
