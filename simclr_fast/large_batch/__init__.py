"""The gradient of a batch whose activations do not fit into memory at once."""

from simclr_fast.large_batch import planner as planner
from simclr_fast.large_batch.api import LargeBatch, Memory

__all__ = ["LargeBatch", "Memory"]
