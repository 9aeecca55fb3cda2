"""The tables of measurements in the documents, made from benchmarks/results/*.json.

    simclr-fast bench all --out benchmarks/results                  measure
    python -m benchmarks.tables --write README.md docs/benchmarks.md   write what was measured
    python -m benchmarks.tables                                     print the tables

In a document, the text between `<!-- results: NAME -->` and `<!-- end of results -->` is replaced.
NAME is a subject of `simclr-fast bench`; `summary`, one row for each subject; `predicted`, what the
models of this folder predict for GPUs; `fits` or `cards`, what `simclr-fast plan --fits` predicts;
`modes` or `schedules`, what `benchmarks.bench_large_batch` measured. Each machine has a file; the
documents show `CPU`'s, and `GPU`'s where a NAME begins with `gpu_`: `gpu_limits` and `gpu_kernels`
are what `benchmarks.large_batch_gpu` and `benchmarks.loss_gpu` measured there.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from simclr_fast.benchmarks import augment_gpu_model, bench_lars, harness
from simclr_fast.benchmarks.harness import number
from simclr_fast.commands.plan import fits_lines

RESULTS = Path(__file__).resolve().parent / "results"
# The machines whose results the documents show.
CPU, GPU = "intel-xeon-processor-2-cores", "nvidia-h200"
SUBJECTS = ("loss", "augment", "lars", "step")
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)

# Names in the tables for contenders whose name in the JSON is that of a function.
LABELS = {
    "fused": "simclr_fast",
    "small_ours": "simclr_fast",
    "dali_only": '`backend="dali"`',
    "decode_only": "decoding alone",
    "solo_learn": "DALI as solo-learn uses it",
    "torchvision_pil": "torchvision v2, PIL images",
    "torchvision_tensor": "torchvision v2, tensors",
    "small_torchvision": "torchvision v2, tensors",
    "textbook torch.compile": "textbook, torch.compile",
    "textbook eager": "textbook, eager",
}
# Columns beside the times. The JSON has more.
FACTS = {
    "loss": ("peak MB", "gradient error"),
    "augment": ("peak MB",),
    "lars": ("peak MB",),
    "step": ("images/s", "data wait", "forward", "loss", "backward", "optimizer"),
}
# Rows of the summary: subject, how the table's title begins or what it contains, column, its name.
SUMMARY = (
    ("loss", "NT-Xent", "forward+backward", "loss, forward and backward, N = {n}"),
    ("augment", "denormals kept", "CPU", "two 224² views of a JPEG, CPU time"),
    ("lars", "resnet50", "step", "LARS step, ResNet-50"),
    ("step", "32×32", "step", "whole training step, 256 images of 32²{dtype}"),
)
# Left out of the summary: ours in another setting, or another computation.
NO_ALTERNATIVES = ("simclr_fast foreach", "SGD fused", "dali_only")
RESNET50_PARAMETERS = 25_557_032


def load(results: Path, machine: str = CPU) -> dict[str, Any]:
    """What was measured on a machine: subject → results."""
    path = results / f"{machine}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def text(name: str, results: Path = RESULTS) -> str:
    """Markdown for a mark: the tables of a subject, or the summary."""
    measured = load(results, GPU if name.startswith("gpu_") else CPU)
    if name == "gpu_limits":
        return limits(measured)
    if name == "gpu_kernels":
        return loss_kernels(measured)
    if name == "summary":
        return summary(results)
    if name == "predicted":
        return predicted()
    if name in ("fits", "cards"):
        return fits(results, name == "cards")
    if name in ("modes", "schedules"):
        return large_batch(measured, name)
    subject = name.removeprefix("gpu_")
    if subject not in SUBJECTS:
        others = ("summary", "predicted", "fits", "cards", "modes", "schedules")
        allowed = ", ".join((*SUBJECTS, *others))
        raise ValueError(f"results must be one of {allowed}, got {name!r}")
    found = measured.get(subject)
    if found is None:
        device = " --device cuda" if subject != name else ""
        command = f"simclr-fast bench {subject}{device} --out benchmarks/results"
        return f"Not recorded yet: `{command}`.\n"
    tables = (_table(table, FACTS[subject]) for table in found["tables"])
    return "\n".join([f"{machine(found['environment'])}\n", *tables])


def fits(results: Path, cards: bool) -> str:
    """What fits on which GPUs. cards: a row for each single GPU, with options of `pretrain`."""
    rows = json.loads((results / "plan.json").read_text())["rows"]
    if not cards:
        return "\n".join(fits_lines(rows)) + "\n"
    lines = [
        "| one GPU | options of `pretrain` | GB of the GPU | GB of RAM | convolution work |",
        "|---|---|---|---|---|",
    ]
    first = {row["gpu"]: row for row in reversed(rows) if row["gpus"] == 1}
    for row in rows:
        if row is first.get(row["gpu"]) and (row["model"], row["width"]) == ("resnet50", 1):
            host = f" --host-memory {row['host_gb']}GB" if row["host_gb"] else ""
            ram = (row["host_bytes"] + row["view_bytes"]) / 1e9
            lines.append(
                f"| {row['gpu']} | `--memory {row['memory']}{host}` | "
                f"{row['device_bytes'] / 1e9:.1f} | {ram:.1f} | {row['compute']:.2f}× |"
            )
    return "\n".join(lines) + "\n"


def large_batch(measured: dict[str, Any], kind: str) -> str:
    """The memory modes on the CPU, or schedules of lockstep: their predicted and measured time."""
    parts = []
    for name, case in measured.items():
        found, _, title = name.partition(": ")
        if found != kind:
            continue
        rows = case["rows"]
        if kind == "schedules":
            heads = "| memory of plain's | predicted time | measured time |\n|---|---|---|"
            lines = [
                f"| {row['memory']} | {row['predicted']:.2f} | {row['measured']:.2f} |"
                for row in rows
            ]
            lines.append(f"\nRank correlation: {case['rank_correlation']:.2f}.")
        else:
            heads = (
                "| mode | peak, GB | of plain | CPU s/step | of plain | s/step | of plain | "
                f"losses |\n{8 * '|---'}|"
            )
            lines = []
            for row in rows:
                pairs = (
                    f"{row[k]:.2f} | {row[k] / rows[0][k]:.2f}" for k in ("gb", "cpu", "seconds")
                )
                losses = ", ".join(f"{loss:.6f}" for loss in row["losses"])
                lines.append(f"| `{row['mode']}` | {' | '.join(pairs)} | {losses} |")
        table = "\n".join([heads, *lines])
        parts.append(f"**{title}**\n\n{machine(case['environment'])}\n\n{table}\n")
    command = "python -m benchmarks.bench_large_batch --out benchmarks/results"
    return "\n".join(parts) or f"Not recorded yet: `{command}`.\n"


def limits(measured: dict[str, Any]) -> str:
    """A batch of 4096 in limited memory of one GPU: predicted and measured."""
    found = measured.get("limits")
    if found is None:
        command = "python -m benchmarks.large_batch_gpu --out benchmarks/results"
        return f"Not recorded yet: `{command}`.\n"
    lines = [
        "| GB of the GPU + of RAM | work | predicted GB | reserved GB | predicted s | s/step | "
        f"of plain |\n{7 * '|---'}|"
    ]
    base = found["rows"][0]
    for row in found["rows"]:
        predicted, cells = row["predicted"], ["", "", ""]
        if predicted:
            cells = [
                f"{predicted['work']:.2f}×",
                f"{predicted['device_bytes'] / 1e9:.1f}",
                f"{predicted['seconds']:.2f}",
            ]
        measured = [
            f"{row['reserved'] / 1e9:.1f}",
            f"{row['seconds']:.2f}",
            f"{row['seconds'] / base['seconds']:.2f}",
        ]
        order = [row["name"], cells[0], cells[1], measured[0], cells[2], *measured[1:]]
        lines.append(f"| {' | '.join(order)} |")
    return f"{machine(found['environment'])}\n\n" + "\n".join(lines) + "\n"


def loss_kernels(measured: dict[str, Any]) -> str:
    """NT-Xent on one GPU: the time of its kernels, and of calls."""
    found = measured.get("kernels")
    if found is None:
        return "Not recorded yet: `python -m benchmarks.loss_gpu --out benchmarks/results`.\n"
    lines = [f"| N | D | dtype | our kernels, µs | our call, µs | textbook, µs |\n{6 * '|---'}|"]
    for row in found["rows"]:
        times = [f"{row[name]:,.0f}" if name in row else "" for name in ("kernels", "call")]
        times.append(f"{row['textbook']:,.0f}" if "textbook" in row else "")
        lines.append(f"| {row['pairs']} | {row['dim']} | {row['dtype']} | {' | '.join(times)} |")
    return f"{machine(found['environment'])}\n\n" + "\n".join(lines) + "\n"


def machine(environment: dict[str, Any]) -> str:
    """When, where, with which versions and by which command."""
    gpu = f"{environment['gpu']}, " if "gpu" in environment else ""
    installed = environment["versions"]
    versions = ", ".join(f"{name} {version}" for name, version in installed.items())
    return (
        f"{environment['when'][:10]}, {gpu}{environment['cores']} cores of {environment['cpu']} "
        f"({environment['instruction_set']}), threads: {environment['threads']}, commit "
        f"{environment['commit']}. {versions}.\n\n```\n{environment['command']}\n```"
    )


def _table(table: dict[str, Any], facts: tuple[str, ...]) -> str:
    """One table of a JSON file: contenders by the first column's median, floors last."""
    times, ratios, floors = table["milliseconds"], table["ratios"], table["floors"]
    shown = [fact for fact in facts if fact in table["facts"]]
    first = next(iter(times))
    names = sorted(times[first], key=lambda name: (name in floors, median(times[first][name])))
    heads = [head for column in times for head in (f"{column}, ms", "× ours")]
    lines = [f"**{table['title']}**", "", f"| | {' | '.join([*heads, *shown])} |"]
    lines.append("|---" * (1 + len(heads) + len(shown)) + "|")
    for name in names:
        cells = [LABELS.get(name, name)]
        for column in times:
            cells += [number(median(times[column][name])), number(ratios[column][name])]
        cells += [table["facts"][fact].get(name, "") for fact in shown]
        lines.append(f"| {' | '.join(cells)} |")
    # Predictions have a section of their own.
    notes = [note for note in table["notes"] if not note.startswith("Predicted")]
    return "\n".join([*lines, *(f"\n{note}" for note in notes)]) + "\n"


