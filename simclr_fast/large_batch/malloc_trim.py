"""What malloc keeps free between tensors goes back to the operating system."""

import ctypes
import sys

from torch import Tensor

_EVERY = 1 << 26
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


class Heap:
    """Trims the CPU's heap once for every 64 MB that were made.

    glibc cannot give a freed block to the next tensor of the same size and alignment once a small
    object lies beside it: a lockstep step would hold 1.5 times the bytes of its tensors.
    """

    def __init__(self) -> None:
        self.made = 0

    def note(self, t: Tensor) -> None:
        """`t` was made and outlives the temporaries beside it."""
        # A fake tensor has no memory.
        if type(t) is not Tensor or t.device.type != "cpu" or _trim is None:
            return
        self.made += t.nbytes
        if self.made >= _EVERY:
            self.made = 0
            _trim(0)
