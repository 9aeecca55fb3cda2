"""simclr-fast pretrain."""

import time
from dataclasses import dataclass
from pathlib import Path

from simclr_fast.commands.run_options import RunOptions, parse_run
from simclr_fast.evaluation.plots import plot_loss
from simclr_fast.training.config import PretrainConfig
from simclr_fast.training.pretrain import pretrain
from simclr_fast.training.report import next_steps, probe_report
from simclr_fast.utils.launch import launched


@dataclass(frozen=True)
class Pretrain(RunOptions):
    """Train an encoder on images without labels."""


def run(arguments: list[str]) -> int:
    """Pretrain, then print the linear probe and its baselines."""
    config = parse_run(Pretrain, arguments, "pretrain").config
    start = time.perf_counter()
    out = pretrain(config)
    if launched().rank == 0:
        print(f"trained in {time.perf_counter() - start:.0f} s")
        _report(config, out)
    return 0


def _report(config: PretrainConfig, out: Path) -> None:
    """Draw the loss curve; print the linear probe (if there are test labels) and the next steps."""
    plot_loss(out / "metrics.jsonl", out / "loss.png", config.batch_size)
    for line in probe_report(config, out):
        print(line)
    print(f"loss curve     {out / 'loss.png'}")
    print(f"encoder        {out / 'encoder.safetensors'}")
    for line in next_steps(config, out):
        print(line)
