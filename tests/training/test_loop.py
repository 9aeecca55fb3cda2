"""The loop on arrays: what is never saved, who may write to a folder, random numbers, messages."""

import json
import logging
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import TINY
from torch import nn

from simclr_fast.data.sources import ArraySource
from simclr_fast.evaluation.online import OnlineProbe
from simclr_fast.models.encoders import SimCLR
from simclr_fast.training import loop, metrics, report
from simclr_fast.training import pretrain as module
from simclr_fast.training.config import PRESETS
from simclr_fast.training.pretrain import pretrain
from simclr_fast.utils.checkpoint import checkpoints, load_checkpoint
from simclr_fast.utils.device import seed_step
from simclr_fast.utils.interrupts import Interrupted
from simclr_fast.utils.locks import locked

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 255, (24, 16, 16, 3), dtype=np.uint8)
    monkeypatch.setattr(module, "open_data", lambda config: ArraySource(images, np.arange(24) % 3))
    own = {"steps": 6, "checkpoint_every": 2, "memory": "plain"}
    return replace(TINY, data="noise", out=tmp_path / "run", **own)


def last_step(out):
    return load_checkpoint(checkpoints(out / "checkpoints")[-1])["step"]


def poison(monkeypatch, step, harm):
    """harm(outputs) → outputs of the model in `step`."""
    calls, forward = [], SimCLR.forward

    def patched(self, images):
        calls.append(1)
        outputs = forward(self, images)
        return harm(self, outputs) if len(calls) == step else outputs

    monkeypatch.setattr(SimCLR, "forward", patched)


def loss_is_nan(model, outputs):
    h, z = outputs
    return h, z * torch.nan


def weight_is_infinite(model, outputs):
    # The running mean of a batch norm is not in the loss. Autograd does not notice writes to .data.
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    norm.running_mean.data.fill_(torch.inf)
    return outputs


@pytest.mark.parametrize("harm", [loss_is_nan, weight_is_infinite])
@pytest.mark.parametrize("step", [3, 4])
def test_what_is_not_finite_is_not_saved(config, monkeypatch, harm, step):
    """No log line comes first. The checkpoint of step 4 is refused, that of step 2 is kept."""
    poison(monkeypatch, step, harm)
    with pytest.raises(FloatingPointError, match=r"NaN or infinite at step 4.*step-00000002\.pt"):
        pretrain(replace(config, log_every=1000))
    assert last_step(config.out) == 2
    assert (config.out / "checkpoints" / "unusable-step-00000004.pt").exists()
    assert not (config.out / "encoder.safetensors").exists()


def test_backends_are_set_for_the_run_alone(config, monkeypatch):
    found = []

    def look(model, outputs):
        found.append((torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32))
        raise KeyError("an error in the run")

    poison(monkeypatch, 2, look)
    with pytest.raises(KeyError, match="an error in the run"):
        pretrain(replace(config, cudnn_benchmark="on", tf32=True))
    assert found == [(True, True)]
    assert not torch.backends.cudnn.benchmark
    assert not torch.backends.cuda.matmul.allow_tf32
    kept = json.loads((config.out / "config.json").read_text())
    assert (kept["cudnn_benchmark"], kept["tf32"]) == ("on", True)


def test_checkpoints_by_time(config, monkeypatch):
    saved = []
    save = loop.checkpoint.save_checkpoint
    monkeypatch.setattr(
        loop.checkpoint, "save_checkpoint", lambda *given: (saved.append(given[1]), save(*given))
    )
    pretrain(replace(config, checkpoint_every=1000, checkpoint_minutes=1e-9))
    assert saved == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="checkpoint_minutes must be positive and finite, got 0"):
        replace(config, checkpoint_minutes=0)


def test_two_runs_in_one_folder(config):
    pretrain(replace(config, steps=2))
    before = (config.out / "config.json").read_text()
    for again in ({"resume": True}, {"overwrite": True}):
        with (
            locked(config.out / ".lock"),
            pytest.raises(BlockingIOError, match="another run uses"),
        ):
            pretrain(replace(config, **again))
        assert last_step(config.out) == 2
        assert (config.out / "config.json").read_text() == before
    pretrain(replace(config, resume=True))
    assert last_step(config.out) == 6


