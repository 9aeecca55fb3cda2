"""simclr-fast ablate."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from simclr_fast.commands.run_options import RunOptions, parse_run
from simclr_fast.training.ablate import ablate, grid, mean_top1, plot_ablation, untrained_top1
from simclr_fast.utils.device import expand_segments
from simclr_fast.utils.launch import require_one_process


@dataclass(frozen=True)
class Ablate(RunOptions):
    """Pretrain and evaluate one encoder per setting of a grid, and draw a heat map.

    The grid has every combination of the values below. All runs have the options of pretrain, which
    also give the value of an axis without values. Finished runs are kept in --out. After an
    interruption the same command continues.
    """

    operations: tuple[Literal["crop", "colour", "jitter", "gray", "blur", "flip"], ...] = ()
    """Augmentations to compare: each by itself, and each pair (arXiv:2002.05709, figure 5)."""
    batch_sizes: tuple[int, ...] = ()
    """Batch sizes to compare. All runs see the same number of images."""
    temperatures: tuple[float, ...] = ()
    """Temperatures of the loss to compare."""
    projectors: tuple[Literal["nonlinear", "linear", "none"], ...] = ()
    """Projection heads to compare."""
    seeds: tuple[int, ...] = ()
    """Repeat every setting with each of these seeds; the heat map shows the mean."""
    max_cells: int | None = None
    """Stop after this many runs. The same command continues with the next."""


def run(arguments: list[str]) -> int:
    """Run the unfinished cells of the grid, and draw the results."""
    given = parse_run(Ablate, arguments, "ablate")
    folder = given.config.out or Path("runs/ablation")
    base = replace(given.config, out=None)
    cells = grid(
        base,
        given.operations,
        given.batch_sizes,
        given.temperatures,
        given.projectors,
        given.seeds,
    )
    require_one_process()
    expand_segments()
    rows = ablate(base, cells, folder, given.max_cells)
    if rows:
        for key, top1 in sorted(mean_top1(rows).items(), key=lambda item: -item[1]):
            print(f"{top1:6.1%}  {' '.join(map(str, key))}")
        untrained = untrained_top1(base, folder)
        print(f"{untrained:6.1%}  untrained encoder")
        plot_ablation(rows, folder / "ablation.png", untrained)
        print(f"results        {folder / 'results.jsonl'}")
        print(f"heat map       {folder / 'ablation.png'}")
    return 0
