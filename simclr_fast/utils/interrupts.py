"""Signals that ask a process to end. They are recorded until a step ends, or raised at once.

Ctrl-C sends SIGINT. Launchers and schedulers send SIGTERM. SLURM can be asked to send SIGUSR1 some
time before it ends a job (`#SBATCH --signal=USR1@90`).
"""

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Windows has no SIGUSR1.
_ENDING = [signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]


class Interrupted(Exception):
    """A signal ended a run after it wrote a checkpoint. signal_number: that signal."""

    def __init__(self, signal_number: int, folder: Path) -> None:
        super().__init__(f"interrupted; {folder} holds a checkpoint: go on with --resume")
        self.signal_number = signal_number


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGUSR1 arrived. number: that signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Record signals that ask to end in the yielded list; do not end the process."""
    caught: list[int] = []
    with _handled((signal.SIGINT, *_ENDING), lambda number, _: caught.append(number)):
        yield caught


@contextmanager
def raise_sigterm() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 raise Terminated, like KeyboardInterrupt for Ctrl-C."""
    with _handled(_ENDING, _terminate):
        yield


@contextmanager
def _handled(signals: Iterable[int], handler: Callable[[int, Any], None]) -> Iterator[None]:
    try:
        before = {number: signal.signal(number, handler) for number in signals}
    except ValueError:
        # Only the main thread may set handlers; elsewhere the caller keeps its own.
        before = {}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def exit_status(stop: KeyboardInterrupt) -> int:
    """The exit status that shells use for a process ended by this signal: 128 + its number."""
    return 128 + (stop.number if isinstance(stop, Terminated) else signal.SIGINT)


def _terminate(number: int, _: Any) -> None:
    raise Terminated(number)
