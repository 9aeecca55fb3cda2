"""simclr-fast eval linear | knn | finetune | layers | embed."""

import copy
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import tyro

from simclr_fast.commands.protocol import Options
from simclr_fast.data.datasets import TORCHVISION
from simclr_fast.data.sources import evenly, subset
from simclr_fast.data.whole import whole_images
from simclr_fast.evaluation import embed, knn, layers, linear, subsets
from simclr_fast.evaluation.accuracy import Scores
from simclr_fast.evaluation.classifier import Recipe
from simclr_fast.evaluation.plots import plot_embedding, plot_layers, plot_neighbours
from simclr_fast.evaluation.subsets import LabelledPair
from simclr_fast.utils.checkpoint import write_text
from simclr_fast.utils.device import expand_segments

USAGE = """usage: simclr-fast eval PROTOCOL --encoder FILE [OPTIONS]

Measure what an encoder has learnt: a table, a JSON file, pictures.

protocols:
  linear    logistic regression on frozen features, and a linear layer trained with random crops
  knn       weighted k nearest neighbours by cosine similarity
  finetune  the whole network on 1%, 10% and 100% of the labels
  layers    compare h, each projector layer and z of a run
  embed     pictures of the features, and a page to browse nearest neighbours

simclr-fast eval PROTOCOL --help   the protocol's options
"""


