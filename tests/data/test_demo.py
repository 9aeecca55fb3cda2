"""The embedded data set."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr_fast.data import demo
from simclr_fast.data.datasets import named_source


def test_the_demo_images_are_balanced_and_distinct():
    assert (demo.files("simclr_fast") / "assets" / demo._ASSET).stat().st_size <= 4 << 20
    for split, per_class in demo.PER_CLASS.items():
        images, labels = demo.demo_garments(split)
        assert images.shape == (10 * per_class, 28, 28)
        assert np.bincount(labels).tolist() == [per_class] * 10
        # Garments, not noise or padding: each fills a fair part of its frame, and none repeats.
        filled = (images > 0).mean(axis=(1, 2))
        assert 0.4 < filled.mean() < 0.6
        assert len({image.tobytes() for image in images}) > 0.99 * len(images)


def test_colour_is_deterministic_and_says_nothing_of_the_class():
    images, labels = demo.demo_images("train", seed=1)
    again, _ = demo.demo_images("train", seed=1)
    other, _ = demo.demo_images("train", seed=2)
    assert np.array_equal(images, again)
    assert not np.array_equal(images, other)
    background = images[:, 0, 0].astype(float)
    means = np.stack([background[labels == c].mean(0) for c in range(10)])
    error = background.std(0) / np.sqrt(600)
    assert (np.abs(means - background.mean(0)) < 4 * error).all()


def test_demo_files_are_written_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SIMCLR_FAST_CACHE", str(tmp_path))
    folder = demo.demo_folder("test")
    paths = sorted(folder.rglob("*.jpg"))
    assert len(paths) == 1000
    assert sorted(p.name for p in folder.iterdir()) == sorted(demo.CLASSES)
    image = Image.open(paths[0])
    assert image.size == (32, 32)
    number = int(paths[0].stem)
    pixels, labels = demo.demo_images("test")
    assert demo.CLASSES[labels[number]] == paths[0].parent.name
    assert np.abs(np.asarray(image).astype(int) - pixels[number]).mean() < 4
    before = paths[0].stat().st_mtime_ns
    assert demo.demo_folder("test") == folder
    assert paths[0].stat().st_mtime_ns == before
    assert [p.name for p in folder.parent.iterdir()] == ["test"]


def test_grain_is_the_images_own_and_says_nothing_of_the_class():
    images, labels = demo.grainy_images("test")
    assert np.array_equal(images, demo.grainy_images("test")[0])
    flat, flat_labels = demo.demo_images("test")
    assert np.array_equal(labels, flat_labels)
    grain = images.astype(float) - flat
    grain = grain[((images > 0) & (images < 255)).all((1, 2, 3))]
    # Brightness alone (half a step rounds up or down), a tenth of the range, a little more between
    # its steps; smooth: neighbours are alike.
    assert len(grain) > 100
    assert np.ptp(grain, axis=3).max() <= 1
    assert 24 <= np.abs(grain).max() <= 0.13 * 255
    flat_grain = grain[..., 0].reshape(len(grain), -1)
    assert np.corrcoef(grain[:, :, 1:, 0].ravel(), grain[:, :, :-1, 0].ravel())[0, 1] > 0.5
    # Each image's own: 256 random steps, no two images' alike.
    between = np.corrcoef(flat_grain[:100])[np.triu_indices(100, 1)]
    assert np.abs(between).max() < 0.5
    source = named_source("demo-grain", "test")
    assert (len(source), source.classes) == (1000, demo.CLASSES)


def test_held_out_images_are_training_images_that_no_run_trains_on():
    def paths(source):
        return [Path(source.path(i)) for i in range(len(source))]

    whole = {path.name for path in paths(named_source("demo"))}
    train, held_out = (named_source("demo-held-out", split) for split in ("train", "test"))
    for source, per_class in ((train, 500), (held_out, 100)):
        assert np.bincount(source.labels).tolist() == [per_class] * 10
        assert source.classes == named_source("demo").classes
        parents = [source.classes[label] for label in source.labels]
        assert [path.parent.name for path in paths(source)] == parents
    names = [{path.name for path in paths(source)} for source in (train, held_out)]
    assert not names[0] & names[1]
    assert names[0] | names[1] == whole


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'val'"):
        demo.demo_garments("val")
