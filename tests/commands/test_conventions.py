"""What users of other commands expect: settings in a file, completion, NO_COLOR, help."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from simclr_fast.augment.params import Augmentation
from simclr_fast.commands import completion
from simclr_fast.commands.cli import COMMANDS, run
from simclr_fast.commands.pretrain import Pretrain
from simclr_fast.commands.run_options import parse_run
from simclr_fast.data.account import Account
from simclr_fast.training.config import PRESETS, PretrainConfig, cifar10, to_json


def parsed(*arguments):
    return parse_run(Pretrain, [str(a) for a in arguments], "pretrain")


def test_settings_come_from_preset_file_and_options_in_this_order(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "preset: cifar10\ntemperature: 0.3\nweight_decay: 1e-4\nlabels: a.csv\n"
        "augmentation:\n  p_blur: 0.5\n  area: [0.2, 1]\n"
    )
    given = parsed("--config", path, "--temperature", "0.4")
    expected = replace(
        cifar10(),
        temperature=0.4,
        weight_decay=1e-4,
        labels=Path("a.csv"),
        augmentation=replace(cifar10().augmentation, p_blur=0.5, area=(0.2, 1)),
    )
    assert (given.preset, given.config) == ("cifar10", expected)
    assert parsed(f"--config={path}", "--preset", "imagenet").config.model == "resnet50"


@pytest.mark.parametrize("preset", ["demo", "imagenet100"])
def test_the_config_of_a_run_is_a_file_of_settings(tmp_path, preset):
    ran = replace(PRESETS[preset](), seed=3, lr=0.7, out=tmp_path / "run", resume=True)
    path = tmp_path / "config.json"
    path.write_text(to_json(ran, Account()))
    given = parsed("--config", path, "--out", tmp_path / "new").config
    assert given == replace(ran, out=tmp_path / "new", resume=False)


def test_a_file_without_a_preset_starts_from_that_of_its_data(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"data": "photos", "epochs": 3}')
    given = parsed("--config", path)
    assert (given.preset, given.config) == ("imagenet", PretrainConfig(data="photos", epochs=3))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "temprature: 0.2", "unknown setting 'temprature'; do you mean temperature"),
        ("a.yaml", "loss: ntxent", "loss in .* must be one of nt-xent, decoupled, sup-con"),
        ("a.yaml", "resume: maybe", "resume in .* must be true or false, got 'maybe'"),
        ("a.yaml", "lr: fast", "lr in .* must be a number, got 'fast'"),
        ("a.yaml", "epochs: 0", "epochs must be at least 1, got 0"),
        ("a.yaml", "model: 3", "model in .* must be text, got 3"),
        ("a.yaml", "preset: imagenot", "preset in .* must be one of demo"),
        ("a.yaml", "augmentation: {blur: 1}", "augmentation has other settings"),
        ("a.yaml", "augmentation: 3", "augmentation in .* must hold names"),
        ("a.yaml", "- 3", "must hold names and values"),
        ("a.yaml", "a: [", "neither YAML nor JSON"),
        ("a.json", "{", "is not JSON"),
    ],
)
def test_wrong_settings_in_a_file_are_named(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=says):
        parsed("--config", tmp_path / name)


def test_a_file_of_settings_that_is_no_text_is_named(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\x80\x81")
    with pytest.raises(ValueError, match=r"run\.yaml is not text in UTF-8"):
        parsed("--config", tmp_path / "run.yaml")


def test_yaml_runs_no_code(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"seed: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(ValueError, match="neither YAML nor JSON"):
        parsed("--config", path)
    assert not (tmp_path / "made").exists()


def test_completion_in_a_shell(tmp_path, capsys):
    assert run(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    program = """source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _simclr_fast; echo "${COMPREPLY[*]}\""""

    def complete(*words):
        command = ["bash", "-c", program, "bash", str(tmp_path / "script"), "simclr-fast", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout.split()

    assert complete("") == [*COMMANDS, "--help", "--version"]
    assert complete("pretrain", "--temp") == ["--temperature"]
    assert complete("pretrain", "--augmentation.p-b") == ["--augmentation.p-blur"]
    assert complete("pretrain", "--optimizer", "") == ["lars", "sgd", "adamw", "adam"]
    assert complete("eval", "li") == ["linear"]
    assert complete("eval", "linear", "--enc") == ["--encoder"]
    assert complete("bench", "la") == ["lars"]
    # A file: the shell completes it.
    assert complete("pretrain", "--data", "x") == []


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_completion_in_zsh(tmp_path):
    """A shell without settings: what ~/.zshrc may have started is started by the script."""
    path = tmp_path / "script"
    path.write_text(completion.script("zsh"))
    program = 'source "$1" && print -r -- "$_comps[simclr-fast]"'
    command = ["zsh", "-f", "-c", program, "zsh", str(path)]
    environment = {**os.environ, "ZDOTDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("_bash_complete -o default -F _simclr_fast\n", "")


@pytest.mark.parametrize(("no_color", "colours"), [("", True), ("1", False)])
def test_no_color(monkeypatch, capsys, no_color, colours):
    """In a terminal, as colours are only for one."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run(["selfcheck", "--help"]) == 0
    assert ("\x1b[" in capsys.readouterr().out) == colours


def test_help_needs_no_optional_package(monkeypatch, capsys):
    for name in ("tqdm", "matplotlib", "nvidia.dali", "sklearn"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run(["pretrain", "--help"]) == 0
    assert "--temperature" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert run(["pretrain", "--help"]) == 0
    shown = capsys.readouterr().out
    assert COMMANDS["pretrain"].about in shown
    assert "pip install tyro" in shown


def test_every_exit_status_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "reference" / "cli.md").read_text()
    for status in ("0", "1", "2", "128 + n"):
        assert f"| {status} |" in page


def test_augmentations_of_a_file_are_typed(tmp_path):
    """As lists in JSON, tuples in the dataclass."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"augmentation": {"mean": [0, 0, 0], "std": [1, 1, 1]}}))
    assert parsed("--config", path).config.augmentation == replace(
        PRESETS["demo"]().augmentation, mean=(0, 0, 0), std=(1, 1, 1)
    )
    assert isinstance(Augmentation().area, tuple)
