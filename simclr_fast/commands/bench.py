"""simclr-fast bench: ours beside the peers, in one process and turn by turn."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import torch

from simclr_fast.benchmarks import harness, machine
from simclr_fast.commands.selfcheck import selfcheck

# What is measured → its module, and the self-checks that must pass before it is timed.
SUBJECTS = {
    "loss": ("bench_nt_xent", "NT-Xent"),
    "augment": ("bench_augment", "views"),
    "lars": ("bench_lars", "LARS"),
    "step": ("bench_step", ""),
}


def run(arguments: list[str]) -> int:
    """A table, a JSON file and a picture per subject; nothing is timed that is not right."""
    parser = harness.parser("simclr-fast bench", __doc__)
    parser.add_argument("what", choices=[*SUBJECTS, "all"])
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder of JSON and PNG")
    given = parser.parse_args(arguments)
    options = harness.options(given)
    limits = machine.floors(options)
    print(f"{machine.text(limits)}\n", flush=True)
    for name in SUBJECTS if given.what == "all" else [given.what]:
        module, checks = SUBJECTS[name]
        _refuse_wrong_results(name, checks, options.device)
        # The subject before may have changed it.
        torch.set_num_threads(options.threads)
        tables = []
        for table in _tables(module, options):
            print(table.text(), "\n", flush=True)
            tables.append(table)
        where = harness.environment(options.device) | {"floor": limits}
        harness.save(tables, where, given.out / f"{name}.json")
        harness.draw(tables, given.out / f"{name}.png")
        print(f"written        {given.out / name}.json, {given.out / name}.png\n", flush=True)
    return 0


def _refuse_wrong_results(name: str, checks: str, device: torch.device) -> None:
    for outcome in selfcheck(device, checks):
        if outcome.status == "FAIL":
            raise ValueError(f"{name} is not timed, as its result is wrong: {outcome}")


def _tables(module: str, options: harness.Options) -> Iterator[harness.Table]:
    try:
        return import_module(f"simclr_fast.benchmarks.{module}").tables(options)
    except ImportError as error:
        raise ImportError(f'{error}: pip install "simclr-fast[bench,train,dali]"') from error
