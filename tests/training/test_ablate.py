"""The grid, its cells' runs, its results over interruptions, its picture."""

import json
import os
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import TINY

from simclr_fast.augment.params import Augmentation
from simclr_fast.commands.cli import run
from simclr_fast.data.sources import ArraySource
from simclr_fast.training import ablate as module
from simclr_fast.training import pretrain as train
from simclr_fast.training.ablate import (
    Cell,
    ablate,
    cell_config,
    grid,
    mean_top1,
    only,
    plot_ablation,
)
from simclr_fast.training.config import demo
from simclr_fast.utils.locks import locked


@pytest.fixture
def base(monkeypatch):
    def source(config, split="train"):
        rng = np.random.default_rng(len(split))
        images = rng.integers(0, 255, (24, 16, 16, 3), dtype=np.uint8)
        return ArraySource(images, np.arange(24) % 3)

    monkeypatch.setattr(module, "images_to_evaluate", source)
    monkeypatch.setattr(train, "open_data", source)
    return replace(TINY, data="noise", steps=2, warmup_epochs=0)


def test_the_grid_has_every_combination():
    base = demo()
    assert grid(base) == [Cell("recipe", 256, 0.2, "nonlinear", 0)]
    names = [cell.augmentation for cell in grid(base, module.OPERATIONS)]
    assert len(names) == len(set(names)) == 6 + 15
    assert {"crop", "flip", "crop+colour", "blur+flip"} < set(names)
    cells = grid(base, (), [128, 256], [0.1, 0.5, 1], ["linear", "none"], [0, 1])
    assert len(set(map(str, cells))) == 2 * 3 * 2 * 2
    with pytest.raises(ValueError, match=r"operations must be among crop.*; got sobel"):
        grid(base, ["crop", "sobel"])


def test_operations_alone_keep_the_recipes_chances():
    recipe = Augmentation(p_flip=0.3, p_blur=0)
    none = only(recipe, [])
    assert (none.crop, none.p_flip, none.p_jitter, none.p_gray, none.p_blur) == (False, 0, 0, 0, 0)
    some = only(recipe, ["flip", "blur"])
    assert (some.crop, some.p_flip, some.p_jitter, some.p_gray, some.p_blur) == (
        (False, 0.3, 0, 0, 0.5)
    )
    for colour, chances in (("colour", (0.8, 0.2)), ("jitter", (0.8, 0)), ("gray", (0, 0.2))):
        some = only(recipe, ["crop", colour])
        assert (some.crop, some.p_flip, some.p_jitter, some.p_gray) == (True, 0, *chances)


def test_another_batch_size_sees_as_many_images(tmp_path):
    base = replace(demo(), steps=1000, lr=2.0)
    (cell,) = grid(base, (), [64], [0.1], ["linear"], [3])
    config = cell_config(base, cell, tmp_path)
    assert (config.batch_size, config.steps, config.lr) == (64, 4000, 0.5)
    assert (config.temperature, config.projector, config.seed) == (0.1, "linear", 3)
    assert config.augmentation == base.augmentation
    assert cell_config(replace(base, lr_rule="sqrt"), cell, tmp_path).lr == 1


def test_finished_cells_are_never_run_again(base, tmp_path, monkeypatch):
    ran = []

    def noted(config):
        ran.append(config.out.name)
        return train.pretrain(config)

    monkeypatch.setattr(module, "pretrain", noted)
    folder = tmp_path / "ablation"
    cells = grid(base, ["crop", "colour"], seeds=[0, 1])
    assert len(ablate(base, cells[:2], folder)) == 2
    # A run that ended before it was probed is not trained again.
    train.pretrain(cell_config(base, cells[2], folder / "cells" / str(cells[2])))
    rows = ablate(base, cells, folder, max_cells=2)
    assert ran == [str(cell) for cell in (cells[0], cells[1], cells[3])]
    rows = ablate(base, cells, folder)
    assert ran == [str(cell) for cell in (*cells[:2], *cells[3:])]
    assert [row["cell"] for row in rows] == [str(cell) for cell in cells]
    written = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert written == rows
    for row in rows:
        assert row["low"] <= row["top1"] <= row["high"]
        assert (row["steps"], row["test_images"]) == (2, 24)
    assert not list(folder.glob("cells/*/checkpoints"))
    with pytest.raises(ValueError, match=r"of other settings \(steps, lr differ\)"):
        ablate(replace(base, steps=3, lr=1.0), cells, folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    with pytest.raises(FileExistsError, match="not of an ablation"):
        ablate(base, cells, tmp_path / "mine")


def test_memory_is_freed_between_cells(base, tmp_path, monkeypatch):
    """If the allocators kept it, the next cell would choose a slower memory mode."""
    done = []
    real = train.pretrain
    monkeypatch.setattr(module, "pretrain", lambda config: (done.append("run"), real(config)))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("torch"))
    backend = SimpleNamespace(ReleaseUnusedMemory=lambda: done.append("DALI"))
    monkeypatch.setitem(sys.modules, "nvidia.dali", SimpleNamespace(backend=backend))
    ablate(base, grid(base, seeds=[0, 1]), tmp_path / "ablation")
    assert done == ["run", "torch", "DALI"] * 2


def result(augmentation, top1, batch=8, tau=0.5, projector="nonlinear", seed=0):
    cell = Cell(augmentation, batch, tau, projector, seed)
    return {**vars(cell), "top1": top1}


