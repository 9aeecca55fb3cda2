"""The gradient of a whole batch in less memory than its activations take."""

from simclr_fast.large_batch.api import LargeBatch, Memory

__all__ = ["LargeBatch", "Memory"]
