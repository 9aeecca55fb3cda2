"""simclr-fast pretrain."""

import time
from dataclasses import dataclass
from itertools import chain

from simclr_fast.commands.run_options import RunOptions, parse_run
from simclr_fast.training.pretrain import pretrain
from simclr_fast.training.report import next_steps, run_report
from simclr_fast.utils.device import expand_segments
from simclr_fast.utils.launch import launched


@dataclass(frozen=True)
class Pretrain(RunOptions):
    """Train an encoder on images without labels."""


def run(arguments: list[str]) -> int:
    """Pretrain, then print the linear probe and its baselines."""
    config = parse_run(Pretrain, arguments, "pretrain").config
    expand_segments()
    start = time.perf_counter()
    out = pretrain(config)
    if launched().rank == 0:
        print(f"trained in {time.perf_counter() - start:.0f} s")
        for line in chain(run_report(config, out), next_steps(config, out)):
            print(line)
    return 0
