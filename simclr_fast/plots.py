"""Pictures of a run: its loss, and its features in two dimensions."""

import json
from pathlib import Path

import numpy as np
from torch import Tensor

from simclr_fast.checkpoint import write_atomic
from simclr_fast.extras import need


def plot_loss(metrics: Path, path: Path) -> None:
    """Loss and contrastive accuracy over steps, from metrics.jsonl."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [row["step"] for row in rows]
    figure, axes = _figure(1, (7, 4))
    (axis,) = axes
    axis.plot(steps, [row["loss"] for row in rows], color="tab:blue")
    axis.set(xlabel="step", ylabel="NT-Xent loss")
    axis.yaxis.label.set_color("tab:blue")
    right = axis.twinx()
    right.plot(steps, [row["contrastive_accuracy"] for row in rows], color="tab:orange", lw=1)
    right.set(ylabel="contrastive accuracy")
    right.set_ylim(bottom=0)
    right.yaxis.label.set_color("tab:orange")
    axis.set_title("pretraining")
    _save(figure, path)


def plot_embedding(
    features: Tensor, labels: np.ndarray, classes: tuple[str, ...], path: Path
) -> None:
    """t-SNE of h [n, D], coloured by class."""
    manifold = need("sklearn.manifold", "train")
    standard = (features - features.mean(0)) / features.std(0).clamp_min(1e-6)
    points = manifold.TSNE(init="pca", perplexity=30, random_state=0).fit_transform(
        standard.numpy()
    )
    figure, axes = _figure(1, (7.5, 6))
    (axis,) = axes
    colours = need("matplotlib", "train").colormaps["tab10"]
    for label, name in enumerate(classes):
        mine = points[labels == label]
        axis.scatter(*mine.T, s=9, color=colours(label % 10), label=name)
    axis.set(xticks=[], yticks=[], title="t-SNE of h, test images (labels never seen in training)")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, markerscale=2)
    _save(figure, path)


def _figure(columns: int, size: tuple[float, float]):
    need("matplotlib", "train")
    # Figure without pyplot: no window system, no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, columns))


def _save(figure, path: Path) -> None:
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
