"""Good and bad runs of the demo, for the page "What is normal".

    python -m benchmarks.normal_runs                   train them all, and draw
    python -m benchmarks.normal_runs --only good       train one again, and draw
    python -m benchmarks.normal_runs --only none       draw

Each run takes less than a minute of one CPU core. Their lines of metrics.jsonl, their warnings, and
the accuracy of k-NN on held-out training images go to benchmarks/results/normal_runs.json. The
picture docs/normal.png and the table in docs/normal.md are made from it.
"""

import json
import logging
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from simclr_fast.benchmarks import harness
from simclr_fast.benchmarks.tables import RESULTS
from simclr_fast.data.demo import demo_images
from simclr_fast.evaluation.accuracy import true_class_rank
from simclr_fast.evaluation.features import features
from simclr_fast.evaluation.knn import TAU, nearest, votes
from simclr_fast.models.weights import load_weights
from simclr_fast.training.config import PRESETS, PretrainConfig
from simclr_fast.training.pretrain import pretrain
from simclr_fast.training.setup import open_data
from simclr_fast.utils.checkpoint import write_atomic, write_json, write_text
from simclr_fast.utils.extras import need

FILE, PICTURE, PAGE = "normal_runs.json", "normal.png", "normal.md"
_BEGIN, _END = "<!-- runs -->\n", "<!-- end of runs -->"
DOCS = RESULTS.parents[1] / "docs"
_STEPS, _NEIGHBOURS = 320, 20
# The images of the starved run: their number, and their side in pixels.
_PHOTOS, _SIDE, _STARVED_STEPS = 256, 800, 16
# Value of metrics.jsonl → heading of its panel.
PANELS = {
    "loss": "loss ÷ its chance level",
    "contrastive_accuracy": "contrastive accuracy",
    "rank_z": "effective rank of z",
    "alignment": "alignment: distance of two views",
    "uniformity": "uniformity",
    "data_wait_percent": "% of the time waiting for data",
}
# Run → colour and line style: some eyes see two of the colours alike.
STYLES = {
    "good": ("#0072B2", "-"),
    "stalled": ("#D55E00", "--"),
    "collapsed": ("#000000", "-"),
    "no-colour": ("#009E73", "-."),
    "starved": ("#CC79A7", "--"),
}

# Values of the table, and their digits after the point.
_DIGITS = {"rank_z": 1, "alignment": 2, "uniformity": 2}

Name = Literal["good", "stalled", "collapsed", "no-colour", "starved"]


@dataclass(frozen=True)
class CommandLine:
    only: Name | Literal["all", "none"] = "all"
    """The run to train."""
    results: Path = RESULTS
    """Folder of normal_runs.json."""
    docs: Path = DOCS
    """Folder of the picture."""
    steps: int = _STEPS
    """Steps of each run; the starved one has 16."""


def config_of(name: str, steps: int) -> tuple[PretrainConfig, str]:
    """A run, and the options of `simclr-fast pretrain` that make it."""
    demo = replace(
        PRESETS["demo"](), data="demo-held-out", steps=steps, batch_size=128, device="cpu"
    )
    common = f"--data demo-held-out --batch-size 128 --steps {steps}"
    if name == "stalled":
        return replace(demo, lr=5e-4), f"{common} --lr 0.0005"
    if name == "collapsed":
        config = replace(demo, temperature=0.5, lr=5.0)
        return config, f"{common} --temperature 0.5 --lr 5"
    if name == "no-colour":
        config = replace(demo, augmentation=replace(demo.augmentation, p_jitter=0, p_gray=0))
        return config, f"{common} --augmentation.p-jitter 0 --augmentation.p-gray 0"
    if name == "starved":
        steps = min(steps, _STARVED_STEPS)
        config = replace(demo, steps=steps, workers=1, log_every=1)
        return config, f"--data photos/ --batch-size 128 --steps {steps} --workers 1"
    return demo, common


def train(name: str, steps: int) -> dict[str, Any]:
    """Train one run; its settings, lines, warnings and accuracy."""
    config, options = config_of(name, steps)
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("simclr_fast")
    with tempfile.TemporaryDirectory() as folder:
        if name == "starved":
            config = replace(config, data=str(_photos(Path(folder) / "photos")))
        config = replace(config, out=Path(folder) / "run", log_every=min(10, config.log_every))
        logger.addHandler(handler)
        began = time.process_time()
        try:
            out = pretrain(config)
        finally:
            logger.removeHandler(handler)
        seconds = time.process_time() - began
        text = (out / "metrics.jsonl").read_text().splitlines()
        accuracy = None if name == "starved" else _accuracy(config, out)
    return {
        "options": options,
        "core_seconds": round(seconds, 1),
        "warnings": said,
        "knn": accuracy,
        "rows": [
            {name: float(f"{value:.4g}") for name, value in json.loads(line).items()}
            for line in text
        ],
        "environment": harness.environment(torch.device("cpu"))
        | {"command": "python -m benchmarks.normal_runs"},
    }


