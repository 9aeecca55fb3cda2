"""The pictures of a run and of an evaluation, drawn by Matplotlib.

The colours are Okabe and Ito's, which people with any form of colour blindness can tell apart.
Classes also differ in their marker, and their names are written where their points are.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from simclr_fast.evaluation.accuracy import Accuracy
from simclr_fast.utils.checkpoint import write_atomic
from simclr_fast.utils.extras import need

BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "0.45"
# Okabe and Ito's colours without black, which is for text, and Matplotlib's codes of markers.
# 7 colours and 5 markers make 35 distinct styles, because 5 and 7 have no common divisor.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_MARKERS = ("o", "s", "^", "D", "X")
_NAMED_CLASSES = 20
# The size of a written class name, as a share of the plot: of one letter, and the height.
_LETTER, _LINE = 0.016, 0.032


class Style(NamedTuple):
    """How the points of a class are drawn. marker: one of o s ^ D X, as in Matplotlib."""

    colour: str
    marker: str


def class_style(label: int) -> Style:
    """The style of class `label`, the same in every picture and on the page of `eval embed`."""
    return Style(_COLOURS[label % len(_COLOURS)], _MARKERS[label % len(_MARKERS)])


def plot_loss(metrics: Path, path: Path, batch_size: int, chance: float) -> None:
    """Draw loss and contrastive accuracy over steps, from metrics.jsonl.

    chance: the loss if all similarities were equal, marked by a dashed line.
    """
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [row["step"] for row in rows]
    figure, (axis,) = _figure(1, (7.5, 4.2))
    axis.axhline(chance, color=GREY, ls="--", lw=1)
    axis.text(steps[-1], chance, f"chance: {chance:.2f}", ha="right", va="bottom")
    axis.plot(steps, [row["loss"] for row in rows], color=BLUE)
    axis.set(xlabel="step", ylabel="loss (solid line)", ylim=(0, 1.12 * chance))
    axis.yaxis.label.set_color(BLUE)
    right = axis.twinx()
    accuracy = [100 * row["contrastive_accuracy"] for row in rows]
    right.plot(steps, accuracy, color=ORANGE, lw=1.2, ls=":")
    right.set(ylabel="contrastive accuracy in % (dotted)", ylim=(0, 100))
    axis.set_title(
        f"Pretraining with N = {batch_size} images a step: how well each view finds its other view",
        fontsize=10,
    )
    _save(figure, path)


def plot_embedding(
    points: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...],
    path: Path,
    title: str,
    pictures: dict[int, np.ndarray] | None = None,
) -> None:
    """Draw points [n, 2]; each class has its colour and marker.

    Up to 20 classes are named where their points are densest, and listed next to the plot.
    pictures: class number → uint8 [side, side, 3], shown in the list.
    """
    figure, (axis,) = _figure(1, (8, 7))
    for label in range(len(classes)):
        mine = points[labels == label]
        colour, marker = class_style(label)
        axis.scatter(*mine.T, s=16, color=colour, marker=marker, edgecolors="0.2", linewidths=0.3)
    axis.set(xticks=[], yticks=[], title=title)
    if 1 < len(classes) <= _NAMED_CLASSES:
        from matplotlib.patheffects import withStroke

        halo = [withStroke(linewidth=3, foreground="white")]
        for row, name in zip(named_points(points, labels, classes), classes, strict=True):
            if row is not None:
                axis.text(*points[row], name, ha="center", weight="bold", path_effects=halo)
        _list_classes(axis, classes, pictures or {})
    _save(figure, path)


def named_points(
    points: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]
) -> list[int | None]:
    """For each class the row of points [n, 2] where its name is written; None without points.

    It is the point where the class is densest and the name covers no earlier name. So it lies
    within a cluster, even if the class has several.
    """
    extent = np.maximum(np.ptp(points, axis=0), 1e-9) if len(points) else np.ones(2)
    chosen: list[int | None] = []
    for label, name in enumerate(classes):
        rows = _densest_first(points, np.flatnonzero(np.asarray(labels) == label))
        free = np.ones(len(rows), bool)
        for other, taken in zip(classes, chosen, strict=False):
            if taken is not None:
                away = np.abs(points[rows] - points[taken]) / extent
                width = _LETTER * (len(name) + len(other)) / 2
                free &= (away[:, 0] > width) | (away[:, 1] > _LINE)
        # If there is no free place, take the densest one.
        best = [*rows[free], *rows]
        chosen.append(int(best[0]) if best else None)
    return chosen


def _densest_first(points: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`rows` by the distance of their points to the tenth nearest, of the first 2,000 rows."""
    rows = rows[:2000]
    if not len(rows):
        return rows
    away = np.linalg.norm(points[rows][:, None] - points[rows], axis=2)  # [n, n]
    rank = min(10, len(rows) - 1)
    return rows[np.partition(away, rank, axis=1)[:, rank].argsort(kind="stable")]


