"""The end of a run: a linear probe of its encoder beside two baselines, and the embedding."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from simclr_fast.data.datasets import named_source
from simclr_fast.data.sources import Source
from simclr_fast.evaluation.embed import project
from simclr_fast.evaluation.features import features, pixels
from simclr_fast.evaluation.linear import linear_probe
from simclr_fast.evaluation.plots import plot_embedding
from simclr_fast.models.encoders import build_encoder
from simclr_fast.training.config import PretrainConfig
from simclr_fast.utils import checkpoint
from simclr_fast.utils.device import resolve_device


def probe_report(config: PretrainConfig, out: Path) -> Iterator[str]:
    """Lines to print. Writes probe.json and embedding.png; nothing for data without a test split.

    The baselines are measured here and now on the same images: the same encoder untrained (the
    weights that this run began with), and logistic regression on the raw pixels.
    """
    train, test = named_source(config.data, "train"), named_source(config.data, "test")
    if train is None or test is None or train.labels is None or test.labels is None:
        return
    aug = config.augmentation
    torch.manual_seed(config.seed)
    encoder, _ = build_encoder(
        config.model, width=config.width, image_size=aug.size, stem=config.stem
    )
    device = resolve_device(config.device)
    results = {}

    def h(source: Source) -> torch.Tensor:
        return features(encoder, source, aug, device=device)

    def probe(name: str, of_train: torch.Tensor, of_test: torch.Tensor) -> str:
        results[name] = linear_probe(of_train, train.labels, of_test, test.labels, device=device)
        return f"{name:<28} {results[name]}"

    yield f"linear probe, top-1 on {len(test)} test images, 95% bootstrap interval"
    yield probe("raw pixels", pixels(train, aug), pixels(test, aug))
    yield probe("same encoder, untrained", h(train), h(test))
    weights, _ = checkpoint.load_encoder(out / "encoder.safetensors")
    encoder.load_state_dict(weights)
    h_train, h_test = h(train), h(test)
    yield probe("pretrained encoder", h_train, h_test)
    title = "t-SNE of h, test images (labels never seen in training)"
    points = project(h_test, "tsne")
    plot_embedding(points, test.labels, test.classes, out / "embedding.png", title)
    summary = {name: vars(accuracy) for name, accuracy in results.items()}
    checkpoint.write_atomic(
        out / "probe.json", lambda p: p.write_text(json.dumps(summary, indent=2) + "\n")
    )
    yield f"embedding      {out / 'embedding.png'}"
