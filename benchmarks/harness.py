"""Shared by all benchmarks: interleaved timing, tables, a description of the machine."""

import contextlib
import ctypes
import gc
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

import simclr_fast
from simclr_fast import ops
from simclr_fast.utils.checkpoint import write_atomic, write_json
from simclr_fast.utils.device import (
    autocast_dtype,
    processor_name,
    resolve_device,
    usable_cores,
)
from simclr_fast.utils.extras import installed_versions, need

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """How a benchmark runs. threads: those of torch. rounds: the calls of each step. half: the
    dtype of further tables in lower precision, or None."""

    device: torch.device
    threads: int
    rounds: int
    quick: bool
    half: torch.dtype | None = None


@dataclass(frozen=True)
class CommandLine:
    """The options that all benchmarks have."""

    quick: bool = False
    """Smaller cases: at most two minutes for each."""
    device: str | None = None
    """cpu or cuda; by default cuda if torch sees a GPU."""
    threads: int | None = None
    """torch's threads on the CPU; by default as many as torch takes by itself."""
    rounds: int | None = None
    """How often every contender is timed, in turns; by default 9, or 3 with --quick."""
    precision: Literal["float32", "auto"] = "float32"
    """auto: loss and step get further tables in the dtype that pretraining's --precision auto
    takes here. The others run there in that dtype or in float32, whichever is faster for them."""

    def __post_init__(self) -> None:
        for name in ("threads", "rounds"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def options(self) -> Options:
        """Check the options and replace None; also set torch's number of threads."""
        device = resolve_device(self.device or "auto")
        if device.type == "mps":
            raise ValueError(f"device must be cpu or cuda, got {device}")
        threads = self.threads or torch.get_num_threads()
        torch.set_num_threads(threads)
        half = autocast_dtype(self.precision, device)
        return Options(device, threads, self.rounds or (3 if self.quick else 9), self.quick, half)


def parse(kind: type[T], module: str, about: str | None) -> T:
    """The command line of `python -m benchmarks.MODULE` as `kind`, a dataclass."""
    return need("tyro").cli(kind, prog=f"python -m benchmarks.{module}", description=about)


@dataclass
class Table:
    """A table that compares contenders.

    times: column → contender → milliseconds of each round. The rounds of a column are interleaved.
        Empty if `base` could not be timed; the notes say why.
    facts: column → contender → text, for further columns. base: the contender that ratios refer to.
    floors: contenders that are lower bounds instead of peers.
    """

    title: str
    base: str
    times: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    facts: dict[str, dict[str, str]] = field(default_factory=dict)
    floors: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    def median(self, column: str, name: str) -> float:
        return statistics.median(self.times[column][name])

    def ratio(self, column: str, name: str) -> float:
        """How many times the base's time `name` takes: the median over rounds."""
        pairs = zip(self.times[column][name], self.times[column][self.base], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    def names(self) -> list[str]:
        """Contenders by the first column's median, floors last."""
        first = next(iter(self.times))
        return sorted(self.times[first], key=lambda n: (n in self.floors, self.median(first, n)))

    def text(self) -> str:
        """Markdown. The column "× ours" is the median of each round's ratio, not the quotient of
        the medians: a round in which everything was slow does not change it."""
        if not self.times:
            return "\n".join([self.title, "", "not timed", *(f"\n{note}" for note in self.notes)])
        heads = [h for c in self.times for h in (f"{c} ms", "× ours")]
        lines = [
            self.title,
            "",
            "| | " + " | ".join([*heads, *self.facts]) + " |",
            "|---" * (1 + len(heads) + len(self.facts)) + "|",
        ]
        for name in self.names():
            cells = []
            for column in self.times:
                cells += [f"{self.median(column, name):.3g}", f"{self.ratio(column, name):.2f}"]
            cells += [fact.get(name, "") for fact in self.facts.values()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        shares = [
            f"{floor.removeprefix('floor: ')} {share:.0%}"
            + (f" ({column})" if len(self.times) > 1 else "")
            for column, floors in self.shares().items()
            for floor, share in floors.items()
        ]
        if shares:
            lines += ["", f"Lower bounds as shares of our time: {', '.join(shares)}."]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])

    def shares(self) -> dict[str, dict[str, float]]:
        """Column → floor → its share of our time. At 1, we are as fast as the floor."""
        return {
            column: {floor: self.ratio(column, floor) for floor in self.floors if floor in times}
            for column, times in self.times.items()
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "base": self.base,
            "milliseconds": self.times,
            "ratios": {c: {n: self.ratio(c, n) for n in t} for c, t in self.times.items()},
            "floors": list(self.floors),
            "shares": self.shares(),
            "facts": self.facts,
            "notes": self.notes,
        }


def measure(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of each step in each round: two calls to warm up, then one call per round, each
    round in another order.

    On a GPU the time between two CUDA events around the step; elsewhere `clock`'s.
    """
    timed = _cuda_milliseconds if torch.device(device).type == "cuda" else _milliseconds
    for step in steps.values():
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for _ in range(rounds):
        # The one before leaves caches and waiting threads as it needs them, so it must not always
        # be the same.
        for name in order.sample(list(steps), len(steps)):
            times[name].append(timed(steps[name], clock))
    return times


def fastest(steps: Mapping[str, Callable[[], object]], device: torch.device) -> str:
    """The name of the step that takes the least time: the least of three calls in turns."""
    times = measure(steps, 3, device)
    return min(times, key=lambda name: min(times[name]))


def _milliseconds(step: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    step()
    return 1e3 * (clock() - start)


def _cuda_milliseconds(step: Callable[[], object], _: Callable[[], float]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_memory(step: Callable[[], object], device: torch.device) -> float | None:
    """MB by which `step` raises the peak of resident memory; on a GPU, of torch's allocations.

    Call the step once before. None if the operating system cannot tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    if sys.platform != "linux":
        return None
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    before = reset_peak()
    step()
    return resident("VmHWM") - before


def reset_peak() -> float:
    """Set the peak of this process's resident memory to what is resident now; return it in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(key: str) -> float:
    """MB of this process's resident memory: "VmRSS" now, "VmHWM" at its peak."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024 / 1e6


def memory_column(
    steps: Mapping[str, Callable[[], object]], device: torch.device
) -> dict[str, dict[str, str]]:
    """The table's column of `peak_memory`, empty where it is not known."""
    found = {name: peak_memory(step, device) for name, step in steps.items()}
    shown = {name: f"{mb:.3g}" for name, mb in found.items() if mb is not None}
    return {"peak MB": shown} if shown else {}


class OtherProcesses:
    """How busy the rest of the machine has been since this was made.

    Counts the processors that this process may use. Times of a machine that others use are wrong by
    more than their spread shows: threads wait for each other at every barrier.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter(), _seconds_of_others()

    def cores(self) -> float | None:
        """Cores in use by others, on average; None where the system cannot tell (not Linux)."""
        since, before = self._start
        now = _seconds_of_others()
        if before is None or now is None:
            return None
        return max(0.0, now - before) / (time.perf_counter() - since)


def _seconds_of_others() -> float | None:
    if sys.platform != "linux":
        return None
    ours = sum(os.times()[:4])
    usable = {f"cpu{k}" for k in os.sched_getaffinity(0)}
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name in usable:
            user, nice, system, _idle, _waiting, irq, soft_irq, stolen = map(int, fields[:8])
            ticks += user + nice + system + irq + soft_irq + stolen
    return ticks / os.sysconf("SC_CLK_TCK") - ours


def environment(device: torch.device, program: str = "simclr-fast") -> dict[str, Any]:
    """Hardware, versions, commit and command: `program` with the options of this process."""
    found = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([program, *sys.argv[1:]]),
        "simclr_fast": simclr_fast.__version__,
        "commit": _commit(),
        "cpu": processor_name(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "instruction_set": _instruction_set(),
        "load": os.getloadavg()[0],
        "versions": installed_versions(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["compute_capability"] = torch.cuda.get_device_capability(device)
        found["cuda"] = torch.version.cuda
    return found


def _instruction_set() -> str:
    if not ops.has_extension():
        return "none: plain torch"
    return import_module("simclr_fast._C").instruction_set()


def _commit() -> str | None:
    folder = Path(simclr_fast.__file__).resolve().parent.parent
    done = subprocess.run(
        ["git", "-C", folder, "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None


def save(subject: str, content: dict[str, Any], where: dict[str, Any], folder: Path) -> Path:
    """Write what was measured into the JSON file of the machine `where`, beside other subjects."""
    path = folder / f"{machine_name(where)}.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    write_json(path, found | {subject: {"environment": where, **content}}, indent=1)
    return path


def machine_name(where: dict[str, Any]) -> str:
    """A file name for a machine: its GPU if that was measured, else processor and cores."""
    name = where.get("gpu") or f"{where['cpu']} {where['cores']} cores"
    words = re.sub(r"\((R|TM)\)|@.*?GHz", " ", name, flags=re.IGNORECASE).lower()
    return "-".join(re.findall("[a-z0-9.]+", words))


def number(value: float) -> str:
    """A measured value in a document or a chart.

    Two significant digits from 0.1 to 10, three decimals below, whole numbers above; never an
    exponent.
    """
    if value < 0.1:
        return f"{value:.3f}"
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"


def draw(tables: list[Table], path: Path) -> None:
    """A panel of bars per table and column: the median milliseconds of each contender, from 0."""
    panels = [
        Panel(
            f"{table.title} · {column}",
            {name: table.median(column, name) for name in table.names()},
            {name: table.ratio(column, name) for name in table.names()},
            table.base,
            table.floors,
        )
        for table in tables
        for column in table.times
    ]
    draw_bars(panels, path)


@dataclass(frozen=True)
class Panel:
    """Bars from top to bottom.

    values: name → milliseconds. ratios: name → `Table.ratio`. ours: the contender that the ratios
    refer to. floors: names of lower bounds.
    """

    title: str
    values: dict[str, float]
    ratios: dict[str, float]
    ours: str
    floors: tuple[str, ...] = ()


def draw_bars(panels: list[Panel], path: Path, heading: str = "", footer: str = "") -> None:
    """One column of panels, each with a linear axis from 0 and the value at each bar."""
    need("matplotlib")
    from matplotlib.figure import Figure

    heights = [0.7 + 0.26 * len(panel.values) for panel in panels]
    figure = Figure(figsize=(8, sum(heights) + 0.5 * bool(heading or footer)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        names, values = list(panel.values), list(panel.values.values())
        colours = [_colour(panel, name) for name in names]
        bars = axis.barh(names, values, color=colours, height=0.72)
        labels = [f"{number(panel.values[name])} ms{_ratio_text(panel, name)}" for name in names]
        axis.bar_label(bars, labels, padding=4, fontsize=8)
        axis.set_title(panel.title, fontsize=9, loc="left")
        axis.set_xlim(0, 1.22 * max(values))
        axis.invert_yaxis()
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("milliseconds; (2×): takes twice as long as simclr_fast", fontsize=8)
    if heading:
        figure.suptitle(heading, x=0.01, ha="left", fontsize=11, fontweight="bold")
    if footer:
        figure.text(0.01, -0.01, footer, fontsize=7, va="top", color="0.3")
    write_atomic(
        path,
        lambda part: figure.savefig(part, format="png", dpi=120, bbox_inches="tight"),
    )


def _ratio_text(panel: Panel, name: str) -> str:
    return "" if name == panel.ours else f"  ({number(panel.ratios[name])}×)"


def _colour(panel: Panel, name: str) -> str:
    """Blue for ours, grey for the others, light grey for bounds: told apart without colour too."""
    if name == panel.ours:
        return "#0072B2"
    return "0.85" if name in panel.floors else "0.6"
