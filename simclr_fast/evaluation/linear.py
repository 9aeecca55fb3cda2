"""L2-regularised logistic regression on frozen features, by L-BFGS to convergence.

The objective is scikit-learn's: Σᵢ CE(W xᵢ + b, yᵢ) + l2/2 ‖W‖². So l2 = 1/C, and the bias is not
penalised. Features are standardised by the training images' mean and deviation. The protocol is
that of arXiv:2002.05709, B.8.1: no augmentation, L-BFGS, l2 from 45 logarithmically spaced values
between 1e-6 and 1e5, chosen on held-out training images.

L-BFGS runs in float64 on the features' principal components. Each component is divided by
sqrt(variance / classes + l2 / n), because variance / classes + l2 / n is about the Hessian's
diagonal. With this scaling tens of steps suffice. The minimiser is the same, because a rotation
does not change the penalty.
"""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simclr_fast.evaluation.accuracy import Accuracy, bootstrap, true_class_rank
from simclr_fast.evaluation.subsets import balanced_subset
from simclr_fast.ops import widest_float
from simclr_fast.utils.checkpoint import load_checkpoint, write_atomic
from simclr_fast.utils.extras import need

log = logging.getLogger(__name__)

SWEEP = tuple(float(v) for v in np.logspace(5, -6, 45))
# A fit has converged when no component of the scaled gradient of (objective / n) exceeds this.
_TOLERANCE = 1e-6
# For the fits that only choose l2, and for `linear_probe`.
_ROUGH_TOLERANCE = 1e-4
_ITERATIONS = 2000
_HISTORY = 10
# Elements of a matrix that is in memory at once, logits for example.
_BLOCK = 2**24
_VALIDATION = 0.2
# The l2 of `linear_probe`, chosen on held-out training images of the demo data. There a value ten
# times as large changes the accuracy by one percentage point.
_L2 = 1.0


@dataclass
class Logistic:
    """x [n, D] → logits (x - mean) / std · weightᵀ + bias.

    weight: float64 [C, D]; bias: float64 [C]; mean, std: float32 [D].
    iterations: steps of L-BFGS. gradient: the largest component of the scaled gradient at the end.
    converged: whether that is within the tolerance.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor
    l2: float
    iterations: int
    gradient: float
    converged: bool

    def parameters(self) -> Tensor:
        """[C, D + 1]: weights and biases."""
        return torch.cat([self.weight, self.bias[:, None]], 1)

    def true_class_rank(self, x: Tensor, labels: Any) -> Tensor:
        """`accuracy.true_class_rank` of every row: int64 [n] on the CPU."""
        targets = _integers(labels).to(self.weight.device)
        parts = [true_class_rank(logits, targets[rows]).cpu() for rows, logits in self._logits(x)]
        return torch.cat(parts)

    def predict(self, x: Tensor) -> Tensor:
        """The most probable class of every row: int64 [n] on the CPU."""
        return torch.cat([logits.argmax(1).cpu() for _, logits in self._logits(x)])

    def _logits(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows, and their logits, float32 [rows, C]."""
        weight, bias = self.weight.float(), self.bias.float()
        for rows in _blocks(len(x), max(weight.shape)):
            z = (x[rows].to(weight.device) - self.mean) / self.std
            yield rows, z @ weight.T + bias


def fit_logistic(
    x: Tensor,
    labels: Any,
    l2: float,
    *,
    n_classes: int | None = None,
    start: Logistic | None = None,
    device: torch.device | str = "cpu",
    tolerance: float = _TOLERANCE,
    max_iterations: int = _ITERATIONS,
) -> Logistic:
    """Minimise the objective that is given at the top of this module.

    x: float [n, D]; labels: integers [n] in [0, n_classes). start: a fit on the same features
        that L-BFGS starts from.
    tolerance: the largest component that the gradient of (objective / n) may have in the scaled
        coordinates. A fit that stops at max_iterations before has converged=False.

    Raises:
        ValueError: a feature is not finite, l2 is not positive, or a label is out of range.
    """
    if not l2 > 0:
        raise ValueError(f"l2 must be positive, got {l2}")
    targets = _integers(labels)
    classes = n_classes or int(targets.max()) + 1
    if len(targets) != len(x) or int(targets.min()) < 0 or int(targets.max()) >= classes:
        raise ValueError(f"labels must be {len(x)} integers in [0, {classes})")
    problem = _Problem(x, targets, classes, device)
    return problem.fit(l2, None if start is None else start.parameters(), tolerance, max_iterations)


