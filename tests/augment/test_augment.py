"""apply_views against the float64 reference and against torchvision, on photographs."""

import colorsys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image
from torchvision.transforms.v2 import functional as F

from simclr_fast import ops, reference
from simclr_fast.augment.params import Augmentation, ViewParams, draw_params
from simclr_fast.augment.views import apply_views
from simclr_fast.ops import library

CHINA = torch.from_numpy(load_sample_image("china.jpg").copy())  # [427, 640, 3]
FLOWER = torch.from_numpy(load_sample_image("flower.jpg").copy())
needs_extension = pytest.mark.skipif(not ops.has_extension(), reason="no native extension")


def photograph(height, width):
    return F.resize(CHINA.permute(2, 0, 1), [height, width]).permute(1, 2, 0).contiguous()


def drawn(aug, images, *, seed=0, view=0):
    sizes = np.array([i.shape[:2] for i in images], dtype=np.int64).reshape(-1, 2)
    return draw_params(aug, seed, 0, np.arange(len(images)), view, sizes)


def exact(images, p, aug):
    return torch.stack(
        [
            reference.augment_view(
                image,
                size=aug.size,
                spec=aug.spec,
                box=p.box[i],
                flip=p.flip[i],
                jitter=p.jitter[i],
                order=p.order[i],
                factors=p.factors[i],
                gray=p.gray[i],
                sigma=p.sigma[i],
                additive_brightness=aug.brightness == "additive",
                bilinear=aug.interpolation == "bilinear",
            )
            for i, image in enumerate(images)
        ]
    )


def poisoned(n, size, dtype=torch.float32, channels_last=False):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(n, 3, size, size, dtype=dtype, memory_format=layout).fill_(float("nan"))


# 224: the paper's; 32: CIFAR; 37, 7: not a multiple of any vector width; 96: STL-10.
@pytest.mark.parametrize("size", [224, 96, 37, 32, 7, 1])
@pytest.mark.parametrize(
    ("spec", "brightness"),
    [
        ("simclr", "multiplicative"),
        ("simclr", "additive"),
        ("torchvision", "multiplicative"),
    ],
)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_views_match_the_reference(spec, brightness, interpolation, size):
    aug = Augmentation(size, spec, interpolation=interpolation, brightness=brightness)
    shapes = [(375, 500), (33, 47), (8, 8), (427, 640), (1, 1), (5, 300), (224, 224), (640, 31)]
    images = [photograph(*shape) for shape in shapes]
    p = drawn(aug, images)
    out = apply_views(images, p, aug, out=poisoned(len(images), size))
    assert (out - exact(images, p, aug)).abs().max() * 255 < 0.05


@pytest.mark.parametrize("spec", ["simclr", "torchvision"])
def test_large_photographs_match_the_reference(spec):
    aug = Augmentation(64, spec)
    images = [photograph(3000, 4000)]
    p = drawn(aug, images)
    assert (apply_views(images, p, aug) - exact(images, p, aug)).abs().max() * 255 < 0.05


