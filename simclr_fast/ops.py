"""The one place that loads the native extension and registers torch.library ops."""

import warnings
from importlib import import_module

import torch

EXTENSION_ERROR: ImportError | None = None
try:
    import_module("simclr_fast._C")
except ImportError as error:
    EXTENSION_ERROR = error


def has_extension() -> bool:
    """Whether the compiled extension is loaded. The first False warns once, with the cause."""
    if EXTENSION_ERROR is not None:
        _warn_once(EXTENSION_ERROR)
    return EXTENSION_ERROR is None


_warned = False


def _warn_once(cause: ImportError) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"simclr_fast's native extension is not loaded ({cause}); the slower plain-torch "
            "paths are used. `pip install .` with a C++17 compiler builds it.",
            RuntimeWarning,
            stacklevel=3,
        )


def augment_views(*arguments: object) -> None:
    """Write views of images into the last argument; see csrc/augment_cpu.cpp for the schema."""
    torch.ops.simclr_fast.augment_views(*arguments)


if EXTENSION_ERROR is None:
    torch.library.register_fake("simclr_fast::augment_views", lambda *arguments: None)
