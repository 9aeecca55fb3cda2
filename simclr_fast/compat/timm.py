"""timm's LARS, computed by simclr_fast."""

from typing import Any, ClassVar

import torch

from simclr_fast.optim import lars as optim


class Lars(optim.LARS):
    """``timm.optim.Lars``: the same arguments, defaults, steps and momentum buffers.

    Groups without weight decay are adapted only with ``always_adapt``. The native kernels are used
    if ``foreach`` is None.
    """

    _other_names: ClassVar[dict[str, str]] = {"trust_coeff": "trust_coefficient"}
    _always_adapt = False

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1.0,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        trust_coeff: float = 0.001,
        eps: float = 1e-8,
        trust_clip: bool = False,
        always_adapt: bool = False,
        foreach: bool | None = None,
    ):
        self._always_adapt = always_adapt
        super().__init__(
            params,
            lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            trust_coefficient=trust_coeff,
            eps=eps,
            trust_clip=trust_clip,
            when_zero="decay",
            foreach=foreach,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        default = self.defaults.setdefault("always_adapt", self._always_adapt)
        param_group.setdefault("always_adapt", default)
        super().add_param_group(param_group)

    def _rule(self, group: dict[str, Any], apart: bool) -> tuple[float, bool]:
        return group["weight_decay"], group["weight_decay"] != 0 or group["always_adapt"]
