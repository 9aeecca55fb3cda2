"""Logs of a run as JSON lines. A resumed run appends to them."""

import json
from pathlib import Path

from simclr_fast.utils.checkpoint import write_text


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of `path` after `step`: a run resumed there writes them again.

    Also drops a line that a killed process left incomplete. Creates the file if it is missing.
    """
    old = path.read_text(errors="replace").splitlines() if path.exists() else []
    kept = "".join(line + "\n" for line in old if _step(line) <= step)
    write_text(path, kept)


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return float("inf")
