"""Image files, arrays and data sets, and the loaders that make batches of views of them."""

from simclr_fast.data.account import Account, DamagedDataError
from simclr_fast.data.datasets import named_source, open_source
from simclr_fast.data.decode import CorruptImageError
from simclr_fast.data.loader import ImageLoader, MultiViewLoader, OneViewLoader, TwoViewLoader
from simclr_fast.data.sources import Source

__all__ = [
    "Account",
    "CorruptImageError",
    "DamagedDataError",
    "ImageLoader",
    "MultiViewLoader",
    "OneViewLoader",
    "Source",
    "TwoViewLoader",
    "named_source",
    "open_source",
]
