"""Pictures of features, and the page in a real browser."""

import json
import re

import numpy as np
import pytest
import torch
from browser import BROWSER, browser
from PIL import Image

from simclr_fast.augment.params import Augmentation
from simclr_fast.commands.cli import run
from simclr_fast.data.sources import ArraySource
from simclr_fast.evaluation.embed import (
    class_pictures,
    neighbours,
    project,
    short_name,
    thumbnails,
)
from simclr_fast.evaluation.plots import (
    class_style,
    named_points,
    plot_embedding,
    plot_loss,
    plot_neighbours,
)
from simclr_fast.models.encoders import build_encoder
from simclr_fast.models.weights import about_encoder


def test_pca_equals_scikit_learns():
    from sklearn.decomposition import PCA

    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7) + 3
    x[:, 3] = x[:, 2] * 2 + 0.3 * x[:, 3]
    standard = ((x - x.mean(0)) / x.std(0)).double().numpy()
    theirs, ours = PCA(2).fit_transform(standard), project(x, "pca")
    assert np.allclose(np.abs(ours), np.abs(theirs), atol=1e-5)
    with pytest.raises(ValueError, match="method"):
        project(x, "lda")


def test_tsne_keeps_clusters_apart():
    labels = np.repeat([0, 1, 2], 12)
    noise = torch.randn(36, 5, generator=torch.Generator().manual_seed(0))
    x = torch.eye(3, 5)[labels] * 30 + noise
    points = project(x, "tsne")
    distance = np.linalg.norm(points[:, None] - points[None], axis=2) + np.eye(36) * 1e9
    assert np.array_equal(labels[distance.argmin(1)], labels)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_a_few_images_are_enough(count, method):
    x = torch.randn(count, 7, generator=torch.Generator().manual_seed(0))
    points = project(x, method)
    assert points.shape == (count, 2)
    assert np.isfinite(points).all()
    assert len(np.unique(points.round(6), axis=0)) == count
    similarities, indices = neighbours(x)
    assert similarities.shape == indices.shape == (count, count - 1)


def test_umap_says_what_to_install():
    try:
        import umap  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="pip install umap-learn"):
            project(torch.randn(9, 3), "umap")


def test_neighbours_leave_out_the_image_itself():
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    x[7] = x[3]
    similarities, indices = neighbours(x)
    cosine = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=2)
    cosine.fill_diagonal_(-2)
    assert torch.allclose(similarities, cosine.topk(8).values, atol=1e-5)
    assert indices.shape == (30, 8)
    assert (indices != torch.arange(30)[:, None]).all()
    assert (indices[3, 0], indices[7, 0]) == (7, 3)
    # Nothing but duplicates.
    _, indices = neighbours(torch.ones(12, 2))
    assert (indices != torch.arange(12)[:, None]).all()


def test_thumbnails_and_pictures_of_classes(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (9, 16, 16, 3), dtype=np.uint8)
    normal = Augmentation(size=16, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    thumbs = thumbnails(ArraySource(images), normal, 16)
    assert np.array_equal(thumbs, images)
    indices = torch.arange(9).roll(-1)[:, None]
    labels, classes, queries = np.arange(9) % 3, ("a", "b", "c"), np.array([0, 4])
    path = tmp_path / "neighbours.png"
    plot_neighbours(thumbs, torch.rand(9, 1), indices, labels, classes, queries, path)
    assert min(Image.open(path).size) > 200
    # Of three points the tenth nearest is the farther one: of 5, 4 and 100, image 0's at 5.
    points = np.array([[5, 0], [0, 0], [0, 0], [4, 0], [0, 0], [0, 0], [100, 0], [0, 0], [0, 0]])
    pictures = class_pictures(ArraySource(images), points, labels, normal)
    assert list(pictures) == [0, 1, 2]
    assert np.array_equal(pictures[0][::4, ::4].shape, (16, 16, 3))
    wanted = np.asarray(Image.fromarray(images[0]).resize((64, 64), Image.Resampling.LANCZOS))
    assert np.array_equal(pictures[0], wanted)
    path = tmp_path / "embedding.png"
    plot_embedding(points, labels, classes, path, "title", pictures)
    assert min(Image.open(path).size) > 200


def test_a_class_in_two_crowds_is_named_within_one():
    rng = np.random.default_rng(0)
    crowds = [rng.normal(0, 0.1, (40, 2)), rng.normal(10, 0.1, (60, 2))]
    points = np.concatenate(crowds)
    row, absent = named_points(points, np.zeros(100, int), ("garment", "no image"))
    assert min(np.linalg.norm(points[row] - center) for center in (0, 10)) < 0.5
    assert absent is None
    assert named_points(points[:1], np.zeros(1, int), ("garment",)) == [0]


def test_names_of_classes_in_one_crowd_do_not_cover_each_other():
    rng = np.random.default_rng(0)
    points = rng.normal(0, 1, (300, 2))
    classes = ("ankle-boot", "pullover", "t-shirt")
    rows = named_points(points, np.arange(300) % 3, classes)
    assert [row % 3 for row in rows] == [0, 1, 2]
    extent = np.ptp(points, axis=0)
    for a in range(3):
        for b in range(a):
            away = np.abs(points[rows[a]] - points[rows[b]]) / extent
            assert away[0] > 0.016 * 8 or away[1] > 0.032
    # Nowhere else to go: the names share their place.
    assert named_points(np.zeros((2, 2)), np.arange(2), ("a", "b")) == [0, 1]


# Machado, Oliveira and Fernandes (2009): what people without one kind of cones see, linear RGB.
BLINDNESS = {
    "protanopia": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
    "deuteranopia": [
        [0.3673, 0.8606, -0.2280],
        [0.2801, 0.6725, 0.0474],
        [-0.0118, 0.0429, 0.9689],
    ],
    "tritanopia": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9309, 0.1476], [0.0047, 0.6914, 0.3039]],
}


