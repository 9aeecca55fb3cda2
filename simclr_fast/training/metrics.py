"""The output of a run while it trains: the progress bar and the lines of metrics.jsonl."""

import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from simclr_fast.training.config import PretrainConfig
from simclr_fast.utils.extras import need
from simclr_fast.utils.lines import keep_until

log = logging.getLogger(__name__)
# If a larger percentage of the time is spent waiting for data, a run says what to try.
_SLOW_DATA = 5.0
# Shorter measurements of the waiting time, in seconds, are not trusted.
_MEASURED = 1.0


class Metrics:
    """The progress bar, and a line of metrics.jsonl every `log_every` steps; for rank 0.

    first: the step at which this run resumes, 0 for a new run. total: all steps of the run.
    """

    def __init__(
        self, name: str, path: Path, config: PretrainConfig, first: int, total: int
    ) -> None:
        self.name, self.path, self.config = name, path, config
        self.first, self.total = first, total
        # Seconds that were spent waiting for data since the last line.
        self.waited = 0.0
        self._advised = False

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
        self._since, self._logged = time.perf_counter(), self.first
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._file.close()

    def after_step(self, step: int, shown: dict[str, Tensor], lr: float) -> None:
        """Count a step. Every `log_every` steps, read `shown` from the device and write a line.

        shown: 0-dim tensors, with the loss and an accuracy among them.

        Raises:
            FloatingPointError: the loss is NaN or infinite.
        """
        self._bar.update(self.config.batch_size)
        if step % self.config.log_every and step != self.total:
            return
        values = {name: value.item() for name, value in shown.items()}
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
            self._advise(row["data_wait_percent"])
        self._since, self._logged, self.waited = now, step, 0.0

    def _advise(self, waited: float) -> None:
        """Say once what to try when the data are slow."""
        if waited > _SLOW_DATA and not self._advised:
            self._advised = True
            log.warning("%.0f%% of the time is spent waiting for data. %s", waited, _REMEDIES)


_REMEDIES = (
    "Try --workers with the number of free cores; smaller image files (a side of 256 pixels is "
    "enough for views of 224); shards (.tar) instead of many files on a network disk."
)
