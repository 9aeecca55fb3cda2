"""simclr-fast supervised."""

from dataclasses import dataclass

from simclr_fast.commands.run_options import RunOptions, parse_run
from simclr_fast.training.report import next_steps
from simclr_fast.training.supervised import supervise
from simclr_fast.utils.device import expand_segments
from simclr_fast.utils.launch import launched


@dataclass(frozen=True)
class Supervised(RunOptions):
    """Train the baseline with labels. Encoder, data, views and optimizer are those of pretrain."""


def run(arguments: list[str]) -> int:
    """Train the supervised baseline, and print its accuracy on the test images."""
    config = parse_run(Supervised, arguments, "supervised").config
    expand_segments()
    out, scores = supervise(config)
    if launched().rank == 0:
        if scores:
            print(scores.row("supervised"))
        print(f"encoder        {out / 'encoder.safetensors'}")
        for line in next_steps(config, out):
            print(line)
    return 0
