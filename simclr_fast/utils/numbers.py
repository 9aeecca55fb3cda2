"""Numbers as users give them: of Python, of numpy, fractions and decimals."""

import operator
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np


def as_float(name: str, value: Any) -> float:
    """`value` as a float. It may be any real number, or a numpy array without axes.

    Raises:
        TypeError: it is no number. Booleans and text are none.
    """
    if type(value) is float:
        return value
    number = value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value
    if isinstance(number, bool | np.bool_) or not isinstance(number, Real | Decimal):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(number)


def as_int(name: str, value: Any, least: int | None = None) -> int:
    """`value` as an int. It may be an integer of Python, numpy or torch, but no float.

    Raises:
        TypeError: it is no integer. ValueError: it is below `least`.
    """
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return number
