"""LARS, the optimizer of the SimCLR paper, and its learning-rate schedule."""

from simclr_fast.optim.lars import LARS, lars_param_groups
from simclr_fast.optim.schedule import scaled_lr, warmup_cosine

__all__ = ["LARS", "lars_param_groups", "scaled_lr", "warmup_cosine"]
