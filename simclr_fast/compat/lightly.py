"""lightly's loss, transform and optimizer, computed by simclr_fast."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from simclr_fast.augment.views import SimCLRViews
from simclr_fast.losses.nt_xent import nt_xent_loss
from simclr_fast.optim import lars as optim
from simclr_fast.utils.distributed import all_gather_rows

IMAGENET_NORMALIZE = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


class SimCLRTransform:
    """lightly.transforms.SimCLRTransform: one PIL image → [view 1, view 2], spec="torchvision".

    The jitter has the paper's proportions: (0.8, 0.8, 0.8, 0.2) times cj_strength. The blur is an
    exact Gaussian of radius (size // 10) // 2; lightly uses Pillow's box approximation.
    """

    def __init__(
        self,
        input_size: int = 224,
        cj_prob: float = 0.8,
        cj_strength: float = 1.0,
        cj_bright: float = 0.8,
        cj_contrast: float = 0.8,
        cj_sat: float = 0.8,
        cj_hue: float = 0.2,
        min_scale: float = 0.08,
        random_gray_scale: float = 0.2,
        gaussian_blur: float = 0.5,
        kernel_size: float | None = None,
        sigmas: tuple[float, float] = (0.1, 2),
        vf_prob: float = 0.0,
        hf_prob: float = 0.5,
        rr_prob: float = 0.0,
        rr_degrees: Any = None,
        normalize: Mapping[str, Sequence[float]] | None = IMAGENET_NORMALIZE,
    ) -> None:
        fixed = {"cj_bright": 0.8, "cj_contrast": 0.8, "cj_sat": 0.8, "kernel_size": None}
        fixed |= {"vf_prob": 0.0, "rr_prob": 0.0, "rr_degrees": None}
        given = locals()
        for name, value in fixed.items():
            if given[name] != value:
                raise ValueError(f"{name} must be {value}, SimCLR's, got {given[name]!r}")
        self.views = SimCLRViews(
            input_size,
            spec="torchvision",
            interpolation="bilinear",
            s=cj_strength,
            hue=cj_hue * cj_strength,
            area=(min_scale, 1.0),
            p_jitter=cj_prob,
            p_gray=random_gray_scale,
            p_blur=gaussian_blur,
            p_flip=hf_prob,
            sigma=tuple(sigmas),
            mean=tuple(normalize["mean"]) if normalize else None,
            std=tuple(normalize["std"]) if normalize else None,
        )

    def __call__(self, image: Any) -> list[Tensor]:
        return list(self.views(image))


class NTXentLoss(nn.Module):
    """NT-Xent of projections [N, D]; with a memory bank, the loss of MoCo (He et al. 2020).

    temperature: divides the cosines.
    memory_bank_size: (rows, features) of a queue of negatives; 0 for negatives from the batch.
    gather_distributed: use negatives from all ranks. Gradients under DDP equal lightly's. The value
        differs: it is the loss of the whole batch on every rank, while lightly returns the part of
        each rank.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ):
        super().__init__()
        size = (memory_bank_size,) if isinstance(memory_bank_size, int) else tuple(memory_bank_size)
        if size != (0,) and (len(size) != 2 or min(size) < 1):
            raise ValueError(
                f"memory_bank_size must be 0 or (rows, features), got {memory_bank_size!r}"
            )
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature!r}")
        self.temperature, self.gather_distributed = temperature, gather_distributed
        bank = F.normalize(torch.randn(size), dim=1) if len(size) == 2 else torch.empty(0)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=False)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        distributed = self.gather_distributed and dist.is_initialized()
        group = dist.group.WORLD if distributed and dist.get_world_size() > 1 else None
        if len(self.bank) == 0:
            return nt_xent_loss(out0, out1, self.temperature, group=group)
        z0, z1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        negatives = self.bank.clone()
        if out0.requires_grad:
            self._enqueue(z1.detach() if group is None else all_gather_rows(z1.detach(), group))
        positive = (z0 * z1).sum(1, keepdim=True)
        logits = torch.cat((positive, z0 @ negatives.T.to(z0.dtype)), 1) / self.temperature
        return F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.long))

    @torch.no_grad()
    def _enqueue(self, rows: Tensor) -> None:
        # As in lightly: a batch that reaches the end is cut off, and the next one starts at 0.
        start = int(self.bank_ptr)
        end = min(start + len(rows), len(self.bank))
        self.bank[start:end] = rows[: end - start].to(self.bank.dtype)
        self.bank_ptr[0] = 0 if end == len(self.bank) else end


class LARS(optim.LARS):
    """``lightly.utils.lars.LARS``: the same arguments, defaults, steps and momentum buffers.

    As in lightly, groups without weight decay are not adapted, and the default momentum is 0.
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
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
        }
        self._start(params, defaults)

    def _rule(self, options: dict[str, Any], apart: bool = False) -> tuple[float, bool]:
        weight_decay = options["weight_decay"]
        return weight_decay, options.get("adapt", weight_decay != 0)
