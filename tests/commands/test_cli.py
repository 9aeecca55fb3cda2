"""The command line itself: help, exit statuses, missing packages, warnings, presets."""

import os
import re
import signal
import subprocess
import sys
import warnings
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest

from simclr_fast.augment.params import Augmentation
from simclr_fast.commands import cli
from simclr_fast.commands.ablate import Ablate
from simclr_fast.commands.cli import COMMANDS, run
from simclr_fast.commands.pretrain import Pretrain
from simclr_fast.commands.run_options import Preset, parse_run
from simclr_fast.training.ablate import OPERATIONS, grid
from simclr_fast.training.config import PRESETS, PretrainConfig
from simclr_fast.utils.interrupts import Interrupted
from simclr_fast.utils.rank_failure import RankFailure

ROOT = Path(__file__).parents[2]


def test_help_lists_every_command_in_a_line(capsys):
    assert run(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in COMMANDS.items():
        assert any(re.fullmatch(rf"  {name} +{re.escape(command.about)}", line) for line in lines)
        assert callable(import_module(f"simclr_fast.commands.{name}").run)
    assert max(map(len, lines)) <= 90


def test_help_version_and_wrong_commands_need_no_optional_package(tmp_path, capsys):
    """Nor torch, whose import takes two seconds."""
    for name in ("torch", "tyro", "tqdm", "matplotlib", "torchvision"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    module, function = ["-m", "simclr_fast"], ["-c", "import simclr_fast.__main__ as m; m.main()"]
    for start, argument, status, says in (
        (module, "--help", 0, "commands:"),
        (module, "train", 2, "no command 'train'"),
        # The installed command exits with what main() returns.
        (function, "train", 0, "no command 'train'"),
    ):
        done = subprocess.run(
            [sys.executable, *start, argument], capture_output=True, text=True, env=environment
        )
        assert says in done.stdout + done.stderr
        assert done.returncode == status
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("simclr_fast 0")


def test_all_missing_packages_of_a_command_are_named_before_it_starts(monkeypatch, capsys):
    for name in ("tyro", "tqdm", "matplotlib", "nvidia.dali"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run(["pretrain", "--data", "demo"]) == 1
    errors = capsys.readouterr().err
    assert re.search(r"pip install tyro tqdm matplotlib nvidia-dali-cuda1[23]0$", errors.strip())


def test_pretrain_help_says_whose_defaults_it_shows(capsys):
    assert run(["pretrain", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "defaults shown are those of --preset demo, which is chosen for --data demo" in shown
    assert "all other data imagenet" in shown
    assert run(["pretrain", "--preset", "imagenet", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "defaults shown are those of --preset imagenet." in shown
    assert "(default: 4096)" in shown


@pytest.mark.parametrize("command", ["pretrain", "ablate", "supervised", "preview"])
def test_help_shows_every_option_of_a_run(command, capsys):
    assert run([command, "--help"]) == 0
    shown = capsys.readouterr().out
    names = [field.name for field in fields(PretrainConfig) if field.name != "augmentation"]
    names += [f"augmentation.{field.name}" for field in fields(Augmentation)]
    for name in names:
        assert f"--{name.replace('_', '-')}" in shown


PROTOCOLS = [f"eval {name}" for name in ("linear", "knn", "finetune", "layers", "embed")]


@pytest.mark.parametrize("command", [*sorted(COMMANDS.keys() - {"eval"}), *PROTOCOLS])
def test_every_option_has_help(command, capsys):
    """pretrain's options are in another module."""
    name, *protocol = command.split()
    assert run([name, *protocol, "--help"]) == 0
    module = import_module(f"simclr_fast.commands.{name}")
    own = module.PROTOCOLS[protocol[0]] if protocol else getattr(module, name.capitalize())
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    undescribed = [
        field.name
        for field in fields(own)
        if field.name != "config"
        and re.search(rf"--{field.name.replace('_', '-')} [^a-z(]*\(default", shown)
    ]
    assert undescribed == []


def test_presets_follow_the_data_unless_given():
    def preset(*arguments):
        given = parse_run(Pretrain, arguments, "pretrain")
        return given.preset, given.config.batch_size, given.config.temperature

    assert preset() == ("demo", 256, 0.2)
    assert preset("--data", "demo-grain") == ("demo", 256, 0.2)
    assert preset("--data=photos") == ("imagenet", 4096, 0.1)
    assert preset("--data", "photos", "--preset=cifar10") == ("cifar10", 256, 0.2)
    assert preset("--preset", "imagenet-256", "--batch-size", "64") == ("imagenet-256", 64, 0.1)
    assert tuple(PRESETS) == get_args(Preset)


def test_an_unknown_preset_is_wrong_usage(capsys):
    assert run(["pretrain", "--preset", "imagenot"]) == 2
    assert "imagenet100" in capsys.readouterr().err


def test_every_operation_can_be_ablated():
    given = parse_run(Ablate, ["--operations", *OPERATIONS], "ablate")
    assert given.operations == OPERATIONS
    assert len(grid(given.config, given.operations)) == 21


class Fake:
    def __init__(self, error):
        self.error = error

    def run(self, arguments):
        raise self.error


def ends(monkeypatch, capsys, error, command="pretrain"):
    monkeypatch.setattr(cli, "import_module", lambda name: Fake(error))
    return run([command]), capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "command", "status", "says"),
    [
        (ValueError("lr must be positive, got 0"), "pretrain", 1, "lr must be positive"),
        (MemoryError(), "pretrain", 1, "simclr-fast pretrain: out of memory"),
        (RankFailure("rank 1 died"), "supervised", 1, "rank 1 died"),
        (KeyboardInterrupt(), "plan", 130, "simclr-fast plan: interrupted\n"),
        (KeyboardInterrupt(), "eval", 130, "the same command goes on"),
        (Interrupted(15, Path("r")), "pretrain", 143, "r holds a checkpoint: go on with --resume"),
        (Interrupted(2, Path("r")), "ablate", 130, "the same command goes on"),
        (SystemExit(2), "plan", 2, ""),
    ],
)
def test_errors_have_their_exit_status_and_message(
    monkeypatch, capsys, error, command, status, says
):
    found, errors = ends(monkeypatch, capsys, error, command)
    assert (found, len(errors.splitlines())) == (status, int(bool(says)))
    assert says in errors


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch, capsys):
    with pytest.raises(KeyError):
        ends(monkeypatch, capsys, KeyError("x"))


def test_sigterm_ends_a_command(monkeypatch, capsys):
    class Waiting:
        def run(self, arguments):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(cli, "import_module", lambda name: Waiting())
    assert run(["plan"]) == 128 + signal.SIGTERM


def test_warnings_are_plain_text(monkeypatch, caplog):
    class Warns:
        def run(self, arguments):
            warnings.warn("the disk is slow", stacklevel=1)
            return 0

    monkeypatch.setattr(cli, "import_module", lambda name: Warns())
    assert run(["plan"]) == 0
    assert [record.getMessage() for record in caplog.records] == ["warning: the disk is slow"]


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m simclr_fast ablate --help | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("usage")
    assert done.stderr == ""
