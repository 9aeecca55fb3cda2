"""simclr-fast selfcheck: check every part on this machine against float64."""

import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from simclr_fast.commands.checks import (
    Check,
    Measured,
    Skip,
    found_devices,
    found_versions,
    further_checks,
    quick_checks,
)
from simclr_fast.utils.checkpoint import write_json, write_text
from simclr_fast.utils.device import resolve_device


@dataclass(frozen=True)
class Selfcheck:
    """Check every part on this machine against float64, and write a report to paste or attach.

    Needs no network. Without --full it takes about a minute.
    """

    device: str = "auto"
    """auto, cpu, cuda or cuda:N. auto: a GPU if torch sees one, else the CPU."""
    full: bool = False
    """Also check every size and CUDA graphs, and run the tests on the GPU, 20 steps at batch 4096
    and the quick benchmarks. Takes up to ten minutes on a GPU and writes the report."""
    out: Path | None = None
    """Folder for report.json and report.txt. By default "selfcheck" with --full, else no report is
    written."""


@dataclass(frozen=True)
class Outcome:
    """One line of the report."""

    status: Literal["ok", "skip", "FAIL"]
    name: str
    detail: str
    seconds: float = 0.0
    data: Any = None

    def __str__(self) -> str:
        return f"{self.status:<5}{self.name:<34}{self.detail}"


def run(arguments: list[str]) -> int:
    """Print one line per check; return 1 if one failed."""
    given = tyro.cli(Selfcheck, args=arguments, prog="simclr-fast selfcheck")
    kind = given.device.partition(":")[0]
    if kind not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {given.device}")
    device = resolve_device(given.device)
    out = given.out or (Path("selfcheck") if given.full else None)
    machine = {"device": str(device), "versions": found_versions(), "machine": found_devices()}
    names = [name for name, _ in _checks(given.full)]
    outcomes: list[Outcome] = []
    if out is not None:
        _write(out, machine, outcomes, names[0])
    for outcome in selfcheck(device, full=given.full):
        print(outcome, flush=True)
        outcomes.append(outcome)
        if out is not None:
            # Also in between, so that a crash of the process leaves a report that names the check.
            _write(out, machine, outcomes, [*names, None][len(outcomes)])
    print(_summary(outcomes))
    if out is not None:
        print(f"report         {out / 'report.txt'}, {out / 'report.json'}")
    return int(any(outcome.status == "FAIL" for outcome in outcomes))


def selfcheck(device: torch.device, about: str = "", full: bool = False) -> Iterator[Outcome]:
    """Run the checks in order, and yield each outcome at once. A failure does not stop the next.

    about: run only checks whose names begin with this. full: also run the long ones.
    """
    lost = ""
    for name, check in _checks(full):
        if not name.startswith(about):
            continue
        if lost:
            yield Outcome("FAIL", name, f"not run: the GPU has stopped working in {lost!r}")
            continue
        start = time.perf_counter()
        status: Literal["ok", "skip", "FAIL"] = "ok"
        data = None
        try:
            found = check(device)
            detail, data = found if isinstance(found, Measured) else (found, None)
            _wait(device)
        except Skip as reason:
            status, detail = "skip", str(reason)
        except Exception as error:
            status, detail = "FAIL", _describe(error)
            lost = "" if _works(device) else name
        yield Outcome(status, name, detail, round(time.perf_counter() - start, 2), data)


def _checks(full: bool) -> list[tuple[str, Check]]:
    return [*quick_checks(), *(further_checks() if full else ())]


def _wait(device: torch.device) -> None:
    """Wait for the work that the check has queued, so that its errors are raised here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _works(device: torch.device) -> bool:
    """Whether the GPU still works. After an illegal access, a process cannot use it any more."""
    try:
        _wait(device)
    except RuntimeError:
        return False
    return True


def _describe(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    cause = " ".join(str(error).split()) or "assertion failed"
    return f"{type(error).__name__}: {cause} ({Path(where.filename).name}:{where.lineno})"


def _summary(outcomes: list[Outcome]) -> str:
    counts = {s: sum(o.status == s for o in outcomes) for s in ("ok", "skip", "FAIL")}
    return f"{counts['ok']} ok, {counts['skip']} skipped, {counts['FAIL']} failed"


def _write(
    out: Path, machine: dict[str, Any], outcomes: list[Outcome], running: str | None
) -> None:
    """The report so far. running: the check that runs next, None after the last one."""
    report: dict[str, Any] = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **machine,
        "summary": _summary(outcomes),
        "running": running,
        "checks": [asdict(outcome) for outcome in outcomes],
    }
    unfinished = [] if running is None else [f"not finished: {running}"]
    lines = "\n".join([*map(str, outcomes), *unfinished, report["summary"], ""])
    write_text(out / "report.txt", lines)
    write_json(out / "report.json", report)
