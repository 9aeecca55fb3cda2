"""Show what the augmentation does to some images: a contact sheet, and the parameters as text."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from simclr_fast.augment.channels import shown
from simclr_fast.augment.params import Augmentation, ViewParams, draw_params, whole
from simclr_fast.augment.views import apply_views
from simclr_fast.utils.checkpoint import write_atomic
from simclr_fast.utils.extras import need

_STEPS = ("brightness", "contrast", "saturation", "hue")
COLUMNS = ("original", "view 1", "view 2", "crop", "flip", *_STEPS, "gray", "blur")
# In pixels: the smallest and largest tile, the gap between tiles, the height of the headings.
_SMALLEST, _LARGEST, _GAP, _TEXT = 64, 128, 3, 12
# Small enough for a document or a message.
_MOST_BYTES = 500_000
_QUALITIES = (90, 80, 70, 60, 50)


def contact_sheet(
    images: Sequence[Tensor | np.ndarray],
    aug: Augmentation,
    *,
    seed: int = 0,
    epoch: int = 0,
    ids: np.ndarray | None = None,
) -> tuple[np.ndarray, list[str]]:
    """One row of tiles per image, one tile for each of COLUMNS, and one line of text per view.

    images: uint8 [H, W, 3] each, or of aug.channels channels as `apply_views` takes them, of which
    the tiles show the first three (augment/channels.py). The columns after the views show each step
    of the first view separately: crop, flip, jitter steps, gray and blur. They also show steps that
    the view skips.

    Returns:
        uint8 [images, columns, size, size, 3], and the lines: the parameters of each view.
    """
    n = len(images)
    numbers = np.arange(n) if ids is None else np.asarray(ids)
    sizes = np.array([i.shape[:2] for i in images], dtype=np.int64).reshape(n, 2)
    aug = replace(aug, mean=None, std=None)
    views = [draw_params(aug, seed, epoch, numbers, view, sizes) for view in (0, 1)]
    drawn = draw_params(replace(aug, p_blur=1.0), seed, epoch, numbers, 0, sizes)
    nothing, everything = np.zeros(n, bool), np.ones(n, bool)
    still = ViewParams(
        box=whole(sizes),
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
    gray = everything if aug.channels == 3 else nothing
    alone += [replace(still, gray=gray), replace(still, sigma=drawn.sigma)]
    tiles = [
        shown((apply_views(images, p, aug).permute(0, 2, 3, 1) * 255).round().byte().numpy())
        for p in (still, *views, *alone)
    ]
    lines = [
        f"id {numbers[i]} view {view + 1}: {_describe(views[view], i)}"
        for i in range(n)
        for view in (0, 1)
    ]
    return np.stack(tiles, axis=1), lines


def save_sheet(tiles: np.ndarray, path: Path) -> None:
    """Write the tiles of `contact_sheet` as a picture with a heading over each column.

    path: .jpg or .png. The quality of a .jpg is lowered until the file has at most 500 kB. Tiles
    are enlarged to at least 64 pixels and reduced to at most 128.
    """
    suffix = path.suffix.lower()
    if suffix not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"the picture must be a .png or .jpg file, got {str(path)!r}")
    image = _titled(tiles)
    packed = io.BytesIO()
    if suffix == ".png":
        image.save(packed, "PNG", optimize=True)
    else:
        for quality in _QUALITIES:
            packed = io.BytesIO()
            image.save(packed, "JPEG", quality=quality, optimize=True)
            if packed.tell() <= _MOST_BYTES:
                break
    write_atomic(path, lambda part: part.write_bytes(packed.getvalue()))


def _titled(tiles: np.ndarray) -> Any:
    """A PIL image: headings, then the tiles with gaps, wider ones around the two views."""
    module, draw_module = need("PIL.Image"), need("PIL.ImageDraw")
    font = need("PIL.ImageFont").load_default(_TEXT)
    rows, columns, size = tiles.shape[:3]
    side = min(max(size, _SMALLEST), _LARGEST)
    sharp = module.Resampling.NEAREST if side > size else module.Resampling.LANCZOS
    cell, top = side + _GAP, _TEXT + 8
    left = [_GAP + c * cell + 2 * _GAP * ((c > 0) + (c > 2)) for c in range(columns)]
    sheet = module.new("RGB", (left[-1] + cell, top + rows * cell), "white")
    draw = draw_module.Draw(sheet)
    for column, name in enumerate(COLUMNS):
        draw.text((left[column] + side / 2, top / 2), name, "black", font=font, anchor="mm")
        for row in range(rows):
            tile = module.fromarray(tiles[row, column]).resize((side, side), sharp)
            sheet.paste(tile, (left[column], top + row * cell))
    return sheet


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
