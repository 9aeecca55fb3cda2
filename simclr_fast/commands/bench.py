"""simclr-fast bench."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro

from simclr_fast.benchmarks import harness, machine
from simclr_fast.commands.selfcheck import selfcheck
from simclr_fast.utils.device import usable_cores
from simclr_fast.utils.extras import explain, missing, require


class Subject(NamedTuple):
    """A part to time.

    module: its module in simclr_fast.benchmarks. checks: self-checks whose names begin like this
    must pass before it is timed. needs: optional packages that it requires. also: optional packages
    that it uses if they are installed.
    """

    module: str
    checks: str
    needs: tuple[str, ...] = ()
    also: tuple[str, ...] = ()


# Cores that other processes may use, on average, before the times are called into question.
BUSY = 0.2

SUBJECTS = {
    "loss": Subject("bench_nt_xent", "NT-Xent", also=("lightly",)),
    "augment": Subject(
        "bench_augment", "views", ("PIL", "sklearn", "torchvision"), ("nvidia.dali", "lightly")
    ),
    "lars": Subject("bench_lars", "LARS", ("torchvision",), ("lightly", "timm")),
    "step": Subject(
        "bench_step",
        "",
        ("PIL", "sklearn", "torchvision"),
        ("nvidia.dali", "lightly"),
    ),
}


@dataclass(frozen=True)
class Bench(harness.CommandLine):
    """Time each part and the same part of other libraries, alternately in one process.

    loss: NT-Xent. augment: the two views. lars: the optimizer's step. step: a whole pretraining
    step. Prints a table for each case, and writes a JSON file and a picture for each part. A part
    with wrong results is not timed. Libraries that are not installed are left out. Run nothing else
    on the machine meanwhile.
    """

    what: tyro.conf.Positional[Literal["loss", "augment", "lars", "step", "all"]] = "all"
    """The part to time."""
    out: Path = Path("bench")
    """Folder for pictures, and for a JSON file with the name of the machine."""


def run(arguments: list[str]) -> int:
    """Time the parts; return 1 if one of them could not be timed at all."""
    given = tyro.cli(Bench, args=arguments, prog="simclr-fast bench")
    options = given.options()
    names = list(SUBJECTS) if given.what == "all" else [given.what]
    # Name all missing packages at once, before anything is measured.
    asked = [m for name in names for m in (*SUBJECTS[name].needs, *SUBJECTS[name].also)]
    absent = missing(dict.fromkeys([*asked, "matplotlib"]))
    if absent:
        print(f"{explain(absent)}\nWhat needs them is left out.\n", flush=True)
    others = harness.OtherProcesses()
    limits = machine.floors(options)
    print(f"{machine.text(limits)}\n", flush=True)
    failed = []
    for name in names:
        # The part before may have changed it.
        torch.set_num_threads(options.threads)
        tables = []
        for table in _tables(name, options):
            print(table.text(), "\n", flush=True)
            tables += [table] if table.times else []
        if not tables:
            failed.append(name)
            continue
        where = harness.environment(options.device) | {"floor": limits}
        where["cores_of_others"] = others.cores()
        content = {"tables": [table.to_json() for table in tables]}
        written = [harness.save(name, content, where, given.out)]
        if "matplotlib" not in absent:
            written.append(given.out / f"{name}.png")
            harness.draw(tables, written[1])
        print(f"written        {', '.join(map(str, written))}\n", flush=True)
    print("× ours: the median over all rounds of (time of the contender / our time).")
    if (busy := others.cores()) is not None and busy > BUSY:
        print(
            f"warning: other processes used {busy:.1f} of the {usable_cores()} cores meanwhile: do "
            "not trust these times"
        )
    if failed:
        print(f"simclr-fast bench: not timed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def _tables(name: str, options: harness.Options) -> Iterator[harness.Table]:
    """The tables of a part. If it cannot run, one table without times that says why."""
    subject = SUBJECTS[name]
    try:
        require(subject.needs)
        module = import_module(f"simclr_fast.benchmarks.{subject.module}")
    except ImportError as error:
        yield harness.Table(name, "", notes=[str(error)])
        return
    for outcome in selfcheck(options.device, subject.checks):
        if outcome.status == "FAIL":
            raise ValueError(f"{name} is not timed, because its result is wrong: {outcome}")
    yield from module.tables(options)
