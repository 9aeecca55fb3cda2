"""The charts of the README, drawn from benchmarks/results/*.json.

    simclr-fast bench all --out benchmarks/results                          measure
    simclr-fast plan --fits --json > benchmarks/results/plan.json           predict
    python -m benchmarks.charts                                             draw

speed.png shows our time and those of other libraries for each subject of `simclr-fast bench`;
memory.png shows what `simclr-fast plan` predicts for ResNet-50 at batch 4096 on one GPU: the memory
that plain needs, and that of the schedules for usual GPUs.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from simclr_fast.benchmarks import harness
from simclr_fast.benchmarks.tables import LABELS, NO_ALTERNATIVES, RESULTS, SUMMARY, load, named
from simclr_fast.utils.checkpoint import write_atomic
from simclr_fast.utils.extras import need

PLAN = "plan.json"
DOCS = RESULTS.parents[1] / "docs"
# Contenders in a panel: ours, lightly's, and the fastest of the others.
_BARS = 5
_MOST_GB = 160


@dataclass(frozen=True)
class CommandLine:
    results: Path = RESULTS
    """Folder of the JSON files."""
    docs: Path = DOCS
    """Folder for the pictures."""


def speed(results: Path, path: Path) -> None:
    """A panel of bars for each subject that is recorded."""
    panels, machines, commands = [], [], []
    measured = load(results)
    for subject, wanted, column, label in SUMMARY:
        found = measured.get(subject)
        tables = [t for t in found["tables"] if wanted in t["title"]] if found else []
        if tables:
            assert found is not None
            environment = found["environment"]
            panels.append(_panel(tables[-1], column, label, environment["threads"]))
            machines.append(_machine(environment))
            commands.append(environment["command"])
    if not panels:
        raise ValueError(f"no results of simclr-fast bench in {results}")
    footer = "\n".join(dict.fromkeys([*machines, *commands]))
    harness.draw_bars(panels, path, "Time of each part: shorter is better", footer)


def _panel(table: dict[str, Any], column: str, label: str, threads: int) -> harness.Panel:
    times = {name: median(values) for name, values in table["milliseconds"][column].items()}
    ours = table["base"]
    others = set(times) - {ours, *table["floors"], *NO_ALTERNATIVES}
    by_time = sorted(others, key=lambda name: (not name.startswith("lightly"), times[name]))
    chosen = sorted(by_time[: _BARS - 1], key=times.__getitem__)
    names = {name: LABELS.get(name, name) for name in [ours, *chosen]}
    values = {shown: times[name] for name, shown in names.items()}
    ratios = {shown: table["ratios"][column][name] for name, shown in names.items()}
    title = f"{named(label, table['title'])} ({threads} thread{'s' if threads > 1 else ''})"
    return harness.Panel(title, values, ratios, names[ours])


def _machine(environment: dict[str, Any]) -> str:
    versions = environment["versions"]
    return f"{environment['when'][:10]}, {environment['cpu']}, torch {versions['torch']}"


def memory(plan: Path, path: Path) -> None:
    """A bar for plain, and one for each GPU: of its memory, and of RAM."""
    need("matplotlib")
    from matplotlib.figure import Figure

    found = json.loads(plan.read_text())
    rows = [
        row
        for row in found["rows"]
        if row["gpus"] == 1 and (row["model"], row["width"]) == ("resnet50", 1)
    ]
    names = ["plain"]
    for row in rows:
        names.append(f"{row['gpu']}: {row['compute']:.2f}× the convolutions")
    device = [rows[0]["plain_bytes"] / 1e9, *(row["device_bytes"] / 1e9 for row in rows)]
    host = [0.0, *((row["host_bytes"] + row["view_bytes"]) / 1e9 for row in rows)]
    figure = Figure(figsize=(8, 0.5 * len(names) + 1.7), layout="constrained")
    axis = figure.subplots()
    places = range(len(names))
    shown = [min(gb, _MOST_GB) for gb in device]
    axis.barh(places, shown, color="#0072B2", height=0.7, label="GPU memory")
    axis.barh(places, host, left=shown, color="#56B4E9", height=0.7, label="RAM")
    for y, (gb, ram) in enumerate(zip(device, host, strict=True)):
        if gb > _MOST_GB:
            style = {"ha": "right", "color": "w"}
            axis.text(_MOST_GB - 1, y, f"{gb:.0f} GB →", va="center", fontsize=9, **style)
        else:
            text = f"{gb:.0f} GB" + (f" + {ram:.0f} GB of RAM" if ram else "")
            axis.text(gb + ram + 1, y, text, va="center", fontsize=9)
    axis.set(xlim=(0, _MOST_GB), ylim=(len(names) - 0.4, -0.6))
    axis.set_yticks(places, names)
    axis.set_xlabel("GB, predicted")
    axis.legend(loc="center right", frameon=False, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    options = found["options"]
    title = (
        f"Batch {options['batch_size']}, exact, on one GPU: ResNet-50, "
        f"{options['image_size']}×{options['image_size']}, {options['precision']}"
    )
    figure.suptitle(title, fontsize=11, fontweight="bold")
    write_atomic(path, lambda part: figure.savefig(part, format="png", dpi=120))


def main() -> None:
    given = harness.parse(CommandLine, "charts", __doc__)
    sources = {"speed.png": (speed, given.results), "memory.png": (memory, given.results / PLAN)}
    for name, (draw, source) in sources.items():
        try:
            draw(source, given.docs / name)
        except (ValueError, FileNotFoundError) as error:
            print(f"not drawn      {given.docs / name}: {error}")
        else:
            print(f"written        {given.docs / name}")


if __name__ == "__main__":
    main()
