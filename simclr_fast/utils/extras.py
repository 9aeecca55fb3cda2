"""Packages that are imported when used, and what to install when one is missing."""

from importlib import import_module
from types import ModuleType


def need(module: str, extra: str) -> ModuleType:
    """Import `module`, which the optional extra `extra` brings."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f'this needs {module.partition(".")[0]}: pip install "simclr-fast[{extra}]"'
        ) from error
