"""From image files, arrays or data sets to batches of views."""

from simclr_fast.data.datasets import named_source, open_source
from simclr_fast.data.decode import CorruptImageError
from simclr_fast.data.loader import ImageLoader, OneViewLoader, TwoViewLoader
from simclr_fast.data.sources import Source

__all__ = [
    "CorruptImageError",
    "ImageLoader",
    "OneViewLoader",
    "Source",
    "TwoViewLoader",
    "named_source",
    "open_source",
]
