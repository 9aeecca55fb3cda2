"""A model whose weights follow those of another: their exponential moving average."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from simclr_fast.utils.numbers import as_float


class WeightAverage(nn.Module):
    """A copy of `model` whose weights are an exponential moving average (EMA) of the model's.

    It serves as MoCo's momentum encoder (arXiv:1911.05722, equation 2), and as an encoder with less
    noise than the last step's. Its weights get no gradient.

    model: any module. The copy starts with its weights, and its forward is the model's.
    decay: the share of the old average that an update keeps, in [0, 1).
    warm_up: for a decay near 1 and few updates, the first weights would weigh too much: update t,
        counted from 1, keeps at most (1 + t) / (10 + t), as TensorFlow's ExponentialMovingAverage.
    buffers: also average floating buffers, such as the running statistics of batch norms, and copy
        other ones. False: leave the buffers to the copy's own forward.
    """

    def __init__(
        self, model: nn.Module, decay: float, *, warm_up: bool = False, buffers: bool = False
    ) -> None:
        super().__init__()
        self.decay = as_float("decay", decay)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}")
        self.module = copy.deepcopy(model).requires_grad_(False)
        self.warm_up, self.buffers_too, self.updates = warm_up, buffers, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the weights of `model`. Does not wait for a GPU."""
        self.updates += 1
        decay = self.decay
        if self.warm_up:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        own: list[Tensor] = list(self.module.parameters())
        given: list[Tensor] = list(model.parameters())
        if self.buffers_too:
            for mine, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
                if mine.is_floating_point():
                    own.append(mine)
                    given.append(theirs)
                else:
                    mine.copy_(theirs)
        torch._foreach_lerp_(own, given, 1 - decay)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.updates)

    def set_extra_state(self, state: Tensor) -> None:
        self.updates = int(state)