def test_a_refused_resume_does_not_change_the_folder(config):
    pretrain(replace(config, steps=2))
    before = {p: p.read_bytes() for p in sorted(config.out.rglob("*")) if p.is_file()}
    (config.out / "config.json").unlink()
    del before[config.out / "config.json"]
    with pytest.raises(ValueError, match="does not fit this model"):
        pretrain(replace(config, projector_dim=64, resume=True))
    assert {p: p.read_bytes() for p in sorted(config.out.rglob("*")) if p.is_file()} == before


def test_a_resumed_run_takes_this_runs_settings_and_says_so(config, caplog):
    """A lower learning rate is what a diverged run is told to take."""
    config = replace(config, warmup_epochs=0, lr=1.0, weight_decay=1e-4)
    pretrain(replace(config, steps=3))
    pretrain(replace(config, lr=0.5, weight_decay=1e-3, resume=True, log_every=2))
    said = "changed settings: steps: 3 → 6; lr: 1.0 → 0.5; weight_decay: 0.0001 → 0.001"
    assert said in caplog.text
    groups = load_checkpoint(checkpoints(config.out / "checkpoints")[-1])["optimizer"]
    assert groups["param_groups"][0]["weight_decay"] == 1e-3
    rows = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    expected = [0.5 * (1 + np.cos(np.pi * (row["step"] - 1) / 6)) / 2 for row in rows[-2:]]
    assert [row["lr"] for row in rows[-2:]] == pytest.approx(expected)


def test_a_signal_in_the_last_step(config, monkeypatch):
    """The run is complete, and the report that would follow is not begun."""

    def terminated(model, outputs):
        os.kill(os.getpid(), signal.SIGTERM)
        return outputs

    poison(monkeypatch, 6, terminated)
    with pytest.raises(Interrupted, match="go on with --resume"):
        pretrain(config)
    assert last_step(config.out) == 6
    assert (config.out / "encoder.safetensors").exists()
    assert pretrain(replace(config, resume=True)) == config.out


