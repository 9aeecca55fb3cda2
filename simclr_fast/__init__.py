"""SimCLR in PyTorch: learn an image encoder without labels, or use one part in your own loop.

nt_xent_loss, NTXentLoss: the loss, as a function and as a module.
sup_con_loss, multi_view_nt_xent_loss: the loss with labels, and with more than two views.
TwoViewLoader: batches of two random views from image files or arrays.
SimCLRViews: two random views of an image or a batch, for your own data set.
LARS: the optimizer of the SimCLR paper.
LargeBatch: the gradient of a batch that does not fit in memory.
load_weights: an encoder from a checkpoint of this or another library.
doctor: what is wrong with a training step, whoever wrote it.

Each name is imported when it is first used, so `import simclr_fast` costs little more than
`import torch`. The command `simclr-fast` trains and evaluates.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simclr_fast import doctor
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
    "doctor",
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
    if name == "doctor":
        return import_module(f"{__name__}.doctor")
    if name not in _PACKAGES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PACKAGES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
