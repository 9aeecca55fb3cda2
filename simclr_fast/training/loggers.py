"""Where a run's numbers and pictures go besides metrics.jsonl: the loggers' own libraries."""

import csv
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simclr_fast.evaluation.plots import plot_pairs
from simclr_fast.utils.checkpoint import write_atomic, write_text
from simclr_fast.utils.extras import need, require

# Modules of other packages that a logger needs.
_NEEDS = {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "trackio": ("trackio",), "csv": ()}
_PROJECT = "simclr_fast"
# Images in the picture of the views.
_SHOWN = 8


class Logger(ABC):
    """Takes the numbers and pictures of a run. Steps never decrease."""

    @abstractmethod
    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Log values by name."""

    def picture(self, step: int, name: str, image: np.ndarray) -> None:  # noqa: B027
        """Log a picture, uint8 [H, W, 3]. A logger without pictures does nothing."""

    @abstractmethod
    def close(self) -> None:
        """Write what is still kept."""


def require_loggers(names: Sequence[str]) -> None:
    """Raise ImportError if a logger's library is missing; one message names all."""
    require([module for name in names for module in _NEEDS[name]])


def open_loggers(
    names: Sequence[str], out: Path, config: dict[str, Any], first: int
) -> list[Logger]:
    """The loggers `names` of the run in the folder `out`.

    config: the settings of the run, to show. first: the step at which the run resumes, or 0. What
    was logged after it is dropped where the library can do so.
    """
    require_loggers(names)
    kinds: dict[str, Callable[[Path, dict[str, Any], int], Logger]]
    kinds = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio, "csv": Csv}
    return [kinds[name](out, config, first) for name in dict.fromkeys(names)]


class TensorBoard(Logger):
    """Event files in `out`/tensorboard: tensorboard --logdir runs."""

    def __init__(self, out: Path, config: dict[str, Any], first: int) -> None:
        module = import_module("torch.utils.tensorboard")
        purge = first + 1 if first else None
        self._writer = module.SummaryWriter(str(out / "tensorboard"), purge_step=purge)
        if not first:
            text = json.dumps(config, indent=2, default=str)
            self._writer.add_text("config", f"```json\n{text}\n```")

    def numbers(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Wandb(Logger):
    """Weights & Biases. Its own variables choose project, account and mode (WANDB_MODE=offline)."""

    def __init__(self, out: Path, config: dict[str, Any], first: int) -> None:
        self._wandb = need("wandb")
        # A resumed run goes on in the same chart.
        kept = out / "wandb_run_id"
        new = np.random.default_rng().bytes(6).hex()
        number = kept.read_text().strip() if first and kept.exists() else new
        self._run = self._wandb.init(
            project=_from_environment("WANDB_PROJECT"),
            name=out.name,
            dir=str(out),
            config=config,
            id=number,
            resume="allow",
        )
        write_text(kept, number + "\n")

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio(Logger):
    """Trackio, a local dashboard: trackio show."""

    def __init__(self, out: Path, config: dict[str, Any], first: int) -> None:
        self._trackio = need("trackio")
        shown = json.loads(json.dumps(config, default=str))
        self._trackio.init(
            project=_from_environment("TRACKIO_PROJECT"),
            name=out.name,
            config=shown,
            resume="allow" if first else "never",
        )

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self._trackio.log(values, step=step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        self._trackio.log({name: self._trackio.Image(image)}, step=step)

    def close(self) -> None:
        self._trackio.finish()


class Csv(Logger):
    """`out`/metrics.csv: the numbers of metrics.jsonl as a table."""

    def __init__(self, out: Path, config: dict[str, Any], first: int) -> None:
        self._path = out / "metrics.csv"
        self._columns: list[str] = []
        kept = self._rows() if first and self._path.exists() else []
        self._write([row for row in kept if int(row["step"]) <= first])

    def numbers(self, step: int, values: dict[str, float]) -> None:
        row = {"step": step, **values}
        if set(row) - set(self._columns):
            # Not every line has every number: a new one becomes a column for all.
            self._write([*self._rows(), row])
            return
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _rows(self) -> list[dict[str, Any]]:
        with self._path.open(newline="") as file:
            return list(csv.DictReader(file))

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self._columns = list(dict.fromkeys(name for row in rows for name in row))

        def write(part: Path) -> None:
            with part.open("w", newline="") as file:
                table = csv.DictWriter(file, self._columns)
                table.writeheader()
                table.writerows(rows)

        write_atomic(self._path, write)

    def close(self) -> None:
        pass


def _from_environment(variable: str) -> str:
    return os.environ.get(variable) or _PROJECT


# Pictures of a batch.


def views_picture(views: Sequence[Tensor], mean: Sequence[float], std: Sequence[float]) -> Any:
    """The views of a batch's first images side by side, a row per image: uint8 [H, W, 3].

    views: [N, C, S, S] each; of more than three channels the first three are shown, of two the
    first. mean, std: those that the views were normalised with.
    """
    shown = torch.stack(
        [view[:_SHOWN].detach().float().cpu() for view in views], 1
    )  # [n, V, C, S, S]
    channels = shown.shape[2]
    scale = torch.tensor(std or [1.0] * channels).view(channels, 1, 1)
    shown = shown * scale + torch.tensor(mean or [0.0] * channels).view(channels, 1, 1)
    shown = shown[:, :, :3] if channels >= 3 else shown[:, :, :1].expand(-1, -1, 3, -1, -1)
    tiles = (shown.clamp(0, 1) * 255).round().byte().permute(0, 3, 1, 4, 2)  # [n, S, V, S, 3]
    return tiles.flatten(0, 1).flatten(1, 2).numpy()


def embedding_picture(h: Tensor, n: int) -> np.ndarray | None:
    """The first two principal components of h: uint8 [H, W, 3]. None if h has no two directions.

    h: [V · n, D], view after view of n images. A line joins the first two views of an image: they
    should be near each other and far from the rest.
    """
    centred = h.detach().double().cpu() - h.detach().double().cpu().mean(0)
    if min(centred.shape) < 2 or not torch.isfinite(centred).all():
        return None
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    if singular[1] == 0:
        return None
    points = (left[:, :2] * singular[:2]).numpy()
    return plot_pairs(points[:n], points[n : 2 * n])
