"""The output of a run while it trains: the progress bar and the lines of metrics.jsonl."""

import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simclr_fast.evaluation.geometry import alignment, effective_rank, uniformity
from simclr_fast.training.config import PretrainConfig, to_json
from simclr_fast.training.loggers import (
    Csv,
    Logger,
    embedding_picture,
    open_loggers,
    views_picture,
)
from simclr_fast.utils.extras import need
from simclr_fast.utils.lines import keep_until

log = logging.getLogger(__name__)
# If a larger percentage of the time is spent waiting for data in as many lines one after the other,
# a run says what to try. In its first steps a run may wait: files are read for the first time. On a
# CPU the views are made between two steps, which takes 7% of the demo's time.
_SLOW_DATA, _SLOW_LINES = 10.0, 5
# Shorter measurements of the waiting time, in seconds, are not trusted.
_MEASURED = 1.0
# Images whose two views are looked at for the ranks of h and z.
_LOOKED_AT = 256
# A run is said to stall if its loss is above this share of the chance level after this many steps
# and this share of the run.
_STALLED, _STALL_STEPS, _STALL_SHARE = 0.98, 300, 0.15
# An effective rank below this is a collapse, and so is a uniformity above this: all rows have
# nearly one direction. The cosine of two unrelated images is then 0.92 or more.
_COLLAPSED, _NARROW = 1.5, -0.3


def line_is_due(step: int, every: int, total: int) -> bool:
    """Whether a line of metrics.jsonl is written after `step`, the last of which is `total`."""
    return step % every == 0 or step == total


