"""simclr_fast: the parts of SimCLR, each fast, exact and usable alone.

The names below are imported when they are first used, so `import simclr_fast` costs little more
than `import torch`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simclr_fast.augment import SimCLRViews
    from simclr_fast.data import TwoViewLoader
    from simclr_fast.large_batch import LargeBatch
    from simclr_fast.losses import (
        NTXentLoss,
        multi_view_nt_xent_loss,
        nt_xent_loss,
        sup_con_loss,
    )
    from simclr_fast.models import load_weights
    from simclr_fast.optim import LARS

__version__ = "0.1.0"
__all__ = [
    "LARS",
    "LargeBatch",
    "NTXentLoss",
    "SimCLRViews",
    "TwoViewLoader",
    "__version__",
    "load_weights",
    "multi_view_nt_xent_loss",
    "nt_xent_loss",
    "sup_con_loss",
]
_PACKAGES = {
    "LARS": "optim",
    "LargeBatch": "large_batch",
    "NTXentLoss": "losses",
    "SimCLRViews": "augment",
    "TwoViewLoader": "data",
    "load_weights": "models",
    "multi_view_nt_xent_loss": "losses",
    "nt_xent_loss": "losses",
    "sup_con_loss": "losses",
}


def __getattr__(name: str) -> Any:
    if name not in _PACKAGES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PACKAGES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
