"""Pictures of features: projections to two dimensions, and the nearest neighbours of an image."""

import base64
import io
from dataclasses import replace
from pathlib import PurePath
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from simclr_fast.augment.channels import shown
from simclr_fast.augment.params import Augmentation
from simclr_fast.data.loader import ImageLoader
from simclr_fast.data.sources import Source, subset
from simclr_fast.evaluation.knn import nearest
from simclr_fast.evaluation.plots import class_style, named_points
from simclr_fast.utils.extras import need
from simclr_fast.utils.pages import fill_page

Method = Literal["pca", "tsne", "umap"]
TITLES: dict[Method, str] = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
NEIGHBOURS = 8
_PAGE = "embed.html"
_CLASS_PICTURE = 64
# Fewer rows than this have no structure that t-SNE or UMAP could show.
_FEWEST = 6


def project(features: Tensor, method: Method, seed: int = 0) -> np.ndarray:
    """Standardise features [n, D] and project them to two dimensions: float [n, 2].

    t-SNE and UMAP start from the principal components, and for fewer than 6 rows stay there.

    Raises:
        ImportError: "umap" without umap-learn, "tsne" without scikit-learn.
    """
    if method not in TITLES:
        raise ValueError(f"method must be 'pca', 'tsne' or 'umap', got {method!r}")
    # A single row has no deviation.
    std = features.std(0, correction=min(1, len(features) - 1))
    standard = (features - features.mean(0)) / std.clamp_min(1e-6)
    if method == "umap" and len(features) >= _FEWEST:
        return need("umap").UMAP(random_state=seed, init="pca").fit_transform(standard.numpy())
    if method == "tsne" and len(features) >= _FEWEST:
        manifold = need("sklearn.manifold")
        perplexity = min(30, (len(features) - 1) / 3)
        tsne = manifold.TSNE(init="pca", perplexity=perplexity, random_state=seed)
        return tsne.fit_transform(standard.numpy())
    _, _, axes = torch.linalg.svd(standard.double(), full_matrices=False)
    # The sign of a principal axis is arbitrary. Choose it so that the largest weight is positive.
    axes = axes[:2] * axes[:2].gather(1, axes[:2].abs().argmax(1, keepdim=True)).sign()
    points = standard.double() @ axes.T
    # A single row, or a single feature, has one component.
    return torch.nn.functional.pad(points, (0, 2 - points.shape[1])).numpy()


def neighbours(features: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """For each row, the 8 other rows of highest cosine similarity.

    Returns:
        similarities, float32 [n, 8], and row numbers, int64 [n, 8]; fewer columns if n < 9.
    """
    count = min(NEIGHBOURS, len(features) - 1)
    if count < 1:
        return torch.zeros(len(features), 0), torch.zeros(len(features), 0, dtype=torch.int64)
    similarities, indices = nearest(features, features, count + 1, device=device)
    # An image is its own nearest neighbour: leave it out. If so many duplicates come first that it
    # is not among them, leave the last one out.
    itself = indices == torch.arange(len(features))[:, None]
    itself[~itself.any(1), -1] = True
    keep = ~itself
    return similarities[keep].view(-1, count), indices[keep].view(-1, count)


def thumbnails(source: Source, augmentation: Augmentation, side: int) -> np.ndarray:
    """The images as the encoder sees them, resized to `side` pixels: uint8 [n, side, side, 3].

    Of images that are not RGB, the first three channels (augment/channels.py).
    """
    image = need("PIL.Image")
    plain = replace(augmentation, mean=None, std=None)
    out = np.empty((len(source), side, side, 3), np.uint8)
    for images, index in ImageLoader(source, min(256, len(source)), plain):
        pixels = shown((images.permute(0, 2, 3, 1) * 255).round().byte().numpy())
        for i, one in zip(index.tolist(), pixels, strict=True):
            out[i] = image.fromarray(one).resize((side, side), image.Resampling.LANCZOS)
    return out


def class_pictures(
    source: Source, points: np.ndarray, labels: np.ndarray, augmentation: Augmentation
) -> dict[int, np.ndarray]:
    """Class number → the image where the points of the class are densest: uint8 [64, 64, 3]."""
    names = tuple(map(str, range(int(labels.max()) + 1)))
    found = named_points(points, labels, names)
    central = {label: row for label, row in enumerate(found) if row is not None}
    chosen = subset(source, np.array(list(central.values())))
    return dict(zip(central, thumbnails(chosen, augmentation, _CLASS_PICTURE), strict=True))


def short_name(name: str) -> str:
    """The last two parts of an image's path; the folders before them would show a private path."""
    return "/".join(PurePath(name).parts[-2:])


def page(
    title: str,
    points: dict[str, np.ndarray],
    thumbs: np.ndarray,
    labels: np.ndarray,
    classes: tuple[str, ...],
    names: list[str],
    similarities: Tensor,
    indices: Tensor,
) -> str:
    """A self-contained HTML page: scatter plots, and an image's neighbours at a click.

    points: name of a projection → [n, 2]; thumbs: [n, side, side, 3]; names: one per image. Classes
    have the colours and markers of `plots.class_style`.
    """
    image = need("PIL.Image")
    n, side = thumbs.shape[:2]
    columns = int(np.ceil(np.sqrt(n)))
    grid = np.zeros((-(-n // columns) * side, columns * side, 3), np.uint8)
    for i, thumb in enumerate(thumbs):
        y, x = i // columns * side, i % columns * side
        grid[y : y + side, x : x + side] = thumb
    packed = io.BytesIO()
    image.fromarray(grid).save(packed, "JPEG", quality=88, subsampling=0)
    data: dict[str, Any] = {
        "title": title,
        "side": side,
        "columns": columns,
        "points": {name: _unit_square(p).round(4).tolist() for name, p in points.items()},
        "named_at": {name: named_points(p, labels, classes) for name, p in points.items()},
        "labels": np.asarray(labels).tolist(),
        "classes": list(classes),
        "styles": [class_style(label) for label in range(len(classes))],
        "names": names,
        "similarities": [[round(s, 3) for s in row] for row in similarities.tolist()],
        "neighbours": indices.tolist(),
        "sprite": "data:image/jpeg;base64," + base64.b64encode(packed.getvalue()).decode(),
    }
    return fill_page(_PAGE, data)


def _unit_square(points: np.ndarray) -> np.ndarray:
    low, high = points.min(0), points.max(0)
    return (points - low) / np.maximum(high - low, 1e-9)