class Metrics:
    """The progress bar, and a line of metrics.jsonl every `log_every` steps; for rank 0.

    The loggers of `config.log` get the same numbers, and pictures.

    first: the step at which this run resumes, 0 for a new run. total: all steps of the run.
    """

    def __init__(
        self, name: str, path: Path, config: PretrainConfig, first: int, total: int
    ) -> None:
        self.name, self.path, self.config = name, path, config
        self.first, self.total = first, total
        self._loggers: list[Logger] = []
        # Seconds that were spent waiting for data since the last line.
        self.waited = 0.0
        self._advice_given: set[str] = set()
        self._slow_lines = 0
        # Rows of h and z, view after view of the same number of images.
        self._rows: list[Tensor] = []
        self._looked_at = 0
        self._kept: Tensor | None = None
        self._grad_norms: dict[str, Tensor] = {}

    def __enter__(self) -> "Metrics":
        keep_until(self.path, self.first)
        self._file = self.path.open("a")
        images = self.config.batch_size
        self._bar: Any = need("tqdm").tqdm(
            total=self.total * images,
            initial=self.first * images,
            unit="images",
            unit_scale=True,
            desc=self.name,
            smoothing=0.05,
            # In a log file each update is a line of text: write few.
            mininterval=0.5 if sys.stderr.isatty() else 20,
            dynamic_ncols=True,
        )
        shown = json.loads(to_json(self.config))
        self._loggers = open_loggers(self.config.log, self.path.parent, shown, self.first)
        self._since, self._logged = time.perf_counter(), self.first
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._file.close()
        for logger in self._loggers:
            logger.close()

    def log(self, step: int, values: dict[str, Any], group: str = "") -> None:
        """Give numbers to the loggers; those of a group get its name before them."""
        found = {f"{group}{name}": v for name, v in values.items() if v is not None}
        for logger in self._loggers:
            logger.numbers(step, found)

    def pictures(self, step: int, views: Sequence[Tensor]) -> None:
        """Give pictures of a batch's views and features to the loggers.

        views: those of this step, [N, C, S, S] each. Small crops are not shown.
        """
        if not self._loggers or all(isinstance(logger, Csv) for logger in self._loggers):
            return
        aug = self.config.augmentation
        shown = views[: self.config.views]
        pictures = {"views": views_picture(shown, aug.mean or (), aug.std or ())}
        if self._kept is not None:
            pictures["features"] = embedding_picture(self._kept, self._looked_at)
        for name, picture in pictures.items():
            for logger in self._loggers if picture is not None else ():
                logger.picture(step, name, picture)

    def wants(self, step: int) -> bool:
        """Whether a line is written after `step`."""
        return line_is_due(step, self.config.log_every, self.total)

    def look(self, h: Tensor, z: Tensor, n_views: int) -> None:
        """Keep some rows of this rank's h and z, both [n_views · n, D], for the next line."""
        n = len(h) // n_views
        self._looked_at = first = min(n, _LOOKED_AT)
        if first > 1:
            starts = range(0, n_views * n, n)
            self._rows = [torch.cat([x.detach()[i : i + first] for i in starts]) for x in (h, z)]
            self._kept = self._rows[0]

    def measure_gradients(self, model: nn.Module, scale: float) -> None:
        """Norms of the gradients of the encoder and of the projector, which are `scale` times
        the loss's, for the next line."""
        for name, part in model.named_children():
            grads = [p.grad for p in part.parameters() if p.grad is not None]
            if grads:
                self._grad_norms[f"grad_norm_{name}"] = nn.utils.get_total_norm(grads) / scale

    def after_step(self, step: int, shown: dict[str, Tensor], lr: float) -> None:
        """Count a step. Every `log_every` steps, read `shown` from the device and write a line.

        shown: 0-dim tensors, with the loss and an accuracy among them.

        Raises:
            FloatingPointError: the loss is NaN or infinite.
        """
        self._bar.update(self.config.batch_size)
        if not self.wants(step):
            return
        values = {name: value.item() for name, value in shown.items()}
        contrastive = self.name == "pretrain"
        if contrastive:
            values["chance_loss"] = self.config.chance_loss
        values |= {name: value.item() for name, value in self._grad_norms.items()}
        values |= self._geometry(contrastive)
        now = time.perf_counter()
        seconds = now - self._since
        row = {
            "step": step,
            **values,
            "lr": float(lr),
            "images_per_second": (step - self._logged) * self.config.batch_size / seconds,
            "data_wait_percent": 100 * self.waited / seconds,
        }
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self.log(step, {name: value for name, value in row.items() if name != "step"})
        self._bar.set_postfix(
            loss=f"{row['loss']:.3f}",
            acc=f"{next(row[name] for name in row if name.endswith('accuracy')):.0%}",
            wait=f"{row['data_wait_percent']:.0f}%",
            refresh=False,
        )
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(
                f"the loss is {row['loss']} at step {step}: lower the learning rate (--lr)"
            )
        # The first measurement includes the start of the run: give no advice on it.
        if self._logged != self.first and seconds > _MEASURED:
            waited = row["data_wait_percent"]
            self._slow_lines = self._slow_lines + 1 if waited > _SLOW_DATA else 0
            self._advise(self._slow_lines == _SLOW_LINES, _SLOW, f"{waited:.0f}%")
        if contrastive:
            self._advise_on_learning(step, row)
        self._since, self._logged, self.waited = now, step, 0.0

    def _geometry(self, contrastive: bool) -> dict[str, float]:
        """Effective ranks, alignment and uniformity of the rows that `look` kept."""
        rows, self._rows = self._rows, []
        # After an infinity or NaN the loss is not finite either, which ends the run.
        if not rows or not all(torch.isfinite(x).all() for x in rows):
            return {}
        h, z = rows
        found = {"rank_h": effective_rank(h)}
        if contrastive:
            n = self._looked_at
            found["rank_z"] = effective_rank(z)
            found["alignment"] = alignment(z[:n], z[n : 2 * n])
            found["uniformity"] = uniformity(z)
        return found

    def _advise_on_learning(self, step: int, row: dict[str, Any]) -> None:
        if step < max(_STALL_STEPS, _STALL_SHARE * self.total):
            return
        rank = min(row.get("rank_h", math.inf), row.get("rank_z", math.inf))
        spread = row.get("uniformity", -math.inf)
        collapsed = rank < _COLLAPSED or spread > _NARROW
        self._advise(collapsed, _COLLAPSE, f"{rank:.1f}", f"{spread:.2f}", str(step))
        # A collapsed run is at its chance level too.
        chance = row["chance_loss"]
        stalled = self.config.loss == "nt-xent" and row["loss"] > _STALLED * chance
        self._advise(
            stalled and not collapsed, _STALL, f"{row['loss']:.2f}", f"{chance:.2f}", str(step)
        )

    def _advise(self, needed: bool, text: str, *values: str) -> None:
        """Log `text` as a warning if it is needed, once in a run."""
        if needed and text not in self._advice_given:
            self._advice_given.add(text)
            log.warning(text, *values)


_SLOW = (
    "%s of the time is spent waiting for data. Try --workers with the number of free cores; "
    "smaller image files (a side of 256 pixels is enough for views of 224); shards (.tar) instead "
    "of many files on a network disk."
)
_STALL = (
    "the loss, %s, is still near its chance level, %s, at step %s: the encoder has learnt almost "
    "nothing. Try a lower --temperature, another --lr, or a longer --warmup-epochs, and look at "
    "the views with simclr-fast preview: can you tell that they belong together?"
)
_COLLAPSE = (
    "the embeddings have collapsed: their effective rank is %s and their uniformity %s at step %s, "
    "so all images are mapped to nearly one direction. Lower --lr and start again, or from an "
    "older checkpoint."
)
