"""SimCLRTransform against the installed lightly."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from simclr_fast import SimCLRViews
from simclr_fast.compat.lightly import SimCLRTransform

CHINA = Image.fromarray(load_sample_image("china.jpg"))
CROP_ONLY = {"cj_prob": 0.0, "random_gray_scale": 0.0, "hf_prob": 0.0, "normalize": None}


def to_bytes(view):
    return (view * 255).round().byte()


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
@pytest.mark.parametrize("size", [8, 15, 32, 64, 96, 224])
def test_blur_is_lightlys_at_every_size(size, sigma):
    gaussian_blur = pytest.importorskip("lightly.transforms.gaussian_blur")
    theirs = gaussian_blur.GaussianBlur(prob=1.0, sigmas=(sigma, sigma))
    views = {}
    for p in (0.0, 1.0):
        torch.manual_seed(0)
        transform = SimCLRTransform(size, gaussian_blur=p, sigmas=(sigma, sigma), **CROP_ONLY)
        views[p] = transform(CHINA)
    for sharp, blurred in zip(views[0.0], views[1.0], strict=True):
        image = Image.fromarray(to_bytes(sharp).movedim(0, -1).numpy())
        expected = torch.from_numpy(np.array(theirs(image))).movedim(-1, 0)
        assert torch.equal(to_bytes(blurred), expected)


def test_sigma_and_the_share_of_blurred_views_equal_lightlys(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "simclr_fast.compat.lightly._blurred_by_pillow",
        lambda view, sigma: drawn.append(sigma) or view,
    )
    torch.manual_seed(0)
    transform = SimCLRTransform(8, sigmas=(0.5, 1.5), gaussian_blur=0.25)
    for _ in range(1000):
        transform(CHINA)
    assert 440 < len(drawn) < 560
    assert 0.5 <= min(drawn) < 0.52
    assert 1.48 < max(drawn) < 1.5
    assert abs(np.mean(drawn) - 1) < 0.05


def test_whole_image_equals_lightlys():
    """Without a random crop, the views are the resized image, normalised."""
    theirs = pytest.importorskip("lightly.transforms").SimCLRTransform
    made = []
    for kind in (SimCLRTransform, theirs):
        image = CHINA.crop((0, 0, 64, 48)).resize((40, 40))
        options = CROP_ONLY | {"min_scale": 1.0, "gaussian_blur": 0.0}
        made.append(
            kind(40, **options | {"normalize": {"mean": [0.5] * 3, "std": [0.2] * 3}})(image)
        )
    for ours, wanted in zip(*made, strict=True):
        assert ours.dtype == wanted.dtype == torch.float32
        torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=0)


def rotated(image):
    """The same photo as a camera held upright stores it: sideways, with the orientation."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = image.rotate(90, expand=True)
    stored.info["exif"] = exif.tobytes()
    stored._exif = None
    assert stored.getexif()[0x0112] == 6
    return stored


def test_exif_orientation_is_ignored_as_lightly_does():
    theirs = pytest.importorskip("lightly.transforms").SimCLRTransform
    image = CHINA.crop((0, 0, 40, 40))
    options = CROP_ONLY | {"min_scale": 1.0, "gaussian_blur": 0.0}
    sideways = SimCLRTransform(40, **options)(image.rotate(90))[0]
    for kind in (SimCLRTransform, theirs):
        torch.testing.assert_close(kind(40, **options)(rotated(image))[0], sideways)
    plain = SimCLRViews(
        40, spec="torchvision", crop=False, p_flip=0, p_jitter=0, p_gray=0, p_blur=0
    )
    torch.testing.assert_close(plain(rotated(image))[0], plain(image)[0])


def test_tensors_are_accepted_and_seeds_repeat():
    transform = SimCLRTransform(32)
    pixels = torch.from_numpy(np.array(CHINA)).movedim(-1, 0)
    made = []
    for image in (CHINA, pixels, pixels / 255, CHINA):
        torch.manual_seed(len(made) // 3)
        made.append(transform(image))
    for other in made[1:3]:
        torch.testing.assert_close(other, made[0], atol=1e-5, rtol=0)
    assert not torch.equal(made[3][0], made[0][0])
    assert not torch.equal(made[0][0], made[0][1])
