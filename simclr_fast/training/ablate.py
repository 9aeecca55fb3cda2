"""Ablations: a grid of short runs, each pretrained and probed, as in the figures of the paper.

Every cell of the grid is one `pretrain` run and the linear probe of its encoder on the test images.
Finished cells are lines of results.jsonl and are never run again.
"""

import dataclasses
import gc
import itertools
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simclr_fast.augment.params import Augmentation
from simclr_fast.data.datasets import named_source
from simclr_fast.data.sources import Source
from simclr_fast.evaluation.features import features
from simclr_fast.evaluation.linear import linear_probe
from simclr_fast.evaluation.plots import plot_heat_maps
from simclr_fast.models.weights import load_weights
from simclr_fast.training.config import APART, PretrainConfig, to_json
from simclr_fast.training.pretrain import pretrain
from simclr_fast.utils import checkpoint
from simclr_fast.utils.device import resolve_device
from simclr_fast.utils.extras import need
from simclr_fast.utils.locks import locked

# An operation's probability where the recipe leaves it out: the paper's.
_PAPER = {"p_jitter": 0.8, "p_gray": 0.2, "p_blur": 0.5, "p_flip": 0.5}
# Colour distortion is jitter and gray (arXiv:2002.05709, appendix A).
_FIELDS = {
    "colour": ("p_jitter", "p_gray"),
    "jitter": ("p_jitter",),
    "gray": ("p_gray",),
    "blur": ("p_blur",),
    "flip": ("p_flip",),
}
OPERATIONS = ("crop", *_FIELDS)
RECIPE = "recipe"


@dataclass(frozen=True)
class Cell:
    """One run: its augmentation ("recipe", or operations joined by "+") and hyperparameters."""

    augmentation: str
    batch_size: int
    temperature: float
    projector: Any
    seed: int

    def __str__(self) -> str:
        return (
            f"{self.augmentation}-batch{self.batch_size}-tau{self.temperature:g}"
            f"-{self.projector}-seed{self.seed}"
        )


def grid(
    base: PretrainConfig,
    operations: Sequence[str] = (),
    batch_sizes: Sequence[int] = (),
    temperatures: Sequence[float] = (),
    projectors: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> list[Cell]:
    """All combinations; an axis without values is `base`'s.

    operations: of OPERATIONS: every one alone and every pair (arXiv:2002.05709, figure 5).
    """
    if unknown := set(operations) - set(OPERATIONS):
        allowed = ", ".join(OPERATIONS)
        raise ValueError(f"operations must be of {allowed}; got {', '.join(sorted(unknown))}")
    pairs = itertools.combinations(operations, 2)
    augmentations = [*operations, *map("+".join, pairs)] or [RECIPE]
    axes = (
        augmentations,
        batch_sizes or [base.batch_size],
        temperatures or [base.temperature],
        projectors or [base.projector],
        seeds or [base.seed],
    )
    return [Cell(*values) for values in itertools.product(*axes)]


def cell_config(base: PretrainConfig, cell: Cell, out: Path) -> PretrainConfig:
    """The run of a cell. Another batch size sees as many images, and `lr` goes by `lr_rule`."""
    augmentation = base.augmentation
    if cell.augmentation != RECIPE:
        augmentation = only(augmentation, cell.augmentation.split("+"))
    ratio = cell.batch_size / base.batch_size
    return replace(
        base,
        out=out,
        augmentation=augmentation,
        batch_size=cell.batch_size,
        steps=base.steps and max(1, round(base.steps / ratio)),
        lr=base.lr and base.lr * (ratio if base.lr_rule == "linear" else ratio**0.5),
        temperature=cell.temperature,
        projector=cell.projector,
        seed=cell.seed,
        resume=True,
        overwrite=False,
    )


def only(augmentation: Augmentation, operations: Sequence[str]) -> Augmentation:
    """`augmentation` with these operations alone, on both views.

    The paper's figure 5 crops every image at random, then distorts one of its two views; here
    every operation, the crop too, is on both views or absent.
    """
    wanted = {field for name in operations for field in _FIELDS.get(name, ())}
    chances: dict[str, Any] = {
        field: (getattr(augmentation, field) or chance) if field in wanted else 0.0
        for field, chance in _PAPER.items()
    }
    return replace(augmentation, crop="crop" in operations, **chances)


def ablate(
    base: PretrainConfig, cells: Sequence[Cell], folder: Path, max_cells: int | None = None
) -> list[dict[str, Any]]:
    """Run the cells that `folder` has no results of, at most `max_cells`; all results so far.

    Writes results.jsonl (a line per finished cell: its settings, top-1 with a 95% bootstrap
    interval, the last loss, seconds) and cells/NAME/. Interrupted, the same call goes on.

    Raises:
        FileExistsError: the folder holds something else. ValueError: it holds results of another
            `base`, or the data have no labelled test images. BlockingIOError: another process is
            at work there.
    """
    train, test = named_source(base.data, "train"), named_source(base.data, "test")
    if train.labels is None or test is None or test.labels is None:
        raise ValueError(f"an ablation needs labelled training and test images; {base.data!r}: no")
    _claim(folder, base)
    with locked(folder / ".lock", f"another process runs the ablation in {folder}"):
        return _run_cells(base, cells, folder, max_cells, train, test)


def _run_cells(
    base: PretrainConfig,
    cells: Sequence[Cell],
    folder: Path,
    max_cells: int | None,
    train: Source,
    test: Source,
) -> list[dict[str, Any]]:
    results = folder / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    finished = {row["cell"] for row in rows}
    todo = [cell for cell in cells if str(cell) not in finished]
    bar = need("tqdm").tqdm(
        todo[:max_cells],
        desc="ablate",
        unit="cell",
        total=len(cells),
        initial=len(cells) - len(todo),
    )
    for cell in bar:
        out = folder / "cells" / str(cell)
        config = cell_config(base, cell, out)
        start = time.perf_counter()
        if not (out / "encoder.safetensors").exists():
            pretrain(config)
        seconds = time.perf_counter() - start
        device, encoder = resolve_device(config.device), load_weights(out).encoder
        h_train, h_test = (
            features(encoder, source, config.augmentation, device=device)
            for source in (train, test)
        )
        accuracy = linear_probe(h_train, train.labels, h_test, test.labels, device=device)
        last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        row = {
            "cell": str(cell),
            **asdict(cell),
            "top1": accuracy.value,
            "low": accuracy.low,
            "high": accuracy.high,
            "test_images": accuracy.n,
            "loss": last["loss"],
            "steps": last["step"],
            "seconds": round(seconds, 1),
        }
        rows.append(row)
        _write(results, "".join(json.dumps(row) + "\n" for row in rows))
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        # The next cell's memory mode is chosen by what is free.
        del encoder
        gc.collect()
        torch.cuda.empty_cache()
        bar.write(f"{cell!s:<48} {accuracy}")
    return rows


def _claim(folder: Path, base: PretrainConfig) -> None:
    """Make the folder for ablations of `base`, or check that it is."""
    about = folder / "base.json"
    values = json.loads(to_json(base))
    text = json.dumps({k: v for k, v in values.items() if k not in APART}, indent=2) + "\n"
    if about.exists():
        if (before := about.read_text()) != text:
            old, new = json.loads(before), json.loads(text)
            changed = [key for key in new if old.get(key) != new[key]]
            raise ValueError(f"{folder} is of other settings: {', '.join(changed)} differ")
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty, and no ablation: choose another --out")
    _write(folder / "results.jsonl", "")
    _write(about, text)


def _write(path: Path, text: str) -> None:
    checkpoint.write_atomic(path, lambda part: part.write_text(text))


def mean_top1(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, int, float, str], float]:
    """Top-1 of each combination, over its seeds."""
    axes = [field.name for field in dataclasses.fields(Cell) if field.name != "seed"]
    groups: dict[Any, list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(row[axis] for axis in axes), []).append(row["top1"])
    return {key: float(np.mean(values)) for key, values in groups.items()}


