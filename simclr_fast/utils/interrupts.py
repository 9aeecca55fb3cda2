"""SIGINT and SIGTERM: noted until a step ends, or raised at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


class Interrupted(Exception):
    """SIGINT or SIGTERM ended a run after it wrote a checkpoint. signal_number: which of them."""

    def __init__(self, signal_number: int, folder: Path) -> None:
        super().__init__(f"interrupted; {folder} holds a checkpoint: go on with --resume")
        self.signal_number = signal_number


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted in the list that this yields, instead of ending the process."""
    caught: list[int] = []
    try:
        before = {
            s: signal.signal(s, lambda number, _: caught.append(number))
            for s in (signal.SIGINT, signal.SIGTERM)
        }
    except ValueError:
        # Only the main thread may set handlers; elsewhere the caller keeps its own.
        before = {}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def raise_sigterm() -> Iterator[None]:
    """SIGTERM raises Terminated, as Ctrl-C raises KeyboardInterrupt."""
    try:
        before = signal.signal(signal.SIGTERM, _terminate)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_status(stop: KeyboardInterrupt) -> int:
    """The exit status that a shell reports for a process that this signal ended."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated
