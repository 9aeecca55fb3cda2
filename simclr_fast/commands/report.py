"""simclr-fast report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from simclr_fast.training.config import from_json
from simclr_fast.training.page import write_report
from simclr_fast.training.report import run_report


@dataclass(frozen=True)
class Report:
    """Write a page about a finished run, or about several runs beside each other.

    One run: linear probe, curves, confusion of classes, embedding, views and settings, as at the
    end of pretrain, in RUN/report.html. Several runs: their probes and curves, and where their
    settings differ.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Output folders of pretrain."""
    to: Path | None = None
    """The page to write. By default RUN/report.html for one run, comparison.html for several."""


def run(arguments: list[str]) -> int:
    """Write the page and print its path."""
    given = tyro.cli(Report, args=arguments, prog="simclr-fast report", description=Report.__doc__)
    if not given.runs:
        raise ValueError("runs must name at least one output folder of pretrain")
    for folder in given.runs:
        if not (folder / "encoder.safetensors").is_file():
            raise FileNotFoundError(f"{folder} is not the folder of a finished run")
    if len(given.runs) == 1:
        (folder,) = given.runs
        config = from_json((folder / "config.json").read_text())
        for line in run_report(config, folder, given.to):
            print(line)
        return 0
    path = given.to or Path("comparison.html")
    write_report(given.runs, path)
    print(f"page           {path}")
    return 0