class _Problem:
    """Standardised features in their principal axes, and the fits on them.

    z: [n, D] with covariance diag(variance); axes: float64 [D, D], standardised x = z · axesᵀ.
    products: the dtype in which the objective multiplies matrices. Sums over blocks of rows are
        always float64. Many GPUs multiply float64 matrices 32 to 64 times more slowly than float32.
    device: where the data and the fits are; the CPU if the device has no float64.
    """

    def __init__(
        self,
        x: Tensor,
        targets: Tensor,
        classes: int,
        device: torch.device | str,
        products: torch.dtype = torch.float64,
    ) -> None:
        if widest_float(torch.device(device)) is not torch.float64:
            device = "cpu"
        self.targets, self.classes, self.products = targets.to(device), classes, products
        self.mean, self.std = _moments(x, device)
        n, dim = x.shape
        # In float64 if that is small.
        storage = torch.float32 if x.numel() > _BLOCK * 8 else products
        standard = torch.empty(n, dim, dtype=storage, device=device)
        covariance = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        for rows in _blocks(n, dim):
            standard[rows] = (x[rows].to(device) - self.mean) / self.std
            block = standard[rows].double()
            covariance.addmm_(block.T, block, alpha=1 / n)
        variance, self.axes = torch.linalg.eigh(covariance)
        self.variance = variance.clamp_min(0)
        for rows in _blocks(n, dim):
            standard[rows] = (standard[rows].double() @ self.axes).to(standard.dtype)
        self.z = standard

    def fit(
        self, l2: float, start: Tensor | None, tolerance: float, max_iterations: int
    ) -> Logistic:
        """start: weights and biases to start from, float64 [C, D + 1]; None for zeros."""
        n, dim = self.z.shape
        scale = (self.variance / self.classes + l2 / n).rsqrt()
        scale = torch.cat([scale, scale.new_full((1,), self.classes**0.5)])
        flat = torch.zeros(self.classes, dim + 1, dtype=torch.float64, device=self.z.device)
        if start is not None:
            flat.copy_(start)
            flat[:, :dim] = flat[:, :dim] @ self.axes
            flat /= scale

        def objective() -> Tensor:
            parameters = flat * scale
            weight, bias = parameters[:, :dim], parameters[:, dim]
            loss = l2 / 2 * weight.square().sum()
            gradient = l2 * parameters
            gradient[:, dim] = 0
            for rows in _blocks(n, max(self.classes, dim)):
                block = self.z[rows].to(self.products)
                logits = (block @ weight.T.to(self.products)).double() + bias
                log_p = torch.log_softmax(logits, 1)
                mine = self.targets[rows, None]
                loss = loss - log_p.gather(1, mine).sum()
                error = log_p.exp_().scatter_add_(1, mine, bias.new_full(mine.shape, -1.0))
                gradient[:, :dim] += error.T.to(self.products) @ block
                gradient[:, dim] += error.sum(0)
            flat.grad = gradient / n * scale
            return loss / n

        optimizer = torch.optim.LBFGS(
            [flat],
            max_iter=max_iterations,
            tolerance_grad=tolerance,
            tolerance_change=0,
            history_size=_HISTORY,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(objective)
        objective()
        assert flat.grad is not None
        gradient = float(flat.grad.abs().max())
        parameters = flat * scale
        return Logistic(
            weight=parameters[:, :dim] @ self.axes.T,
            bias=parameters[:, dim],
            mean=self.mean,
            std=self.std,
            l2=l2,
            iterations=optimizer.state[flat]["n_iter"],
            gradient=gradient,
            converged=gradient <= tolerance,
        )


@dataclass
class Sweep:
    """What `sweep_logistic` finds.

    fit: the fit on all training images with the chosen l2. validation: l2 → top-1 on the held-out
    training images.
    """

    fit: Logistic
    validation: dict[float, float]


def sweep_logistic(
    x: Tensor,
    labels: Any,
    *,
    n_classes: int,
    values: tuple[float, ...] = SWEEP,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Path | None = None,
) -> Sweep:
    """Choose l2 on a class-balanced fifth of the training images, then fit on all of them.

    The only image of a class is not held out: without it the class would be unknown to the fits
    that choose l2. It counts among the held-out images although the fits have seen it. Otherwise an
    l2 so large that such classes are never predicted would look as good as any.

    values: the values of l2, largest first; each fit starts from the one before. If several reach
        the same accuracy, the largest is chosen.
    progress: a file for the finished fits; a sweep of the same features, labels and arguments
        continues from it. The caller deletes it.
    """
    targets = _integers(labels)
    held_out = np.zeros(len(x), bool)
    held_out[balanced_subset(targets.numpy(), _VALIDATION, seed)] = True
    alone = np.bincount(targets.numpy())[targets.numpy()] == 1
    judged, held_out = held_out | alone, held_out & ~alone
    # These fits only choose l2, and there are 45 of them: fast products are exact enough.
    problem = _Problem(x[~held_out], targets[~held_out], n_classes, device, _rough_products(device))
    done: dict[float, float] = {}
    start = None
    # The file may belong to other arguments, features or labels.
    key = _fingerprint(x, targets, values, seed, n_classes) if progress is not None else ""
    if progress is not None and progress.exists():
        saved = _read(progress)
        if saved.get("key") == key:
            done, start = saved["done"], saved["start"]
    for l2 in need("tqdm").tqdm(values, desc="l2 sweep", leave=False):
        if l2 in done:
            continue
        fit = problem.fit(l2, start, _ROUGH_TOLERANCE, _ITERATIONS)
        rank = fit.true_class_rank(x[judged], targets[judged])
        done[l2] = float((rank == 0).double().mean())
        start = fit.parameters()
        if progress is not None:
            write_atomic(progress, partial(torch.save, {"key": key, "done": done, "start": start}))
    # Free its copy of the features before the final fit makes another.
    del problem
    best = max(done, key=lambda l2: (done[l2], l2))
    return Sweep(fit_logistic(x, targets, best, n_classes=n_classes, device=device), done)


def _read(progress: Path) -> dict[str, Any]:
    """The kept part of a sweep; {} if the file is damaged. Then the sweep begins anew."""
    try:
        return load_checkpoint(progress)
    except ValueError as error:
        log.warning("the sweep begins anew: %s", error)
        return {}


def _fingerprint(x: Tensor, targets: Tensor, *arguments: Any) -> str:
    """A hash of everything that a sweep's fits depend on."""
    digest = hashlib.blake2b(repr((x.dtype, x.shape, arguments)).encode(), digest_size=16)
    digest.update(targets.numpy().tobytes())
    for rows in _blocks(*x.shape):
        digest.update(x[rows].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def linear_probe(
    train: Tensor,
    train_labels: Any,
    test: Tensor,
    test_labels: Any,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Accuracy:
    """A quick estimate: the logistic regression at one fixed l2. `sweep_logistic` is the protocol.

    train: [n, D], test: [m, D]; labels: integers [n] and [m]. Rows with a negative label (STL-10's
    unlabelled images) are left out. seed: for the bootstrap. device: where the fit is computed.
    """
    accuracy, _ = confusion_probe(train, train_labels, test, test_labels, seed, device)
    return accuracy


def confusion_probe(
    train: Tensor,
    train_labels: Any,
    test: Tensor,
    test_labels: Any,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Accuracy, np.ndarray]:
    """`linear_probe`, and the test images by true and predicted class: int64 [C, C]."""
    (train, train_labels), (test, test_labels) = (
        (x[labels >= 0], labels[labels >= 0])
        for x, labels in ((train, np.asarray(train_labels)), (test, np.asarray(test_labels)))
    )
    classes = 1 + int(max(np.max(train_labels), np.max(test_labels)))
    problem = _Problem(train, _integers(train_labels), classes, device, _rough_products(device))
    fit = problem.fit(_L2, None, _ROUGH_TOLERANCE, _ITERATIONS)
    correct = (fit.true_class_rank(test, test_labels) == 0).numpy()
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (test_labels, fit.predict(test).numpy()), 1)
    return bootstrap(correct, seed), counts


def _moments(x: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature, float32 [D]; 1 for a constant feature."""
    total = torch.zeros(x.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for rows in _blocks(len(x), x.shape[1]):
        total += x[rows].double().sum(0).cpu()
    mean = total / len(x)
    for rows in _blocks(len(x), x.shape[1]):
        squares += (x[rows].double().cpu() - mean).square().sum(0)
    std = (squares / len(x)).sqrt()
    if not torch.isfinite(std).all():
        raise ValueError("the features are not finite: the encoder has diverged")
    std = torch.where(std > 1e-6 * mean.abs().clamp_min(1e-6), std, torch.ones_like(std))
    return mean.float().to(device), std.float().to(device)


def _rough_products(device: torch.device | str) -> torch.dtype:
    """The dtype of the matrix products in a fit that only chooses l2."""
    return torch.float32 if torch.device(device).type == "cuda" else torch.float64


def _blocks(n: int, width: int) -> Iterator[slice]:
    step = max(_BLOCK // width, 1)
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def _integers(labels: Any) -> Tensor:
    return torch.as_tensor(np.asarray(labels), dtype=torch.int64)
