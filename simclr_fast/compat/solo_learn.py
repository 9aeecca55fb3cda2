"""solo-learn's loss and optimizer, computed by simclr_fast."""

from typing import Any, ClassVar

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

    With ``exclude_bias_n_norm_lars``, parameters of one dimension are neither adapted nor decayed.
    """

    _other_names: ClassVar[dict[str, str]] = {
        "eta": "trust_coefficient",
        "clip_lars_lr": "trust_clip",
    }
    _exclude = False

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
        clip_lars_lr: bool = False,
        exclude_bias_n_norm_lars: bool = False,
    ):
        self._exclude = exclude_bias_n_norm_lars
        super().__init__(
            params,
            lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            trust_coefficient=eta,
            eps=eps,
            trust_clip=clip_lars_lr,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        default = self.defaults.setdefault("exclude_bias_n_norm_lars", self._exclude)
        param_group.setdefault("exclude_bias_n_norm_lars", default)
        super().add_param_group(param_group)

    def _apart(self, p: Tensor) -> bool:
        return p.ndim == 1

    def _rule(self, group: dict[str, Any], apart: bool) -> tuple[float, bool]:
        excluded = apart and group["exclude_bias_n_norm_lars"]
        return (0.0, False) if excluded else (group["weight_decay"], True)