def run(arguments: list[str]) -> int:
    """Run a protocol, print its table and write its JSON."""
    if not arguments or arguments[0] not in PROTOCOLS:
        asked = arguments and arguments[0] in ("-h", "--help")
        print(USAGE, end="", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    name = arguments[0]
    options = tyro.cli(PROTOCOLS[name], args=arguments[1:], prog=f"simclr-fast eval {name}")
    expand_segments()
    if not options.goes_on():
        return 0
    for line in options.lines():
        print(line, flush=True)
    return 0


@dataclass(frozen=True)
class Linear(Options):
    """Linear evaluation of a frozen encoder (arXiv:2002.05709, B.6 and B.8.1)."""

    logistic: bool = True
    """Fit an L2-regularised logistic regression; the penalty is chosen among 45."""
    sgd: bool = True
    """Train a linear layer with random crops and flips."""
    optimizer: Literal["sgd", "lars"] = "sgd"
    """The optimizer of the linear layer."""
    epochs: int = 90
    """Epochs for the linear layer."""
    batch_size: int = 4096
    """Images per step for the linear layer."""
    lr: float = 0.1
    """Learning rate per 256 images of the batch, for sgd."""

    protocol: ClassVar[str] = "linear"

    def goes_on(self) -> bool:
        return self.features_on_all_ranks() if self.logistic else super().goes_on()

    def lines(self) -> Iterator[str]:
        pair = self.pair()
        weights = self.load()
        yield f"{weights}\nlinear evaluation, {measured(pair)}"
        results: dict[str, Any] = {}
        if self.logistic:
            x, y = self.features(weights.encoder, weights.augmentation, pair)
            sweep = self.sweep("h", x, pair)
            fit = sweep.fit
            scores = self.scores(fit.true_class_rank(y, pair.test_labels), pair)
            results["logistic"] = {
                **scores.to_json(),
                "l2": fit.l2,
                "validation": sweep.validation,
                "iterations": fit.iterations,
                "gradient": fit.gradient,
                "converged": fit.converged,
            }
            yield from _table("logistic regression", scores)
            yield (
                f"{'':<28} l2 {fit.l2:.3g} of {len(sweep.validation)} values, "
                f"{sweep.validation[fit.l2]:.1%} on held-out training images; {fit.iterations} "
                f"steps, {'converged' if fit.converged else 'NOT converged'}"
            )
        if self.sgd:
            recipe = Recipe(True, self.epochs, self.lr, self.batch_size, self.optimizer)
            name = f"linear-{self.optimizer}"
            scores = self.trained(weights, weights.encoder, pair.train, pair, recipe, name)
            results[self.optimizer] = {**scores.to_json(), "recipe": asdict(recipe)}
            yield from _table(f"{self.optimizer.upper()}, {self.epochs} epochs", scores)
        yield self.write(results, train=pair.train, test=pair.test)


@dataclass(frozen=True)
class Knn(Options):
    """Weighted k nearest neighbours by cosine similarity (arXiv:1805.01978, 3.4)."""

    k: tuple[int, ...] = knn.K
    """Numbers of neighbours. Each gives a result."""
    tau: float = knn.TAU
    """Temperature: a neighbour's vote has the weight exp(similarity / tau)."""

    protocol: ClassVar[str] = "knn"

    def goes_on(self) -> bool:
        return self.features_on_all_ranks()

    def lines(self) -> Iterator[str]:
        pair = self.pair()
        weights = self.load()
        yield f"{weights}\nk-NN, τ {self.tau}, {measured(pair)}"
        x, y = self.features(weights.encoder, weights.augmentation, pair)
        found = knn.knn_ranks(
            x,
            pair.train_labels,
            y,
            pair.test_labels,
            len(pair.classes),
            ks=self.k,
            tau=self.tau,
            device=self.torch_device,
        )
        results = {}
        for k, rank in found.items():
            scores = self.scores(rank, pair)
            results[f"k={k}"] = scores.to_json()
            yield from _table(f"{k} neighbours", scores)
        yield self.write(results, train=pair.train, test=pair.test)


@dataclass(frozen=True)
class Finetune(Options):
    """Train the whole network on a part of the labels (arXiv:2002.05709, B.5)."""

    shares: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Shares of the training images of each class. Each gives a result."""
    subset: Path | None = None
    """Train on the images in this list instead: a file with one file name per line, such as
    1percent.txt of google-research/simclr."""
    epochs: int | None = None
    """Epochs. By default 60 for up to 2% of the images, else 30."""
    batch_size: int = 4096
    """Images per step."""
    lr: float = 0.05
    """Learning rate per 256 images of the batch."""

    protocol: ClassVar[str] = "finetune"

    def lines(self) -> Iterator[str]:
        pair = self.pair()
        weights = self.load()
        yield f"{weights}\nfine-tuning, {measured(pair)}"
        parts: dict[str, np.ndarray] = {}
        if self.subset:
            parts[self.subset.stem] = subsets.listed_subset(pair.train, self.subset)
        else:
            for share in self.shares:
                parts[f"{share:.4g}"] = subsets.balanced_subset(pair.train_labels, share, self.seed)
        results = {}
        for name, ids in parts.items():
            part = subset(pair.train, ids)
            few = len(part) <= 0.02 * len(pair.train)
            recipe = Recipe(False, self.epochs or (60 if few else 30), self.lr, self.batch_size)
            encoder = copy.deepcopy(weights.encoder)
            scores = self.trained(weights, encoder, part, pair, recipe, f"finetune-{name}")
            results[name] = {**scores.to_json(), "images": len(part), "recipe": asdict(recipe)}
            yield from _table(f"{len(part)} labels, {recipe.epochs} epochs", scores)
        yield self.write(results, train=pair.train, test=pair.test)


@dataclass(frozen=True)
class Layers(Options):
    """Logistic regression on h, on each projector layer and on z of a run (--encoder: its folder).

    The penalty is chosen separately for each layer, among 12 values (every fourth of the 45).
    """

    protocol: ClassVar[str] = "layers"

    @property
    def channels(self) -> int:
        return layers.load_run(self.encoder)[1].channels

    def lines(self) -> Iterator[str]:
        pair = self.pair()
        model, augmentation = layers.load_run(self.encoder)
        taps = layers.Taps(model).to(self.torch_device).eval()
        yield f"{self.encoder}: logistic regression, {measured(pair)}"
        both = self.features(taps, augmentation, pair)
        parts = [features.split(taps.widths(features.shape[1]), dim=1) for features in both]
        results, found = {}, {}
        for name, x, y in zip(taps.names, *parts, strict=True):
            sweep = self.sweep(name, x, pair, linear.SWEEP[::4])
            scores = self.scores(sweep.fit.true_class_rank(y, pair.test_labels), pair)
            found[name] = scores.top1
            results[name] = {**scores.to_json(), "l2": sweep.fit.l2, "width": x.shape[1]}
            yield scores.row(f"{name} [{x.shape[1]}]")
        picture = self.folder / "layers.png"
        plot_layers(found, picture)
        yield self.write(results, train=pair.train, test=pair.test)
        yield f"{'picture':<28} {picture}"


@dataclass(frozen=True)
class Embed(Options):
    """Draw the features in two dimensions, and nearest neighbours as a picture and as a web page.

    The images are those of --test, else the test images of --data, else --data itself. Labels only
    determine the colours.
    """

    methods: tuple[embed.Method, ...] = ()
    """How to project the features to two dimensions. By default pca and tsne, and umap if
    umap-learn is installed."""
    images: int = 1000
    """Show at most this many images, evenly spaced in the data."""
    queries: int = 10
    """Rows in the picture of neighbours."""
    thumb: int = 64
    """Side of a small image in the picture and on the page, in pixels."""

    protocol: ClassVar[str] = "embed"

    def lines(self) -> Iterator[str]:
        source = subsets.shown_source(self.data, self.test, **self.opening)
        some = subset(source, evenly(source, self.images))
        source = whole_images(some, self.on_error, self.workers)
        weights = self.load()
        yield f"{weights}\nimages           {source.account.line()}"
        features = self.features_of(weights.encoder, weights.augmentation, source, "shown")
        labels, classes = subsets.labels_or_none(source)
        methods: tuple[embed.Method, ...] = self.methods or ("pca", "tsne")
        if not self.methods and find_spec("umap"):
            methods += ("umap",)
        points: dict[str, np.ndarray] = {}
        for method in methods:
            points[method] = embed.project(features, method, self.seed)
            picture = self.folder / f"embed-{method}.png"
            title = f"{embed.TITLES[method]} of the features h of {len(source)} images"
            shown = embed.class_pictures(source, points[method], labels, weights.augmentation)
            plot_embedding(points[method], labels, classes, picture, title, shown)
            yield f"{method:<28} {picture}"
        similarities, indices = embed.neighbours(features, self.torch_device)
        thumbs = embed.thumbnails(source, weights.augmentation, self.thumb)
        rows = evenly(source, self.queries)
        sheet = self.folder / "neighbours.png"
        plot_neighbours(thumbs, similarities, indices, labels, classes, rows, sheet)
        yield f"{'nearest neighbours':<28} {sheet}"
        page = embed.page(
            f"{len(source)} images of {_short(self.data)} by {weights.model}",
            points,
            thumbs,
            labels,
            classes,
            [embed.short_name(source.name(i)) for i in range(len(source))],
            similarities,
            indices,
        )
        path = self.folder / "embed.html"
        write_text(path, page)
        yield f"{'page':<28} {path}"
        if source.labels is not None and source.has_labels:
            known = torch.from_numpy(source.labels)
            if not indices.numel():
                return
            same = (known[indices] == known[:, None])[known >= 0].double()
            results = {"images": len(source), "neighbours_of_the_same_class": same.mean().item()}
            yield f"{'same class':<28} {same.mean():.1%} of the {indices.shape[1]} neighbours"
            yield self.write(results, shown=source)


PROTOCOLS: dict[str, type[Options]] = {
    kind.protocol: kind for kind in (Linear, Knn, Finetune, Layers, Embed)
}


def _short(data: str) -> str:
    """A data set's name without its folder: cifar10:ROOT → "cifar10", /a/b/photos → "photos"."""
    kind, colon, _ = data.partition(":")
    return kind if colon and kind in TORCHVISION else Path(data).name


def measured(pair: LabelledPair) -> str:
    """What is measured on, for the head of a protocol's output."""
    absent = sorted(set(range(len(pair.classes))) - set(pair.test_labels.tolist()))
    note = ""
    if absent:
        names = ", ".join(pair.classes[i] for i in absent[:5])
        names += ", ..." if len(absent) > 5 else ""
        note = f"\n{len(absent)} of {len(pair.classes)} classes have no test images: {names}"
    return (
        f"{len(pair.test)} test images, 95% bootstrap intervals\n"
        f"training images  {pair.train.account.line()}\n"
        f"test images      {pair.test.account.line()}{note}"
    )


def _table(name: str, scores: Scores) -> Iterator[str]:
    yield scores.row(name)
    yield f"{'':<28} mean per class {scores.mean_per_class:.1%}; lowest classes: {scores.worst()}"
