"""report.html: a run's probe, curves, confusion of classes, embedding, views and settings.

One file without references to others: it opens without a network, and can be sent to somebody.
"""

import base64
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from simclr_fast import __version__
from simclr_fast.utils.checkpoint import write_json, write_text
from simclr_fast.utils.device import processor_name
from simclr_fast.utils.extras import installed_versions
from simclr_fast.utils.pages import fill_page

PAGE, MACHINE = "report.html", "machine.json"
_TEMPLATE = "report.html"
# Lines of metrics.jsonl that are drawn of each run.
_DRAWN = 600
# More classes than this make no readable matrix.
_MATRIX = 40


@dataclass(frozen=True)
class Pictures:
    """What the page of a single run shows besides numbers.

    embedding: the text of a page by `evaluation.embed`. views: a JPEG file. confusion: images by
    true and predicted class, [C, C], and classes: the names.
    """

    embedding: str | None = None
    views: bytes | None = None
    confusion: Sequence[Sequence[int]] = ()
    classes: Sequence[str] = ()


def write_machine(out: Path, device: torch.device, ranks: int) -> None:
    """Write machine.json: where and with which versions a run is made."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    facts = {
        "started": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "device": f"{name} ({device})",
        "ranks": str(ranks),
        "cpu": f"{processor_name()}, {os.cpu_count()} cores",
        "threads of torch": str(torch.get_num_threads()),
        "system": platform.platform(),
        "simclr_fast": __version__,
        **installed_versions(),
    }
    write_json(out / MACHINE, facts)


def write_report(runs: Sequence[Path], path: Path, pictures: Pictures | None = None) -> None:
    """Write the report of one run, or of several beside each other.

    runs: output folders of pretrain or supervised.

    Raises:
        FileNotFoundError: a folder is not that of a run.
    """
    pictures = pictures or Pictures()
    named = [_run(folder, name) for folder, name in zip(runs, _names(runs), strict=True)]
    data: dict[str, Any] = {
        "title": f"Report of {named[0]['name']}" if len(runs) == 1 else "Runs beside each other",
        "about": f"Written by simclr_fast {__version__} on {datetime.now():%Y-%m-%d}.",
        "runs": named,
        "confusion": None,
        "embedding": pictures.embedding,
        "views": None,
    }
    if 1 < len(pictures.classes) <= _MATRIX:
        counts = [list(map(int, row)) for row in pictures.confusion]
        data["confusion"] = {"classes": list(pictures.classes), "counts": counts}
    if pictures.views is not None:
        data["views"] = "data:image/jpeg;base64," + base64.b64encode(pictures.views).decode()
    write_text(path, fill_page(_TEMPLATE, data))


def _run(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not the output folder of a run: no config.json")
    lines = folder / "metrics.jsonl"
    text = lines.read_text().splitlines() if lines.is_file() else []
    every = -(-len(text) // _DRAWN) or 1
    # The last line is always drawn.
    drawn = [json.loads(line) for line in text[::-1][::every][::-1]]
    config = json.loads((folder / "config.json").read_text())
    return {
        "name": name,
        # JSON knows no NaN.
        "rows": [{k: v for k, v in row.items() if v == v} for row in drawn],
        "probe": _read(folder / "probe.json"),
        "settings": _flat(config),
        "machine": _read(folder / MACHINE),
    }


def _names(runs: Sequence[Path]) -> list[str]:
    """The folders' names; with their parents' where two are alike."""
    short = [run.resolve().name for run in runs]
    if len(set(short)) == len(short):
        return short
    return ["/".join(run.resolve().parts[-2:]) for run in runs]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings under names such as "augmentation.size"."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = "none" if value is None else str(value)
    return found
