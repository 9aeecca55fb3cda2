"""The torch.library ops, one module each: schema, choice of the kernel, shapes, gradient.

What an op does in plain torch is in the module beside it whose name ends in `_plain`.
"""

from simclr_fast.ops import augment, lars, nt_xent, sup_con
from simclr_fast.ops.library import (
    EXTENSION_ERROR,
    Implementation,
    has_extension,
    implementation_for,
    why_plain,
    widest_float,
)

__all__ = [
    "EXTENSION_ERROR",
    "Implementation",
    "augment",
    "has_extension",
    "implementation_for",
    "lars",
    "nt_xent",
    "sup_con",
    "why_plain",
    "widest_float",
]
