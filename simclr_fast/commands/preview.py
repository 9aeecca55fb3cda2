"""simclr-fast preview."""

import argparse
from pathlib import Path

import numpy as np

from simclr_fast.augment.preview import contact_sheet
from simclr_fast.commands.pretrain import parse_pretrain
from simclr_fast.data.datasets import named_source
from simclr_fast.data.decode import decode_some
from simclr_fast.utils.checkpoint import write_atomic
from simclr_fast.utils.extras import need


def run(arguments: list[str]) -> int:
    """A contact sheet of a run's first images, originals beside views, and the parameters drawn."""
    image = need("PIL.Image")
    own = argparse.ArgumentParser(
        prog="simclr-fast preview",
        epilog="Every other option is pretrain's: --data, --augmentation.size, ...",
        allow_abbrev=False,
    )
    own.add_argument("--images", type=int, default=8)
    own.add_argument("--to", type=Path, default=Path("preview.png"))
    given, rest = own.parse_known_args(arguments)
    config = parse_pretrain(rest)
    source = named_source(config.data)
    # Spread over the source: folders hold one class after another.
    ids = np.linspace(0, len(source) - 1, min(given.images, len(source))).astype(np.int64)
    images = decode_some(source, ids)
    sheet, lines = contact_sheet(images, config.augmentation, seed=config.seed, ids=ids)
    print("\n".join(lines))
    write_atomic(given.to, lambda path: image.fromarray(sheet).save(path, "PNG"))
    print(f"contact sheet  {given.to}")
    return 0
