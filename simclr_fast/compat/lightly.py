"""lightly's names and signatures."""

from typing import Any

from simclr_fast import optim


class LARS(optim.LARS):
    """``lightly.utils.lars.LARS``: the same arguments, defaults, steps and momentum buffers.

    Groups without weight decay are not adapted, and the momentum is 0 unless given, as there.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
    ):
        super().__init__(
            params,
            lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            trust_coefficient=trust_coefficient,
            eps=eps,
        )

    def _adapts(self, group: dict[str, Any]) -> bool:
        return group["weight_decay"] != 0
