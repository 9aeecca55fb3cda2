"""The charts of the README: drawn from recorded results, and from those that are there alone."""

import json

import pytest
from PIL import Image

from simclr_fast.benchmarks import charts, harness


def table(title, column, base, **times):
    found = harness.Table(title, base, {column: {k: [v, v] for k, v in times.items()}})
    return found.to_json() | {"floors": ["floor"]}


@pytest.fixture
def results(tmp_path):
    where = {"when": "2026-01-02T03:04:05", "cpu": "a CPU", "threads": 2, "command": "bench"}
    where["versions"] = {"torch": "2.10"}
    peers = {f"peer{i}": 10.0 + i for i in range(6)}
    one = table("NT-Xent, N = 256, D = 128", "forward+backward", "simclr_fast", simclr_fast=2.0)
    two = table(
        "NT-Xent, N = 1024, D = 128", "forward+backward", "simclr_fast", simclr_fast=8.0,
        lightly=90.0, floor=1.0, **peers,
    )  # fmt: skip
    content = {"environment": where, "tables": [one, two]}
    (tmp_path / "loss.json").write_text(json.dumps(content))
    rows = [
        {"memory": "plain", "keep_every": 1, "device_bytes": 700e9, "exact_gradient": True},
        {"memory": "lockstep", "keep_every": 1, "device_bytes": 100e9, "exact_gradient": True},
        {"memory": "lockstep", "keep_every": 1, "device_bytes": 99e9, "exact_gradient": True},
        {"memory": "lockstep", "keep_every": 2, "device_bytes": 70e9, "exact_gradient": True},
        {"memory": "replay", "keep_every": 1, "exact_gradient": True, "refusal": "no"},
        {"memory": "grad-cache", "keep_every": 1, "device_bytes": 9e9, "exact_gradient": False},
    ]
    options = {"batch_size": 4096, "gpus": 1, "model": "resnet50", "image_size": 224}
    plan = {
        "options": options | {"precision": "bfloat16"},
        "rows": [row | {"offload_bytes": 0} for row in rows],
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    return tmp_path


def test_speed_shows_ours_lightly_and_the_fastest(results, monkeypatch):
    drawn = []
    real = harness.draw_bars
    monkeypatch.setattr(harness, "draw_bars", lambda *given: (drawn.append(given), real(*given)))
    charts.speed(results, results / "speed.png")
    (([panel], _, heading, footer),) = drawn
    # Of the largest number of pairs; the floor is no library.
    assert panel.title == "loss, forward and backward, N = 1024"
    assert list(panel.values) == ["simclr_fast", "peer0", "peer1", "peer2", "lightly"]
    assert panel.values["lightly"] == 90
    assert "2026-01-02" in footer
    assert "shorter is better" in heading
    assert min(Image.open(results / "speed.png").size) > 200


def test_memory_of_each_mode(results):
    charts.memory(results / "plan.json", results / "memory.png")
    assert min(Image.open(results / "memory.png").size) > 200


def test_no_results_are_said(tmp_path):
    with pytest.raises(ValueError, match="no results of simclr-fast bench"):
        charts.speed(tmp_path, tmp_path / "speed.png")


def test_bars_begin_at_zero_and_are_as_long_as_their_times(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    kept = []
    real = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (kept.append(self), real(self, *a, **k))
    )
    panel = harness.Panel(
        "t", {"simclr_fast": 2.0, "other": 9.0, "floor": 1.0}, "simclr_fast", ("floor",)
    )
    harness.draw_bars([panel], tmp_path / "a.png")
    (axis,) = kept[0].axes
    assert axis.get_xscale() == "linear"
    assert axis.get_xlim()[0] == 0
    assert [bar.get_width() for bar in axis.patches] == [2, 9, 1]
    assert [text.get_text() for text in axis.texts] == ["2 ms", "9 ms  (4.5×)", "1 ms  (0.5×)"]
