"""Whether Triton's interpreter works here, and how it works faster."""

import inspect
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

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


def remember_builtins() -> None:
    """Let the interpreter look for the builtins of Triton's language only once.

    It lists all members of the language's modules and classes at every call of every function, to
    patch those that are builtins. This takes a third of its time.
    """
    from triton import language
    from triton.runtime import interpreter

    names: dict[Any, list[str]] = {}

    def getmembers(owner: Any) -> list[tuple[str, Any]]:
        if owner not in names:
            found = inspect.getmembers(owner)
            names[owner] = [name for name, value in found if language.core.is_builtin(value)]
        return [(name, getattr(owner, name)) for name in names[owner]]

    members = {name: getattr(inspect, name) for name in dir(inspect)}
    interpreter.inspect = SimpleNamespace(**members | {"getmembers": getmembers})