@pytest.mark.parametrize("spec", ["simclr", "torchvision"])
@pytest.mark.parametrize("size", [40, 17, 64])
def test_whole_images_of_every_small_size(size, spec):
    """At some of these scales, filter weights are exactly zero."""
    aug = Augmentation(size, spec, crop=False, p_flip=0, p_jitter=0, p_gray=0, p_blur=0)
    images = [photograph(n, 70 - n) for n in range(1, 70)]
    p = drawn(aug, images)
    assert (apply_views(images, p, aug) - exact(images, p, aug)).abs().max() * 255 < 0.05


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [32, 37])
def test_dtypes_layouts_and_normalisation(size, dtype, channels_last):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    aug = Augmentation(size, mean=mean, std=std)
    images = [FLOWER, CHINA, photograph(20, 30)]
    p = drawn(aug, images)
    full = apply_views(images, p, Augmentation(size))
    normalised = F.normalize(full.double(), mean, std)
    out = apply_views(images, p, aug, dtype=dtype, channels_last=channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert out.is_contiguous(memory_format=layout)
    assert out.dtype == dtype
    assert (out - normalised).abs().max() <= (normalised.to(dtype) - normalised).abs().max() + 2e-6
    into = poisoned(3, size, dtype, channels_last)
    assert apply_views(images, p, aug, out=into) is into
    assert torch.equal(into, out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_to_nearest_even(dtype):
    """As torch casts, for values over the whole range and subnormal halves."""
    n = 64
    sweep = torch.cat([torch.linspace(0, 1, n * n // 2), torch.logspace(-9, 0, n * n // 2)])
    image = sweep.reshape(1, n, n, 1).expand(1, n, n, 3).contiguous()
    aug = Augmentation(n, crop=False, p_flip=0, p_jitter=0, p_gray=0, p_blur=0)
    p = drawn(aug, image)
    assert torch.equal(apply_views(image, p, aug, dtype=dtype)[0, 0].flatten(), sweep.to(dtype))


def test_without_steps_the_pixels_are_unchanged():
    aug = Augmentation(50, crop=False, p_flip=0, p_jitter=0, p_gray=0, p_blur=0)
    image = photograph(50, 50)[None]
    out = apply_views(image, drawn(aug, image), aug)
    assert torch.equal((out * 255).round().byte(), image.permute(0, 3, 1, 2))


@pytest.mark.parametrize("kind", ["list", "numpy", "strided", "float"])
def test_every_kind_of_input_gives_the_same_views(kind):
    aug = Augmentation(32)
    batch = torch.stack([photograph(40, 44), photograph(400, 440)[::10, ::10]])
    p = drawn(aug, batch)
    expected = apply_views(batch, p, aug)
    wide = torch.zeros(2, 40, 60, 3, dtype=torch.uint8)
    wide[:, :, 3:47] = batch
    given = {
        "list": list(batch),
        "numpy": [b.numpy() for b in batch],
        "strided": [*wide[:, :, 3:47]],
        "float": batch / 255,
    }[kind]
    torch.testing.assert_close(apply_views(given, p, aug), expected, atol=2e-6, rtol=0)


def test_out_may_have_any_strides():
    aug = Augmentation(16)
    images = [CHINA, FLOWER]
    p = drawn(aug, images)
    out = torch.zeros(2, 3, 16, 40)[..., 5:21]
    assert torch.equal(apply_views(images, p, aug, out=out), apply_views(images, p, aug))


def test_plain_torch_gives_the_same_views(monkeypatch):
    aug = Augmentation(48, mean=(0.5,) * 3, std=(0.25,) * 3)
    images = [CHINA, FLOWER]
    p = drawn(aug, images, seed=3)
    native = apply_views(images, p, aug)
    monkeypatch.setattr(library, "EXTENSION_ERROR", ImportError("left out by the test"))
    torch.testing.assert_close(apply_views(images, p, aug), native, atol=1e-4, rtol=0)


def test_an_empty_batch_gives_no_views():
    empty = torch.empty(0, 5, 5, 3, dtype=torch.uint8)
    p = drawn(Augmentation(32), empty)
    assert apply_views([], p, Augmentation(32)).shape == (0, 3, 32, 32)
    assert apply_views(empty, p, Augmentation(32)).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_views_do_not_depend_on_the_number_of_threads(threads):
    aug = Augmentation(40)
    images = [CHINA, FLOWER] * 4
    p = drawn(aug, images)
    before = torch.get_num_threads()
    expected = apply_views(images, p, aug)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(apply_views(images, p, aug), expected)
    finally:
        torch.set_num_threads(before)


def params(box, order=(0, 1, 2, 3), factors=(1, 1, 1, 0), **switches):
    one = {"flip": False, "jitter": True, "gray": False, "sigma": 0.0, **switches}
    return ViewParams(
        box=np.array([box], dtype=np.int32),
        flip=np.array([one["flip"]]),
        jitter=np.array([one["jitter"]]),
        order=np.array([order], dtype=np.uint8),
        factors=np.array([factors], dtype=np.float32),
        gray=np.array([one["gray"]]),
        sigma=np.array([one["sigma"]], dtype=np.float32),
    )


TORCHVISION_OPS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


@pytest.mark.parametrize("image", [CHINA, FLOWER], ids=["china", "flower"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)])
def test_colour_and_blur_equal_torchvision(image, order):
    factors = (1.4, 0.5, 1.7, -0.17)
    aug = Augmentation(256, "torchvision")
    p = params((20, 30, 256, 256), order, factors, flip=True, sigma=1.3)
    x = F.horizontal_flip(image[20:276, 30:286].permute(2, 0, 1).float() / 255)
    for op in order:
        x = TORCHVISION_OPS[op](x, factors[op])
    x = F.gaussian_blur(x, [25, 25], [1.3, 1.3])
    assert (apply_views([image], p, aug)[0] - x).abs().max() * 255 < 0.05


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("box", [(3, 5, 400, 600), (100, 100, 120, 90), (0, 0, 427, 640)])
def test_resize_equals_torchvisions_antialiased_resize(box, interpolation):
    aug = Augmentation(224, "torchvision", interpolation=interpolation)
    image = CHINA.permute(2, 0, 1).float() / 255
    mode = F.InterpolationMode(interpolation)
    expected = F.resized_crop(image, *box, [224, 224], mode, antialias=True).clamp(0, 1)
    out = apply_views([CHINA], params(box, jitter=False), aug)[0]
    assert (out - expected).abs().max() * 255 < 0.05


def test_simclr_saturation_and_hue_equal_colorsys():
    """HSV saturation and hue, pixel by pixel, against the standard library."""
    pixels = torch.rand(16, 16, 3, dtype=torch.float64, generator=torch.manual_seed(0))
    pixels[0] = pixels[0, :, :1]
    pixels[1, :, 0] = pixels[1, :, 1]
    expected = torch.empty_like(pixels)
    for index in np.ndindex(16, 16):
        h, s, v = colorsys.rgb_to_hsv(*pixels[index].tolist())
        turned = colorsys.hsv_to_rgb((h + 0.13) % 1, min(1.0, s * 1.6), v)
        expected[index] = torch.tensor(turned, dtype=torch.float64)
    p = params((0, 0, 16, 16), (2, 3, 0, 1), (1, 1, 1.6, 0.13))
    out = apply_views(pixels.float()[None], p, Augmentation(16))[0].permute(1, 2, 0)
    assert (out - expected).abs().max() < 2e-6


def test_simclr_contrast_is_per_channel_and_clips_after_each_step():
    image = CHINA[:64, :64].float()[None] / 255
    p = params((0, 0, 64, 64), (0, 1, 2, 3), (1.8, 0.3, 1, 0))
    x = (image[0].permute(2, 0, 1).double() * 1.8).clamp(0, 1)
    mean = x.mean((1, 2), keepdim=True)
    x = ((x - mean) * 0.3 + mean).clamp(0, 1)
    assert (apply_views(image, p, Augmentation(64))[0] - x).abs().max() < 2e-6


def test_simclr_blur_pads_with_zeros():
    white = torch.ones(1, 40, 40, 3)
    p = params((0, 0, 40, 40), jitter=False, sigma=1.5)
    corner = apply_views(white, p, Augmentation(40))[0, 0]
    kernel = torch.exp(-0.5 * (torch.arange(-2, 3) / 1.5) ** 2)
    edge = (kernel[2:].sum() / kernel.sum()).item()
    assert corner[0, 0].item() == pytest.approx(edge**2, abs=1e-6)
    assert corner[20, 20].item() == pytest.approx(1, abs=1e-6)
    assert apply_views(white, p, Augmentation(40, "torchvision")).min() > 1 - 1e-6


@needs_extension
def test_the_native_op_passes_opcheck(monkeypatch):
    aug = Augmentation(8)
    image = photograph(9, 11)[None]
    p = drawn(aug, image)
    captured = []
    monkeypatch.setattr(ops.augment, "augment_views", lambda *arguments: captured.append(arguments))
    apply_views(image, p, aug)
    torch.library.opcheck(torch.ops.simclr_fast.augment_views.default, captured[0])


def test_bad_input_is_named():
    aug = Augmentation(8)
    image = photograph(9, 11)
    p = drawn(aug, [image])
    with pytest.raises(TypeError, match="uint8"):
        apply_views([image.double()], p, aug)
    with pytest.raises(ValueError, match=r"\[H, W, 3\]"):
        apply_views([image[..., :2]], p, aug)
    mixed = [torch.zeros(4, 4, 3), torch.zeros(4, 4, 3, dtype=torch.uint8)]
    with pytest.raises(ValueError, match=r"one dtype and device, .*float32 .*uint8 on cpu at 1"):
        apply_views(mixed, p, aug)
    elsewhere = [torch.zeros(4, 4, 3), torch.zeros(4, 4, 3, device="meta")]
    with pytest.raises(ValueError, match=r"on cpu first .* on meta at 1"):
        apply_views(elsewhere, p, aug)
    with pytest.raises(ValueError, match="params are for 1"):
        apply_views([image, image], p, aug)
    with pytest.raises(ValueError, match="out must be"):
        apply_views([image], p, aug, out=torch.empty(1, 3, 9, 9))
    with pytest.raises(TypeError, match="dtype"):
        apply_views([image], p, aug, dtype=torch.float64)
    with pytest.raises(ValueError, match="box"):
        apply_views([image[:4]], params((0, 0, 9, 11)), aug)
