"""The outputs of a model, of any structure, cut into micro-batches and put together again."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

# What may stand beside tensors: it must be the same for every micro-batch.
_CONSTANTS = (type(None), bool, int, float, str)


def tensors(outputs: Any, where: str = "the model's output") -> list[Tensor]:
    """The tensors of a model's outputs: a tensor, or tuples, lists, dicts and dataclasses of such.

    Raises:
        TypeError: there is something else among them.
    """
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, _CONSTANTS):
        return []
    return [t for key, value in _items(outputs, where) for t in tensors(value, f"{where}[{key!r}]")]


def rebuild(like: Any, found: Iterator[Tensor]) -> Any:
    """A copy of `like` in which the tensors of `found` replace its tensors, in order."""
    if isinstance(like, Tensor):
        return next(found)
    if isinstance(like, _CONSTANTS):
        return like
    return _made(like, lambda value: rebuild(value, found))


def refuse_other_rows(outputs: Any, rows: int, memory: str) -> None:
    """Raise ValueError unless every tensor of `outputs` has one row per view. rows: the views."""
    for t in tensors(outputs):
        if not t.dim() or len(t) != rows:
            raise ValueError(
                f"memory={memory!r} runs the model on micro-batches, so every output must have one "
                f"row per view: got shape {list(t.shape)} for {rows} views. Return [N, ...] and "
                "reshape it in loss_fn, or use memory='replay'"
            )


def refuse_other_constants(one: Any, other: Any, memory: str) -> None:
    """Raise ValueError if values beside the tensors differ between two micro-batches."""
    if _constants(one) != _constants(other):
        raise ValueError(
            f"memory={memory!r} runs the model on micro-batches, and what its output holds beside "
            "tensors differs between them: return tensors with one row per view, or use "
            "memory='replay'"
        )


def _constants(outputs: Any) -> list[Any]:
    """The values of a model's outputs that are no tensors, and the structure."""
    if isinstance(outputs, Tensor):
        return []
    if isinstance(outputs, _CONSTANTS):
        return [outputs]
    return [(type(outputs), key, _constants(v)) for key, v in _items(outputs, "the model's output")]


def _items(outputs: Any, where: str) -> list[tuple[Any, Any]]:
    if isinstance(outputs, Mapping):
        return list(outputs.items())
    if isinstance(outputs, (list, tuple)):
        return list(enumerate(outputs))
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        return [(f.name, getattr(outputs, f.name)) for f in dataclasses.fields(outputs)]
    raise TypeError(
        "the model must return tensors, or tuples, lists, dicts and dataclasses of them; "
        f"{where} is a {type(outputs).__name__}"
    )


def _made(like: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(like, Mapping):
        made = copy.copy(like)
        for key, value in like.items():
            made[key] = change(value)  # type: ignore[index]
        return made
    if isinstance(like, (list, tuple)):
        items = [change(value) for value in like]
        return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)
    made = copy.copy(like)
    for f in dataclasses.fields(like):
        # Also for frozen ones.
        object.__setattr__(made, f.name, change(getattr(like, f.name)))
    return made
