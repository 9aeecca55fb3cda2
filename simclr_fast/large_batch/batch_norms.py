"""Find the batch norms of a model, and refuse those with an unknown forward."""

from torch import nn

_BatchNorm = nn.modules.batchnorm._BatchNorm
_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
# timm's batch norms, which call their children `drop` and `act` after the norm.
_WITH_ACTIVATION = ("BatchNormAct2d", "SyncBatchNormAct")


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether `module` is a batch norm that uses the statistics of the batch.

    Raises:
        ValueError: it is a subclass with another forward, which cannot be replaced.
    """
    if not isinstance(module, _BatchNorm):
        return False
    if not module.training and module.running_mean is not None:
        return False
    if type(module).forward not in _FORWARDS and type(module).__name__ not in _WITH_ACTIVATION:
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
