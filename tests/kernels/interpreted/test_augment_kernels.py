"""The views' Triton kernels beside the CPU's, and every load and store."""

import os
from collections import Counter

import numpy as np
import pytest
import torch
from kernel_memory import checked_memory
from triton.runtime import interpreter

from simclr_fast.augment.params import Augmentation, draw_params
from simclr_fast.augment.views import (
    _apply_in_threes,
    _apply_torch,
    _apply_triton,
    apply_views,
    pack_params,
)
from simclr_fast.data.decode import Part
from simclr_fast.data.pipelines import HostViews, KeptViews
from simclr_fast.data.sources import ArraySource
from simclr_fast.kernels import augment as kernels
from simclr_fast.ops import Implementation

PLANAR, LAST = torch.contiguous_format, torch.channels_last
SHAPES = [(60, 80), (17, 33), (40, 41), (9, 100)]
CORNERS = [(10, 20), (100, 50), (200, 300), (50, 400)]


@pytest.fixture(scope="module")
def photograph():
    datasets = pytest.importorskip("sklearn.datasets")
    return torch.from_numpy(datasets.load_sample_image("china.jpg").copy())


@pytest.fixture
def images(photograph, device):
    parts = zip(SHAPES, CORNERS, strict=True)
    return [photograph[y : y + h, x : x + w].to(device) for (h, w), (y, x) in parts]


def on_cpu(given):
    return given.cpu() if isinstance(given, torch.Tensor) else [image.cpu() for image in given]


def assert_close(out, exact):
    """0.1/255, and a last place of the outputs' dtype: the interpreter cuts bfloat16 off."""
    error = (out.cpu().float() - exact).abs()
    assert (error <= 0.1 / 255 + torch.finfo(out.dtype).eps * exact.abs()).all()


@pytest.mark.parametrize(
    ("size", "spec", "floating", "layout", "dtype", "options"),
    [
        (37, "simclr", False, PLANAR, torch.float32, {}),
        (40, "torchvision", True, LAST, torch.float16, {}),
        (
            *(33, "simclr", True, PLANAR, torch.bfloat16),
            {"brightness": "additive", "interpolation": "bilinear"},
        ),
        (
            *(40, "torchvision", False, LAST, torch.float32),
            {"mean": (0.4,) * 3, "std": (0.3,) * 3},
        ),
    ],
)
def test_views_and_crops(size, spec, floating, layout, dtype, options, photograph, images, device):
    aug = Augmentation(size, spec, p_blur=0.75, **options)
    given = [(i.float() / 255).contiguous() if floating else i for i in images]
    p = draw_params(aug, size, 0, np.arange(4), 0, np.array(SHAPES))
    out = torch.full((4, 3, size, size), float("nan"), dtype=dtype)
    out = out.contiguous(memory_format=layout)
    _apply_triton(given, p, aug, out)
    assert_close(out, apply_views(on_cpu(given), p, aug))
    crops = torch.stack([photograph[y : y + size, x : x + size] for y, x in CORNERS])
    p.box = np.tile(np.array([0, 0, size, size], np.int32), (4, 1))
    packed = [torch.from_numpy(array).to(device) for array in pack_params(p)]
    normalize = torch.tensor([v for part in aug.normalization for v in part])
    steps = aug.spec == "simclr", aug.brightness == "additive", aug.blur_radius
    out = torch.full_like(out, float("nan"))
    with checked_memory() as launches:
        kernels.augment_crops(crops.to(device), *packed, normalize, *steps, out)
    assert launches == ["mean_kernel", "color_kernel", "blur_kernel", "blur_kernel"]
    assert_close(out, apply_views(crops, p, aug))


