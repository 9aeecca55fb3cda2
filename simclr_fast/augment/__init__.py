"""The two random views of an image: their distribution, the random numbers, and the pixels."""

from simclr_fast.augment.params import Augmentation, ViewParams, draw_params
from simclr_fast.augment.views import SimCLRViews, apply_views

__all__ = ["Augmentation", "SimCLRViews", "ViewParams", "apply_views", "draw_params"]
