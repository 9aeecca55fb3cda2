"""--log: the numbers and pictures of a run in the loggers' own files, without network."""

import csv
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import TINY

from simclr_fast.training import loggers
from simclr_fast.training.metrics import Metrics
from simclr_fast.training.pretrain import pretrain


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def config(tmp_path):
    """A run of 3 steps with a checkpoint after the second, and a probe."""
    return replace(
        TINY, data="demo", out=tmp_path / "run", steps=3, checkpoint_every=2, probe_every=2
    )


def tables(out):
    with (out / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_the_numbers_of_metrics_jsonl_and_of_the_probe_also_after_a_resume(config):
    out = pretrain(replace(config, log=("csv",)))
    rows = tables(out)
    numbers = [row for row in rows if row["loss"]]
    for row, line in zip(numbers, lines(out), strict=True):
        assert {k: float(v) for k, v in row.items() if v and not k.startswith("probe")} == line
    assert [row["step"] for row in rows if row["probe_linear"]] == ["2"]
    pretrain(replace(config, log=("csv",), steps=4, resume=True))
    assert [row["step"] for row in tables(out) if row["loss"]] == ["1", "2", "3", "4"]


def test_tensorboard_holds_numbers_and_pictures(config):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", exc_type=ImportError
    )
    out = pretrain(replace(config, log=("tensorboard",)))
    pretrain(replace(config, log=("tensorboard",), steps=4, resume=True))
    events = accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    found = events.Scalars("loss")
    assert [e.step for e in found] == [1, 2, 3, 4]
    expected = [line["loss"] for line in lines(out)]
    assert [e.value for e in found] == pytest.approx(expected, rel=1e-6)
    assert {"lr", "rank_h", "probe_linear"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["views", "features"]
    assert [e.step for e in events.Images("views")] == [2, 3, 4]
    views = events.Images("views")[0]
    assert (views.width, views.height) == (2 * 16, 8 * 16)


class StandIn:
    """Records what a logger's library is told, with its signatures."""

    def __init__(self):
        self.told, self.finished = [], 0

    def init(self, *, project, name, config, resume, dir=None, id=None):
        self.options = {"project": project, "name": name, "resume": resume, "id": id}
        assert config["model"] == "resnet10"
        return self

    def log(self, values, step):
        self.told.append((step, values))

    def Image(self, image):
        assert image.dtype == np.uint8
        assert image.shape[2] == 3
        return ("image", image.shape)

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_logger_gets_numbers_pictures_and_the_end(config, monkeypatch, name):
    library = StandIn()
    monkeypatch.setattr(loggers, "need", lambda module: library)
    monkeypatch.setattr(loggers, "require", lambda modules: None)
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "mine")
    out = pretrain(replace(config, log=(name,)))
    first = library.options
    assert (first["project"], first["name"]) == ("mine", "run")
    losses = [values["loss"] for _, values in library.told if "loss" in values]
    assert losses == [line["loss"] for line in lines(out)]
    pictures = {(s, k) for s, values in library.told for k in values if k in ("views", "features")}
    assert pictures == {(step, kind) for step in (2, 3) for kind in ("views", "features")}
    assert library.finished == 1
    pretrain(replace(config, log=(name,), steps=4, resume=True))
    # The same chart goes on.
    assert library.options["id"] == first["id"]
    assert library.options["resume"] == "allow"


def test_wandb_itself_offline(config, monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = pretrain(replace(config, steps=1, probe_every=None, log=("wandb",)))
    assert list((out / "wandb").glob("offline-run-*/run-*.wandb"))


def test_all_missing_libraries_are_named_before_the_run_starts(config, monkeypatch):
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"wandb .*; trackio .* are missing: pip install wandb t"):
        pretrain(replace(config, log=("wandb", "trackio")))
    assert not config.out.exists()


def test_metrics_jsonl_is_written_and_closed_when_a_logger_fails(config, monkeypatch):
    class Failing(loggers.Csv):
        def numbers(self, step, values):
            raise OSError("disk full")

    monkeypatch.setattr(loggers, "Csv", Failing)
    with pytest.raises(OSError, match="disk full"):
        pretrain(replace(config, log=("csv",)))
    assert len(lines(config.out)) == 1


def test_a_picture_of_normalised_views():
    generator = torch.Generator().manual_seed(0)
    shown = torch.rand(2, 3, 4, 4, generator=generator)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    tensors = [torch.tensor(values).view(3, 1, 1) for values in (mean, std)]
    view = (shown - tensors[0]) / tensors[1]
    picture = loggers.views_picture([view, view.flip(3)], mean, std)
    assert picture.shape == (8, 8, 3)
    expected = (shown[1] * 255).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(picture[4:, :4], expected)
    np.testing.assert_array_equal(picture[4:, 4:], expected[:, ::-1])
    for channels in (1, 2, 5):
        many = loggers.views_picture([torch.rand(9, channels, 4, 4)] * 2, (), ())
        assert many.shape == (8 * 4, 8, 3)


def test_a_picture_of_features_needs_two_directions():
    h = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    picture = loggers.embedding_picture(h, 6)
    assert picture.ndim == 3
    assert picture.std() > 0
    assert loggers.embedding_picture(torch.ones(12, 5), 6) is None
    assert loggers.embedding_picture(torch.full((12, 5), torch.nan), 6) is None


def test_without_loggers_no_picture_is_made(config, monkeypatch, tmp_path):
    monkeypatch.setattr("simclr_fast.training.metrics.views_picture", None)
    with Metrics("pretrain", tmp_path / "m.jsonl", replace(config, log=("csv",)), 0, 3) as metrics:
        metrics.pictures(1, [torch.zeros(2, 3, 4, 4)])
