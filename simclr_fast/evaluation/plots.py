"""Pictures of a run: its loss, and its features in two dimensions."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from simclr_fast.evaluation.accuracy import Accuracy
from simclr_fast.utils.checkpoint import write_atomic
from simclr_fast.utils.extras import need


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
    points: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], path: Path, title: str
) -> None:
    """Points [n, 2], coloured by class; a legend for up to 20 classes."""
    figure, axes = _figure(1, (7.5, 6))
    (axis,) = axes
    few = len(classes) <= 10
    colours = need("matplotlib").colormaps["tab10" if few else "gist_rainbow"]
    for label, name in enumerate(classes):
        mine = points[labels == label]
        colour = colours(label if few else label / len(classes))
        axis.scatter(*mine.T, s=9, color=colour, label=name)
    axis.set(xticks=[], yticks=[], title=title)
    if 1 < len(classes) <= 20:
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, markerscale=2)
    _save(figure, path)


def plot_layers(accuracies: dict[str, Accuracy], path: Path) -> None:
    """Top-1 after each layer, with its interval."""
    figure, axes = _figure(1, (1.6 + 1.5 * len(accuracies), 4))
    (axis,) = axes
    values = np.array([a.value for a in accuracies.values()])
    errors = np.array([[a.value - a.low, a.high - a.value] for a in accuracies.values()]).T
    axis.bar(list(accuracies), 100 * values, yerr=100 * errors, capsize=4, color="tab:blue")
    for i, value in enumerate(values):
        axis.text(i, 1, f"{100 * value:.1f}", ha="center", color="white")
    axis.set(ylabel="linear probe, top-1 in %", title="where the features are best")
    _save(figure, path)


def plot_heat_maps(
    panels: dict[str, np.ndarray],
    rows: tuple[str, list[str]],
    columns: tuple[str, list[str]],
    path: Path,
) -> None:
    """Tables [R, C] as coloured squares with their numbers; NaN is left white.

    panels: by title. rows, columns: what they are, and the label of each.
    """
    wide, high = len(columns[1]), len(rows[1])
    figure, axes = _figure(len(panels), ((0.9 * wide + 2) * len(panels), 0.75 * high + 1.6))
    values = np.concatenate([table.ravel() for table in panels.values()])
    low, top = np.nanmin(values), np.nanmax(values)
    for axis, (title, table) in zip(axes, panels.items(), strict=True):
        axis.imshow(table, vmin=low, vmax=top, cmap="viridis", aspect="auto")
        axis.set(title=title, xlabel=columns[0], ylabel=rows[0])
        axis.set_xticks(range(wide), columns[1])
        axis.set_yticks(range(high), rows[1])
        for (i, j), value in np.ndenumerate(table):
            if not np.isnan(value):
                dark = value < (low + top) / 2
                axis.text(
                    j, i, f"{value:.1f}", ha="center", va="center", color="w" if dark else "k"
                )
    _save(figure, path)


def _figure(columns: int, size: tuple[float, float]) -> Any:
    need("matplotlib")
    # Figure without pyplot: no window system, no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, columns))


def _save(figure: Any, path: Path) -> None:
    write_atomic(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
