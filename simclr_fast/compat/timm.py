"""timm's LARS, computed by simclr_fast."""

from typing import Any, ClassVar

import torch

from simclr_fast.optim import lars as optim


class Lars(optim.LARS):
    """``timm.optim.Lars``: the same arguments, defaults, steps and momentum buffers.

    Groups without weight decay are adapted only with ``always_adapt``. The native kernels are used
    if ``foreach`` is None. The groups have timm's options. They may also have those of
    `simclr_fast.optim.LARS`: ``adapt``, for example, goes before timm's rule.
    """

    _fixed_options: ClassVar[dict[str, Any]] = {"when_zero": "decay"}

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
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coeff": trust_coeff,
            "eps": eps,
            "trust_clip": trust_clip,
            "always_adapt": always_adapt,
            "foreach": foreach,
        }
        self._start(params, defaults)

    def _rule(self, options: dict[str, Any], apart: bool = False) -> tuple[float, bool]:
        weight_decay = options["weight_decay"]
        return weight_decay, options.get("adapt", weight_decay != 0 or options["always_adapt"])
