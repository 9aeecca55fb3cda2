"""`load_weights`; it lives in simclr_fast.models."""

from simclr_fast.models.weights import Weights, load_weights

__all__ = ["Weights", "load_weights"]
