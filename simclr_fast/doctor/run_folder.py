"""Check a pretraining run from the files in its folder."""

import json
import math
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from simclr_fast.augment.params import Augmentation
from simclr_fast.data.sources import Source, evenly, subset
from simclr_fast.data.whole import whole_images
from simclr_fast.doctor.report import Finding, Report
from simclr_fast.doctor.rules import (
    NOTHING_LEARNT,
    PATIENCE,
    at_chance,
    collapse,
    learning_rate,
    no_colour_distortion,
    no_warm_up,
)
from simclr_fast.evaluation.features import features
from simclr_fast.evaluation.layers import Taps, load_run
from simclr_fast.models.encoders import SimCLR
from simclr_fast.training.config import PretrainConfig, from_json
from simclr_fast.training.setup import open_data
from simclr_fast.utils.checkpoint import load_encoder, not_finite

# A larger percentage of the time spent waiting for data is a finding.
_WAIT = 5.0
# Lines of metrics.jsonl after the warm-up from which the course of the loss is judged.
_LINES = 8


def examine(folder: Path, *, images: int = 256, device: torch.device | str = "cpu") -> Report:
    """The report on a run of `simclr-fast pretrain`, finished or not.

    images: how many images of its data the ranks of h and z are computed from.

    Raises:
        FileNotFoundError: the folder has no config.json or no metrics.jsonl. ValueError: it is not
            the folder of a pretraining run.
    """
    for name in ("config.json", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not the output folder of a run: no {name}")
    config = from_json((folder / "config.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if not rows:
        raise ValueError(f"{folder / 'metrics.jsonl'} has no lines yet: wait for some steps")
    if "contrastive_accuracy" not in rows[-1]:
        raise ValueError(
            f"{folder} is not a pretraining run: metrics.jsonl has no contrastive loss"
        )
    report = Report()
    report.findings += [*_settings(config), *_course(config, rows, report)]
    report.findings += _weights(folder, config, rows[-1]["step"], images, device, report)
    report.findings.sort(key=lambda finding: finding.severity)
    return report


def _settings(config: PretrainConfig) -> list[Finding]:
    found: list[Finding] = []
    if config.optimizer == "lars":
        if config.lr is not None:
            found += learning_rate("LARS", config.lr, config.batch_size)
        if config.warmup_epochs == 0:
            found.append(no_warm_up("LARS", config.lr or math.nan))
    views = config.augmentation
    if not views.s or not views.p_jitter:
        seen = f"the views have no colour jitter (s {views.s:g}, p_jitter {views.p_jitter:g})"
        found.append(no_colour_distortion(seen))
    if config.allow_ghost_bn:
        found.append(
            Finding(
                "ghost-batch-norm",
                "warning",
                "allow_ghost_bn is set: batch norms use the statistics of micro-batches",
                "Statistics of fewer rows give another gradient.",
                "--memory lockstep, which is exact.",
            )
        )
    return found


def _course(config: PretrainConfig, rows: list[dict[str, Any]], report: Report) -> list[Finding]:
    step = rows[-1]["step"]
    chance = config.chance_loss
    bad = [row["step"] for row in rows if not math.isfinite(row["loss"])]
    report.facts.append(f"loss at step {step}: {rows[-1]['loss']:.4f}; chance level: {chance:.4f}")
    if bad:
        return [
            Finding(
                "not-finite",
                "error",
                f"the loss is NaN or infinite at step {bad[0]}",
                "The weights are lost from there on.",
                "Lower the learning rate (--lr), and --resume from the last checkpoint.",
            )
        ]
    found: list[Finding] = []
    top = max(range(len(rows)), key=lambda i: rows[i]["lr"])
    after = rows[top:]
    loss = mean(row["loss"] for row in rows[-3:])
    accuracy = mean(row["contrastive_accuracy"] for row in rows[-3:])
    # While the learning rate still rises, the loss may be anywhere.
    if step >= PATIENCE and len(after) > 1 and loss > NOTHING_LEARNT * chance:
        if accuracy < 10 / config.batch_size and config.loss == "nt-xent":
            found.append(at_chance(step, loss, chance))
    elif len(after) >= _LINES:
        quarter = len(after) // 4
        early = median(row["loss"] for row in after[:quarter])
        late = median(row["loss"] for row in after[2 * quarter : 3 * quarter])
        if late > 0.998 * early:
            found.append(
                Finding(
                    "plateau",
                    "warning",
                    f"after the warm-up the loss went from {early:.4f} to {late:.4f} in half of "
                    "the remaining steps",
                    "A run that learns has a falling loss until its learning rate is low.",
                    "Another learning rate (--lr), half and double of it; stronger or weaker "
                    "views.",
                )
            )
    waits = [row["data_wait_percent"] for row in rows[1:]]
    if waits and mean(waits) > _WAIT:
        found.append(
            Finding(
                "waiting-for-data",
                "warning",
                f"{mean(waits):.0f}% of the time is spent waiting for images",
                "The model stands still meanwhile.",
                "--workers with the number of free cores; smaller image files (a side of 256 "
                "pixels is enough for views of 224); shards (.tar) on a network disk.",
            )
        )
    return found


def _weights(
    folder: Path,
    config: PretrainConfig,
    step: int,
    images: int,
    device: torch.device | str,
    report: Report,
) -> list[Finding]:
    found: list[Finding] = []
    exported = folder / "encoder.safetensors"
    if exported.is_file() and (bad := not_finite(dict(load_encoder(exported)[0]))):
        found.append(_lost(f"{exported}: {bad[0]} and {len(bad) - 1} more are NaN or infinite"))
    try:
        model, augmentation = load_run(folder)
    except FileNotFoundError as error:
        report.unchecked.append(f"h and z: {error}")
        return found
    except ValueError as error:
        return [*found, _lost(str(error))]
    try:
        parts = _h_and_z(model, augmentation, open_data(config), images, device)
    except (OSError, ValueError, ImportError) as error:
        report.unchecked.append(f"h and z: {error}")
        return found
    for name, x in parts.items():
        found += collapse(name, x, step >= PATIENCE, report)
    return found


def _lost(seen: str) -> Finding:
    return Finding(
        "damaged-weights",
        "error",
        seen,
        "The run cannot go on from these weights, and they give no features.",
        "--resume from an older checkpoint, with a lower learning rate.",
    )


def _h_and_z(
    model: SimCLR,
    augmentation: Augmentation,
    source: Source,
    images: int,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """Features of some images, evenly spaced in the data, without augmentation."""
    taps = Taps(model)
    part = whole_images(subset(source, evenly(source, images)))
    both = features(taps, part, augmentation, device=device, batch_size=min(images, len(source)))
    parts = both.split(taps.widths(both.size(1)), dim=1)
    named = dict(zip(taps.names, parts, strict=True))
    return {name: named[name] for name in ("h", "z") if name in named}
