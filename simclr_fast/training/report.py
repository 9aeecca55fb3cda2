"""The report at the end of a run: probe, baselines, pictures, a page, and what to do next."""

import json
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from simclr_fast.augment.params import Augmentation
from simclr_fast.augment.preview import contact_sheet, save_sheet
from simclr_fast.data.decode import decode_some
from simclr_fast.data.sources import Source, evenly, subset
from simclr_fast.evaluation.accuracy import Accuracy
from simclr_fast.evaluation.embed import (
    class_pictures,
    neighbours,
    page,
    project,
    short_name,
    thumbnails,
)
from simclr_fast.evaluation.features import features, pixels
from simclr_fast.evaluation.linear import confusion_probe
from simclr_fast.evaluation.plots import plot_embedding, plot_loss
from simclr_fast.evaluation.subsets import labels_or_none
from simclr_fast.models.encoders import RESNETS, default_stem
from simclr_fast.training.config import PretrainConfig
from simclr_fast.training.loop import AVERAGED, ENCODER
from simclr_fast.training.page import PAGE, Pictures, write_report
from simclr_fast.training.setup import images_to_evaluate, open_data, untrained_encoder
from simclr_fast.utils import checkpoint
from simclr_fast.utils.device import resolve_device

# Raw pixels are probed at no more than this size. The fit's memory grows with the square of their
# number: 0.08 GB at 32 × 32 pixels, 181 GB at 224 × 224.
_PIXELS = 32
# Images of the embedding, their side in pixels, and images whose views are shown.
_EMBEDDED, _THUMB, _VIEWED = 1000, 48, 6


def run_report(config: PretrainConfig, out: Path, to: Path | None = None) -> Iterator[str]:
    """Report on a finished run; yield lines to print.

    Writes loss.png, report.html and, if the data have labelled test images, probe.json and
    embedding.png. The probe has two baselines on the same images: logistic regression on the raw
    pixels, shrunk to 32 × 32 if larger, and the same encoder with the run's initial weights.

    to: the page, by default report.html in `out`.
    """
    plot_loss(out / "metrics.jsonl", out / "loss.png", config.batch_size, config.chance_loss)
    train, test = images_to_evaluate(config), images_to_evaluate(config, "test")
    aug, device = config.augmentation, resolve_device(config.device)
    torch.manual_seed(config.seed)
    encoder, _ = untrained_encoder(config)

    def h(source: Source) -> Tensor:
        return features(encoder, source, aug, device=device)

    weights, _ = checkpoint.load_encoder(out / ENCODER)
    averaged = out / AVERAGED
    confusion: np.ndarray | None = None
    if test is not None and train.has_labels and test.has_labels:
        small = replace(aug, size=min(aug.size, _PIXELS))
        shrunk = f", {small.size}×{small.size}" if small.size < aug.size else ""
        labels = train.labels, test.labels
        results: dict[str, Accuracy] = {}

        def probe(name: str, of_train: Tensor, of_test: Tensor) -> str:
            nonlocal confusion
            given = (of_train, labels[0], of_test, labels[1])
            results[name], confusion = confusion_probe(*given, device=device)
            return f"{name:<28} {results[name]}"

        yield f"linear probe, top-1 on {len(test)} test images, 95% bootstrap interval"
        yield probe(f"raw pixels{shrunk}", pixels(train, small), pixels(test, small))
        yield probe("same encoder, untrained", h(train), h(test))
        encoder.load_state_dict(weights)
        yield probe("pretrained encoder", h(train), h(test))
        if averaged.exists():
            # The confusion of classes is that of the last weights.
            kept = confusion
            encoder.load_state_dict(checkpoint.load_encoder(averaged)[0])
            yield probe("average of its weights", h(train), h(test))
            encoder.load_state_dict(weights)
            confusion = kept
        summary = {name: vars(accuracy) for name, accuracy in results.items()}
        checkpoint.write_json(out / "probe.json", summary)
    else:
        encoder.load_state_dict(weights)
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    yield f"loss           {last['loss']:.3f}; guessing gives {last['chance_loss']:.3f}"
    if "rank_h" in last:
        yield f"effective rank {last['rank_h']:.1f} of h, {last['rank_z']:.1f} of z"
    shown = train if test is None else test
    shown = subset(shown, evenly(shown, _EMBEDDED))
    embedding, picture = _embedding(shown, h(shown), aug, device, out)
    if picture:
        yield f"embedding      {picture}"
    pictures = Pictures(
        embedding,
        _views(subset(train, evenly(train, _VIEWED)), config),
        [] if confusion is None else confusion.tolist(),
        [] if test is None else test.classes,
    )
    to = to or out / PAGE
    write_report([out], to, pictures)
    yield f"loss curve     {out / 'loss.png'}"
    yield f"encoder        {out / ENCODER}"
    if averaged.exists():
        yield f"its average    {averaged}"
    yield f"all of this    {to} (open it in a browser)"


def _embedding(
    source: Source, h: Tensor, aug: Augmentation, device: torch.device, out: Path
) -> tuple[str, Path | None]:
    """The page of t-SNE and neighbours, and the picture embedding.png if there are classes."""
    labels, classes = labels_or_none(source)
    points = project(h, "tsne")
    path = None
    if source.has_labels:
        path = out / "embedding.png"
        title = "t-SNE of the features h of test images (no label was used in training)"
        pictures = class_pictures(source, points, labels, aug)
        plot_embedding(points, labels, classes, path, title, pictures)
    names = [short_name(source.name(i)) for i in range(len(source))]
    thumbs = thumbnails(source, aug, _THUMB)
    near = neighbours(h, device)
    title = f"{len(source)} images"
    return page(title, {"tsne": points}, thumbs, labels, classes, names, *near), path


def _views(source: Source, config: PretrainConfig) -> bytes:
    """The contact sheet of `simclr-fast preview`, as a JPEG file."""
    images = decode_some(source, np.arange(len(source)))
    tiles, _ = contact_sheet(images, config.augmentation, seed=config.seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "views.jpg"
        save_sheet(tiles, path)
        return path.read_bytes()


def next_steps(config: PretrainConfig, out: Path) -> Iterator[str]:
    """Commands to run after a finished run, ready to be copied."""
    options = {
        "data": config.data if config.data != "demo" else None,
        "labels": config.labels,
        "image-key": config.image_key,
        "on-error": config.on_error if config.on_error == "skip" else None,
    }
    data = "".join(f" --{name} {shlex.quote(str(v))}" for name, v in options.items() if v)
    # `eval linear` needs test images. `eval embed` does not.
    protocol = "embed" if open_data(config, "test") is None else "linear"
    stem = config.stem or default_stem(config.augmentation.size)
    # torchvision has only some of our encoders; torch.export takes any.
    plain = config.model in RESNETS and config.model != "resnet10" and stem == "imagenet"
    form = "torchvision" if plain and config.width == 1 else "torch-export"
    run, to = shlex.quote(str(out)), shlex.quote(str(out / form))
    yield "next:"
    yield f"  simclr-fast eval {protocol} --encoder {run}{data}"
    yield f"  simclr-fast export --encoder {run} --to {to} --format {form}"
