"""Top-1, top-5 and per-class accuracy, with bootstrap intervals."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_BOOTSTRAPS = 2000


@dataclass(frozen=True)
class Accuracy:
    """Accuracy in [0, 1] on n images, with a 95% bootstrap interval over the images."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:6.1%}  [{self.low:.1%}, {self.high:.1%}]"


@dataclass(frozen=True)
class Scores:
    """top1, top5: Accuracy (top5 None for fewer than 6 classes); per_class: top-1 by class name."""

    top1: Accuracy
    top5: Accuracy | None
    per_class: dict[str, float]

    @property
    def mean_per_class(self) -> float:
        """The metric of Flowers, Pets, Aircraft and Caltech (arXiv:2002.05709, B.8.1)."""
        return float(np.mean(list(self.per_class.values())))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "mean_per_class": self.mean_per_class}

    def row(self, name: str) -> str:
        """One line of a table: the name, top-1 and top-5 with their intervals."""
        top5 = f"   top-5 {self.top5}" if self.top5 else ""
        return f"{name:<28} top-1 {self.top1}{top5}"

    def worst(self, count: int = 3) -> str:
        """The classes with the lowest top-1."""
        lowest = sorted(self.per_class.items(), key=lambda item: item[1])[:count]
        return ", ".join(f"{name} {value:.1%}" for name, value in lowest)


def bootstrap(correct: np.ndarray, seed: int = 0) -> Accuracy:
    """The mean of `correct`, bool [n], with the 2.5% and 97.5% quantiles of its resampled means."""
    n = len(correct)
    means = np.random.default_rng(seed).binomial(n, correct.mean(), _BOOTSTRAPS) / n
    low, high = np.percentile(means, [2.5, 97.5])
    return Accuracy(float(correct.mean()), float(low), float(high), n)


def true_class_rank(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes score higher than the true one: int64 [n]. Ties go to the lower index.

    scores: [n, C], higher is likelier; labels: int64 [n] on the same device.
    """
    true = scores.gather(1, labels[:, None])
    before = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    return ((scores > true) | ((scores == true) & before)).sum(1)


def score(rank: Tensor, labels: np.ndarray, classes: tuple[str, ...], seed: int = 0) -> Scores:
    """Accuracies from the rank of each image's true class.

    rank: int64 [n] from `true_class_rank`; labels: integers [n] below len(classes).
    """
    first = (rank == 0).numpy(force=True)
    five = (rank < 5).numpy(force=True)
    labels = np.asarray(labels)
    return Scores(
        top1=bootstrap(first, seed),
        top5=bootstrap(five, seed) if len(classes) > 5 else None,
        per_class={
            name: float(first[labels == i].mean())
            for i, name in enumerate(classes)
            if (labels == i).any()
        },
    )
