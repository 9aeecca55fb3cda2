"""simclr-fast pretrain."""

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from simclr_fast.evaluation.plots import plot_loss
from simclr_fast.training.config import PRESETS, PretrainConfig
from simclr_fast.training.pretrain import pretrain
from simclr_fast.training.report import probe_report
from simclr_fast.utils.extras import need
from simclr_fast.utils.interrupts import Interrupted
from simclr_fast.utils.rank_watch import RankFailure


def run(arguments: list[str]) -> int:
    """Pretrain, then print the linear probe beside its baselines."""
    config = parse_pretrain(arguments)
    start = time.perf_counter()
    try:
        out = pretrain(config)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signal_number
    except RankFailure as failure:
        return rank_failed("pretrain", failure)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"trained in {time.perf_counter() - start:.0f} s")
        _report(config, out)
    return 0


def rank_failed(command: str, failure: RankFailure) -> int:
    """Say so; the process's exit status."""
    print(f"simclr-fast {command}: {failure}", file=sys.stderr, flush=True)
    if torch.cuda.is_initialized():
        # NCCL's threads may still wait for the lost rank.
        os._exit(1)
    return 1


def parse_pretrain(arguments: list[str], command: str = "pretrain") -> PretrainConfig:
    """Options over a preset: --preset's, else demo's for the demo data, else imagenet's."""
    tyro = need("tyro")
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset", choices=sorted(PRESETS))
    early.add_argument("--data", default="demo")
    known, _ = early.parse_known_args(arguments)
    preset = known.preset or ("demo" if known.data in ("demo", "demo-grain") else "imagenet")
    rest = _without(arguments, "--preset")
    return tyro.cli(
        PretrainConfig,
        args=rest,
        default=PRESETS[preset](),
        prog=f"simclr-fast {command}",
        description=f"Train an encoder. Values shown are those of --preset {preset}.",
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
    plot_loss(out / "metrics.jsonl", out / "loss.png")
    for line in probe_report(config, out):
        print(line)
    print(f"loss curve     {out / 'loss.png'}")
    print(f"encoder        {out / 'encoder.safetensors'}")
