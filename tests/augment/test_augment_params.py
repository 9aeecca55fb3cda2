"""Parameters depend on (seed, epoch, id, view) alone and have the distribution of their spec."""

import json
import math
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from tf_crops import WHERE, quantities
from torchvision.transforms import RandomResizedCrop

from simclr_fast.augment.params import Augmentation, draw_params, draw_views, philox

N = 20_000
SIZES = np.tile([[375, 500]], (N, 1))
P_MIN = 1e-4
TENSORFLOW = json.loads(WHERE.read_text())


def same(a, b):
    return all(np.array_equal(getattr(a, k), getattr(b, k)) for k in vars(a))


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # Random123's kat_vectors
        ([0, 0], [0, 0, 0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 2, [0xFFFFFFFF] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0xA4093822, 0x299F31D0],
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_numbers(key, counter, expected):
    out = philox(np.array(key, dtype=np.uint32), np.array(counter, dtype=np.uint32)[:, None])
    assert out[:, 0].tolist() == expected


@pytest.mark.parametrize("spec", ["simclr", "torchvision"])
def test_a_sample_gets_the_same_parameters_in_any_batch(spec):
    aug = Augmentation(spec=spec)
    rng = np.random.default_rng(0)
    ids = rng.permutation(2**40 + np.arange(300))
    sizes = rng.integers(20, 600, (300, 2))
    whole = draw_params(aug, 7, 3, ids, 1, sizes)
    parts = rng.permutation(300)
    assert same(whole[parts], draw_params(aug, 7, 3, ids[parts], 1, sizes[parts]))
    assert same(whole[5:6], draw_params(aug, 7, 3, ids[5:6], 1, sizes[5:6]))


def test_every_part_of_the_key_changes_the_parameters():
    aug, ids, sizes = Augmentation(), np.arange(50), SIZES[:50]
    base = draw_params(aug, 1, 2, ids, 0, sizes)
    for seed, epoch, view in ((2, 2, 0), (1 + 2**32, 2, 0), (1, 3, 0), (1, 2, 1)):
        other = draw_params(aug, seed, epoch, ids, view, sizes)
        assert not np.any(base.factors == other.factors)
    far = draw_params(aug, 1, 2, ids + 2**32, 0, sizes)
    assert not np.any(base.factors == far.factors)


def test_the_images_size_changes_only_the_box():
    aug, ids = Augmentation(), np.arange(100)
    a = draw_params(aug, 0, 0, ids, 0, np.tile([[100, 100]], (100, 1)))
    b = draw_params(aug, 0, 0, ids, 0, np.tile([[333, 77]], (100, 1)))
    for name in ("flip", "jitter", "order", "factors", "gray", "sigma"):
        assert np.array_equal(getattr(a, name), getattr(b, name))


def ks(sample, cdf_or_sample):
    if callable(cdf_or_sample):
        return stats.kstest(sample, cdf_or_sample).pvalue
    return stats.ks_2samp(sample, cdf_or_sample).pvalue


@pytest.mark.parametrize("spec", ["simclr", "torchvision"])
def test_switches_order_factors_and_sigma_have_their_distributions(spec):
    aug = Augmentation(spec=spec, s=0.5)
    p = draw_params(aug, 11, 0, np.arange(N), 0, SIZES)
    for drawn, probability in ((p.flip, 0.5), (p.jitter, 0.8), (p.gray, 0.2), (p.sigma > 0, 0.5)):
        assert stats.binomtest(int(drawn.sum()), N, probability).pvalue > P_MIN
    codes = p.order @ np.array([64, 16, 4, 1])
    counts = np.unique(codes, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > P_MIN
    assert np.all(np.sort(p.order, axis=1) == np.arange(4))
    for op in range(3):
        assert ks(p.factors[:, op], stats.uniform(0.6, 0.8).cdf) > P_MIN
    assert ks(p.factors[:, 3], stats.uniform(-0.1, 0.2).cdf) > P_MIN
    assert ks(p.sigma[p.sigma > 0], stats.uniform(0.1, 1.9).cdf) > P_MIN
    # Pairwise independence of everything that is drawn.
    columns = np.column_stack([p.flip, p.jitter, p.gray, p.sigma > 0, p.factors, p.order[:, 0]])
    off = np.corrcoef(columns.T.astype(float))[~np.eye(columns.shape[1], dtype=bool)]
    assert np.abs(off).max() < 5 / math.sqrt(N)


def test_views_are_independent():
    a, b = (draw_params(Augmentation(), 0, 0, np.arange(N), v, SIZES) for v in (0, 1))
    for x, y in ((a.factors[:, 0], b.factors[:, 0]), (a.box[:, 0], b.box[:, 0])):
        assert abs(stats.pearsonr(x, y).statistic) < 5 / math.sqrt(N)


def test_additive_brightness_is_centred_on_zero():
    p = draw_params(Augmentation(brightness="additive"), 0, 0, np.arange(N), 0, SIZES)
    assert ks(p.factors[:, 0], stats.uniform(-0.8, 1.6).cdf) > P_MIN


def tensorflow_crop(height, width, area, ratio, rng):
    """sample_distorted_bounding_box with min_object_covered = 0.1 and the whole image as object."""
    for _ in range(100):
        aspect = rng.uniform(*ratio)
        least, most = area[0] * height * width, area[1] * height * width
        h, top = round(math.sqrt(least / aspect)), round(math.sqrt(most / aspect))
        if round(top * aspect) > width:
            top = int((width + 0.5 - 1e-7) / aspect)
            top -= round(top * aspect) > width
        top = min(top, height)
        h = min(h, top)
        h += rng.randrange(top - h + 1)
        w = round(h * aspect)
        if w * h < least:
            h += 1
            w = round(h * aspect)
        if w * h > most:
            h -= 1
            w = round(h * aspect)
        fits = least <= w * h <= most and 0 < w <= width and 0 < h <= height
        if not fits or w * h < 0.1 * height * width:
            continue
        y = rng.randrange(height - h) if h < height else 0
        x = rng.randrange(width - w) if w < width else 0
        return y, x, h, w
    return 0, 0, height, width


def torchvision_crop(height, width, area, ratio, rng):
    return RandomResizedCrop.get_params(torch.empty(1, height, width), list(area), list(ratio))


@pytest.mark.parametrize("shape", [(375, 500), (32, 32), (60, 400)])
@pytest.mark.parametrize("spec", ["simclr", "torchvision"])
def test_crops_have_the_distribution_of_the_spec(spec, shape):
    torch.manual_seed(0)
    rng = random.Random(0)
    area, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    crop = tensorflow_crop if spec == "simclr" else torchvision_crop
    expected = np.array([crop(*shape, area, ratio, rng) for _ in range(N)])
    sizes = np.tile([shape], (N, 1))
    box = draw_params(Augmentation(spec=spec, area=area, ratio=ratio), 5, 0, np.arange(N), 0, sizes)
    box = box.box.astype(float)
    for measure in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 2],
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 0] / np.maximum(shape[0] - b[:, 2], 1),
    ):
        assert ks(measure(box), measure(expected)) > P_MIN


