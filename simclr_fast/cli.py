"""The command line: simclr-fast pretrain | preview."""

import argparse
import logging
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from simclr_fast import __version__
from simclr_fast.checkpoint import write_atomic
from simclr_fast.config import PRESETS, PretrainConfig
from simclr_fast.extras import need

_USAGE = """simclr-fast: SimCLR in PyTorch

  simclr-fast pretrain [--preset demo|cifar10|imagenet100|imagenet] [--data ...] [options]
  simclr-fast pretrain --help          all options, with the preset's values
  simclr-fast preview [--data ...] [--images 8] [--to preview.png] [options]
                                       what the augmentation does to some of the images
  simclr-fast --version
"""


def run(arguments: list[str]) -> int:
    """Run one command; the process's exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"simclr_fast {__version__}, torch {torch.__version__}")
        return 0
    commands = {"pretrain": _pretrain, "preview": _preview}
    if arguments[0] not in commands:
        print(f"simclr-fast: no command {arguments[0]!r}\n\n{_USAGE}", end="", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return commands[arguments[0]](arguments[1:])
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        if os.environ.get("SIMCLR_FAST_TRACEBACK"):
            raise
        print(f"simclr-fast {arguments[0]}: {error}", file=sys.stderr)
        return 1


def _pretrain(arguments: list[str]) -> int:
    from simclr_fast.train import Interrupted, pretrain

    config = parse_pretrain(arguments)
    start = time.perf_counter()
    try:
        out = pretrain(config)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signal_number
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"trained in {time.perf_counter() - start:.0f} s")
        _report(config, out)
    return 0


def _preview(arguments: list[str]) -> int:
    """A contact sheet of a run's first images, originals beside views, and the parameters drawn."""
    from simclr_fast.data import decode_some
    from simclr_fast.datasets import named_source
    from simclr_fast.preview import contact_sheet

    image = need("PIL.Image", "train")
    own = argparse.ArgumentParser(prog="simclr-fast preview", allow_abbrev=False)
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


def parse_pretrain(arguments: list[str]) -> PretrainConfig:
    """Options over a preset: --preset's, else demo's for the demo data, else imagenet's."""
    tyro = need("tyro", "train")
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", choices=sorted(PRESETS))
    early.add_argument("--data", default="demo")
    known, _ = early.parse_known_args(arguments)
    preset = known.preset or ("demo" if known.data == "demo" else "imagenet")
    rest = _without(arguments, "--preset")
    return tyro.cli(
        PretrainConfig,
        args=rest,
        default=PRESETS[preset](),
        prog="simclr-fast pretrain",
        description=f"Pretrain an encoder. Values shown are those of --preset {preset}.",
    )


def _without(arguments: list[str], option: str) -> list[str]:
    """`arguments` without `option VALUE` or `option=VALUE`."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument.startswith(option + "="):
            skip = False
            continue
        if argument == option:
            skip = True
            continue
        kept.append(argument)
    return kept


def _report(config: PretrainConfig, out: Path) -> None:
    """The loss curve, and where there are test labels the linear probe beside its baselines."""
    from simclr_fast.plots import plot_loss
    from simclr_fast.report import probe_report

    plot_loss(out / "metrics.jsonl", out / "loss.png")
    for line in probe_report(config, out):
        print(line)
    print(f"loss curve     {out / 'loss.png'}")
    print(f"encoder        {out / 'encoder.safetensors'}")
