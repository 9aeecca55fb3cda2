"""solo-learn's names and signatures."""

from typing import Any, ClassVar

from torch import Tensor

from simclr_fast import optim
from simclr_fast._lars_foreach import Batch


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

    def _batches(self, found_inf: Tensor | None) -> list[Batch]:
        batches = []
        for batch in super()._batches(found_inf):
            if not batch.group["exclude_bias_n_norm_lars"]:
                batches.append(batch)
                continue
            flat = [i for i, p in enumerate(batch.params) if p.ndim == 1]
            others = [i for i, p in enumerate(batch.params) if p.ndim != 1]
            undecayed = batch.group | {"weight_decay": 0.0}
            batches.append(batch.select(others))
            batches.append(batch.select(flat)._replace(group=undecayed, adapt=False))
        return [batch for batch in batches if batch.params]