def plot_ablation(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Heat maps of top-1 in percent: operations against operations, else the axes that vary."""
    means: dict[Any, float] = {key: 100 * value for key, value in mean_top1(rows).items()}
    axes: list[list[Any]] = [list(dict.fromkeys(key[i] for key in means)) for i in range(4)]
    names = ("augmentation", "batch size", "temperature", "projector")
    panels: dict[str, np.ndarray] = {}
    operations = [name for name in axes[0] if "+" not in name and name != RECIPE]
    if len(operations) > 1:
        for rest in itertools.product(*axes[1:]):
            table = [[_pair(means, a, b, rest) for b in operations] for a in operations]
            averaged = np.column_stack([table, np.nanmean(table, axis=1)])
            panels["batch {}, τ {:g}, {} projector".format(*rest)] = averaged
        plot_heat_maps(panels, ("", operations), ("", [*operations, "average"]), path)
        return
    # The axes with the most values are rows and columns, the other two are panels.
    order = sorted(range(4), key=lambda i: -len(axes[i]))
    rows_axis, columns_axis, *others = order
    for rest in itertools.product(*(axes[i] for i in others)):
        fixed = dict(zip(others, rest, strict=True))
        table = [
            [
                means.get(
                    tuple({**fixed, rows_axis: a, columns_axis: b}[i] for i in range(4)), np.nan
                )
                for b in axes[columns_axis]
            ]
            for a in axes[rows_axis]
        ]
        panels[", ".join(f"{names[i]} {fixed[i]}" for i in others)] = np.array(table)
    plot_heat_maps(
        panels,
        (names[rows_axis], list(map(str, axes[rows_axis]))),
        (names[columns_axis], list(map(str, axes[columns_axis]))),
        path,
    )


def _pair(means: dict[Any, float], a: str, b: str, rest: tuple[Any, ...]) -> float:
    """Of two operations in either order, or of one alone; NaN if that is not run yet."""
    names = [a] if a == b else [f"{a}+{b}", f"{b}+{a}"]
    return next((means[k] for name in names if (k := (name, *rest)) in means), np.nan)
