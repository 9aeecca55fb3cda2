"""Ablations: a grid of short runs, each pretrained and probed, as in the figures of the paper.

For every cell of the grid, `pretrain` trains an encoder and a linear probe measures it on the test
images. A finished cell is a line of results.jsonl and is never run again.
"""

import itertools
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from simclr_fast.augment.params import Augmentation
from simclr_fast.data.sources import Source
from simclr_fast.evaluation.features import features
from simclr_fast.evaluation.linear import linear_probe
from simclr_fast.evaluation.plots import HeatMap, plot_heat_maps
from simclr_fast.models.weights import load_weights
from simclr_fast.training.config import NOT_COMPARED, PretrainConfig, to_json
from simclr_fast.training.pretrain import pretrain
from simclr_fast.training.setup import build_model, images_to_evaluate
from simclr_fast.utils.checkpoint import write_json, write_text
from simclr_fast.utils.device import release_memory, resolve_device
from simclr_fast.utils.extras import need
from simclr_fast.utils.locks import locked

# The paper's probability of each operation, for operations that the recipe does not have.
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
    """All combinations of the given values. An axis without values takes that of `base`.

    operations: names from OPERATIONS. The grid has each of them without the others, and each pair
        (arXiv:2002.05709, figure 5).
    """
    if unknown := set(operations) - set(OPERATIONS):
        allowed = ", ".join(OPERATIONS)
        raise ValueError(f"operations must be among {allowed}; got {', '.join(sorted(unknown))}")
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
    """The configuration of a cell's run.

    If its batch size differs from that of `base`, the steps are scaled to see as many images, and
    the learning rate is scaled by `lr_rule`.
    """
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
    """`augmentation` reduced to these operations, on both views.

    This differs from the paper's figure 5. There every image is cropped at random, and the
    operations are applied to one of its two views. Here an operation, cropping included, is applied
    to both views or to none.
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
    """Run at most `max_cells` of the cells that have no result in `folder`; return all results.

    Writes results.jsonl and cells/NAME/. A line of results.jsonl is a finished cell: its settings,
    top-1 with a 95% bootstrap interval, the last loss, seconds. After an interruption, the same
    call continues.

    Raises:
        FileExistsError: the folder holds something else. ValueError: it holds results of another
            `base`, or the data have no labelled test images. BlockingIOError: another process uses
            the folder.
    """
    train, test = images_to_evaluate(base), images_to_evaluate(base, "test")
    if test is None or not train.has_labels or not test.has_labels:
        raise ValueError(
            f"an ablation needs labelled training and test images: data {base.data!r} has none"
        )
    _claim(folder, base, (train, test))
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
        write_text(results, "".join(json.dumps(row) + "\n" for row in rows))
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        # Free memory: it decides the memory mode of the next cell.
        del encoder
        release_memory()
        bar.write(f"{cell!s:<48} {accuracy}")
    return rows


def _claim(folder: Path, base: PretrainConfig, sources: Sequence[Source]) -> None:
    """Create the folder for ablations of `base` on these images and labels, or check that it is."""
    about = folder / "base.json"
    values = json.loads(to_json(base))
    # By content: a copy of the images elsewhere is the same data.
    values["images"] = [f"{s.content().hex()} {s.labels_fingerprint().hex()}" for s in sources]
    text = json.dumps({k: v for k, v in values.items() if k not in NOT_COMPARED}, indent=2) + "\n"
    if about.exists():
        if (before := about.read_text()) != text:
            old, new = json.loads(before), json.loads(text)
            changed = [key for key in new if old.get(key) != new[key]]
            raise ValueError(
                f"{folder} holds results of other settings ({', '.join(changed)} differ): choose "
                "another --out"
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} holds files that are not of an ablation: choose another --out"
        )
    write_text(folder / "results.jsonl", "")
    write_text(about, text)


class Setting(NamedTuple):
    """A cell without its seed."""

    augmentation: str
    batch_size: int
    temperature: float
    projector: str


_AXES = ("augmentation", "batch size", "temperature", "projector")


def mean_top1(rows: Sequence[dict[str, Any]]) -> dict[Setting, float]:
    """Top-1 of each setting, averaged over its seeds."""
    groups: dict[Setting, list[float]] = {}
    for row in rows:
        setting = Setting(*(row[name] for name in Setting._fields))
        groups.setdefault(setting, []).append(row["top1"])
    return {setting: float(np.mean(values)) for setting, values in groups.items()}


def untrained_top1(base: PretrainConfig, folder: Path) -> float:
    """Top-1 of the probe on the untrained encoder; saved in untrained.json."""
    kept = folder / "untrained.json"
    if not kept.exists():
        train, test = images_to_evaluate(base), images_to_evaluate(base, "test")
        assert test is not None
        torch.manual_seed(base.seed)
        encoder, device = build_model(base).encoder, resolve_device(base.device)
        h_train, h_test = (
            features(encoder, source, base.augmentation, device=device) for source in (train, test)
        )
        found = linear_probe(h_train, train.labels, h_test, test.labels, device=device)
        write_json(kept, {"top1": found.value}, indent=None)
    return json.loads(kept.read_text())["top1"]


def plot_ablation(
    rows: Sequence[dict[str, Any]], path: Path, untrained: float | None = None
) -> None:
    """Draw heat maps of top-1.

    With several operations, a map shows one operation against another; otherwise it shows the two
    axes with the most values. untrained: top-1 before training, marked on the colour bar.
    """
    means = mean_top1(rows)
    operations = [
        name
        for name in dict.fromkeys(setting.augmentation for setting in means)
        if name in OPERATIONS
    ]
    if len(operations) > 1:
        maps = operation_maps(means, operations)
        heading = "Operations of the augmentation: one on the diagonal, two elsewhere"
    else:
        maps, heading = axis_maps(means), "Ablation"
    seeds = len({row["seed"] for row in rows})
    heading += f"; mean of {seeds} seeds" if seeds > 1 else ""
    plot_heat_maps(maps, path, heading, None if untrained is None else 100 * untrained)


def operation_maps(means: dict[Setting, float], operations: list[str]) -> list[HeatMap]:
    """One map per batch size, temperature and projector: an operation against another."""
    maps = []
    for rest in dict.fromkeys(setting[1:] for setting in means):

        def percent(a: str, b: str, rest: tuple[Any, ...] = rest) -> float:
            for name in (a,) if a == b else (f"{a}+{b}", f"{b}+{a}"):
                if (key := Setting(name, *rest)) in means:
                    return 100 * means[key]
            return math.nan

        table = np.array([[percent(a, b) for b in operations] for a in operations])
        average = np.array([np.nan if np.isnan(row).all() else np.nanmean(row) for row in table])
        maps.append(
            HeatMap(
                "batch size {}, temperature {:g}, {} projector".format(*rest),
                "first operation",
                operations,
                "second operation",
                [*operations, "average"],
                np.column_stack([table, average]),
            )
        )
    return maps


def axis_maps(means: dict[Setting, float]) -> list[HeatMap]:
    """The axis with the most values against the next; a map for each value of the other two."""
    values = [list(dict.fromkeys(setting[axis] for setting in means)) for axis in range(len(_AXES))]
    down, across, *others = sorted(range(len(_AXES)), key=lambda axis: -len(values[axis]))
    maps = []
    for fixed in itertools.product(*(values[axis] for axis in others)):

        def percent(a: Any, b: Any, fixed: tuple[Any, ...] = fixed) -> float:
            setting = {down: a, across: b, **dict(zip(others, fixed, strict=True))}
            key = Setting(*(setting[axis] for axis in range(len(_AXES))))
            return 100 * means.get(key, math.nan)

        maps.append(
            HeatMap(
                ", ".join(f"{_AXES[axis]} {v}" for axis, v in zip(others, fixed, strict=True)),
                _AXES[down],
                list(map(str, values[down])),
                _AXES[across],
                list(map(str, values[across])),
                np.array([[percent(a, b) for b in values[across]] for a in values[down]]),
            )
        )
    return maps