@pytest.mark.parametrize(
    "case", TENSORFLOW["cases"], ids=lambda case: "x".join(map(str, case["size"]))
)
def test_crops_are_as_tensorflow_draws_them(case):
    """Kolmogorov-Smirnov at the thresholds of tests/helpers/tf_crops.py, for P_MIN."""
    sizes = np.tile([case["size"]], (N, 1))
    boxes = draw_params(Augmentation(spec="simclr"), 7, 0, np.arange(N), 0, sizes).box
    least = math.sqrt(-math.log(P_MIN / 2) / 2 * (1 / N + 1 / TENSORFLOW["draws"]))
    for name, values in quantities(boxes).items():
        theirs = case["shares"][name]
        ours = [np.mean(values <= t) for t in theirs["at"]]
        assert np.abs(np.array(ours) - theirs["share"]).max() < least, name


@pytest.mark.parametrize("spec", ["simclr", "torchvision"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 1000), (3, 2), (8, 8), (3000, 4000)])
def test_boxes_lie_inside_any_image(spec, shape):
    sizes = np.tile([shape], (500, 1))
    box = draw_params(Augmentation(spec=spec), 0, 0, np.arange(500), 0, sizes).box
    assert box[:, :2].min() >= 0
    assert box[:, 2:].min() >= 1
    assert np.all(box[:, :2] + box[:, 2:] <= sizes)


