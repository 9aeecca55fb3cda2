"""simclr-fast supervised."""

import os
import sys

from simclr_fast.commands.pretrain import parse_pretrain, rank_failed
from simclr_fast.training.supervised import supervise
from simclr_fast.utils.interrupts import Interrupted, exit_status, raise_sigterm
from simclr_fast.utils.rank_watch import RankFailure


def run(arguments: list[str]) -> int:
    """Train the supervised baseline, and print its accuracy on the test images."""
    config = parse_pretrain(arguments, "supervised")
    try:
        with raise_sigterm():
            out, scores = supervise(config)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signal_number
    except KeyboardInterrupt as stop:
        print("interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return exit_status(stop)
    except RankFailure as failure:
        return rank_failed("supervised", failure)
    if int(os.environ.get("RANK", 0)) == 0:
        if scores:
            print(scores.row("supervised"))
        print(f"encoder        {out / 'encoder.safetensors'}")
    return 0
