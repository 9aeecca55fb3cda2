"""The charts of the README, drawn from recorded results; missing results are reported."""

import json

import pytest
from PIL import Image

from simclr_fast.benchmarks import charts, harness, tables

ENVIRONMENT = {
    "when": "2026-01-02T03:04:05",
    "cpu": "a CPU",
    "threads": 2,
    "command": "bench",
    "versions": {"torch": "2.10"},
}


def table(title, column, base, **times):
    times = {name: value if isinstance(value, list) else [value] for name, value in times.items()}
    return harness.Table(title, base, {column: times}, floors=("floor",)).to_json()


def record(folder, *found):
    """Record tables of the loss, on the machine that the documents show."""
    content = {"loss": {"environment": ENVIRONMENT, "tables": found}}
    (folder / f"{tables.CPU}.json").write_text(json.dumps(content))


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    from matplotlib.figure import Figure

    saved = []
    real = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (saved.append(self), real(self, *a, **k))
    )
    return saved


@pytest.fixture
def results(tmp_path):
    peers = {f"peer{i}": 10.0 + i for i in range(6)}
    one = table("NT-Xent, N = 256, D = 128", "forward+backward", "simclr_fast", simclr_fast=2.0)
    two = table(
        "NT-Xent, N = 1024, D = 128", "forward+backward", "simclr_fast", simclr_fast=8.0,
        lightly=90.0, floor=1.0, **peers,
    )  # fmt: skip
    record(tmp_path, one, two)
    row = {"model": "resnet50", "width": 1, "gpus": 1, "gpu": "A card", "gpu_gb": 24, "host_gb": 8}
    row |= {"plain_bytes": 700e9, "device_bytes": 22e9, "host_bytes": 8e9, "view_bytes": 5e9}
    row |= {"compute": 1.4, "seconds": 9.0, "bus_bytes": 80e9, "memory": "lockstep"}
    options = {"batch_size": 4096, "image_size": 224, "precision": "bfloat16"}
    rows = [row, row | {"host_gb": 0, "host_bytes": 0, "view_bytes": 0}, row | {"width": 2}]
    plan = {"options": options, "rows": rows}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    return tmp_path


def test_speed_shows_ours_lightly_and_the_fastest(results, monkeypatch):
    drawn = []
    real = harness.draw_bars
    monkeypatch.setattr(harness, "draw_bars", lambda *given: (drawn.append(given), real(*given)))
    charts.speed(results, results / "speed.png")
    (([panel], _, heading, footer),) = drawn
    # The table of the largest number of pairs, without its floor.
    assert panel.title == "loss, forward and backward, N = 1024 (2 threads)"
    assert list(panel.values) == ["simclr_fast", "peer0", "peer1", "peer2", "lightly"]
    assert panel.values["lightly"] == 90
    assert "2026-01-02" in footer
    assert "shorter is better" in heading
    assert min(Image.open(results / "speed.png").size) > 200


def test_the_memory_chart_is_drawn(results):
    charts.memory(results / "plan.json", results / "memory.png")
    assert min(Image.open(results / "memory.png").size) > 200


def test_charts_and_tables_round_alike_and_show_the_same_ratio(tmp_path, figures):
    """The ratio of the medians is 15, the median of the ratios 14; only the latter is shown."""
    slow = table(
        "NT-Xent, N = 1024, D = 128", "forward+backward", "simclr_fast",
        simclr_fast=[100.0, 113.3, 120.0], lightly=[1700.4, 1586.2, 1680.0],
    )  # fmt: skip
    record(tmp_path, slow)
    charts.speed(tmp_path, tmp_path / "speed.png")
    (axis,) = figures[0].axes
    assert [text.get_text() for text in axis.texts] == ["113 ms", "1,680 ms  (14×)"]
    assert "| **113 ms** | 1,680 ms, 14× (lightly) |" in tables.summary(tmp_path)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0304, "0.030"),
        (0.19, "0.19"),
        (1.69, "1.7"),
        (14.5, "14"),
        (117.4, "117"),
        (1691, "1,691"),
    ],
)
def test_numbers_are_rounded_for_documents(value, shown):
    assert harness.number(value) == shown


def test_missing_results_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="no results of simclr-fast bench"):
        charts.speed(tmp_path, tmp_path / "speed.png")


def test_bars_begin_at_zero_and_are_as_long_as_their_times(tmp_path, figures):
    values = {"simclr_fast": 2.0, "other": 9.0, "floor": 1.0}
    ratios = {"simclr_fast": 1.0, "other": 4.5, "floor": 0.5}
    panel = harness.Panel("t", values, ratios, "simclr_fast", ("floor",))
    harness.draw_bars([panel], tmp_path / "a.png")
    (axis,) = figures[0].axes
    assert axis.get_xscale() == "linear"
    assert axis.get_xlim()[0] == 0
    assert [bar.get_width() for bar in axis.patches] == [2, 9, 1]
    assert [text.get_text() for text in axis.texts] == ["2 ms", "9 ms  (4.5×)", "1 ms  (0.5×)"]