@pytest.mark.parametrize("kind", BLINDNESS)
def test_colour_blind_people_can_tell_classes_apart(kind):
    """By marker, or by a colour at least 30 of 441 away; 20 classes are also named in the plot."""
    styles = [class_style(label) for label in range(35)]
    assert len(set(styles)) == 35
    colours = np.array([[int(s.colour[i : i + 2], 16) for i in (1, 3, 5)] for s in styles])
    seen = ((colours / 255) ** 2.2 @ np.array(BLINDNESS[kind]).T).clip(0, 1) ** (1 / 2.2) * 255
    for a in range(35):
        for b in range(a):
            same = styles[a].marker == styles[b].marker
            assert not same or np.linalg.norm(seen[a] - seen[b]) > 30, (styles[a], styles[b])


def test_the_loss_is_drawn(tmp_path):
    rows = [{"step": i, "loss": 4.0, "contrastive_accuracy": 0.5} for i in (20, 40)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_loss(tmp_path / "m.jsonl", tmp_path / "loss.png", 256, 6.24)
    assert min(Image.open(tmp_path / "loss.png").size) > 300


def test_names_of_images_have_no_private_folders():
    assert short_name("/home/me/photos/dog/1.jpg") == "dog/1.jpg"
    assert short_name("image 3 of the array") == "image 3 of the array"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The command's page of 40 images with names that HTML must not take for its own."""
    pytest.importorskip("nvidia.dali", reason="decoding needs DALI (Linux)")
    from simclr_fast.utils.checkpoint import save_encoder

    home = tmp_path_factory.mktemp("embed")
    rng = np.random.default_rng(0)
    for i in range(40):
        folder = home / "images" / ("a<b>&" if i % 2 else "</script>".replace("/", "∕"))
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 100, (16, 16, 3), dtype=np.uint8)
        pixels[..., i % 2] += 120
        Image.fromarray(pixels).save(folder / f"{i}.png")
    torch.manual_seed(0)
    encoder, _ = build_encoder("resnet10", width=0.125, image_size=16)
    about = about_encoder("resnet10", 0.125, None, Augmentation(size=16))
    save_encoder(home / "encoder.safetensors", encoder, about)
    arguments = ["--encoder", str(home / "encoder.safetensors"), "--data", str(home / "images")]
    assert run(["eval", "embed", *arguments, "--thumb", "32", "--cache", str(home / "c")]) == 0
    return home / "eval" / "embed.html"


def test_the_command_writes_pictures_and_page(page):
    for name in ("embed-pca.png", "embed-tsne.png", "neighbours.png"):
        assert min(Image.open(page.parent / name).size) > 300
    text = page.read_text()
    assert not re.search(r"""(src|href)=|@import|url\((?!\$)""", text)
    assert text.count("</script>") == 2
    assert str(page.parent.parent) not in text
    results = json.loads((page.parent / "embed.json").read_text())["results"]
    assert 0.5 < results["neighbours_of_the_same_class"] <= 1


def test_the_command_shows_a_single_image(page, tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    Image.new("RGB", (20, 20), "red").save(folder / "a.png")
    arguments = ["--encoder", str(page.parents[1] / "encoder.safetensors"), "--data", str(folder)]
    assert run(["eval", "embed", *arguments, "--out", str(tmp_path), "--cache", str(tmp_path)]) == 0
    assert (tmp_path / "embed.html").exists()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (Debian: chromium)")
def test_the_page_works_in_a_browser(page, tmp_path):
    with browser(tmp_path / "profile") as tab:
        tab.open(page)
        assert tab.js("document.title") == "40 images of images by resnet10"
        assert tab.js("document.querySelectorAll('#near figure').length") == 8
        # Every neighbour's picture is drawn from the page's own data.
        near = tab.js("[...document.querySelectorAll('#near button')].map((b) => +b.dataset.image)")
        assert near == tab.js("data.neighbours[0]")
        assert tab.js("document.querySelector('#class').textContent") in ("a<b>&", "<∕script>")
        # A click on a neighbour makes it the query.
        x, y = tab.js(
            "(() => { const r = document.querySelector('#near button').getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        tab.click(x, y)
        assert tab.js("selected") == near[0]
        assert tab.js("location.hash") == f"#{near[0]}"
        # A click on a point of the plot selects it.
        x, y = tab.js(
            "(() => { const r = document.querySelector('#plot').getBoundingClientRect();"
            "return [r.x + places[5][0], r.y + places[5][1]]; })()"
        )
        assert tab.js("document.querySelector('#hover').hidden") is True
        tab.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        assert tab.js("+document.querySelector('#hover').dataset.image") == 5
        assert tab.js("document.querySelector('#hover').offsetWidth") >= 90
        tab.click(x, y)
        assert tab.js("selected") == 5
        tab.key("ArrowRight")
        assert tab.js("selected") == 6
        # A class taken out is no longer drawn.
        painted = (
            "(() => { const c = document.querySelector('#plot'); const d = c.getContext('2d')"
            ".getImageData(0, 0, c.width, c.height).data; let n = 0;"
            "for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; })()"
        )
        before = tab.js(painted)
        tab.js("document.querySelectorAll('#classes button')[0].click()")
        assert tab.js(painted) < 0.8 * before
        tab.js("const m = document.querySelector('#method'); m.value = 'tsne'; m.onchange()")
        assert tab.js("method") == "tsne"
        tab.screenshot(tmp_path / "page.png")
        shot = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
        assert len(np.unique(shot.reshape(-1, 3), axis=0)) > 200
        assert tab.problems == []
        assert [url for url in tab.requests if not url.startswith(("file:", "data:"))] == []
