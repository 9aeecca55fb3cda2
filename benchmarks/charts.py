"""The charts of the README, drawn from benchmarks/results/*.json.

    simclr-fast bench all --out benchmarks/results                          measure
    simclr-fast plan --gpu a100-80gb --json > benchmarks/results/plan.json  predict
    python -m benchmarks.charts                                             draw

speed.png shows our time and those of other libraries for each subject of `simclr-fast bench`;
memory.png shows the predicted memory of a batch per GPU in each memory mode of `simclr-fast plan`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from simclr_fast.benchmarks import harness
from simclr_fast.benchmarks.tables import LABELS, NO_ALTERNATIVES, RESULTS, SUMMARY, load
from simclr_fast.utils.checkpoint import write_atomic
from simclr_fast.utils.extras import need

PLAN = "plan.json"
DOCS = RESULTS.parents[1] / "docs"
# Contenders in a panel: ours, lightly's, and the fastest of the others.
_BARS = 5
# Memory of usual GPUs, GB.
_CARDS = (24, 40, 80)
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
    for subject, wanted, column, label in SUMMARY:
        found = load(subject, results)
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
    pairs = table["title"].partition("N = ")[2].partition(",")[0]
    names = {name: LABELS.get(name, name) for name in [ours, *chosen]}
    values = {shown: times[name] for name, shown in names.items()}
    ratios = {shown: table["ratios"][column][name] for name, shown in names.items()}
    title = f"{label.format(n=pairs)} ({threads} thread{'s' if threads > 1 else ''})"
    return harness.Panel(title, values, ratios, names[ours])


def _machine(environment: dict[str, Any]) -> str:
    versions = environment["versions"]
    return f"{environment['when'][:10]}, {environment['cpu']}, torch {versions['torch']}"


def memory(plan: Path, path: Path) -> None:
    """A bar for each memory mode of a plan, and lines at the memory of usual GPUs."""
    need("matplotlib")
    from matplotlib.figure import Figure

    found = json.loads(plan.read_text())
    options = found["options"]
    rows: dict[str, dict[str, Any]] = {}
    for row in found["rows"]:
        name = row["memory"] + (f", keep every {k}" if (k := row["keep_every"]) > 1 else "")
        # Show the first micro-batch size, which is the fastest, and no offload.
        if "device_bytes" in row and not row["offload_bytes"]:
            rows.setdefault(name if row["exact_gradient"] else f"{name} (another gradient)", row)
    figure = Figure(figsize=(8, 0.5 * len(rows) + 1.7), layout="constrained")
    axis = figure.subplots()
    needed = [row["device_bytes"] / 1e9 for row in rows.values()]
    colours = ["#0072B2" if row["exact_gradient"] else "0.7" for row in rows.values()]
    axis.barh(list(rows), [min(gb, _MOST_GB) for gb in needed], color=colours, height=0.7)
    for y, gb in enumerate(needed):
        if gb > _MOST_GB:
            text, x, options_of_text = f"{gb:.0f} GB →", _MOST_GB - 1, {"ha": "right", "color": "w"}
        else:
            text, x, options_of_text = f"{gb:.0f} GB", gb + 1, {"ha": "left", "color": "k"}
        box = {"facecolor": "w", "edgecolor": "none", "pad": 1} if gb <= _MOST_GB else None
        axis.text(x, y, text, va="center", fontsize=9, bbox=box, **options_of_text)
    for card in _CARDS:
        axis.axvline(card, color="#D55E00", ls="--", lw=1.2, zorder=0.5)
        axis.text(card, -0.62, f"{card} GB", ha="center", va="bottom", color="#D55E00", fontsize=9)
    axis.set(xlim=(0, _MOST_GB), ylim=(len(rows) - 0.4, -0.6))
    axis.set_xlabel("GB per GPU, predicted: nothing was measured on a GPU; dashed: usual GPUs")
    axis.spines[["top", "right"]].set_visible(False)
    title = (
        f"Memory for batch {options['batch_size']} on {options['gpus']} GPU: "
        f"{options['model']}, {options['image_size']}×{options['image_size']}, "
        f"{options['precision']}"
    )
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=22)
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
