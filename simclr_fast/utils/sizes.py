"""Sizes of memory, as users write them."""

import math
import re


def parse_size(text: str) -> float:
    """The bytes of a size such as "80GB" (10⁹ each), "24GiB" (2³⁰ each), "512MB" or "1.5TB".

    Raises:
        ValueError: the text is not such a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B\s*", text)
    if not match or float(match[1]) == 0:
        raise ValueError(
            f"a size must be a positive number with KB, MB, GB, TB, MiB or GiB, "
            f"such as 80GB or 24GiB, got {text!r}"
        )
    return float(match[1]) * (1024 if match[3] else 1000) ** ("KMGT".index(match[2]) + 1)


def gigabytes(size: float, *, down: bool = False) -> str:
    """A size in GB with one decimal, rounded up (or down), as `parse_size` reads it."""
    tenths = (math.floor if down else math.ceil)(size / 1e8)
    return f"{tenths / 10:g}GB"
