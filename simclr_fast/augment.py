"""Two views of images: native fused C++ on the CPU, a Triton kernel or plain torch on the GPU."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from simclr_fast import ops, reference
from simclr_fast.augment_params import Augmentation, ViewParams, draw_params

__all__ = ["Augmentation", "ViewParams", "apply_views", "draw_params"]

_OUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def apply_views(
    images: Tensor | Sequence[Tensor | np.ndarray],
    params: ViewParams,
    aug: Augmentation,
    *,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """Make one view of each image, given its parameters.

    images: [n, H, W, 3], or n of [H, W, 3] of any sizes; uint8, or float32 in [0, 1].
    out:    [n, 3, size, size], contiguous or channels_last, float32, float16 or bfloat16; written
            and returned. Without it, a new tensor of `dtype` and layout `channels_last`.

    Values lie in [0, 1], unless `aug` normalises.
    """
    images = _as_tensors(images)
    n = len(images)
    if len(params) != n:
        raise ValueError(f"params are for {len(params)} images, got {n} images")
    extents = np.array([i.shape[:2] for i in images], dtype=np.int64).reshape(n, 2)
    corner, extent = params.box[:, :2], params.box[:, 2:]
    outside = (corner < 0) | (extent < 1) | (corner.astype(np.int64) + extent > extents)
    if outside.any():
        i = int(outside.any(axis=1).argmax())
        raise ValueError(f"box {params.box[i].tolist()} leaves image {i} of {extents[i].tolist()}")
    shape = (n, 3, aug.size, aug.size)
    device = images.device if isinstance(images, Tensor) else images[0].device if n else None
    if out is None:
        if dtype not in _OUT_DTYPES:
            raise TypeError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
        layout = torch.channels_last if channels_last else torch.contiguous_format
        out = torch.empty(shape, dtype=dtype, device=device, memory_format=layout)
    elif tuple(out.shape) != shape or out.dtype not in _OUT_DTYPES or (n and out.device != device):
        raise ValueError(
            f"out must be {shape} float32, float16 or bfloat16 on {device}, got "
            f"{tuple(out.shape)} {out.dtype} on {out.device}"
        )
    if n == 0:
        return out
    if out.device.type == "cpu" and ops.has_extension():
        return _apply_native(images, params, aug, out)
    return _apply_torch(images, params, aug, out)


def _as_tensors(images: Tensor | Sequence[Tensor | np.ndarray]) -> Tensor | list[Tensor]:
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images)
    if not isinstance(images, Tensor):
        images = [i if isinstance(i, Tensor) else torch.from_numpy(i) for i in images]
        for image in images:
            _check_image(image, 3)
        return images
    _check_image(images, 4)
    return images


def _check_image(image: Tensor, dims: int) -> None:
    if image.dim() != dims or image.shape[-1] != 3:
        expected = "[n, H, W, 3]" if dims == 4 else "[H, W, 3] each"
        raise ValueError(f"images must be {expected}, got {tuple(image.shape)}")
    if image.dtype not in (torch.uint8, torch.float32):
        raise TypeError(f"images must be uint8 or float32 in [0, 1], got {image.dtype}")


def _dense_rows(image: Tensor) -> Tensor:
    return image if image.stride()[-2:] == (3, 1) else image.contiguous()


def _apply_native(
    images: Tensor | list[Tensor], params: ViewParams, aug: Augmentation, out: Tensor
) -> Tensor:
    dense = out.is_contiguous() or out.is_contiguous(memory_format=torch.channels_last)
    target = out if dense else torch.empty_like(out, memory_format=torch.contiguous_format)
    scale, shift = aug.normalization
    switches = np.stack([params.flip, params.jitter, params.gray], axis=1).astype(np.uint8)
    ops.augment_views(
        [_dense_rows(i) for i in ([images] if isinstance(images, Tensor) else images)],
        torch.from_numpy(np.ascontiguousarray(params.box, dtype=np.int32)),
        torch.from_numpy(switches),
        torch.from_numpy(np.ascontiguousarray(params.order, dtype=np.uint8)),
        torch.from_numpy(np.ascontiguousarray(params.factors, dtype=np.float32)),
        torch.from_numpy(np.ascontiguousarray(params.sigma, dtype=np.float32)),
        scale + shift,
        aug.spec == "simclr",
        aug.brightness == "additive",
        aug.interpolation == "bilinear",
        aug.blur_radius,
        target,
    )
    return target if dense else out.copy_(target)


def _apply_torch(
    images: Tensor | list[Tensor], params: ViewParams, aug: Augmentation, out: Tensor
) -> Tensor:
    scale, shift = (torch.tensor(v, device=out.device)[:, None, None] for v in aug.normalization)
    for i, image in enumerate(images):
        view = reference.augment_view(
            image,
            size=aug.size,
            spec=aug.spec,
            box=params.box[i],
            flip=bool(params.flip[i]),
            jitter=bool(params.jitter[i]),
            order=params.order[i],
            factors=params.factors[i],
            gray=bool(params.gray[i]),
            sigma=float(params.sigma[i]),
            additive_brightness=aug.brightness == "additive",
            bilinear=aug.interpolation == "bilinear",
            dtype=torch.float32,
        )
        out[i] = view * scale + shift
    return out
