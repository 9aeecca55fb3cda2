"""Small SimCLR steps for the doctor: a correct one, and parts to change."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from simclr_fast.augment import SimCLRViews
from simclr_fast.data.demo import demo_images
from simclr_fast.models.encoders import SimCLR
from simclr_fast.optim import LARS, lars_param_groups, warmup_cosine


def small_model(norm: type[nn.Module] = nn.BatchNorm2d) -> SimCLR:
    def norm2d(channels: int) -> nn.Module:
        return nn.GroupNorm(4, channels) if norm is nn.GroupNorm else norm(channels)

    encoder = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False),
        norm2d(16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 32, 3, 2, 1, bias=False),
        norm2d(32),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    middle = nn.LayerNorm(32) if norm is nn.GroupNorm else nn.BatchNorm1d(32)
    projector = nn.Sequential(nn.Linear(32, 32), middle, nn.ReLU(), nn.Linear(32, 16))
    return SimCLR(encoder, projector)


@cache
def views(images: int = 64, seed: int = 0, **augmentation: Any) -> tuple[Tensor, Tensor]:
    """Two views of embedded images, float32 [images, 3, 16, 16]."""
    pixels = torch.from_numpy(demo_images("train")[0][seed * images : (seed + 1) * images])
    torch.manual_seed(seed)
    first, second = SimCLRViews(16, **augmentation)(pixels)
    return first, second


def textbook(z: Tensor, temperature: float = 0.2) -> Tensor:
    """NT-Xent of [2N, D], view 1 first."""
    u = F.normalize(z, dim=1)
    logits = (u @ u.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


def both_at_once(model: nn.Module, batch: Any) -> Tensor:
    return model(torch.cat(batch))[1]


@dataclass
class Steps:
    """A step made of parts. The defaults are right."""

    batch: Any = None
    model: nn.Module = field(default_factory=small_model)
    forward: Callable[[nn.Module, Any], Any] = both_at_once
    loss: Callable[..., Tensor] = textbook
    optimizer: torch.optim.Optimizer | None = None
    zero_grad: bool = True

    def __post_init__(self) -> None:
        if self.batch is None:
            self.batch = views()
        if self.optimizer is None:
            self.optimizer = LARS(lars_param_groups(self.model), lr=0.4)
            warmup_cosine(self.optimizer, 10, 100)

    def __call__(self, model: nn.Module, batch: Any) -> None:
        if self.zero_grad:
            self.optimizer.zero_grad()
        self.loss(self.forward(model, batch)).backward()
        self.optimizer.step()
