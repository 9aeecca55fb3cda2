"""Plain torch, float64-clean definitions that every fast path is tested and benchmarked against."""

import torch
from torch import Tensor

LARS_SEMANTICS = ("google", "moco", "lightly", "timm", "solo_learn", "larc")


def lars_step(
    p: Tensor,
    g: Tensor,
    v: Tensor | None,
    semantics: str,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    trust_coefficient: float = 1e-3,
    eps: float = 1e-8,
    trust_clip: bool = False,
    adapt: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """One step for one tensor, as the implementation called ``semantics`` defines it.

    p, g, v: weight, gradient and momentum buffer (None before the first step), any shape; the
    results are float64. ``adapt`` says whether the tensor is one that the implementation adapts
    (by name, dimension or weight decay, according to it).

    google: google-research/simclr, lars_optimizer.py, classic_momentum=True (no eps, no clip).
    moco: facebookresearch/moco-v3, moco/optimizer.py. lightly: lightly.utils.lars. timm:
    timm.optim.lars. solo_learn: solo/utils/lars.py. larc: apex.parallel.LARC around SGD.
    """
    p, g = p.double(), g.double()
    w_norm, g_norm = float(p.norm()), float(g.norm())
    if semantics in ("google", "moco"):
        d = g + weight_decay * p
        d_norm = float(d.norm())
        ratio = trust_coefficient * w_norm / d_norm if adapt and w_norm > 0 and d_norm > 0 else 1.0
        if semantics == "moco":
            v = ratio * d if v is None else momentum * v.double() + ratio * d
            return p - lr * v, v
        v = torch.zeros_like(p) if v is None else v.double()
        v = momentum * v + lr * ratio * d
        return p - (momentum * v + lr * ratio * d if nesterov else v), v

    # Not adapted: no decay in lightly and timm; solo-learn drops the decay of 1-d tensors.
    d = g
    if adapt and semantics == "timm":
        ratio = 1.0
        if w_norm > 0 and g_norm > 0:
            ratio = trust_coefficient * w_norm / (g_norm + w_norm * weight_decay + eps)
        if trust_clip:
            ratio = min(ratio / lr, 1.0) if lr else 1.0
        d = (g + weight_decay * p) * ratio
    elif adapt and w_norm != 0 and g_norm != 0:
        ratio = trust_coefficient * w_norm / (g_norm + w_norm * weight_decay + eps)
        if trust_clip:
            ratio = min(ratio / lr, 1.0) if lr else 1.0
        d = (g + weight_decay * p) * ratio
    if momentum == 0:
        return p - lr * d, v
    v = d.clone() if v is None else momentum * v.double() + (1 - dampening) * d
    return p - lr * (d + momentum * v if nesterov else v), v
