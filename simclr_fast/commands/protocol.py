"""Shared by all protocols of simclr-fast eval: options, features, a trained classifier, JSON."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from simclr_fast.augment.params import Augmentation
from simclr_fast.data.sources import Source
from simclr_fast.evaluation import linear
from simclr_fast.evaluation.accuracy import Scores, score
from simclr_fast.evaluation.classifier import Recipe, classify, train_classifier
from simclr_fast.evaluation.features import cached_features, extract_features
from simclr_fast.evaluation.subsets import LabelledPair, labelled_pair
from simclr_fast.models.encoders import Stem
from simclr_fast.models.weights import Weights, load_weights
from simclr_fast.utils.checkpoint import write_json
from simclr_fast.utils.device import resolve_device
from simclr_fast.utils.distributed import join_world
from simclr_fast.utils.launch import launched, require_one_process


@dataclass(frozen=True)
class Options:
    """The options that all protocols have."""

    encoder: Path
    """A file of weights of any library (.safetensors, .pth, .pt, .ckpt), or the folder of a run."""
    data: str = "demo"
    """Training images with labels: "demo", a folder with one folder per class, shards, or NAME:ROOT
    for a data set of torchvision in the folder ROOT: aircraft, cars, cifar10, cifar100, dtd,
    flowers102, food101, pets, stl10 or svhn."""
    test: str | None = None
    """Test images with labels, named as for --data. Not needed for the demo data and torchvision's
    data sets, which have a test split."""
    labels: Path | None = None
    """A CSV file with lines "path,label", or a column of a Hugging Face data set. Its labels
    replace those of --data and --test."""
    image_key: str | None = None
    """Which image of a sample to use if it has several: a field of tars (jpg), a feature of
    TFRecords, a column of Hugging Face data sets."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with an image that cannot be decoded, or a damaged archive. raise: end and name
    it. skip: leave it out of training and test images, name it and count it."""
    out: Path | None = None
    """Output folder. By default "eval" in the encoder's folder."""
    cache: Path | None = None
    """Folder for the features, which are computed once. By default in the cache of the demo data
    ($SIMCLR_FAST_CACHE, ~/.cache/simclr_fast)."""
    model: str | None = None
    """The encoder's torchvision or timm model, if its file does not say."""
    width: float | None = None
    """The encoder's width, if its file does not say."""
    stem: Stem | None = None
    """The encoder's first layers, if its file does not say."""
    prefix: str | None = None
    """What stands before the names of the encoder's weights, if the file has several encoders, such
    as encoder_k. (with its dot)."""
    mean: tuple[float, ...] | None = None
    """Mean of the pixels in [0, 1] that the encoder was trained with. By default what its file
    says. If it does not: ImageNet's, or none for a ResNet whose first batch norm shows that it saw
    pixels in [0, 1], as google-research/simclr's did."""
    std: tuple[float, ...] | None = None
    """Their standard deviation."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps. auto: a GPU if torch sees one, else the CPU."""
    workers: int | None = None
    """Threads that decode images. By default the number of cores, at most 8."""
    seed: int = 0
    """Determines subsets, crops and bootstrap intervals."""

    protocol: ClassVar[str]

    def lines(self) -> Iterator[str]:
        """The lines to print. Each is yielded as soon as it is known."""
        raise NotImplementedError

    @property
    def torch_device(self) -> torch.device:
        return resolve_device(self.device)

    @property
    def folder(self) -> Path:
        beside = self.encoder if self.encoder.is_dir() else self.encoder.parent
        return self.out or beside / "eval"

    @property
    def opening(self) -> dict[str, Any]:
        """How to open --data and --test."""
        return {
            "labels": self.labels,
            "image_key": self.image_key,
            "on_error": self.on_error,
            "channels": self.channels,
        }

    @property
    def channels(self) -> int:
        """Of the images, as the encoder was trained on them."""
        return self.load().augmentation.channels

    def pair(self) -> LabelledPair:
        return labelled_pair(self.data, self.test, **self.opening)

    def load(self) -> Weights:
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean and std go together, got {self.mean} and {self.std}")
        given: dict[str, Any] = {"model": self.model, "width": self.width, "stem": self.stem}
        weights = load_weights(self.encoder, **given, prefix=self.prefix)
        if self.mean is not None:
            normal = replace(weights.augmentation, mean=self.mean, std=self.std)
            weights = replace(weights, augmentation=normal, input_known_from="")
        weights.encoder.to(self.torch_device)
        return weights

    def goes_on(self) -> bool:
        """Whether this process computes `lines`: always, as it must be the only one."""
        require_one_process()
        return True

    def features_on_all_ranks(self) -> bool:
        """Compute the features of all images on all ranks, into the cache; True on rank 0."""
        if launched().size == 1:
            return True
        with join_world(self.device) as world:
            pair, weights = self.pair(), self.load()
            for source, name in ((pair.train, "training"), (pair.test, "test")):
                given = weights.encoder, source, weights.augmentation
                extract_features(*given, **self._extraction(name), world=world)
        return world.rank == 0

    def features(
        self, encoder: nn.Module, augmentation: Augmentation, pair: LabelledPair
    ) -> tuple[Tensor, Tensor]:
        """Those of the training and of the test images."""
        train = self.features_of(encoder, augmentation, pair.train, "training")
        return train, self.features_of(encoder, augmentation, pair.test, "test")

    def features_of(
        self, encoder: nn.Module, augmentation: Augmentation, source: Source, name: str
    ) -> Tensor:
        return cached_features(encoder, source, augmentation, **self._extraction(name))

    def _extraction(self, name: str) -> dict[str, Any]:
        """Options of `extract_features`."""
        return {
            "folder": self.cache,
            "device": self.torch_device,
            "workers": self.workers,
            "name": f"features of the {name} images",
        }

    def trained(
        self,
        weights: Weights,
        encoder: nn.Module,
        part: Source,
        pair: LabelledPair,
        recipe: Recipe,
        name: str,
    ) -> Scores:
        """Test scores of a classifier trained on `part`; its checkpoints are in folder/name."""
        model = train_classifier(
            encoder,
            weights.feature_dim,
            part,
            len(pair.classes),
            recipe,
            weights.augmentation,
            self.folder / name,
            seed=self.seed,
            device=self.torch_device,
            workers=self.workers,
            name=name,
        )
        rank = classify(
            model, pair.test, weights.augmentation, device=self.torch_device, workers=self.workers
        )
        return self.scores(rank, pair)

    def scores(self, rank: Tensor, pair: LabelledPair) -> Scores:
        """rank: `true_class_rank` of the test images."""
        return score(rank, pair.test_labels, pair.classes, self.seed)

    def sweep(
        self, name: str, x: Tensor, pair: LabelledPair, values: tuple[float, ...] = linear.SWEEP
    ) -> linear.Sweep:
        """`linear.sweep_logistic` on the training images' features `x`.

        Its progress is kept on disk until `write`.
        """
        return linear.sweep_logistic(
            x,
            pair.train_labels,
            n_classes=len(pair.classes),
            values=values,
            seed=self.seed,
            device=self.torch_device,
            progress=self.folder / f"{self.protocol}-sweep-{name}.pt",
        )

    def write(self, results: dict[str, Any], **images: Source) -> str:
        """Write PROTOCOL.json, delete the progress of the sweeps, return a line to print.

        images: name → images, whose accounts are written too.
        """
        path = self.folder / f"{self.protocol}.json"
        found = {name: source.account.to_json() for name, source in images.items()}
        write_json(path, {"options": asdict(self), "images": found, "results": results})
        for done in self.folder.glob(f"{self.protocol}-sweep-*.pt"):
            done.unlink()
        return f"{'results':<28} {path}"
