"""simclr-fast supervised."""

import sys

from simclr_fast.commands.pretrain import parse_pretrain
from simclr_fast.supervised import supervise
from simclr_fast.train import Interrupted


def run(arguments: list[str]) -> int:
    """Train the supervised baseline, and print its accuracy on the test images."""
    try:
        out, scores = supervise(parse_pretrain(arguments, "supervised"))
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signal_number
    if scores:
        print(scores.row("supervised"))
    print(f"encoder        {out / 'encoder.safetensors'}")
    return 0
