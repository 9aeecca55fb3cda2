"""solo-learn's loss and optimizer, computed by simclr_fast."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from simclr_fast.losses.nt_xent import nt_xent_loss
from simclr_fast.optim import lars as optim


def simclr_loss_func(z: Tensor, indexes: Tensor, temperature: float = 0.1) -> Tensor:
    """NT-Xent of two views, z [2N, D] (view 1 first). With several ranks, z is gathered over them.

    indexes: [2N], the image of each row: N different values, twice in the same order.

    Gradients under DDP equal solo-learn's. The value is the loss of the whole batch on every rank.
    """
    if indexes.shape != z.shape[:1] or len(indexes) % 2:
        raise ValueError(
            f"indexes must name the image of each row of z {list(z.shape)}, two views after one "
            f"another, got shape {list(indexes.shape)}"
        )
    first, second = indexes.chunk(2)
    ordered = first.sort().values
    two_views = (first == second).all() & (ordered[1:] != ordered[:-1]).all()
    message = "indexes must hold each image once per view, in the same order for both views"
    if indexes.is_cuda:
        torch._assert_async(two_views, message)
    elif not two_views:
        raise ValueError(message)
    several = dist.is_initialized() and dist.get_world_size() > 1
    group = dist.group.WORLD if several else None
    return nt_xent_loss(z, temperature=temperature, group=group)


class LARS(optim.LARS):
    """``solo.utils.lars.LARS``: the same arguments, defaults, steps and momentum buffers.

    With ``exclude_bias_n_norm``, parameters of one dimension are neither adapted nor decayed.

    clip_lars_lr, exclude_bias_n_norm_lars: the names that clip_lr and exclude_bias_n_norm had in
        older versions. The groups have the names that were given.

    The groups may also have the options of `simclr_fast.optim.LARS`.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        eta: float = 1e-3,
        eps: float = 1e-8,
        clip_lr: bool = False,
        exclude_bias_n_norm: bool = False,
        *,
        clip_lars_lr: bool | None = None,
        exclude_bias_n_norm_lars: bool | None = None,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "eta": eta,
            "eps": eps,
        }
        for name, value, old_name, old_value in (
            ("clip_lr", clip_lr, "clip_lars_lr", clip_lars_lr),
            (
                *("exclude_bias_n_norm", exclude_bias_n_norm),
                *("exclude_bias_n_norm_lars", exclude_bias_n_norm_lars),
            ),
        ):
            if value and old_value is not None:
                raise TypeError(f"{old_name} is the old name of {name}: give one of them")
            if old_value is None:
                defaults[name] = value
            else:
                defaults[old_name] = old_value
        self._start(params, defaults)

    def _apart(self, p: Tensor) -> bool:
        return p.ndim == 1

    def _rule(self, options: dict[str, Any], apart: bool = False) -> tuple[float, bool]:
        excluded = apart and options["exclude_bias_n_norm"]
        weight_decay = 0.0 if excluded else options["weight_decay"]
        return weight_decay, options.get("adapt", not excluded)
