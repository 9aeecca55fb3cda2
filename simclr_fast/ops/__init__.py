"""The torch.library ops, one module each: schema, choice of the kernel, shapes, gradient.

The plain-torch path of an op is in the module with the same name and `_plain` at the end.
"""

from simclr_fast.ops import augment, lars, norm_act, norm_train, nt_xent, queue, sup_con
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
    "norm_act",
    "norm_train",
    "nt_xent",
    "queue",
    "sup_con",
    "why_plain",
    "widest_float",
]
