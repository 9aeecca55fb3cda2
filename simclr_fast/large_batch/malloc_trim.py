"""Return memory that malloc keeps between tensors to the operating system."""

import ctypes
import sys

from torch import Tensor

_EVERY = 1 << 26
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


class Heap:
    """Trims the CPU's heap after every 64 MB of new tensors.

    glibc cannot reuse a freed block for a tensor of the same size and alignment if a small object
    was allocated at its edge. Without trimming, a lockstep step needs 1.5 times the bytes of its
    tensors.
    """

    def __init__(self) -> None:
        self.made = 0

    def note(self, t: Tensor) -> None:
        """Count a new tensor that lives longer than the temporaries around it."""
        # A fake tensor has no memory.
        if type(t) is not Tensor or t.device.type != "cpu" or _trim is None:
            return
        self.made += t.nbytes
        if self.made >= _EVERY:
            self.made = 0
            _trim(0)
