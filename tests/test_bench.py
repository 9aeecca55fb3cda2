"""The benchmark harness: what its numbers mean, and that a wrong result is not timed."""

import json
import time

import pytest

from simclr_fast import selfcheck
from simclr_fast.benchmarks import bench_lars, harness
from simclr_fast.cli import run


def test_measure_takes_turns_after_warming_up():
    calls = []
    steps = {"a": lambda: calls.append("a"), "b": lambda: (calls.append("b"), time.sleep(0.01))}
    times = harness.measure(steps, 3)
    assert calls == ["a", "a", "b", "b", *"ababab"]
    assert [len(times[name]) for name in "ab"] == [3, 3]
    assert min(times["b"]) >= 10


def test_ratios_are_medians_of_each_rounds_ratio():
    """So a round in which everything was slow changes nothing."""
    table = harness.Table(
        "t", "ours", {"step": {"ours": [1.0, 10.0, 2.0], "peer": [2.0, 30.0, 6.0]}}, floors=()
    )
    assert table.ratio("step", "peer") == 3
    assert "| peer | 6 | 3.00 |" in table.text()
    assert table.names() == ["ours", "peer"]


def test_lars_side_by_side_from_the_command_line(tmp_path, capsys, monkeypatch):
    pytest.importorskip("lightly")
    monkeypatch.setattr(bench_lars, "shapes_of", lambda model: [(30, 40), (50,)] * 5)
    command = ["bench", "lars", "--quick", "--rounds", "1", "--out", str(tmp_path)]
    assert run([*command, "--device", "cpu", "--threads", "1"]) == 0
    assert "| lightly |" in capsys.readouterr().out
    content = json.loads((tmp_path / "lars.json").read_text())
    assert content["environment"]["versions"]["torch"]
    assert content["environment"]["threads"] == 1
    assert content["tables"][0]["ratios"]["step"]["simclr_fast"] == 1
    assert (tmp_path / "lars.png").stat().st_size > 5000


def test_what_is_wrong_is_not_timed(monkeypatch, capsys, tmp_path):
    right = selfcheck.nt_xent_loss
    monkeypatch.setattr(selfcheck, "nt_xent_loss", lambda z, **k: 1.01 * right(z, **k))
    assert run(["bench", "loss", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "loss is not timed, as its result is wrong: FAIL NT-Xent" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
