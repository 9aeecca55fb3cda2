"""The page "What is normal": its runs, their warnings, its table and its picture."""

import json
from pathlib import Path

import pytest
from PIL import Image

from simclr_fast.benchmarks import normal_runs
from simclr_fast.commands.pretrain import Pretrain
from simclr_fast.commands.run_options import parse_run

ROOT = Path(__file__).parents[2]
RUNS = json.loads((normal_runs.RESULTS / normal_runs.FILE).read_text())
WARNINGS = {
    "good": [],
    "stalled": ["is still near its chance level"],
    "collapsed": ["the embeddings have collapsed"],
    "no-colour": [],
    "starved": ["of the time is spent waiting for data"],
}


@pytest.mark.parametrize("name", WARNINGS)
def test_each_run_was_warned_of_what_is_wrong(name):
    run = RUNS[name]
    # A busy machine makes the other runs wait as well.
    waits = WARNINGS["starved"][0]
    said = [m for m in run["warnings"] if name == "starved" or waits not in m]
    assert len(said) == len(WARNINGS[name]), said
    for message, part in zip(said, WARNINGS[name], strict=True):
        assert part in message
    assert run["core_seconds"] < 60
    assert {"when", "cpu", "commit", "command", "versions"} <= set(run["environment"])


def test_the_good_run_learns_and_the_one_without_colour_distortion_does_not():
    """Although its curves are better."""
    good, bad = RUNS["good"], RUNS["no-colour"]
    assert good["knn"] > 0.5
    assert bad["knn"] < 0.2
    assert bad["rows"][-1]["loss"] < good["rows"][-1]["loss"]
    assert bad["rows"][-1]["contrastive_accuracy"] > 0.9


@pytest.mark.parametrize("name", WARNINGS)
def test_the_options_in_the_table_make_the_run(name):
    """With the preset of the demo, also for the folder of photos."""
    config, options = normal_runs.config_of(name, normal_runs._STEPS)
    assert RUNS[name]["options"] == options
    arguments = ["--preset", "demo", *options.split(), "--device", "cpu"]
    if name == "starved":
        arguments += ["--log-every", "1"]
        options = options.replace("photos/", "demo-held-out")
    parsed = parse_run(Pretrain, arguments, "pretrain").config
    assert parsed == normal_runs.replace(config, data=parsed.data)


def test_the_page_has_the_table_of_the_results():
    page = (ROOT / "docs" / normal_runs.PAGE).read_text()
    assert normal_runs.filled(page, RUNS) == page


def test_the_picture_is_drawn_from_the_results(tmp_path):
    normal_runs.draw(RUNS, tmp_path / "again.png")
    recorded = Image.open(ROOT / "docs" / normal_runs.PICTURE)
    assert Image.open(tmp_path / "again.png").size == recorded.size
