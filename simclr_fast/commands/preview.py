"""simclr-fast preview."""

from dataclasses import dataclass
from pathlib import Path

from simclr_fast.augment.preview import contact_sheet, save_sheet
from simclr_fast.commands.run_options import RunOptions, parse_run
from simclr_fast.data.account import printable
from simclr_fast.data.decode import decode_some
from simclr_fast.data.sources import evenly
from simclr_fast.training.setup import images_to_evaluate


@dataclass(frozen=True)
class Preview(RunOptions):
    """Draw some images of --data, their two random views, and each step of the augmentation.

    Of the options of pretrain, only --data, --labels, --image-key, --on-error, --seed and those of
    the augmentation have an effect.
    """

    images: int = 8
    """Number of images, evenly spaced in the data."""
    to: Path = Path("preview.jpg")
    """The picture to write. A .jpg has at most 500 kB; a .png is several times as large."""
    list: bool = False
    """Draw nothing. Print what was found in --data: the images used, every class, and what was left
    out and why."""


def run(arguments: list[str]) -> int:
    """Write the contact sheet, and print the parameters of each view."""
    given = parse_run(Preview, arguments, "preview")
    if given.images < 1:
        raise ValueError(f"images must be at least 1, got {given.images}")
    config = given.config
    source = images_to_evaluate(config)
    if given.list:
        print("\n".join(source.account.lines()))
        return 0
    print(f"data           {printable(config.data)}: {source.account.line()}")
    ids = evenly(source, given.images)
    images = decode_some(source, ids)
    tiles, lines = contact_sheet(images, config.augmentation, seed=config.seed, ids=ids)
    print("\n".join(lines))
    save_sheet(tiles, given.to)
    print(f"contact sheet  {given.to}")
    return 0
