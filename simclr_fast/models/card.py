"""The model card of an exported encoder: data, recipe, results, and how to use it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simclr_fast import __version__
from simclr_fast.models.weights import Weights

# Pictures of a run's folder that the card shows, with what they are.
_PICTURES = {
    "loss.png": "Loss during training",
    "embedding.png": "Test images by their features (t-SNE), coloured by class",
}
# Settings of a run that the card lists, in this order.
_RECIPE = (
    "method",
    "batch_size",
    "epochs",
    "steps",
    "optimizer",
    "lr",
    "lr_rule",
    "trust_coefficient",
    "weight_decay",
    "warmup_epochs",
    "loss",
    "temperature",
    "views",
    "projector",
    "projector_dim",
    "projector_depth",
    "precision",
    "seed",
)


def write_card(weights: Weights, folder: Path, usage: str, tags: list[str]) -> None:
    """Write README.md into `folder`, and beside it the pictures of the run that it shows.

    The run is the folder of the weights. What it lacks is left out. Of paths only the last part is
    shown: they may name people.

    usage: Python code that loads the encoder from a hub, by the name USER/NAME.
    """
    run = weights.path.parent
    pictures = [name for name in _PICTURES if (run / name).is_file()]
    for name in pictures:
        shutil.copyfile(run / name, folder / name)
    parts = [
        _front(tags),
        f"# {weights.model}, trained by SimCLR without labels\n",
        *_encoder(weights),
        *_data(_json(run / "config.json")),
        *_recipe(_json(run / "config.json"), run / "metrics.jsonl"),
        *(f"![{_PICTURES[name]}]({name})\n" for name in pictures),
        *_results(run),
        "## Use it\n",
        f"```python\n{usage}\n```\n",
        "## Limits\n",
        "The encoder has seen only images like those above, and no label. What it holds similar is "
        "what random crops and colours of one image have in common. Measure it on your task "
        "before you rely on it.\n",
        "## Source\n",
        "Method: [A Simple Framework for Contrastive Learning of Visual Representations]"
        f"(https://arxiv.org/abs/2002.05709). Trained and exported by simclr_fast {__version__}.\n",
    ]
    (folder / "README.md").write_text("\n".join(parts))


def _front(tags: list[str]) -> str:
    lines = "".join(f"- {tag}\n" for tag in ["simclr", "self-supervised", "simclr_fast", *tags])
    library = "timm" if "timm" in tags else "simclr_fast"
    return (
        f"---\nlibrary_name: {library}\npipeline_tag: image-feature-extraction\ntags:\n{lines}---\n"
    )


def _encoder(weights: Weights) -> Iterator[str]:
    aug = weights.augmentation
    values = "in [0, 1]"
    if aug.mean is not None:
        values = f"in [0, 1], minus {list(aug.mean)}, divided by {list(aug.std or ())}"
    count = sum(p.numel() for p in weights.encoder.parameters())
    stem = f", stem {weights.stem}" if weights.stem else ""
    yield (
        f"An image encoder ({count / 1e6:.1f} million weights, width {weights.width:g}{stem}). "
        f"Input: {aug.channels} channels, trained at {aug.size}×{aug.size} pixels, "
        f"values {values}. Output: {weights.feature_dim} features per image.\n"
    )


def _data(config: dict[str, Any]) -> Iterator[str]:
    if not config:
        return
    yield "## Data\n"
    images = config.get("images") or {}
    data = str(config.get("data", ""))
    name = Path(data.rstrip("/")).name or data
    line = f"`{name}`: {images.get('used', 0):,} images" if images else f"`{name}`"
    if lost := sum((images.get("left_out") or {}).values()):
        line += f"; {lost:,} files were left out"
    if config.get("loss") != "sup-con":
        line += ". Labels were not used"
    yield f"{line}.\n"


def _recipe(config: dict[str, Any], metrics: Path) -> Iterator[str]:
    if not config:
        return
    yield "## Recipe\n"
    # Steps, where they are set, take the place of epochs.
    unused = "epochs" if config.get("steps") else "steps"
    rows = [(name, config.get(name)) for name in _RECIPE if name != unused]
    rows += [(f"augmentation.{k}", v) for k, v in (config.get("augmentation") or {}).items()]
    shown = [f"| {name} | {value} |" for name, value in rows if value is not None]
    yield "\n".join(["| setting | value |", "|---|---|", *shown, ""])
    if metrics.is_file() and (lines := metrics.read_text().splitlines()):
        last = json.loads(lines[-1])
        chance = f" (guessing gives {last['chance_loss']:.3f})" if "chance_loss" in last else ""
        yield f"Loss after {last['step']:,} steps: {last['loss']:.3f}{chance}.\n"


def _results(run: Path) -> Iterator[str]:
    rows = []
    for name, found in _json(run / "probe.json").items():
        if isinstance(found, dict) and "value" in found:
            low, high = found.get("low", found["value"]), found.get("high", found["value"])
            rows.append(f"| {name} | {found['value']:.1%} | {low:.1%} to {high:.1%} |")
    if not rows:
        return
    yield "## Results\n"
    yield "Top-1 of a linear classifier on the frozen features of the data's test images.\n"
    yield "\n".join(["| features | top-1 | 95% interval |", "|---|---|---|", *rows, ""])


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = json.loads(path.read_text())
    return found if isinstance(found, dict) else {}
