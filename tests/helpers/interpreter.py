"""Whether Triton's interpreter works here."""

from importlib.metadata import PackageNotFoundError, version

import pytest


def _release(package: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in version(package).split(".")[:2])
    except PackageNotFoundError:
        return ()


# It makes an int of an array of one element, which numpy refuses since 2.4.
FAULT = "Triton's interpreter before 3.7 needs numpy below 2.4"
BROKEN = () < _release("triton") < (3, 7) and _release("numpy") >= (2, 4)
needs_interpreter = pytest.mark.skipif(BROKEN, reason=FAULT)