def predicted() -> str:
    """Microseconds of the views and of a LARS step by GPU."""
    lines = ["| GPU | `backend` | bytes moved | µs per source image |", "|---|---|---|---|"]
    for row in augment_gpu_model.rows():
        moved = f"{row.bytes / 1e6:.1f} MB"
        lines.append(f"| {row.gpu} | `{row.backend}` | {moved} | {row.microseconds:.1f} |")
    command = "```\npython -m benchmarks.augment_gpu_model\n```"
    lars = f"A LARS step of ResNet-50. {bench_lars.prediction(RESNET50_PARAMETERS)}"
    return "\n".join(lines) + f"\n\n{command}\n\n{lars}\n"


def summary(results: Path = RESULTS) -> str:
    """One row per subject: our time, the fastest alternative's and lightly's."""
    lines = ["| | simclr_fast | fastest alternative | lightly |", "|---|---|---|---|"]
    measured = load(results)
    for subject, wanted, column, label in SUMMARY:
        found = measured.get(subject)
        # The largest number of pairs is the last table.
        tables = [t for t in found["tables"] if wanted in t["title"]] if found else []
        if not tables:
            lines.append(
                f"| {label.partition('{')[0].removesuffix(', N = ')} | not recorded yet | | |"
            )
            continue
        times, ratios = tables[-1]["milliseconds"][column], tables[-1]["ratios"][column]
        ours = tables[-1]["base"]
        others = set(times) - {ours, *tables[-1]["floors"], *NO_ALTERNATIVES}
        best = min(others, key=lambda name: median(times[name]))
        lightly = next((name for name in sorted(others) if name.startswith("lightly")), None)
        cells = [
            named(label, tables[-1]["title"]),
            f"**{number(median(times[ours]))} ms**",
            f"{_cell(best, times, ratios)} ({LABELS.get(best, best)})",
            _cell(lightly, times, ratios) if lightly else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def named(label: str, title: str) -> str:
    """A label of `SUMMARY` with what the title of its table says."""
    pairs = re.search(r"N = (\d+)", title)
    dtype = ", bfloat16" if ", bfloat16" in title else ""
    return label.format(n=pairs[1] if pairs else "", dtype=dtype)


def _cell(name: str, times: dict[str, list[float]], ratios: dict[str, float]) -> str:
    return f"{number(median(times[name]))} ms, {number(ratios[name])}×"


def write(page: Path, results: Path = RESULTS) -> None:
    """Replace what stands between the marks of a document."""
    page.write_text(filled(page.read_text(), results))


def filled(document: str, results: Path = RESULTS) -> str:
    """The document with the recorded results between its marks."""
    return BLOCK.sub(lambda block: block[1] + text(block[2], results) + block[3], document)


@dataclass(frozen=True)
class CommandLine:
    write: tuple[Path, ...] = ()
    """Documents whose marks are filled; without, the tables are printed."""
    results: Path = RESULTS
    """Folder of the JSON files."""


def main() -> None:
    given = harness.parse(CommandLine, "tables", __doc__)
    for page in given.write:
        write(page, given.results)
    if not given.write:
        for name in (*SUBJECTS, "summary"):
            print(text(name, given.results))


if __name__ == "__main__":
    main()
