"""Find the batch norms of a model, and refuse those with an unknown forward."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

_BatchNorm = nn.modules.batchnorm._BatchNorm
_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
# timm's batch norms, which call their children `drop` and `act` after the norm.
_WITH_ACTIVATION = ("BatchNormAct2d", "SyncBatchNormAct")


class Replaced(partial[Any]):
    """A forward that LargeBatch puts in the place of a batch norm's own during a step."""


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """A context in which modules have other forwards."""
    before: dict[nn.Module, Any] = {m: vars(m).get("forward") for m in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether `module` is a batch norm that uses the statistics of the batch.

    Raises:
        ValueError: it has another forward, of its subclass or of its own, which cannot be
            replaced.
    """
    if not isinstance(module, _BatchNorm):
        return False
    if not module.training and module.running_mean is not None:
        return False
    own = vars(module).get("forward")
    known = type(module).forward in _FORWARDS or type(module).__name__ in _WITH_ACTIVATION
    if not known or not (own is None or isinstance(own, Replaced)):
        raise ValueError(
            f"{type(module).__name__} is a batch norm that overrides forward, so its statistics "
            "cannot be those of the whole batch; only memory='plain' on one rank can run it"
        )
    return True


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` that use batch statistics now, by name."""
    return {name: m for name, m in model.named_modules() if uses_batch_statistics(m)}


def after_norm(norm: nn.Module) -> list[str]:
    """Names of the children of a batch norm that run after it."""
    if type(norm).__name__ not in _WITH_ACTIVATION:
        return []
    return [name for name in ("drop", "act") if hasattr(norm, name)]