def _list_classes(axis: Any, classes: tuple[str, ...], pictures: dict[int, np.ndarray]) -> None:
    """Draw a list right of the axis: each class's marker, its picture if given, its name."""
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    step = min(1 / len(classes), 0.075)
    for label, name in enumerate(classes):
        y = 0.5 + step * ((len(classes) - 1) / 2 - label)
        colour, marker = class_style(label)
        look = {"color": colour, "marker": marker, "edgecolors": "0.2", "linewidths": 0.5}
        axis.scatter(1.03, y, s=50, transform=axis.transAxes, clip_on=False, **look)
        axis.text(1.12, y, name, transform=axis.transAxes, va="center", fontsize=10)
        if label in pictures:
            picture = OffsetImage(pictures[label], zoom=0.34 * 64 / len(pictures[label]))
            at = (1.08, y)
            axis.add_artist(AnnotationBbox(picture, at, xycoords="axes fraction", frameon=False))


def plot_neighbours(
    thumbs: np.ndarray,
    similarities: Tensor,
    indices: Tensor,
    labels: np.ndarray,
    classes: tuple[str, ...],
    queries: np.ndarray,
    path: Path,
) -> None:
    """Draw a row per query: the image, then its neighbours with class and cosine similarity.

    thumbs: uint8 [n, side, side, 3]; similarities, indices: [n, k]; labels: [n]; queries: numbers
    of the images to show. A neighbour of another class has a thick dashed frame.
    """
    count = indices.shape[1]
    figure, (axis,) = _figure(1, (1.1 * (count + 1.4), 1.32 * len(queries) + 0.8))
    named = len(classes) > 1
    heads = ["image", *(f"neighbour {i}" if i == 1 else str(i) for i in range(1, count + 1))]
    for column, head in enumerate(heads):
        axis.text(_left(column) + 0.5, -0.12, head, ha="center", va="bottom", fontsize=9)
    for row, query in enumerate(queries):
        cells = [(int(query), None)]
        cells += list(zip(indices[query].tolist(), similarities[query].tolist(), strict=True))
        for column, (image, similarity) in enumerate(cells):
            x, y = _left(column), 1.3 * row
            axis.imshow(thumbs[image], extent=(x, x + 1, y + 1, y), interpolation="nearest")
            text = [classes[labels[image]]] if named else []
            text += [] if similarity is None else [f"{similarity:.2f}"]
            axis.text(x + 0.5, y + 1.03, "  ".join(text), ha="center", va="top", fontsize=7)
            if named and labels[image] != labels[query]:
                _frame(axis, x, y)
    axis.set(xlim=(-0.05, _left(count) + 1.05), ylim=(1.3 * len(queries), -0.45), aspect="equal")
    axis.axis("off")
    other = "; dashed frame: another class" if named else ""
    axis.set_title(f"Nearest neighbours by cosine similarity of h{other}", fontsize=11)
    _save(figure, path)


def _left(column: int) -> float:
    """The left edge of a column of `plot_neighbours`; a gap follows the column of queries."""
    return 1.06 * column + 0.25 * (column > 0)


def _frame(axis: Any, x: float, y: float) -> None:
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle((x, y), 1, 1, fill=False, ls="--", lw=2.2, ec="#D55E00"))


