"""simclr-fast ablate."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from simclr_fast.commands.pretrain import parse_pretrain
from simclr_fast.training.ablate import OPERATIONS, ablate, grid, mean_top1, plot_ablation
from simclr_fast.utils.interrupts import Interrupted, exit_status, raise_sigterm
from simclr_fast.utils.launch import require_one_process


def run(arguments: list[str]) -> int:
    """Run what is left of a grid of runs, and draw it."""
    own = argparse.ArgumentParser(prog="simclr-fast ablate", allow_abbrev=False, add_help=False)
    own.add_argument("--operations", nargs="+", default=[], choices=OPERATIONS)
    own.add_argument("--batch-sizes", nargs="+", type=int, default=[])
    own.add_argument("--temperatures", nargs="+", type=float, default=[])
    own.add_argument("--projectors", nargs="+", default=[], choices=("nonlinear", "linear", "none"))
    own.add_argument("--seeds", nargs="+", type=int, default=[])
    own.add_argument("--max-cells", type=int)
    own.add_argument("-h", "--help", action="store_true")
    given, rest = own.parse_known_args(arguments)
    if given.help:
        print(own.format_usage() + "Every other option is pretrain's, for all cells.")
        return 0
    base = parse_pretrain(rest, "ablate")
    folder = base.out or Path("runs/ablation")
    base = replace(base, out=None)
    cells = grid(
        base,
        given.operations,
        given.batch_sizes,
        given.temperatures,
        given.projectors,
        given.seeds,
    )
    require_one_process()
    try:
        with raise_sigterm():
            rows = ablate(base, cells, folder, given.max_cells)
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"interrupted; the same command goes on in {folder}", file=sys.stderr)
        return 128 + stop.signal_number if isinstance(stop, Interrupted) else exit_status(stop)
    if rows:
        for key, top1 in sorted(mean_top1(rows).items(), key=lambda item: -item[1]):
            print(f"{top1:6.1%}  {' '.join(map(str, key))}")
        plot_ablation(rows, folder / "ablation.png")
        print(
            f"results        {folder / 'results.jsonl'}\nheat map       {folder / 'ablation.png'}"
        )
    return 0
