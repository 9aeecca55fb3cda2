"""lightly's loss, transform and optimizer, computed by simclr_fast."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from simclr_fast.augment.params import Augmentation, ViewParams, draw_views
from simclr_fast.augment.views import apply_views, as_images, image_sizes
from simclr_fast.losses.nt_xent import nt_xent_loss
from simclr_fast.optim import lars as optim
from simclr_fast.utils.distributed import all_gather_rows

IMAGENET_NORMALIZE = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


class SimCLRTransform:
    """lightly.transforms.SimCLRTransform: one image → [view 1, view 2], each [3, size, size].

    The arguments are those of lightly 1.6. Values that SimCLR does not use are refused.

    The image is a PIL image, or a tensor as `SimCLRViews` takes it. As in lightly, its EXIF
    orientation is ignored. Views are blurred by Pillow, as lightly's are, so a blurred view is
    rounded to 8 bits. Everything else is computed in float32, where lightly rounds to 8 bits after
    each step.

    The random numbers come from torch's generator, which torch.manual_seed and DataLoader's
    workers seed.
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
        sigmas: tuple[float, float] = (0.1, 2),
        vf_prob: float = 0.0,
        hf_prob: float = 0.5,
        rr_prob: float = 0.0,
        rr_degrees: float | tuple[float, float] | None = None,
        normalize: Mapping[str, Sequence[float]] | None = IMAGENET_NORMALIZE,
    ) -> None:
        given = locals()
        if not isinstance(sigmas, Sequence) or len(sigmas) != 2:
            # Before lightly 1.6, kernel_size came before sigmas.
            raise ValueError(f"sigmas must be the range (lowest, highest), got {sigmas!r}")
        fixed: dict[str, Any] = {"cj_bright": 0.8, "cj_contrast": 0.8, "cj_sat": 0.8}
        fixed |= {"vf_prob": 0.0, "rr_prob": 0.0, "rr_degrees": None}
        for name, value in fixed.items():
            if given[name] != value:
                raise ValueError(f"{name} must be {value}, SimCLR's, got {given[name]!r}")
        self.aug = Augmentation(
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
            sigma=(sigmas[0], sigmas[1]),
        )
        self.normalize = normalize

    def __call__(self, image: Any) -> list[Tensor]:
        batch = as_images([image], upright=False)
        number = np.array([int(torch.randint(2**62, ()))])
        both = draw_views(self.aug, 0, 0, number, image_sizes(batch))
        return [self._view(batch, params) for params in both]

    def _view(self, batch: Tensor | list[Tensor], params: ViewParams) -> Tensor:
        sigma = float(params.sigma[0])
        (view,) = apply_views(batch, replace(params, sigma=np.zeros_like(params.sigma)), self.aug)
        if sigma > 0:
            view = _blurred_by_pillow(view, sigma)
        if self.normalize:
            mean, std = (view.new_tensor(self.normalize[name]) for name in ("mean", "std"))
            view = (view - mean[:, None, None]) / std[:, None, None]
        return view


def _blurred_by_pillow(view: Tensor, sigma: float) -> Tensor:
    """Blur [3, H, W] in [0, 1]. Pillow approximates the Gaussian by three box filters."""
    from PIL import Image, ImageFilter

    pixels = (view * 255).round().to("cpu", torch.uint8).movedim(0, -1)
    blurred = Image.fromarray(pixels.numpy()).filter(ImageFilter.GaussianBlur(sigma))
    return torch.from_numpy(np.array(blurred)).movedim(-1, 0).to(view) / 255


class NTXentLoss(nn.Module):
    """NT-Xent of projections [N, D]; with a memory bank, the loss of MoCo (He et al. 2020).

    temperature: divides the cosines; from 1e-6 to 1e6.
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
        if gather_distributed and not dist.is_available():
            raise ValueError("gather_distributed=True needs a torch with torch.distributed")
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
        logits = torch.cat((positive, z0 @ negatives.T.to(z0)), 1) / self.temperature
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

    As in lightly, groups without weight decay are not adapted, and the default momentum is 0. The
    groups have lightly's options. They may also have those of `simclr_fast.optim.LARS`: ``adapt``,
    for example, goes before lightly's rule.
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