def drawn(rows, path, monkeypatch):
    seen = []
    real = module.plot_heat_maps
    monkeypatch.setattr(module, "plot_heat_maps", lambda *given: (seen.append(given), real(*given)))
    plot_ablation(rows, path, 0.25)
    assert min(Image.open(path).size) > 100
    (([*maps], _, heading, untrained),) = seen
    assert untrained == 25
    return maps, heading


def test_pairs_of_operations_make_a_matrix(tmp_path, monkeypatch):
    rows = [
        result("crop", 0.2),
        result("crop", 0.4, seed=1),
        result("colour", 0.1),
        result("crop+colour", 0.7),
        result("gray", 0.5),
    ]
    assert mean_top1(rows)["crop", 8, 0.5, "nonlinear"] == pytest.approx(0.3)
    (table,), heading = drawn(rows, tmp_path / "a.png", monkeypatch)
    nan = np.nan
    expected = [[30, 70, nan, 50], [70, 10, nan, 40], [nan, nan, 50, 50]]
    assert np.allclose(table.values, expected, equal_nan=True)
    assert (table.rows, table.columns[-1]) == (["crop", "colour", "gray"], "average")
    assert (table.row_axis, table.column_axis) == ("first operation", "second operation")
    assert "one on the diagonal" in heading
    assert "mean of 2 seeds" in heading


def test_other_axes_make_a_matrix(tmp_path, monkeypatch):
    rows = [
        result("recipe", batch / 100 + tau / 10, batch, tau)
        for batch in (8, 16)
        for tau in (0.1, 0.5, 1.0)
    ]
    (table,), _ = drawn(rows, tmp_path / "b.png", monkeypatch)
    assert (table.row_axis, table.rows) == ("temperature", ["0.1", "0.5", "1.0"])
    assert (table.column_axis, table.columns) == ("batch size", ["8", "16"])
    assert np.allclose(table.values, [[9, 17], [13, 21], [18, 26]])


def test_sigterm_ends_it_and_the_same_command_goes_on(base, tmp_path, capsys, monkeypatch):
    """In the second step of the second cell, then in the features of that cell."""
    out = tmp_path / "out"
    options = ["--data", "noise", "--model", "resnet10", "--width", "0.125", "--device", "cpu"]
    options += ["--augmentation.size", "16", "--batch-size", "8", "--warmup-epochs", "0"]
    command = ["ablate", "--seeds", "0", "1", "--steps", "3", *options, "--out", str(out)]
    results = out / "results.jsonl"
    losses, loss = [], train.nt_xent_loss
    real = module.features

    def stopped_loss(*given, **options):
        losses.append(1)
        if len(losses) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(*given, **options)

    def stopped_features(*given, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*given, **options)

    monkeypatch.setattr(train, "nt_xent_loss", stopped_loss)
    assert run(command) == 128 + signal.SIGTERM
    with monkeypatch.context() as patch:
        patch.setattr(module, "features", stopped_features)
        assert run(command) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.count("the same command goes on") == 2
    assert len(results.read_text().splitlines()) == 1
    assert len(losses) == 6
    assert run(command) == 0
    assert len(results.read_text().splitlines()) == 2
    assert len(losses) == 6


def test_the_ablate_command_writes_results_and_picture(base, tmp_path, capsys):
    options = ["--data", "noise", "--model", "resnet10", "--width", "0.125", "--device", "cpu"]
    options += ["--augmentation.size", "16", "--batch-size", "8", "--warmup-epochs", "0"]
    out = ["--out", str(tmp_path / "out"), "--steps", "1", "--max-cells", "1"]
    assert run(["ablate", "--temperatures", "0.1", "1", *options, *out]) == 0
    printed = capsys.readouterr().out
    assert "recipe 8 0.1 nonlinear" in printed
    assert str(tmp_path / "out" / "ablation.png") in printed
    assert "untrained encoder" in printed
    assert 0 <= json.loads((tmp_path / "out" / "untrained.json").read_text())["top1"] <= 1
    assert run(["ablate", "--help"]) == 0
    assert "--operations" in capsys.readouterr().out


def test_two_processes_do_not_share_a_folder(base, tmp_path):
    cells = grid(base)
    assert ablate(base, cells, tmp_path, max_cells=0) == []
    with (
        locked(tmp_path / ".lock"),
        pytest.raises(BlockingIOError, match="another process runs the ablation in"),
    ):
        ablate(base, cells, tmp_path)
    assert len(ablate(base, cells, tmp_path)) == 1


@pytest.mark.parametrize("changed", ["images", "labels"])
def test_results_belong_to_their_images_and_labels(changed, base, tmp_path, monkeypatch):
    module.ablate(base, grid(base), tmp_path / "out")
    source = module.images_to_evaluate

    def other(config, split="train"):
        given = source(config, split)
        images, labels = given.images.copy(), given.labels.copy()
        if changed == "images":
            images[3, 2, 1, 0] ^= 1
        else:
            labels[3] = 0 if labels[3] else 1
        return ArraySource(images, labels)

    monkeypatch.setattr(module, "images_to_evaluate", other)
    with pytest.raises(ValueError, match=r"other settings \(images differ\)"):
        module.ablate(base, grid(base), tmp_path / "out")
