"""A contact sheet of what the augmentation does, and its parameters as text."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from simclr_fast.augment.params import Augmentation, ViewParams, draw_params
from simclr_fast.augment.views import apply_views

_STEPS = ("brightness", "contrast", "saturation", "hue")
COLUMNS = ("original", "view 1", "view 2", "crop", "flip", *_STEPS, "gray", "blur")
_GAP = 2


def contact_sheet(
    images: Sequence[Tensor | np.ndarray],
    aug: Augmentation,
    *,
    seed: int = 0,
    epoch: int = 0,
    ids: np.ndarray | None = None,
) -> tuple[np.ndarray, list[str]]:
    """One row per image of COLUMNS, and one line of parameters per view.

    images: uint8 [H, W, 3] each. The columns after the views show, each alone and whether or not
    the view has it, the first view's crop, flip, jitter steps, gray and blur. Returns a uint8 array
    [rows, columns, 3] and the lines.
    """
    n = len(images)
    numbers = np.arange(n) if ids is None else np.asarray(ids)
    sizes = np.array([i.shape[:2] for i in images], dtype=np.int64).reshape(n, 2)
    aug = replace(aug, mean=None, std=None)
    views = [draw_params(aug, seed, epoch, numbers, view, sizes) for view in (0, 1)]
    drawn = draw_params(replace(aug, p_blur=1.0), seed, epoch, numbers, 0, sizes)
    whole = np.concatenate([np.zeros_like(sizes), sizes], axis=1).astype(np.int32)
    nothing, everything = np.zeros(n, bool), np.ones(n, bool)
    still = ViewParams(
        box=whole,
        flip=nothing,
        jitter=nothing,
        order=drawn.order,
        factors=drawn.factors,
        gray=nothing,
        sigma=np.zeros(n, np.float32),
    )
    identity = np.array([aug.brightness == "multiplicative", 1, 1, 0], np.float32)
    alone = [replace(still, box=drawn.box), replace(still, flip=everything)]
    for step in range(len(_STEPS)):
        factors = np.tile(identity, (n, 1))
        factors[:, step] = drawn.factors[:, step]
        alone.append(replace(still, jitter=everything, factors=factors))
    alone += [replace(still, gray=everything), replace(still, sigma=drawn.sigma)]
    tiles = [
        (apply_views(images, p, aug).permute(0, 2, 3, 1) * 255).round().byte().numpy()
        for p in (still, *views, *alone)
    ]
    cell = aug.size + _GAP
    sheet = np.full((n * cell + _GAP, len(tiles) * cell + _GAP, 3), 255, np.uint8)
    for column, tile in enumerate(tiles):
        for row in range(n):
            y, x = _GAP + row * cell, _GAP + column * cell
            sheet[y : y + aug.size, x : x + aug.size] = tile[row]
    lines = [
        f"id {numbers[i]} view {view + 1}: {_describe(views[view], i)}"
        for i in range(n)
        for view in (0, 1)
    ]
    return sheet, lines


def _describe(p: ViewParams, i: int) -> str:
    y, x, h, w = p.box[i]
    parts = [f"crop {h}×{w} at ({y}, {x})"]
    if p.flip[i]:
        parts.append("flip")
    if p.jitter[i]:
        parts += [f"{_STEPS[k]} {p.factors[i, k]:.3f}" for k in p.order[i]]
    if p.gray[i]:
        parts.append("gray")
    if p.sigma[i] > 0:
        parts.append(f"blur σ {p.sigma[i]:.2f}")
    return ", ".join(parts)
