"""Run a function, or a pretraining run that may be killed anywhere, with one process per rank."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing
from forks import context

from simclr_fast.training import pretrain as train
from simclr_fast.training.config import PretrainConfig
from simclr_fast.utils import rank_watch


def on_ranks(function: Callable, arguments: tuple, size: int) -> None:
    """Call function(rank, *arguments) on every rank; if one raises an error, raise it here."""
    torch.multiprocessing.start_processes(
        function, arguments, size, start_method=context.get_start_method()
    )


def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (30, 20, 20, 3), dtype=np.uint8)


def _rank(
    rank: int, size: int, port: int, config: PretrainConfig, stderr: Path, plan: Callable | None
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.stderr = stderr.open("w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    torch.set_num_threads(1)
    # Arrays need no decoder: importing DALI would take longer than the run.
    train.open_data = lambda config: pixels()
    # What counts are beats, and these are half as long.
    rank_watch._BEAT, rank_watch._GRACE = 0.5, 2.0
    if plan is not None:
        plan(rank)
    try:
        train.pretrain(config)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


class Run:
    """`config` on `size` ranks; plan(rank) runs first in each and may patch the package.

    outs: an output folder for each rank, as on machines without a shared disk.
    """

    def __init__(
        self,
        config: PretrainConfig,
        size: int,
        plan: Callable | None = None,
        outs: Sequence[Path] | None = None,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        assert config.out is not None
        self.processes, self.errors = [], []
        for rank in range(size):
            name = f"{config.out.name}-{time.monotonic_ns()}-{rank}.txt"
            self.errors.append(config.out.parent / name)
            own = config if outs is None else replace(config, out=outs[rank])
            arguments = (rank, size, port, own, self.errors[-1], plan)
            self.processes.append(context.Process(target=_rank, args=arguments))
            self.processes[-1].start()

    def wait(self, ranks: list[int] | None = None, seconds: float = 90) -> list[int | None]:
        """Exit statuses of `ranks`, by default of all; None for a rank that still runs."""
        end = time.monotonic() + seconds
        chosen = self.processes if ranks is None else [self.processes[r] for r in ranks]
        for process in chosen:
            process.join(max(0, end - time.monotonic()))
        return [process.exitcode for process in chosen]

    def says(self, rank: int) -> str:
        return self.errors[rank].read_text()

    def kill(self) -> None:
        for process in self.processes:
            # It may end by itself between the question and the signal.
            with suppress(ProcessLookupError):
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
            process.join()
