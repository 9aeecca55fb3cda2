"""report.html: what it holds, and that it works in a browser without a network."""

import json
import math
import re

import numpy as np
import pytest
import torch
from browser import BROWSER, browser
from PIL import Image

from simclr_fast.evaluation import embed
from simclr_fast.training.page import Pictures, write_machine, write_report


@pytest.fixture
def runs(tmp_path):
    """Two finished runs' folders, which differ in the learning rate."""
    made = []
    for name, lr in (("one", 0.1), ("two", 0.2)):
        folder = tmp_path / name
        folder.mkdir()
        config = {"lr": lr, "data": "a </script> b", "augmentation": {"size": 32, "mean": None}}
        (folder / "config.json").write_text(json.dumps(config))
        rows = [
            {"step": s, "loss": 6 - lr * s / 50, "chance_loss": math.log(511), "rank_h": math.nan}
            for s in range(0, 1001)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        probe = {"pretrained encoder": {"value": 0.5 + lr, "low": 0.4, "high": 0.8, "n": 10}}
        (folder / "probe.json").write_text(json.dumps(probe))
        write_machine(folder, torch.device("cpu"), 1)
        made.append(folder)
    return made


def data_of(page):
    found = re.search(r'<script type="application/json" id="data">(.*)</script>', page.read_text())
    return json.loads(found[1])


def test_the_page_holds_the_run(runs, tmp_path):
    page = tmp_path / "page.html"
    write_report(runs[:1], page, Pictures("<p>x</p>", b"jpeg", [[3, 1], [0, 2]], ["a", "b"]))
    data = data_of(page)
    (run,) = data["runs"]
    assert run["name"] == "one"
    # 1,001 lines are thinned out, the last one stays.
    assert len(run["rows"]) == 501
    assert run["rows"][-1]["step"] == 1000
    assert "rank_h" not in run["rows"][0]
    assert run["settings"]["augmentation.size"] == "32"
    assert run["settings"]["augmentation.mean"] == "none"
    assert run["machine"]["torch"] == torch.__version__
    assert data["confusion"] == {"classes": ["a", "b"], "counts": [[3, 1], [0, 2]]}
    assert data["embedding"] == "<p>x</p>"
    text = page.read_text()
    assert text.count("</script>") == 2
    # Nothing is fetched from anywhere.
    assert not re.search(r"""(src|href)=["']|@import|url\(""", text)


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} is not the output folder of a run"):
        write_report([tmp_path], tmp_path / "page.html")


def test_too_many_classes_make_no_matrix(runs, tmp_path):
    page = tmp_path / "page.html"
    write_report(runs[:1], page, Pictures(None, None, np.eye(41, dtype=int), list(range(41))))
    assert data_of(page)["confusion"] is None


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (Debian: chromium)")
def test_the_page_works_in_a_browser(runs, tmp_path):
    rng = np.random.default_rng(0)
    points, thumbs = rng.random((12, 2)), rng.integers(0, 255, (12, 16, 16, 3), dtype=np.uint8)
    labels, names = np.arange(12) % 2, [f"{i}.png" for i in range(12)]
    near = embed.neighbours(torch.rand(12, 4, generator=torch.Generator().manual_seed(0)))
    frame = embed.page("12 images", {"tsne": points}, thumbs, labels, ("a", "b"), names, *near)
    packed = tmp_path / "views.jpg"
    Image.fromarray(thumbs[0]).save(packed)
    pictures = Pictures(frame, packed.read_bytes(), [[5, 1], [0, 6]], ["a", "b"])
    write_report(runs[:1], tmp_path / "single.html", pictures)
    write_report(runs, tmp_path / "both.html")
    visible = "[...document.querySelectorAll('section:not([hidden]) h2')].map((h) => h.textContent)"
    with browser(tmp_path / "profile") as tab:
        tab.open(tmp_path / "single.html")
        assert tab.js("document.querySelector('h1').textContent") == "Report of one"
        assert tab.js(visible) == [
            *("Linear probe", "Curves", "Confusion of classes", "Test images by their features"),
            *("Views", "Settings", "Machine"),
        ]
        assert tab.js("document.querySelectorAll('#curves polyline').length") == 1
        inside = "document.querySelector('iframe').contentDocument"
        assert tab.js(f"{inside}.querySelectorAll('#near figure').length") == 8
        # A click on a neighbour works inside of the frame, too.
        tab.js(f"{inside}.querySelector('#near button').click()")
        assert tab.js("document.querySelector('#views').naturalWidth") == 16
        assert tab.js(
            "[...document.querySelectorAll('#confusion td')].map((c) => c.textContent)"
        ) == [*("83", "17", "", "100")]
        tab.open(tmp_path / "both.html")
        assert tab.js("document.querySelectorAll('#curves polyline').length") == 2
        assert "Confusion of classes" not in tab.js(visible)
        # The first table of the settings: where the runs differ.
        rows = "[...document.querySelector('#settings table').tBodies[0].rows]"
        assert tab.js(f"{rows}.map((r) => r.textContent)") == ["lr0.10.2"]
        assert tab.problems == []
        assert [
            url for url in tab.requests if not url.startswith(("file:", "data:", "about:"))
        ] == []
