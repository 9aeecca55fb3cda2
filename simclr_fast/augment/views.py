"""Two views of images: fused C++ on the CPU, a Triton kernel or plain torch on the GPU."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simclr_fast import ops, reference
from simclr_fast.augment.channels import picture_channels
from simclr_fast.augment.params import Augmentation, ViewParams, draw_params, draw_views
from simclr_fast.augment.rgb import rgb_array
from simclr_fast.utils.numbers import as_int

__all__ = ["Augmentation", "SimCLRViews", "ViewParams", "apply_views", "draw_params"]

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

    images: [n, H, W, C], or n of [H, W, C] of any sizes; uint8, or float32 in [0, 1].
        C: aug.channels. Of other numbers than 3, the kernels make three channels at a time; with
        the contrast of spec="torchvision" plain torch does it.
    out:    [n, C, size, size], contiguous or channels_last, float32, float16 or bfloat16. It is
            written and returned. By default a new tensor of `dtype`.
    channels_last: memory format of the new tensor.

    Values lie in [0, 1], unless `aug` normalises.
    """
    images = as_tensors(images, aug.channels)
    n = len(images)
    if len(params) != n:
        raise ValueError(f"params are for {len(params)} images, got {n} images")
    extents = image_sizes(images)
    corner, extent = params.box[:, :2], params.box[:, 2:]
    outside = (corner < 0) | (extent < 1) | (corner.astype(np.int64) + extent > extents)
    if outside.any():
        i = int(outside.any(axis=1).argmax())
        raise ValueError(f"box {params.box[i].tolist()} leaves image {i} of {extents[i].tolist()}")
    shape = (n, aug.channels, aug.size, aug.size)
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
    return fill_views(images, params, aug, out)


def fill_views(
    images: Tensor | list[Tensor], params: ViewParams, aug: Augmentation, out: Tensor
) -> Tensor:
    """`apply_views` without its checks, for tensors on the device of `out`."""
    if len(params) == 0:
        return out
    kernels = ops.implementation_for(out.device)
    if aug.channels != 3:
        return _apply_in_threes(images, params, aug, out, kernels)
    if kernels is ops.Implementation.NATIVE:
        return _apply_native(images, params, aug, out)
    if kernels is ops.Implementation.TRITON:
        return _apply_triton(images, params, aug, out)
    return _apply_torch(images, params, aug, out)


def as_tensors(
    images: Tensor | Sequence[Tensor | np.ndarray], channels: int = 3
) -> Tensor | list[Tensor]:
    """Check images. Arrays become tensors, which share their memory if it is writable."""
    if isinstance(images, np.ndarray):
        images = _from_numpy(images)
    if isinstance(images, Tensor):
        _check_image(images, 4, channels)
        return images
    tensors = [i if isinstance(i, Tensor) else _from_numpy(i) for i in images]
    for i, tensor in enumerate(tensors):
        _check_image(tensor, 3, channels)
        # The kernels assume the first image's dtype and device for all.
        if tensor.dtype != tensors[0].dtype or tensor.device != tensors[0].device:
            raise ValueError(
                f"images must have one dtype and device, got {tensors[0].dtype} on "
                f"{tensors[0].device} first and {tensor.dtype} on {tensor.device} at {i}"
            )
    return tensors


def image_sizes(images: Tensor | list[Tensor]) -> np.ndarray:
    """int64 [n, 2]: height and width of each of the [n, H, W, C] or n of [H, W, C]."""
    if isinstance(images, Tensor):
        return np.tile(np.array(images.shape[1:3], dtype=np.int64), (len(images), 1))
    return np.array([i.shape[:2] for i in images], dtype=np.int64).reshape(-1, 2)


