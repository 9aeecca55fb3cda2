"""`load_weights` under a short path. Its code is in simclr_fast.models.weights."""

from simclr_fast.models.weights import Weights, load_weights

__all__ = ["Weights", "load_weights"]
