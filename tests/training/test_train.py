"""The driver end to end on real JPEG files: a run, its folder, resume, signals, ranks, probe."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import TINY, write_photos

from simclr_fast.commands.cli import run
from simclr_fast.commands.pretrain import Pretrain
from simclr_fast.commands.run_options import parse_run
from simclr_fast.data import demo
from simclr_fast.losses.nt_xent import nt_xent_loss
from simclr_fast.training.config import PRESETS, PretrainConfig, from_json, to_json
from simclr_fast.training.pretrain import pretrain
from simclr_fast.utils.checkpoint import checkpoints, load_checkpoint

pytest.importorskip("nvidia.dali", reason="decoding needs DALI (Linux)")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("train"), 40)


@pytest.fixture
def config(images, tmp_path):
    return replace(
        TINY, data=str(images), out=tmp_path / "run", steps=8, checkpoint_every=3, workers=2
    )


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_its_folder(config):
    out = pretrain(config)
    assert from_json((out / "config.json").read_text()) == config
    lines = rows(out)
    assert [row["step"] for row in lines] == list(range(1, 9))
    assert lines[0]["lr"] == 0
    assert {"loss", "contrastive_accuracy", "contrastive_entropy", "images_per_second"} < set(
        lines[0]
    )
    assert [p.name for p in checkpoints(out / "checkpoints")] == [
        "step-00000006.pt",
        "step-00000008.pt",
    ]
    weights = load_file(out / "encoder.safetensors")
    trained = load_checkpoint(checkpoints(out / "checkpoints")[-1])["model"]
    assert weights.keys() == {k.removeprefix("encoder.") for k in trained if "encoder" in k}
    assert all(torch.equal(v, trained[f"encoder.{k}"]) for k, v in weights.items())


@pytest.mark.parametrize("views", [2, 3])
def test_statistics_are_made_only_for_the_steps_that_are_logged(config, views, monkeypatch):
    asked = []

    def counted(*args, return_stats=False, **options):
        asked.append(return_stats)
        return nt_xent_loss(*args, return_stats=return_stats, **options)

    monkeypatch.setattr("simclr_fast.training.pretrain.nt_xent_loss", counted)
    out = pretrain(replace(config, views=views, steps=4, log_every=3))
    assert [row["step"] for row in rows(out)] == [3, 4]
    # With three views the loss is another function.
    assert asked == ([False, False, True, True] if views == 2 else [True, True])


@pytest.mark.parametrize("optimizer", ["lars", "adam"])
def test_resume_in_mid_epoch_is_bit_for_bit(config, optimizer):
    config = replace(config, optimizer=optimizer)
    whole = pretrain(config)
    last = checkpoints(whole / "checkpoints")[-1]
    # Step 6 is the first of the second epoch of 5; drop what came after it, and go on.
    cut = replace(config, out=config.out.parent / "cut")
    pretrain(cut)
    checkpoints(cut.out / "checkpoints")[-1].unlink()
    pretrain(replace(cut, resume=True))
    assert [r["loss"] for r in rows(cut.out)] == [r["loss"] for r in rows(whole)]
    one, two = (load_checkpoint(folder / "checkpoints" / last.name) for folder in (whole, cut.out))
    for key, value in one["model"].items():
        assert torch.equal(value, two["model"][key]), key


def test_an_output_folder_in_use_is_refused(config):
    config.out.mkdir()
    (config.out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        pretrain(config)
    assert (config.out / "notes.txt").exists()
    pretrain(replace(config, overwrite=True, steps=1))
    assert not (config.out / "notes.txt").exists()


def command(config, *more):
    augmentation = config.augmentation
    return [
        *("-m", "simclr_fast", "pretrain", "--data", config.data, "--out", str(config.out)),
        *("--model", config.model, "--width", str(config.width), "--device", "cpu"),
        *("--augmentation.size", str(augmentation.size), "--batch-size", str(config.batch_size)),
        *("--warmup-epochs", "1", "--log-every", "1", "--precision", "float32", *more),
    ]


def await_rows(out, alive):
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        assert alive()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def assert_saved(out):
    (saved,) = checkpoints(out / "checkpoints")
    assert load_checkpoint(saved)["step"] == rows(out)[-1]["step"]


def test_ctrl_c_saves_a_checkpoint(config):
    process = subprocess.Popen(
        [sys.executable, *command(config, "--steps", "100000")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    await_rows(config.out, lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "--resume" in errors
    assert_saved(config.out)


def test_sigterm_saves_a_checkpoint(config, capsys):
    """It arrives at any moment of a step."""

    def send():
        await_rows(config.out, lambda: True)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    status = run(command(config, "--steps", "100000")[2:])
    sender.join()
    assert status == 128 + signal.SIGTERM
    assert "--resume" in capsys.readouterr().err
    assert_saved(config.out)


def test_ranks_train_as_one_process(config):
    """Two gloo ranks, uneven shares of a batch of 9: the same losses as one process."""
    config = replace(config, batch_size=9)
    alone = replace(config, out=config.out.parent / "alone", steps=4)
    pretrain(alone)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = command(config, "--steps", "4", "--preset", "imagenet")
    subprocess.run(
        [*launcher, *arguments],
        cwd=ROOT,
        check=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    one, two = ([r["loss"] for r in rows(out)] for out in (alone.out, config.out))
    assert np.allclose(one, two, rtol=2e-4), (one, two)


def test_the_demo_from_the_command_line(tmp_path, monkeypatch, capsys):
    """On a part of the embedded images: `make pretrain` is of all."""
    garments, part = demo.demo_garments, {"train": slice(0, 900, 3), "test": slice(0, 300, 2)}
    monkeypatch.setattr(
        demo, "demo_garments", lambda split: tuple(p[part[split]] for p in garments(split))
    )
    monkeypatch.setenv("SIMCLR_FAST_CACHE", str(tmp_path / "cache"))
    # A probe of 3,072 pixels takes seconds.
    monkeypatch.setattr("simclr_fast.training.report._PIXELS", 16)
    out = tmp_path / "run"
    assert run(["pretrain", "--data", "demo", "--steps", "3", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for name in ("raw pixels, 16×16", "same encoder, untrained", "pretrained encoder"):
        assert name in printed
    results = json.loads((out / "probe.json").read_text())
    assert all(0.05 < r["low"] <= r["value"] <= r["high"] < 0.9 for r in results.values())
    for picture in ("loss.png", "embedding.png"):
        assert str(out / picture) in printed
        assert min(Image.open(out / picture).size) > 300
    page = (out / "report.html").read_text()
    shown = json.loads(re.search(r'<script type="application/json" id="data">(.*)', page)[1][:-9])
    assert shown["runs"][0]["probe"] == results
    assert shown["runs"][0]["machine"]["torch"] == torch.__version__
    assert np.sum(shown["confusion"]["counts"]) == 150
    assert shown["views"].startswith("data:image/jpeg;base64,")
    again = tmp_path / "again.html"
    assert run(["report", str(out), "--to", str(again)]) == 0
    repeated = re.search(r'<script type="application/json" id="data">(.*)', again.read_text())[1]
    assert json.loads(repeated[:-9]) == shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "/nowhere"], "/nowhere"),
        (["--data", "demo", "--batch-size", "9999"], "9999"),
        (["--data", "demo", "--model", "resnet51"], "resnet51"),
        (["--data", "cifar10:/nowhere"], "cifar10"),
        (["--temperature", "0"], "temperature must be positive and finite, got 0"),
    ],
)
def test_errors_are_one_line(arguments, says, tmp_path, capsys):
    assert run(["pretrain", *arguments, "--out", str(tmp_path / "run")]) == 1
    errors = capsys.readouterr().err
    assert says in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_preview_writes_a_sheet_and_prints_parameters(images, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    options = ["--images", "3", "--to", str(sheet), "--augmentation.size", "32"]
    assert run(["preview", "--data", str(images), *options]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) >= 6
    assert str(sheet) in printed[-1]
    width, height = Image.open(sheet).size
    assert width > height > 3 * 32


@pytest.mark.parametrize("option", [("--temperature", "hot"), ("--no-such-option", "1")])
def test_bad_options_are_explained(option, capsys):
    assert run(["pretrain", *option]) == 2
    assert option[0].strip("-") in capsys.readouterr().err


def test_unknown_commands_are_refused(capsys):
    assert run(["--help"]) == 0
    assert run([]) == 2
    assert run(["train"]) == 2
    assert "no command 'train'" in capsys.readouterr().err


def parse(*arguments):
    return parse_run(Pretrain, arguments, "pretrain").config


def test_options_override_presets():
    for name, preset in PRESETS.items():
        assert parse("--preset", name) == preset()
        assert from_json(to_json(preset())) == preset()
    paper = parse("--data", "photos")
    assert (paper.batch_size, paper.temperature, paper.optimizer) == (4096, 0.1, "lars")
    assert parse("--augmentation.p-jitter", "0").augmentation.p_jitter == 0


NUMBERS = [
    *("width", "projector_dim", "projector_depth", "batch_size", "epochs", "steps", "temperature"),
    *("lr", "weight_decay", "warmup_epochs", "micro_batch", "workers"),
    *("log_every", "probe_every", "checkpoint_every", "checkpoint_minutes", "timeout"),
]


@pytest.mark.parametrize("field", NUMBERS)
def test_bad_configurations_are_refused_by_name(field):
    is_float = "float" in str(PretrainConfig.__annotations__[field])
    for bad in (-1, float("nan") if is_float else 0):
        with pytest.raises(ValueError, match=f"{field} must be .*, got {bad}"):
            PretrainConfig(**{field: bad})
