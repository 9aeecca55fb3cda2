"""The whole batch's gradient in less memory than its activations need."""

from simclr_fast.large_batch.engine import LargeBatch, Memory

__all__ = ["LargeBatch", "Memory"]
