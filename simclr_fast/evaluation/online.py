"""A linear classifier and k-NN during training, on the features that training computes anyway.

They read the encoder's features of each step's views, detached. No image is encoded twice, no
random number is drawn, and no weight of the model changes. arXiv:2002.05709, B.6 also trains a
linear classifier during pretraining. The features are those of augmented training images, so the
accuracies are lower than those of `simclr-fast eval`. They show how a run develops, not its result.
"""

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simclr_fast.evaluation.accuracy import true_class_rank
from simclr_fast.evaluation.knn import TAU, votes
from simclr_fast.ops import widest_float
from simclr_fast.utils.lines import keep_until

log = logging.getLogger(__name__)
_K, _BANK, _QUERIES = 20, 4096, 512
# The features have mean 0 and length about 1. There SGD is stable up to a learning rate of
# 2 (1 + momentum) / (1 / 2).
_LR, _MOMENTUM = 2.0, 0.9


class OnlineProbe:
    """Accuracies of a run's features on the training images, every `every` steps.

    labels: int64 [n], one per image of the source, -1 for images without one.

    A report has:
    linear: top-1 of a linear classifier on the first views of all steps since the last report. Each
        batch is classified before the classifier learns from it. The classifier takes one Nesterov
        step per batch, on the features of all views, standardised over the batch.
    knn: top-1 of weighted 20-NN. The queries are the first views of this step (at most 512), the
        bank those of earlier steps (at most 4,096). An image is not its own neighbour.
    percent_of_time: the probe's share of the time since the last report.
    """

    def __init__(self, labels: np.ndarray | None, every: int, device: torch.device) -> None:
        if labels is None or labels.max() < 0:
            raise ValueError("probe_every needs labelled images, such as one folder per class")
        self.every, self.device = every, device
        self.labels = torch.from_numpy(labels).to(device)
        self.classes = int(labels.max()) + 1
        self.h: Tensor | None = None
        # Empty until the first step or a checkpoint fills it.
        self.state: dict[str, Tensor] = {}
        self.path: Path | None = None
        self._clock = _Clock(device)

    def open(self, path: Path, step: int) -> None:
        """Append reports to `path` as JSON lines. First drop its lines after `step`."""
        keep_until(path, step)
        self.path = path

    def take(self, h: Tensor) -> None:
        """Keep the features of a step's views: [views · n, D], first views first."""
        self.h = h.detach()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from a checkpoint's `state`; an empty one starts anew."""
        # "next" stays on the CPU, because every step reads it there.
        self.state = {
            name: value.cpu() if name == "next" else value.to(self.device)
            for name, value in state.items()
        }

    @torch.no_grad()
    def after_step(self, step: int, index: Tensor) -> dict[str, Any] | None:
        """Learn from the features of images `index`, int64 [n]; return a report if one is due."""
        assert self.h is not None
        with self._clock:
            h, self.h = self.h.float(), None
            ids = index.to(self.device, non_blocking=True)
            if not self.state:
                self._start(h.shape[1])
            due = step % self.every == 0
            first = torch.nn.functional.normalize(h[: len(ids)], dim=1)
            knn = self._knn(first, ids) if due else None
            self._remember(first, ids)
            self._learn(h, ids)
        if not due:
            return None
        state = self.state
        seen, right = int(state["seen"]), int(state["right"])
        state["seen"].zero_()
        state["right"].zero_()
        row = {
            "step": step,
            "linear": right / seen if seen else None,
            "knn": None if knn is None else float(knn),
            "percent_of_time": self._clock.percent(),
        }
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        log.info(
            "step %d: online probe: linear %s, %d-NN %s of training views (%.1f%% of the time)",
            step,
            _percent(row["linear"]),
            _K,
            _percent(row["knn"]),
            row["percent_of_time"],
        )
        return row

    def _start(self, dim: int) -> None:
        bank = min(_BANK, len(self.labels))
        self.state = {
            "weight": torch.zeros(self.classes, dim + 1, device=self.device),
            "velocity": torch.zeros(self.classes, dim + 1, device=self.device),
            "seen": torch.zeros((), dtype=torch.int64, device=self.device),
            "right": torch.zeros((), dtype=torch.int64, device=self.device),
            "bank": torch.zeros(bank, dim, device=self.device),
            # -1: not filled yet.
            "bank_ids": torch.full((bank,), -1, device=self.device),
            # On the CPU, because every step reads it there.
            "next": torch.zeros((), dtype=torch.int64),
        }

    def _learn(self, h: Tensor, ids: Tensor) -> None:
        state = self.state
        x = (h - h.mean(0)) / (h.std(0, correction=0) + 1e-6) / h.shape[1] ** 0.5
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        targets = self.labels[ids].repeat(len(h) // max(len(ids), 1))
        known = targets >= 0
        logits = x @ state["weight"].T
        right = (true_class_rank(logits, targets.clamp_min(0)) == 0) & known
        state["right"] += right[: len(ids)].sum()
        state["seen"] += known[: len(ids)].sum()
        error = logits.softmax(1) - torch.nn.functional.one_hot(targets.clamp_min(0), self.classes)
        error *= known[:, None]
        gradient = error.T @ x / known.sum().clamp_min(1)
        state["velocity"].mul_(_MOMENTUM).add_(gradient)
        state["weight"].sub_(_LR * (gradient + _MOMENTUM * state["velocity"]))

    def _remember(self, first: Tensor, ids: Tensor) -> None:
        bank = self.state["bank"]
        count, start = min(len(ids), len(bank)), int(self.state["next"])
        at = (torch.arange(count, device=self.device) + start) % len(bank)
        bank[at], self.state["bank_ids"][at] = first[-count:], ids[-count:]
        self.state["next"].fill_((start + count) % len(bank))

    def _knn(self, first: Tensor, ids: Tensor) -> Tensor | None:
        ids, first = ids[:_QUERIES], first[:_QUERIES]
        bank_ids = self.state["bank_ids"]
        labels = torch.where(bank_ids >= 0, self.labels[bank_ids.clamp_min(0)], -1)
        k = min(_K, len(bank_ids))
        similar = first @ self.state["bank"].T
        similar.masked_fill_((labels < 0) | (bank_ids == ids[:, None]), -2.0)
        best, at = similar.topk(k, dim=1)
        targets = self.labels[ids]
        known = (targets >= 0) & (best[:, -1] > -2)
        if not known.any():
            return None
        scores = votes(best[known], labels[at[known]], self.classes, TAU)
        right = true_class_rank(scores, targets[known]) == 0
        return right.to(widest_float(self.device)).mean()


class _Clock:
    """Measures the share of time inside `with` blocks; on a GPU by events, synced in `percent`."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.seconds, self.since = 0.0, time.perf_counter()
        self.events: list[Any] = []

    def __enter__(self) -> None:
        self.start = time.perf_counter()
        if self.cuda:
            self.events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
            self.events[-1][0].record()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.start
        if self.cuda:
            self.events[-1][1].record()

    def percent(self) -> float:
        """The share in percent since the last call."""
        spent = self.seconds
        if self.cuda:
            self.events[-1][1].synchronize()
            spent = sum(a.elapsed_time(b) for a, b in self.events) / 1000
        now = time.perf_counter()
        share = 100 * spent / (now - self.since)
        self.seconds, self.since, self.events = 0.0, now, []
        return share


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