def test_small_crops_cover_their_whole_range():
    """TensorFlow's least coverage of 0.1 would cut it."""
    aug = Augmentation(area=(0.02, 0.14), min_covered=0)
    box = draw_params(aug, 0, 0, np.arange(N), 0, SIZES).box.astype(float)
    share = box[:, 2] * box[:, 3] / (375 * 500)
    assert share.min() == pytest.approx(0.02, rel=0.02)
    assert share.max() == pytest.approx(0.14, rel=0.02)
    least = replace(aug, min_covered=0.1)
    box = draw_params(least, 0, 0, np.arange(N), 0, SIZES).box.astype(float)
    assert (box[:, 2] * box[:, 3]).min() >= 0.1 * 375 * 500
    with pytest.raises(ValueError, match=r"min_covered must be below the end of area .* got 0\.1"):
        Augmentation(area=(0.02, 0.1))
    assert Augmentation(area=(0.02, 0.1), spec="torchvision").min_covered == 0.1


def test_a_step_of_probability_0_never_happens():
    aug = Augmentation(crop=False, p_flip=0, p_jitter=0, p_gray=0, p_blur=0)
    p = draw_params(aug, 0, 0, np.arange(1000), 0, SIZES[:1000])
    assert not np.concatenate([p.flip, p.jitter, p.gray, p.sigma]).any()
    assert np.all(p.box == [0, 0, 375, 500])
    always = Augmentation(p_flip=1, p_jitter=1, p_gray=1, p_blur=1)
    on = draw_params(always, 0, 0, np.arange(1000), 0, SIZES[:1000])
    assert on.flip.all()
    assert on.jitter.all()
    assert on.gray.all()
    assert (on.sigma > 0).all()


def test_drawing_a_batch_is_fast():
    aug, ids, sizes = Augmentation(), np.arange(256), SIZES[:256]
    times = []
    for epoch in range(20):
        start = time.perf_counter()
        draw_params(aug, 0, epoch, ids, 0, sizes)
        times.append(time.perf_counter() - start)
    assert min(times) < 4e-3


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"size": 0}, "size"),
        ({"spec": "pil"}, "spec"),
        ({"s": -1}, "s must"),
        ({"s": 3}, "hue"),
        ({"hue": 0.6}, "hue"),
        ({"p_blur": 1.5}, "p_blur"),
        ({"p_gray": float("nan")}, "p_gray"),
        ({"area": (0.5, 0.1)}, "area"),
        ({"area": (0.0, 1.0)}, "area"),
        ({"ratio": (0.75, math.inf)}, "ratio"),
        ({"brightness": "v1"}, "brightness"),
        ({"brightness": "additive", "spec": "torchvision"}, "additive"),
        ({"interpolation": "nearest"}, "interpolation"),
        ({"mean": (0.5, 0.5, 0.5)}, "std"),
        ({"mean": (0, 0, 0), "std": (1, 0, 1)}, "std"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        Augmentation(**arguments)


def test_bad_draws_are_named():
    aug, ids, sizes = Augmentation(), np.arange(3), SIZES[:3]
    with pytest.raises(ValueError, match="view"):
        draw_params(aug, 0, 0, ids, -1, sizes)
    with pytest.raises(ValueError, match="epoch"):
        draw_params(aug, 0, -1, ids, 0, sizes)
    with pytest.raises(TypeError, match="ids"):
        draw_params(aug, 0, 0, ids * 0.5, 0, sizes)
    with pytest.raises(TypeError, match="sizes"):
        draw_params(aug, 0, 0, ids, 0, sizes[:2])
    with pytest.raises(ValueError, match="sizes"):
        draw_params(aug, 0, 0, ids, 0, sizes * 0)


@pytest.mark.parametrize("spec", ["simclr", "torchvision"])
def test_drawing_both_views_at_once_equals_drawing_each(spec):
    aug = Augmentation(spec=spec, area=(0.5, 0.6))
    ids = np.arange(400) * 12_345_678_901
    views = draw_views(aug, 2**40, 9, ids, SIZES[:400])
    assert all(same(views[v], draw_params(aug, 2**40, 9, ids, v, SIZES[:400])) for v in (0, 1))
    assert [len(view) for view in draw_views(aug, 0, 0, ids[:0], SIZES[:0])] == [0, 0]
    more = draw_views(aug, 2**40, 9, ids, SIZES[:400], 5)
    assert all(same(a, b) for a, b in zip(more, views, strict=False))
    assert len(more) == 5
    assert same(more[4], draw_params(aug, 2**40, 9, ids, 4, SIZES[:400]))


def test_no_view_repeats_another_view_or_epoch():
    aug, ids = Augmentation(area=(0.5, 0.6)), np.arange(50)
    sizes = np.full((50, 2), 1000)
    drawn = [
        draw_params(aug, 3, epoch, ids, view, sizes).box.tobytes()
        for epoch in range(4)
        for view in range(6)
    ]
    assert len(set(drawn)) == 24
