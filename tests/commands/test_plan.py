"""simclr-fast plan: the command that it prints, its JSON, and that it never contradicts itself."""

import json
import shlex
import sys

import pytest

from simclr_fast.commands import plan
from simclr_fast.commands.cli import run
from simclr_fast.commands.pretrain import Pretrain
from simclr_fast.commands.run_options import parse_run
from simclr_fast.large_batch import planner
from simclr_fast.large_batch.planner import Setting

SMALL = ["--model", "resnet18", "--width", "0.25", "--image-size", "32", "--batch-size", "64"]


@pytest.fixture
def settings(monkeypatch):
    """Replaces the simulation: gives it the settings that a test wants."""
    monkeypatch.setattr(planner, "more_host_memory", lambda *_: None)

    def use(*ways):
        monkeypatch.setattr(planner, "settings", lambda *_: iter(ways))

    return use


def test_the_printed_command_is_the_run_that_was_planned(settings, capsys):
    settings(Setting("plain", None, 90e9), Setting("lockstep", 64, 20e9))
    options = ["--data", "my photos", "--gpus", "4", "--projector-depth", "3", "--precision"]
    memory = ["--gpu-memory", "24GiB", "--host-memory", "64GB"]
    assert run(["plan", *SMALL, *memory, *options, "float16"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[:6] == ["torchrun", "--nproc-per-node", "4", "-m", "simclr_fast", "pretrain"]
    config = parse_run(Pretrain, words[6:], "pretrain").config
    assert (config.data, config.model, config.width) == ("my photos", "resnet18", 0.25)
    assert (config.batch_size, config.augmentation.size, config.projector_depth) == (64, 32, 3)
    assert (config.memory, config.micro_batch) == ("lockstep", 64)
    assert (config.gpu_memory, config.host_memory) == ("24GiB", "64GB")
    assert config.precision == "float16"
    assert config.out is not None


def test_every_optimizer_of_pretrain_and_compile(settings, monkeypatch, capsys):
    settings(Setting("plain", None, 90e9), Setting("lockstep", 64, 20e9))
    seen = []
    exact = planner.exact
    monkeypatch.setattr(planner, "exact", lambda work, way: seen.append(work) or exact(work, way))
    for optimizer, state in (("lars", 1), ("sgd", 1), ("adam", 2), ("adamw", 2)):
        given = [*SMALL, "--optimizer", optimizer, "--compile", "--gpu-memory", "24GB"]
        assert run(["plan", *given]) == 0
        printed = capsys.readouterr().out
        config = parse_run(Pretrain, shlex.split(printed.splitlines()[-1])[2:], "pretrain").config
        assert (config.optimizer, config.compile) == (optimizer, True)
        assert (seen[-1].state, seen[-1].compile) == (state, True)
        assert "into one pass over memory" in printed
    for memory, gpus, compiles in (("plain", 1, True), ("plain", 2, True), ("replay", 1, False)):
        settings(Setting(memory, None, 2e9))
        assert run(["plan", *SMALL, "--compile", "--gpus", str(gpus)]) == 0
        command = capsys.readouterr().out.splitlines()[-1]
        assert f"--memory {memory}" in command
        assert ("--compile" in command) is compiles


def test_the_command_for_one_gpu_and_the_demo(settings, capsys):
    settings(Setting("plain", None, 1e9))
    assert run(["plan", "--data", "demo"]) == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[:2] == ["simclr-fast", "pretrain"]
    config = parse_run(Pretrain, words[2:], "pretrain").config
    assert (config.data, config.model, config.width) == ("demo", "resnet50", 1)
    assert (config.batch_size, config.stem, config.augmentation.size) == (4096, None, 224)


def test_grad_cache_is_not_called_a_fit(settings, capsys):
    settings(Setting("plain", None, 900e9), Setting("grad-cache", 256, 5e9))
    assert run(["plan", *SMALL]) == 1
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line for line in lines if line.startswith("grad-cache  "))
    assert row.endswith("fits, but another gradient")
    assert "batch_size 64 fits in no mode: --memory plain needs 900GB" in lines[-1]


@pytest.mark.parametrize(("name", "memory"), [(n, m) for n, (m, _) in plan.GPUS.items()])
def test_a_gpu_name_gives_its_memory(settings, capsys, name, memory):
    settings(Setting("plain", None, 0.89 * memory * 1e9))
    assert run(["plan", *SMALL, "--gpu", name]) == 0
    assert f"{plan.GPUS[name][1].name} with {memory}GB" in capsys.readouterr().out
    settings(Setting("plain", None, 0.91 * memory * 1e9))
    assert run(["plan", *SMALL, "--gpu", name]) == 1


def test_gpu_memory_overrides_that_of_the_named_gpu(settings, capsys):
    settings(Setting("plain", None, 30e9))
    assert run(["plan", *SMALL, "--gpu", "h100", "--gpu-memory", "24GiB"]) == 1
    assert "H100 80GB SXM with 24GiB" in capsys.readouterr().out


def test_plan_prints_what_it_does_before_it_computes(monkeypatch, capsys):
    def slow(*_):
        shown.append(capsys.readouterr().out)
        yield Setting("plain", None, 1e9)

    shown = []
    monkeypatch.setattr(planner, "settings", slow)
    assert run(["plan", *SMALL]) == 0
    assert "Each row takes some seconds" in shown[0]


def test_a_terminal_shows_the_progress_of_plan(settings, monkeypatch, capsys):
    settings(Setting("plain", None, 1e9))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(["plan", *SMALL]) == 0
    assert "computing the next row" in capsys.readouterr().err


def test_plan_writes_json(settings, capsys):
    refused = Setting("replay", None, float("inf"), float("inf"), float("inf"), refusal="no")
    settings(Setting("plain", None, 90e9), refused, Setting("lockstep", 64, 20e9))
    assert run(["plan", *SMALL, "--gpu", "a100-80gb", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["predicted"] is True
    assert [row["fits"] for row in found["rows"]] == [False, False, True]
    assert found["rows"][1]["refusal"] == "no"
    assert "device_bytes" not in found["rows"][1]
    assert found["command"].endswith("--memory lockstep --micro-batch 64")
    assert found["gpu"]["name"] == "A100 80GB SXM"