def test_a_failing_run_closes_its_loader(config, monkeypatch):
    """Otherwise its threads and buffers would live as long as the error's traceback."""
    closed = []

    def batches(self):
        try:
            yield from real(self)
        finally:
            closed.append(1)

    real = module.MultiViewLoader.__iter__
    monkeypatch.setattr(module.MultiViewLoader, "__iter__", batches)
    poison(monkeypatch, 2, lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        pretrain(config)
    assert caught.traceback
    assert closed == [1]


def test_overwrite_deletes_all_but_the_lock(config):
    pretrain(config)
    (config.out / "notes").mkdir()
    (config.out / "notes" / "mine.txt").write_text("")
    pretrain(replace(config, overwrite=True, steps=1))
    assert last_step(config.out) == 1
    assert not (config.out / "notes").exists()


def with_dropout(config):
    model = loop_model(config)
    model.projector = nn.Sequential(nn.Dropout(0.5), model.projector)
    return model


loop_model = module.build_model


def test_dropout_resumes_bit_for_bit(config, monkeypatch):
    monkeypatch.setattr(module, "build_model", with_dropout)
    whole, cut = pretrain(config), replace(config, out=config.out.parent / "cut")
    pretrain(cut)
    checkpoints(cut.out / "checkpoints")[-1].unlink()
    torch.rand(7)
    pretrain(replace(cut, resume=True))
    one, two = (load_checkpoint(checkpoints(o / "checkpoints")[-1]) for o in (whole, cut.out))
    for key, value in one["model"].items():
        assert torch.equal(value, two["model"][key]), key


def test_draws_differ_between_ranks_and_steps(monkeypatch):
    seeded = []

    class Generator:
        def manual_seed(self, seed):
            seeded.append(seed)

    def drawn(seed, step, rank, device=CPU):
        seed_step(seed, step, device, rank)
        return torch.rand(4).tolist()

    cases = [(seed, step, rank) for seed in range(3) for step in range(20) for rank in range(8)]
    values = [tuple(drawn(*case)) for case in cases]
    assert len(set(values)) == len(cases)
    assert drawn(*cases[7]) == list(values[7])
    # The GPU's own generator, which draws dropout there, and no other GPU's.
    monkeypatch.setattr(torch.cuda, "default_generators", [None, Generator()])
    for case in cases:
        drawn(*case, torch.device("cuda", 1))
    assert len(set(seeded)) == len(cases)


def test_the_probes_next_row_stays_on_the_host():
    """The host reads it in every step: on a GPU that would be a wait per step."""
    meta = torch.device("meta")
    probe = OnlineProbe(np.arange(8) % 2, 1, CPU)
    probe._start(4)
    resumed = OnlineProbe(np.arange(8) % 2, 1, CPU)
    resumed.device = meta
    resumed.load_state_dict(probe.state)
    assert {name: value.device for name, value in resumed.state.items()} == {
        name: CPU if name == "next" else meta for name in probe.state
    }


def test_a_run_prints_a_summary(config, caplog):
    with caplog.at_level(logging.INFO):
        pretrain(config)
    (said,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("pretrain\n")]
    assert "noise: 24 images" in said
    assert "resnet10, " in said
    assert "6 steps, 2 epochs" in said
    assert "cpu" in said
    assert str(config.out / "checkpoints") in said


def test_slow_data_are_warned_of_once(config, caplog, monkeypatch):
    monkeypatch.setattr(metrics, "_MEASURED", 0.0)
    monkeypatch.setattr(metrics, "_SLOW_DATA", 0.0)
    pretrain(config)
    assert caplog.text.count("waiting for data. Try --workers") == 1
    monkeypatch.setattr(metrics, "_SLOW_DATA", 100.0)
    caplog.clear()
    pretrain(replace(config, overwrite=True))
    assert "waiting for data" not in caplog.text


def test_a_batch_larger_than_the_data_has_a_remedy(config):
    with pytest.raises(ValueError, match=r"at most 24, the number of images.*--batch-size 16"):
        pretrain(replace(config, batch_size=4096))


def test_the_report_shrinks_large_images(config, monkeypatch):
    """The fit on raw pixels needs memory with the square of their number."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (24, 48, 48, 3), dtype=np.uint8)
    widths = []
    fit = report.confusion_probe

    def noted(of_train, *rest, **options):
        widths.append(of_train.shape[1])
        return fit(of_train, *rest, **options)

    monkeypatch.setattr(module, "open_data", lambda config: ArraySource(images))
    for name in ("open_data", "images_to_evaluate"):
        monkeypatch.setattr(
            report, name, lambda config, split="train": ArraySource(images, np.arange(24) % 3)
        )
    monkeypatch.setattr(report, "confusion_probe", noted)
    config = replace(config, augmentation=replace(config.augmentation, size=48), steps=1)
    lines = list(report.run_report(config, pretrain(config)))
    assert widths[0] == 3 * 32 * 32
    assert lines[1].startswith("raw pixels, 32×32")
    assert json.loads((config.out / "probe.json").read_text()).keys() > {"pretrained encoder"}
    assert list(report.next_steps(config, config.out))[1].split()[:5] == [
        *("simclr-fast", "eval", "linear", "--encoder", str(config.out))
    ]


def test_the_printed_next_commands_are_valid(config):
    """Their arguments are accepted: test images where none are asked for, a format that fits."""
    narrow = replace(PRESETS["demo"](), out=config.out)
    photos = replace(PRESETS["imagenet"](), data="photos", out=config.out)
    small = replace(photos, augmentation=replace(photos.augmentation, size=32))
    for run, protocol, form in (
        (narrow, "linear", "torch-export"),
        (photos, "embed", "torchvision"),
        (small, "embed", "torch-export"),
    ):
        _, evaluate, export = report.next_steps(run, config.out)
        assert f"eval {protocol} --encoder {config.out}" in evaluate
        assert ("--data photos" in evaluate) == (run.data == "photos")
        assert export.endswith(f"--format {form}")
    shards = replace(photos, data="my shards/{000..099}.tar", image_key="jpg")
    _, evaluate, _ = report.next_steps(shards, config.out)
    assert evaluate.endswith("--data 'my shards/{000..099}.tar' --image-key jpg")
