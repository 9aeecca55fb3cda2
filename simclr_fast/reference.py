"""The definitions that every fast path is tested against: plain torch, exact in float64."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

LUMA = (0.2989, 0.587, 0.114)


def augment_view(
    image: Tensor,
    *,
    size: int,
    spec: str,
    box: tuple[int, int, int, int],
    flip: bool = False,
    jitter: bool = False,
    order: tuple[int, int, int, int] = (0, 1, 2, 3),
    factors: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 0.0),
    gray: bool = False,
    sigma: float = 0.0,
    additive_brightness: bool = False,
    bilinear: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """One view [C, size, size] in [0, 1] of `image` [H, W, C], uint8 or floating in [0, 1].

    Without three channels, contrast is around each channel's mean, saturation and hue are left out,
    and gray must be False. The arguments are the random numbers of the view, as in `ViewParams`.
    The formulas are those of google-research/simclr's data_util.py and tf.image (spec="simclr"), or
    of torchvision.transforms.v2 on floats (spec="torchvision").
    """
    y, x, h, w = (int(v) for v in box)
    is_rgb = image.shape[-1] == 3
    if gray and not is_rgb:
        raise ValueError(f"gray needs 3 channels, got {image.shape[-1]}")
    crop = image[y : y + h, x : x + w].permute(2, 0, 1)
    pixels = crop.to(dtype) / 255 if image.dtype == torch.uint8 else crop.to(dtype)
    antialias = spec == "torchvision"
    rows = resize_matrix(h, size, antialias, bilinear, pixels)
    columns = resize_matrix(w, size, antialias, bilinear, pixels)
    # An 8-bit pipeline clips here; TensorFlow keeps bicubic's overshoot until the next clip.
    out = rows @ pixels @ columns.T
    out = out.clamp(0, 1) if spec == "torchvision" else out
    if flip:
        out = out.flip(-1)
    if jitter:
        brightness, contrast, saturation, hue = (float(f) for f in factors)
        for op in order:
            if op > 1 and not is_rgb:
                continue
            if op == 0:
                out = out + brightness if additive_brightness else out * brightness
            elif op == 1:
                pivot = luma(out) if spec == "torchvision" and is_rgb else out
                mean = pivot.mean((-2, -1), keepdim=True)
                out = (out - mean) * contrast + mean
            elif op == 2 and spec == "torchvision":
                out = saturation * out + (1 - saturation) * luma(out)
            elif op == 2:
                hsv = rgb_to_hsv(out)
                out = hsv_to_rgb(torch.stack([hsv[0], (hsv[1] * saturation).clamp(0, 1), hsv[2]]))
            else:
                hsv = rgb_to_hsv(out)
                out = hsv_to_rgb(torch.stack([(hsv[0] + hue) % 1, hsv[1], hsv[2]]))
            out = out.clamp(0, 1)
    if gray:
        out = luma(out).expand(3, -1, -1)
    return gaussian_blur(out.clamp(0, 1), sigma, reflect=spec == "torchvision").clamp(0, 1)


def luma(image: Tensor) -> Tensor:
    """[3, H, W] → [1, H, W]."""
    r, g, b = image
    return (LUMA[0] * r + LUMA[1] * g + LUMA[2] * b)[None]


def resize_matrix(n_in: int, n_out: int, antialias: bool, bilinear: bool, like: Tensor) -> Tensor:
    """The weights of a resize, [n_out, n_in], in the dtype and on the device of `like`.

    Samples outside the image get no weight and the others are renormalised, as in Pillow, in
    torch's antialiased resize and in TensorFlow's half-pixel bicubic (a = -0.5).
    """
    scale = n_in / n_out
    stretch = max(scale, 1.0) if antialias else 1.0
    # In numpy: torch may have no float64 on the device, or another default device.
    outputs, inputs = np.arange(n_out) + 0.5, np.arange(n_in) + 0.5
    x = np.abs(inputs - outputs[:, None] * scale) / stretch
    if bilinear:
        weight = np.maximum(1 - x, 0)
    else:
        inner = (1.5 * x - 2.5) * x * x + 1
        outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
        weight = np.where(x < 1, inner, np.where(x < 2, outer, 0))
    weight /= weight.sum(1, keepdims=True)
    return torch.tensor(weight, dtype=like.dtype, device=like.device)


def rgb_to_hsv(image: Tensor) -> Tensor:
    """[3, H, W] → [3, H, W] with hue in turns; Smith, 1978."""
    r, g, b = image
    top, chroma = image.amax(0), image.amax(0) - image.amin(0)
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    h = torch.where(
        top == r, (g - b) / safe, torch.where(top == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    )
    saturation = torch.where(top > 0, chroma / torch.where(top > 0, top, 1), 0)
    return torch.stack([torch.where(chroma > 0, h / 6 % 1, 0), saturation, top])


def hsv_to_rgb(hsv: Tensor) -> Tensor:
    """[3, H, W] → [3, H, W]."""
    h, s, v = hsv
    n = torch.tensor([5.0, 3.0, 1.0], dtype=h.dtype, device=h.device)[:, None, None]
    k = (n + 6 * h) % 6
    return v - v * s * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(image: Tensor, sigma: float, *, reflect: bool) -> Tensor:
    """Separable blur of [C, S, S] with radius (S // 10) // 2, padded by reflection or zeros."""
    radius = image.shape[-1] // 10 // 2
    if sigma <= 0 or radius == 0:
        return image
    weight = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = torch.tensor(weight / weight.sum(), dtype=image.dtype, device=image.device)
    padded = pad(image[:, None], [radius] * 4, mode="reflect" if reflect else "constant")
    blurred = conv2d(conv2d(padded, kernel[None, None, None, :]), kernel[None, None, :, None])
    return blurred[:, 0]


def nt_xent(
    z1: Tensor,
    z2: Tensor | None = None,
    temperature: float | Tensor = 0.5,
    decoupled: bool = False,
) -> Tensor:
    """NT-Xent of each row, [2N], view 1's rows first (Chen et al. 2020, equation 1).

    The positive stays outside the sum, log(1 + exp(lse(negatives) - positive)), so that neither
    the loss nor its gradient subtracts two nearly equal numbers when views are aligned.

    z1, z2: [N, D]; or z1 is [2N, D], view 1 first, and z2 is None. O(N²) memory, any autograd.
    decoupled: lse(negatives) - positive (Yeh et al. 2022, equation 5), N at least 2.
    """
    z = z1 if z2 is None else torch.cat((z1, z2))
    u = torch.nn.functional.normalize(z, dim=1)
    rows = torch.arange(len(z), device=z.device)
    positive = rows.roll(len(z) // 2)
    s = u @ u.T / temperature
    pair = (rows[:, None] == rows) | (positive[:, None] == rows)
    negatives = s.masked_fill(pair, -math.inf).logsumexp(1)
    if len(z) == 2:
        return 0 * s[rows, positive]
    loss = negatives - s[rows, positive]
    return loss if decoupled else torch.logaddexp(s.new_zeros(()), loss)


def sup_con(z: Tensor, labels: Tensor, temperature: float | Tensor = 0.1) -> Tensor:
    """Supervised contrastive loss L_out of each row, [M] (Khosla et al. 2020, equation 2).

    z: [M, D]; labels: [M]. A row whose class has no other row counts 0. O(M²) memory.
    """
    u = torch.nn.functional.normalize(z, dim=1)
    s = u @ u.T / temperature
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positives = (labels[:, None] == labels) & ~own
    count = positives.sum(1)
    log_p = s - s.masked_fill(own, -math.inf).logsumexp(1, keepdim=True)
    mean = torch.where(positives, log_p, 0).sum(1) / count.clamp_min(1)
    return torch.where(count > 0, -mean, 0)


def queue(z: Tensor, keys: Tensor, others: Tensor, temperature: float | Tensor = 0.2) -> Tensor:
    """The loss of each row of z against its own key and a queue, [R] (He et al. 2020, equation 1).

    z, keys: [R, D]; others: the queue, [K, D]. All are normalised here. O(R·K) memory.
    """
    u, k, n = (torch.nn.functional.normalize(x, dim=1) for x in (z, keys, others))
    positive = (u * k).sum(1) / temperature
    return torch.logaddexp(z.new_zeros(()), (u @ n.T / temperature).logsumexp(1) - positive)


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

    p, g, v: weight, gradient and momentum buffer (None before the first step), any shape. The
    results are float64. adapt: whether the implementation adapts this tensor. It decides by name,
    dimension or weight decay.

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
