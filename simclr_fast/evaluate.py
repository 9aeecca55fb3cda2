"""What an encoder has learnt: logistic regression on its frozen features."""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from simclr_fast.augment_params import Augmentation
from simclr_fast.data import ImageLoader
from simclr_fast.extras import need
from simclr_fast.models import encode
from simclr_fast.sources import Source

_BOOTSTRAPS = 2000
# scikit-learn's inverse strength of the L2 penalty, on standardised features. Chosen on held-out
# training images of the embedded data; a factor of ten more moves the result by a point.
_C = 1.0
# Raw pixels converge slowly, long after the predictions have stopped changing.
_ITERATIONS, _TOLERANCE = 500, 1e-3


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy in [0, 1] on n images, with a 95% bootstrap interval over the images."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:6.1%}  [{self.low:.1%}, {self.high:.1%}]"


def features(
    encoder: nn.Module,
    source: Source,
    augmentation: Augmentation,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
) -> Tensor:
    """h of every image, undistorted: float32 [n, feature_dim] on the CPU, in the source's order."""
    was_training = encoder.training
    loader = ImageLoader(source, batch_size, augmentation, channels_last=True)
    try:
        return encode(encoder, loader, torch.device(device))
    finally:
        encoder.train(was_training)


def pixels(source: Source, augmentation: Augmentation) -> Tensor:
    """Every image, undistorted, as a row of its values: float32 [n, 3·size·size]."""
    loader = ImageLoader(source, min(256, len(source)), augmentation)
    return torch.cat([images.flatten(1).clone() for images, _ in loader])


def linear_probe(train: Tensor, train_labels, test: Tensor, test_labels, seed: int = 0) -> Accuracy:
    """Multinomial logistic regression, L2-regularised, on standardised features.

    train: [n, D], test: [m, D]; labels: integers [n] and [m].
    """
    need("sklearn", "train")
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if not (torch.isfinite(train).all() and torch.isfinite(test).all()):
        raise ValueError("the features are not finite: the encoder has diverged")
    probe = make_pipeline(
        StandardScaler(), LogisticRegression(C=_C, max_iter=_ITERATIONS, tol=_TOLERANCE)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=ConvergenceWarning)
        probe.fit(train.numpy(), train_labels)
    correct = probe.predict(test.numpy()) == np.asarray(test_labels)
    return bootstrap(correct, seed)


def bootstrap(correct: np.ndarray, seed: int = 0) -> Accuracy:
    """The mean of `correct`, bool [n], and the 2.5 and 97.5 percentiles of its resampled means."""
    n = len(correct)
    means = np.random.default_rng(seed).binomial(n, correct.mean(), _BOOTSTRAPS) / n
    low, high = np.percentile(means, [2.5, 97.5])
    return Accuracy(float(correct.mean()), float(low), float(high), n)