def _photos(folder: Path) -> Path:
    """Garments enlarged to the size of photos, as JPEG files."""
    folder.mkdir()
    images, _ = demo_images("train")
    for i, image in enumerate(images[:: len(images) // _PHOTOS][:_PHOTOS]):
        Image.fromarray(image).resize((_SIDE, _SIDE)).save(folder / f"{i}.jpg", quality=90)
    return folder


def _accuracy(config: PretrainConfig, out: Path) -> float:
    """Top-1 of weighted k-NN on the held-out images, whose labels the run has not seen."""
    encoder = load_weights(out).encoder
    train_images, test_images = open_data(config), open_data(config, "test")
    assert test_images is not None
    h = [features(encoder, source, config.augmentation) for source in (train_images, test_images)]
    labels = [torch.from_numpy(np.asarray(s.labels)) for s in (train_images, test_images)]
    similarities, at = nearest(h[1], h[0], _NEIGHBOURS)
    classes = int(labels[0].max()) + 1
    scores = votes(similarities, labels[0][at], classes, TAU)
    return round(float((true_class_rank(scores, labels[1]) == 0).double().mean()), 4)


def draw(runs: dict[str, Any], path: Path) -> None:
    """A panel for each value of PANELS, a curve for each run."""
    need("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.6), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    for axis, (value, heading) in zip(axes, PANELS.items(), strict=True):
        # The starved run is too short to learn.
        waiting = value == "data_wait_percent"
        shown = ("good", "starved") if waiting else tuple(n for n in STYLES if n != "starved")
        for name, (colour, style) in STYLES.items():
            rows = runs[name]["rows"] if name in runs and name in shown else []
            if not rows:
                continue
            heights = [row[value] / (row["chance_loss"] if value == "loss" else 1) for row in rows]
            # Shares of the run, as the starved one has fewer steps.
            steps = [100 * row["step"] / rows[-1]["step"] for row in rows]
            axis.plot(steps, heights, color=colour, ls=style, label=name.replace("-", " "))
        if value == "loss":
            axis.axhline(1, color="0.45", ls=":", lw=1)
        axis.set_title(heading, fontsize=10)
        axis.set_xlabel("% of the run", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    handles = {}
    for axis in axes:
        handles |= {
            label: line for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5)
    write_atomic(path, lambda part: figure.savefig(part, format="png", dpi=110))


def table(runs: dict[str, Any]) -> str:
    """The last line of every run, as Markdown."""
    lines = [
        "| run | options | loss | chance | accuracy | rank of z | alignment | uniformity | waiting "
        "| k-NN |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    common = runs["good"]["options"] if "good" in runs else ""
    for name in STYLES:
        if name not in runs:
            continue
        run = runs[name]
        last = run["rows"][-1]
        own = run["options"].removeprefix(common).strip()
        knn = "" if run["knn"] is None else f"{100 * run['knn']:.1f}%"
        values = [
            name.replace("-", " "),
            f"`{own}`" if own else f"`{common}`",
            f"{last['loss']:.2f}",
            f"{last['chance_loss']:.2f}",
            f"{100 * last['contrastive_accuracy']:.0f}%",
            *(f"{last[key]:.{digits}f}" for key, digits in _DIGITS.items()),
            f"{last['data_wait_percent']:.0f}%",
            knn,
        ]
        lines.append(f"| {' | '.join(values)} |")
    where = next(iter(runs.values()))["environment"]
    lines += ["", f"{where['when'][:10]}, {where['threads']} thread of {where['cpu']}."]
    return "\n".join(lines) + "\n"


def filled(page: str, runs: dict[str, Any]) -> str:
    """The page with the table between its marks."""
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}{table(runs)}{_END}{after}"


def main() -> None:
    given = harness.parse(CommandLine, "normal_runs", __doc__)
    path = given.results / FILE
    runs = json.loads(path.read_text()) if path.exists() else {}
    for name in STYLES if given.only == "all" else (given.only,):
        if name != "none":
            runs[name] = train(name, given.steps)
            write_json(path, runs, indent=1)
            print(f"trained        {name}: {runs[name]['core_seconds']} core-seconds")
    draw(runs, given.docs / PICTURE)
    page = given.docs / PAGE
    if page.exists():
        write_text(page, filled(page.read_text(), runs))
    print(f"written        {given.docs / PICTURE}")


if __name__ == "__main__":
    main()
