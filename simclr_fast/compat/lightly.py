"""lightly's signatures."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from simclr_fast.augment import SimCLRViews

IMAGENET_NORMALIZE = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


class SimCLRTransform:
    """lightly.transforms.SimCLRTransform: one PIL image → [view 1, view 2], spec="torchvision".

    The jitter's proportions are the paper's (.8, .8, .8, .2 times cj_strength); the blur is an
    exact Gaussian of radius (size // 10) // 2, where lightly uses Pillow's box approximation.
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