def _from_numpy(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _check_image(image: Tensor, dims: int, channels: int) -> None:
    shape, dtype = image.shape, image.dtype
    if len(shape) != dims or shape[-1] != channels:
        expected = f"[n, H, W, {channels}]" if dims == 4 else f"[H, W, {channels}] each"
        raise ValueError(f"images must be {expected}, got {tuple(shape)}")
    if dtype not in (torch.uint8, torch.float32):
        raise TypeError(f"images must be uint8 or float32 in [0, 1], got {dtype}")


def _dense_rows(image: Tensor) -> Tensor:
    # contiguous() keeps any stride along a dimension of size 1, for example in a narrow image.
    dense = image.stride()[-2:] == (3, 1)
    return image if dense else image.clone(memory_format=torch.contiguous_format)


def _apply_native(
    images: Tensor | list[Tensor], params: ViewParams, aug: Augmentation, out: Tensor
) -> Tensor:
    dense = out.is_contiguous() or out.is_contiguous(memory_format=torch.channels_last)
    target = out if dense else torch.empty_like(out, memory_format=torch.contiguous_format)
    scale, shift = aug.normalization
    switches = np.stack([params.flip, params.jitter, params.gray], axis=1).astype(np.uint8)
    ops.augment.augment_views(
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


def _apply_triton(
    images: Tensor | list[Tensor], params: ViewParams, aug: Augmentation, out: Tensor
) -> Tensor:
    # A variable keeps the copies of images without dense rows alive until the launch.
    dense = _dense_rows(images) if isinstance(images, Tensor) else [_dense_rows(i) for i in images]
    return views_at(_addresses(dense), dense[0].dtype == torch.uint8, params, aug, out)


def views_at(
    where: np.ndarray, as_bytes: bool, params: ViewParams, aug: Augmentation, out: Tensor
) -> Tensor:
    """`fill_views` by Triton, for RGB images at addresses on the device of `out`.

    where: int64 [2, n]: the address of each image, and the stride of its rows in elements.
    as_bytes: whether the images are uint8; otherwise float32.
    """
    from simclr_fast.kernels import augment as kernels

    ints, floats = pack_params(params)
    kernels.augment_views(
        _upload(where, out.device),
        as_bytes,
        _upload(ints, out.device),
        _upload(floats, out.device),
        _upload(_constants(aug), out.device),
        aug.spec == "simclr",
        aug.brightness == "additive",
        aug.interpolation == "bilinear",
        aug.blur_radius,
        out,
    )
    return out


def runs_in_threes(aug: Augmentation) -> bool:
    """Whether the kernels for RGB make the views of images that are not RGB.

    Contrast of torchvision is around the mean luma of RGB, and around each channel's mean here.
    """
    return aug.spec == "simclr" or not (aug.p_jitter and aug.s)


def _apply_in_threes(
    images: Tensor | list[Tensor],
    params: ViewParams,
    aug: Augmentation,
    out: Tensor,
    kernels: ops.Implementation,
) -> Tensor:
    """Views of images that are not RGB: three channels at a time are made as if they were."""
    fused = {ops.Implementation.NATIVE: _apply_native, ops.Implementation.TRITON: _apply_triton}
    if kernels not in fused or not runs_in_threes(aug):
        return _apply_torch(images, params, aug, out)
    apply = fused[kernels]
    # Saturation and hue are off. At the end their steps do nothing, while at the start they would
    # clip what the bicubic resize left outside of [0, 1].
    last = np.argsort(params.order >= 2, axis=1, kind="stable")
    params = replace(params, order=np.take_along_axis(params.order, last, axis=1))
    if not isinstance(images, Tensor):
        cut = [(slice(y, y + h), slice(x, x + w)) for y, x, h, w in params.box.tolist()]
        images = [image[box] for image, box in zip(images, cut, strict=True)]
        params = replace(params, box=params.box * np.array([0, 0, 1, 1], params.box.dtype))
    channels = aug.channels
    for start in range(0, channels, 3):
        # The last three may begin with channels that are there already.
        first = max(min(start, channels - 3), 0)
        three = [min(first + i, channels - 1) for i in range(3)]
        mean, std = (None if v is None else tuple(v[c] for c in three) for v in (aug.mean, aug.std))
        rgb = replace(aug, channels=3, mean=mean, std=std)
        if isinstance(images, Tensor):
            parts: Tensor | list[Tensor] = _three_of(images, first)
        else:
            parts = [_three_of(image, first) for image in images]
        if channels >= 3:
            apply(parts, params, rgb, out[:, first : first + 3])
        else:
            made = out.new_empty(len(out), 3, aug.size, aug.size)
            out.copy_(apply(parts, params, rgb, made)[:, :channels])
    return out


def _three_of(image: Tensor, first: int) -> Tensor:
    """Three channels, contiguous, from number `first` on; of one or two, the last is repeated."""
    part = image[..., first : first + 3]
    if image.shape[-1] < 3:
        part = torch.cat([part, *[part[..., -1:]] * (3 - image.shape[-1])], -1)
    return part.contiguous()


def _addresses(images: Tensor | list[Tensor]) -> np.ndarray:
    """int64 [2, n]: the address of each image, and the stride of its rows in elements."""
    if isinstance(images, Tensor):
        step = images.stride(0) * images.element_size()
        address = images.data_ptr() + step * np.arange(len(images), dtype=np.int64)
        return np.stack([address, np.full_like(address, images.stride(1))])
    return np.array([[i.data_ptr() for i in images], [i.stride(0) for i in images]], dtype=np.int64)


def _constants(aug: Augmentation) -> np.ndarray:
    """float32 [6]: scale of R, G, B, then shift."""
    scale, shift = aug.normalization
    return np.array(scale + shift, dtype=np.float32)


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy to the device; on CUDA from pinned memory, so that the host does not wait."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def finish_crops(
    crops: Tensor, ints: Tensor, floats: Tensor, aug: Augmentation, out: Tensor
) -> Tensor:
    """Flip, jitter, gray, blur and normalisation for crops that are already cut and resized.

    crops: uint8 [n, size, size, 3], contiguous. ints, floats: from `pack_params`, on the same
    device. out: as in `apply_views`. A GPU's work is queued on torch's current stream.
    """
    if len(crops) and ops.implementation_for(crops.device) is ops.Implementation.TRITON:
        from simclr_fast.kernels import augment as kernels

        kernels.augment_crops(
            crops,
            ints,
            floats,
            _upload(_constants(aug), out.device),
            aug.spec == "simclr",
            aug.brightness == "additive",
            aug.blur_radius,
            out,
        )
        return out
    params = _unpack_params(ints.numpy(force=True), floats.numpy(force=True))
    params.box = np.tile(np.array([0, 0, aug.size, aug.size], np.int32), (len(crops), 1))
    return apply_views(crops, params, aug, out=out)


def pack_params(params: ViewParams) -> tuple[np.ndarray, np.ndarray]:
    """int32 [n, 11]: box, flip, jitter, order (4), gray; float32 [n, 5]: factors (4), sigma."""
    flip, jitter, gray = (switch[:, None] for switch in (params.flip, params.jitter, params.gray))
    ints = np.concatenate([params.box, flip, jitter, params.order, gray], axis=1, dtype=np.int32)
    floats = np.concatenate([params.factors, params.sigma[:, None]], axis=1, dtype=np.float32)
    return ints, floats


def _unpack_params(ints: np.ndarray, floats: np.ndarray) -> ViewParams:
    return ViewParams(
        box=ints[:, :4],
        flip=ints[:, 4] != 0,
        jitter=ints[:, 5] != 0,
        order=ints[:, 6:10].astype(np.uint8),
        factors=floats[:, :4],
        gray=ints[:, 10] != 0,
        sigma=floats[:, 4],
    )


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


class SimCLRViews:
    """Two views of each image: views = SimCLRViews(96); view1, view2 = views(images).

    images: one of
        - a batch [N, 3, H, W] or [N, H, W, 3], or a list of [3, H, W] or [H, W, 3] tensors of any
          sizes; uint8, uint16, or floating point in [0, 1]; on any device. If both layouts fit, the
          channels come first. uint16 is scaled to uint8. One channel is taken as gray.
        - a list of PIL images of any mode. They are turned upright by their EXIF orientation and
          converted to 8-bit RGB (augment/rgb.py has the rules).
        Both return two tensors [N, 3, size, size].
          With `channels` other than 3, all of these have that number of channels, and nothing is
          converted (augment/channels.py). 16-bit images become floating ones.
        - one PIL image or one 3-dimensional tensor. It returns two tensors [3, size, size], as a
          transform inside a Dataset does.

    With `ids`, the views depend only on (seed, epoch, id, view) and the image's size. They are the
    same in any batch, worker, order, process and backend. Without `ids`, random ones come from
    torch's global generator, which torch.manual_seed and DataLoader's workers seed.

    Arguments: those of Augmentation, and
        seed: part of the generator's key.
        dtype: of the views: float32, float16 or bfloat16.
        channels_last: memory format of the views.
    """

    def __init__(
        self,
        size: int = 224,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        **augmentation: Any,
    ) -> None:
        self.aug = Augmentation(size, **augmentation)
        self.seed = as_int("seed", seed)
        self.dtype = dtype
        self.channels_last = channels_last

    def __call__(
        self, images: Any, ids: Sequence[int] | np.ndarray | None = None, epoch: int = 0
    ) -> tuple[Tensor, Tensor]:
        single = not isinstance(images, list | tuple | Tensor | np.ndarray)
        single = single or (not isinstance(images, list | tuple) and images.ndim == 3)
        batch = as_images([images] if single else images, channels=self.aug.channels)
        n = len(batch)
        if ids is None:
            numbers = int(torch.randint(2**62, ())) + np.arange(n)
        else:
            numbers = np.atleast_1d(np.asarray(ids))
            if len(numbers) != n:
                raise ValueError(f"ids must hold one per image, got {len(numbers)} for {n} images")
        sizes = image_sizes(batch)
        first, second = (
            apply_views(batch, params, self.aug, dtype=self.dtype, channels_last=self.channels_last)
            for params in draw_views(self.aug, self.seed, epoch, numbers, sizes)
        )
        return (first[0], second[0]) if single else (first, second)

    def __repr__(self) -> str:
        return f"SimCLRViews({self.aug}, seed={self.seed})"


def as_images(images: Any, *, upright: bool = True, channels: int = 3) -> Tensor | list[Tensor]:
    """The images that `SimCLRViews` takes as [..., H, W, channels], uint8 or float32.

    upright: turn PIL images upright by their EXIF orientation.
    """
    if isinstance(images, np.ndarray):
        images = _from_numpy(images)
    if isinstance(images, Tensor):
        if images.dim() != 4:
            raise ValueError(
                f"a batch must be [N, {channels}, H, W] or [N, H, W, {channels}], got "
                f"{tuple(images.shape)}"
            )
        return _channels_last(images, channels)
    return [_channels_last(_as_tensor(image, upright, channels), channels) for image in images]


def _as_tensor(image: Any, upright: bool, channels: int) -> Tensor:
    if isinstance(image, Tensor):
        return image
    if isinstance(image, np.ndarray):
        return _from_numpy(image)
    if not hasattr(image, "convert"):
        raise TypeError(f"an image must be a tensor, ndarray or PIL image, got {type(image)}")
    if channels != 3:
        return torch.from_numpy(picture_channels(image, channels)).movedim(-1, 0)
    return torch.from_numpy(rgb_array(image, upright=upright))


def _channels_last(image: Tensor, channels: int) -> Tensor:
    """[..., C, H, W] or [..., H, W, C] → [..., H, W, C] in uint8 or float32. For RGB, one channel
    [..., 1, H, W] is repeated."""
    first = (1, 3) if channels == 3 else (channels,)
    if image.dim() < 3 or (image.shape[-3] not in first and image.shape[-1] != channels):
        raise ValueError(
            f"an image must be [{channels}, H, W] or [H, W, {channels}], got {tuple(image.shape)}"
        )
    if image.dtype == torch.uint16 and channels != 3:
        image = image.float() / 65535
    elif image.dtype == torch.uint16:
        image = (image.float() / 257).round().to(torch.uint8)
    elif image.dtype != torch.uint8:
        if not image.is_floating_point():
            raise TypeError(
                f"an image must be uint8, uint16 or floating in [0, 1], got {image.dtype}"
            )
        image = image.float()
        # A bicubic resize may go a little beyond. On a GPU this check would make the host wait.
        if image.is_cpu and image.numel():
            low, high = (float(value) for value in image.aminmax())
            if not (low >= -1 and high <= 2):
                raise ValueError(
                    f"a floating image must be in [0, 1], got one from {low:g} to {high:g}"
                )
    channels_first = image.shape[-3] == channels or image.shape[-1] != channels
    image = image.movedim(-3, -1) if channels_first else image
    return image.expand(*image.shape[:-1], channels).contiguous()
