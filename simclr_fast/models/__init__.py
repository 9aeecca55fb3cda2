"""Encoders and projectors, and their weights from and for other libraries."""

from simclr_fast.models.average import WeightAverage
from simclr_fast.models.encoders import SimCLR, build_encoder, build_projector
from simclr_fast.models.weights import Weights, load_weights

__all__ = ["SimCLR", "WeightAverage", "Weights", "build_encoder", "build_projector", "load_weights"]
