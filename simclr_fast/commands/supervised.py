"""simclr-fast supervised."""

import os
from dataclasses import dataclass

from simclr_fast.commands.run_options import RunOptions, parse_run
from simclr_fast.training.supervised import supervise


@dataclass(frozen=True)
class Supervised(RunOptions):
    """Train the baseline with labels: the encoder, data, views and optimizer of pretrain."""


def run(arguments: list[str]) -> int:
    """Train the supervised baseline, and print its accuracy on the test images."""
    out, scores = supervise(parse_run(Supervised, arguments, "supervised").config)
    if int(os.environ.get("RANK", 0)) == 0:
        if scores:
            print(scores.row("supervised"))
        print(f"encoder        {out / 'encoder.safetensors'}")
    return 0
