"""The report at the end of a run: a linear probe, two baselines, and what to do next."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from simclr_fast.data.sources import Source
from simclr_fast.evaluation.embed import class_pictures, project
from simclr_fast.evaluation.features import features, pixels
from simclr_fast.evaluation.linear import linear_probe
from simclr_fast.evaluation.plots import plot_embedding
from simclr_fast.evaluation.subsets import labels_or_none
from simclr_fast.models.encoders import RESNETS, build_encoder, default_stem
from simclr_fast.training.config import PretrainConfig
from simclr_fast.training.setup import open_data
from simclr_fast.utils import checkpoint
from simclr_fast.utils.device import resolve_device

# Raw pixels are probed at no more than this size. The fit's memory grows with the square of their
# number: 0.08 GB at 32 × 32 pixels, 181 GB at 224 × 224.
_PIXELS = 32


def probe_report(config: PretrainConfig, out: Path) -> Iterator[str]:
    """Probe the run's encoder; yield lines to print; write probe.json and embedding.png.

    Yields nothing if the data have no labelled test split. Two baselines are measured on the same
    images: logistic regression on the raw pixels, shrunk to 32 × 32 if larger, and the same encoder
    with the run's initial weights.
    """
    train, test = open_data(config), open_data(config, "test")
    if test is None or not train.has_labels or not test.has_labels:
        return
    aug, device = config.augmentation, resolve_device(config.device)
    small = replace(aug, size=min(aug.size, _PIXELS))
    shrunk = f", {small.size}×{small.size}" if small.size < aug.size else ""
    torch.manual_seed(config.seed)
    encoder, _ = build_encoder(
        config.model,
        width=config.width,
        image_size=aug.size,
        stem=config.stem,
        zero_gamma=config.zero_gamma,
    )
    results = {}

    def h(source: Source) -> Tensor:
        return features(encoder, source, aug, device=device)

    def probe(name: str, of_train: Tensor, of_test: Tensor) -> str:
        results[name] = linear_probe(of_train, train.labels, of_test, test.labels, device=device)
        return f"{name:<28} {results[name]}"

    yield f"linear probe, top-1 on {len(test)} test images, 95% bootstrap interval"
    yield probe(f"raw pixels{shrunk}", pixels(train, small), pixels(test, small))
    yield probe("same encoder, untrained", h(train), h(test))
    weights, _ = checkpoint.load_encoder(out / "encoder.safetensors")
    encoder.load_state_dict(weights)
    h_train, h_test = h(train), h(test)
    yield probe("pretrained encoder", h_train, h_test)
    title = "t-SNE of the features h of test images (no label was used in training)"
    points = project(h_test, "tsne")
    labels, classes = labels_or_none(test)
    pictures = class_pictures(test, points, labels, aug)
    plot_embedding(points, labels, classes, out / "embedding.png", title, pictures)
    summary = {name: vars(accuracy) for name, accuracy in results.items()}
    checkpoint.write_atomic(
        out / "probe.json", lambda p: p.write_text(json.dumps(summary, indent=2) + "\n")
    )
    yield f"embedding      {out / 'embedding.png'}"


def next_steps(config: PretrainConfig, out: Path) -> Iterator[str]:
    """Commands to run after a finished run, ready to be copied."""
    data = f" --data {config.data}" if config.data != "demo" else ""
    # `eval linear` needs test images. `eval embed` does not.
    protocol = "embed" if open_data(config, "test") is None else "linear"
    stem = config.stem or default_stem(config.augmentation.size)
    # torchvision has only some of our encoders; torch.export takes any.
    plain = config.model in RESNETS and config.model != "resnet10" and stem == "imagenet"
    form = "torchvision" if plain and config.width == 1 else "torch-export"
    yield "next:"
    yield f"  simclr-fast eval {protocol} --encoder {out}{data}"
    yield f"  simclr-fast export --encoder {out} --to {out / form} --format {form}"