def plot_layers(accuracies: dict[str, Accuracy], path: Path) -> None:
    """Draw the top-1 of each layer's features, with its 95% interval."""
    figure, (axis,) = _figure(1, (1.6 + 1.5 * len(accuracies), 4))
    values = np.array([a.value for a in accuracies.values()])
    errors = np.array([[a.value - a.low, a.high - a.value] for a in accuracies.values()]).T
    axis.bar(list(accuracies), 100 * values, yerr=100 * errors, capsize=4, color=BLUE)
    for i, value in enumerate(values):
        axis.text(i, 1, f"{100 * value:.1f}", ha="center", color="white", fontweight="bold")
    axis.set(ylabel="linear probe, top-1 in %", ylim=(0, None))
    axis.set_title("Accuracy of each layer's features, 95% intervals", fontsize=10)
    _save(figure, path)


def plot_pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """A picture of points [n, 2] and their partners [n, 2], joined by lines: uint8 [H, W, 3]."""
    figure, (axis,) = _figure(1, (5, 5))
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection

    axis.add_collection(LineCollection(list(np.stack((first, second), 1)), colors="0.75", lw=0.7))
    axis.scatter(*first.T, s=12, color=BLUE, label="view 1")
    axis.scatter(*second.T, s=12, color="#D55E00", label="view 2")
    axis.set_title("h of a batch, first two principal components", fontsize=10)
    axis.legend(loc="best", fontsize=8)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


@dataclass(frozen=True)
class HeatMap:
    """One table to draw. values: [len(rows), len(columns)] in percent, NaN where unknown."""

    title: str
    row_axis: str
    rows: list[str]
    column_axis: str
    columns: list[str]
    values: np.ndarray


def plot_heat_maps(
    maps: list[HeatMap], path: Path, heading: str = "", untrained: float | None = None
) -> None:
    """Draw tables as coloured squares with their numbers, all on one colour scale.

    untrained: the accuracy of an untrained encoder in percent, marked on the colour bar.
    """
    wide, high = len(maps[0].columns), len(maps[0].rows)
    size = ((0.95 * wide + 1.6) * len(maps) + 1.4, 0.75 * high + 1.9)
    figure, axes = _figure(len(maps), size)
    values = np.concatenate([one.values.ravel() for one in maps])
    known = [*values[~np.isnan(values)], *([] if untrained is None else [untrained])]
    low, top = min(known), max(known)
    low -= 0.03 * (top - low)
    image = None
    for axis, one in zip(axes, maps, strict=True):
        # Cividis looks the same to people with and without colour blindness.
        image = axis.imshow(one.values, vmin=low, vmax=top, cmap="cividis", aspect="auto")
        axis.set_title(one.title, fontsize=9)
        axis.set(xlabel=one.column_axis, ylabel=one.row_axis)
        axis.set_xticks(range(wide), one.columns)
        axis.set_yticks(range(high), one.rows)
        for (i, j), value in np.ndenumerate(one.values):
            dark = value < (low + top) / 2
            text = "not run" if np.isnan(value) else f"{value:.1f}"
            axis.text(j, i, text, ha="center", va="center", color="white" if dark else "black")
    bar = figure.colorbar(image, ax=list(axes), label="linear probe, top-1 in %")
    if untrained is not None:
        bar.ax.axhline(untrained, color="white", lw=3)
        bar.ax.axhline(untrained, color="#D55E00", lw=1.5)
        bar.ax.text(-0.15, untrained, "untrained", ha="right", va="center", fontsize=8)
    if heading:
        figure.suptitle(heading, fontsize=10)
    _save(figure, path)


def _figure(columns: int, size: tuple[float, float]) -> Any:
    need("matplotlib")
    # Figure instead of pyplot: needs no window system and keeps no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, columns))


def _save(figure: Any, path: Path) -> None:
    write_atomic(
        path,
        lambda temporary: figure.savefig(temporary, format="png", dpi=130, bbox_inches="tight"),
    )
