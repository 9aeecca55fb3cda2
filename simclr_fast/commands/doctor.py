"""simclr-fast doctor."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from simclr_fast.doctor.run_folder import examine
from simclr_fast.utils.device import resolve_device
from simclr_fast.utils.launch import require_one_process


@dataclass(frozen=True)
class Doctor:
    """Say what is wrong with a pretraining run, finished or not, from the files in its folder.

    The exit status is 1 if something serious is found. For the training step of another library
    see simclr_fast.doctor.
    """

    run: tyro.conf.Positional[Path]
    """The output folder of the run."""
    images: int = 256
    """Number of images of its data from which the effective ranks of h and z are computed."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        if self.images < 8:
            raise ValueError(f"images must be at least 8, got {self.images}")


def run(arguments: list[str]) -> int:
    """Print the report on a run."""
    given = tyro.cli(Doctor, args=arguments, prog="simclr-fast doctor")
    require_one_process()
    report = examine(given.run, images=given.images, device=resolve_device(given.device))
    print(f"{given.run}\n{report}")
    return int(report.serious)