@pytest.mark.parametrize(("interpolation", "taps"), [("bicubic", 4), ("bilinear", 2)])
def test_only_taps_with_weight_are_read(interpolation, taps, images, monkeypatch):
    """Three channels of 4 × 4 taps of a bicubic filter, of 2 × 2 of a bilinear one."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("the interpreter alone sees memory accesses")
    native, pixels = interpreter._interpreter, 0

    class Counter:
        def __getattr__(self, name):
            return getattr(native, name)

        def load(self, pointers, mask, other, dtype):
            nonlocal pixels
            pixels += pointers.size == kernels.BLOCK and dtype == np.uint8
            return native.load(pointers, mask, other, dtype)

    aug = Augmentation(24, interpolation=interpolation)
    p = draw_params(aug, 1, 0, np.arange(4), 0, np.array(SHAPES))
    out = torch.full((4, 3, 24, 24), float("nan"))
    monkeypatch.setattr(interpreter, "_interpreter", Counter())
    _apply_triton(images, p, aug, out)
    # One block a view.
    assert pixels == 4 * 3 * taps**2
    assert_close(out, apply_views(on_cpu(images), p, aug))


@pytest.mark.parametrize(("which", "size"), [("strided", 17), ("dense", 24), ("one", 1)])
def test_a_batch_in_one_tensor(which, size, photograph, device):
    """Rows and images are further apart than they are long; 1 × 1 views."""
    batch = photograph.to(device).unfold(0, 40, 170).unfold(1, 50, 250)
    batch = batch.flatten(0, 1).permute(0, 2, 3, 1)
    dense = batch.contiguous()[:, :33, :41]
    given = {"strided": batch, "dense": dense, "one": batch[:1]}[which]
    aug, n = Augmentation(size), len(given)
    p = draw_params(aug, 2, 0, np.arange(n), 1, np.array([given.shape[1:3]] * n))
    out = torch.full((n, 3, size, size), float("nan"))
    _apply_triton(given, p, aug, out)
    assert_close(out, apply_views(given.cpu(), p, aug))


def test_kept_images_give_the_views_of_the_host(photograph, device):
    """Two epochs of parts with new and kept images. Each image is read once."""
    photos = [
        photograph.numpy()[y : y + height, x : x + width]
        for (height, width), (y, x) in zip(SHAPES, CORNERS, strict=True)
    ]
    augmentations = [Augmentation(16, p_blur=0.5), Augmentation(7)]
    reads = Counter()

    class Counted(ArraySource):
        def read(self, i):
            reads[i] += 1
            return super().read(i)

    def draw(ids, sizes):
        return [draw_params(aug, 0, 0, ids, v, sizes) for v, aug in enumerate(augmentations)]

    host = HostViews(ArraySource(photos), 3, 1, augmentations, draw)
    kept = KeptViews(Counted(photos), 3, 1, augmentations, draw, device)
    for epoch in ([[2, 0], [1, 2, 3]], [[3], [0, 1, 2]]):
        parts = [Part(0, np.array(ids)) for ids in epoch]
        for (part, outputs), own in zip(host.run(parts), kept.run(parts), strict=True):
            exact = [torch.empty(len(part.ids), 3, aug.size, aug.size) for aug in augmentations]
            exact = on_cpu(exact)
            views = [torch.full_like(view, torch.nan, device=device) for view in exact]
            host.write(part, outputs, exact)
            kept.write(*own, views)
            for view, other in zip(views, exact, strict=True):
                assert_close(view, other)
    assert dict(reads) == {0: 1, 1: 1, 2: 1, 3: 1}


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize(("channels", "size", "layout"), [(2, 9, LAST), (5, 12, PLANAR)])
def test_other_channels_in_threes(channels, size, layout, joined, images):
    """Each is the view of that channel in plain torch."""
    aug = Augmentation(size, channels=channels, p_blur=0.75, saturation=0, hue=0, p_gray=0)
    given = [torch.cat([i, i.flip(2)], 2)[..., :channels].contiguous() for i in images]
    shapes = SHAPES
    if joined:
        given, shapes = torch.stack([i[:9, :33] for i in given]), [(9, 33)] * 4
    p = draw_params(aug, size, 0, np.arange(4), 0, np.array(shapes))
    out = torch.full((4, channels, size, size), float("nan")).contiguous(memory_format=layout)
    _apply_in_threes(given, p, aug, out, Implementation.TRITON)
    exact = torch.empty(out.shape, device="cpu")
    assert_close(out, _apply_torch(on_cpu(given), p, aug, exact))
