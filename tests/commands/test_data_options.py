"""What the commands say and keep of their data: the account, labels of a file, odd names."""

import json
import os
from dataclasses import replace

import pytest
from odd_inputs import picture, write, write_tar
from tiny_runs import TINY

from simclr_fast.commands.cli import run
from simclr_fast.data.account import printable
from simclr_fast.training.config import from_json, to_json
from simclr_fast.training.pretrain import pretrain
from simclr_fast.training.report import next_steps, run_report

LATIN = os.fsdecode("caf\xe9".encode("latin-1"))
COUNT = 16


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder whose name and classes are not UTF-8, with two images that are left out."""
    monkeypatch.setenv("SIMCLR_FAST_CACHE", str(tmp_path / "cache"))
    names = [f"{LATIN}/{i}.png" if i % 2 else f"x/{i}.png" for i in range(COUNT)]
    files = {name: i for i, name in enumerate(names)}
    return write(tmp_path / LATIN, files | {"notes.txt": "x", "__MACOSX/1.png": 1})


def trained(folder, **options):
    config = replace(TINY, data=str(folder), out=folder.parent / "run", steps=2, **options)
    return pretrain(config), config


def test_preview_lists_the_account(photos, capsys):
    assert run(["preview", "--data", str(photos), "--list"]) == 0
    printed = capsys.readouterr().out
    for line in (
        f"found          {COUNT + 2}",
        f"used           {COUNT} images",
        "labels         folder names",
        "  caf\\xe9: 8 images",
        "  1 .txt\n    ",
        "  1 hidden or system\n    ",
        "lost           0",
    ):
        assert line in printed
    assert not list(photos.parent.glob("*.jpg"))


def test_a_run_says_and_keeps_what_it_found(photos, caplog):
    with caplog.at_level("INFO"):
        out, config = trained(photos)
    line = "16 images, 2 classes (folder names); left out: "
    assert line in caplog.text
    text = (out / "config.json").read_text()
    found = json.loads(text)["images"]
    assert (found["found"], found["used"], found["lost"]) == (18, 16, [])
    assert found["left_out"] == {".txt": 1, "hidden or system": 1}
    assert found["classes"] == {"caf\\xe9": 8, "x": 8}
    # The account is no option.
    assert from_json(text) == config
    assert from_json(to_json(config)) == config


def test_a_resumed_run_warns_of_other_labels(photos, caplog):
    _, config = trained(photos)
    write(photos / "..", {"labels.csv": "0.png,1\n1.png,2\n"})
    pretrain(replace(config, resume=True, steps=4, labels=photos.parent / "labels.csv"))
    assert "images labels: folder names → integers" in caplog.text


def test_evaluation_and_export_of_odd_names(photos, capsys):
    out, _ = trained(photos)
    out = out.rename(photos.parent / f"{LATIN} run")
    common = ["--encoder", str(out), "--device", "cpu"]
    test = write(photos.parent / "test", {f"{LATIN}/1.png": 90, "x/1.png": 80, "x/2.png": 70})
    given = [*common, "--data", str(photos), "--test", str(test)]
    assert run(["eval", "knn", *given]) == 0
    assert "test images      3 images, 2 classes (folder names)" in capsys.readouterr().out
    saved = json.loads((out / "eval/knn.json").read_text())
    assert saved["images"]["test"]["classes"] == {"caf\\xe9": 1, "x": 2}
    assert run(["eval", "linear", *given, "--epochs", "1", "--batch-size", "8"]) == 0
    assert run(["eval", "embed", *common, "--data", str(photos), "--methods", "pca"]) == 0
    to = str(photos.parent / f"{LATIN} export")
    assert run(["export", "--encoder", str(out), "--to", to, "--format", "torch-export"]) == 0
    assert capsys.readouterr().out.encode()


def test_labels_of_a_file_are_for_training_and_test_images(photos, capsys):
    out, _ = trained(photos)
    lines = [f"{i}.png,{'odd' if i % 3 else 'even'}" for i in range(COUNT)]
    write(photos.parent, {"labels.csv": "\n".join([*lines, "30.png,odd", "31.png,unseen"])})
    test = write(photos.parent / "test", {"30.png": 90, "99.png": 1})
    csv = str(photos.parent / "labels.csv")
    given = ["--encoder", str(out), "--device", "cpu", "--data", str(photos), "--test", str(test)]
    assert run(["eval", "knn", *given]) == 1
    assert "has no labels: give a folder" in capsys.readouterr().err
    assert run(["eval", "knn", *given, "--labels", csv]) == 0
    printed = capsys.readouterr().out
    assert "training images  16 images, 2 classes (strings); left out" in printed
    assert "test images      1 image, 1 class (strings); left out: 1 unlabelled" in printed
    saved = json.loads((out / "eval/knn.json").read_text())
    assert list(saved["results"]["k=16"]["per_class"]) == ["odd"]
    assert run(["eval", "embed", *given, "--labels", csv, "--methods", "pca"]) == 0
    assert '"unlabelled"' in (out / "eval/embed.html").read_text()


def test_a_damaged_archive_ends_a_run_unless_skipped(tmp_path, caplog, capsys):
    path = write_tar(tmp_path / "x.tar", [(f"{i}.png", i) for i in range(COUNT)])
    path.write_bytes(path.read_bytes()[: 1024 * 12 + 100])
    assert run(["preview", "--data", str(path)]) == 1
    said = capsys.readouterr().err
    assert "ends within the header at byte 12288" in said
    assert "on_error 'skip'" in said
    with caplog.at_level("INFO"):
        out, _ = trained(path, on_error="skip")
    assert f"12 images; LOST: {path} ends within" in caplog.text
    assert len(json.loads((out / "config.json").read_text())["images"]["lost"]) == 1


def test_a_run_and_its_report_without_corrupt_images(photos, caplog):
    """Training replaces a corrupt image, the online probe takes the other one's label, and the
    report leaves it out."""
    broken = write(photos, {"x/99.png": picture(99)[:50]}) / "x/99.png"
    out, config = trained(photos, on_error="skip", probe_every=1)
    assert list(run_report(config, out))
    assert caplog.text.count(f"skipping {printable(broken)}: ") == 2
    assert any("--on-error skip" in line for line in next_steps(config, out))


def test_pretraining_ignores_labels_that_it_does_not_use(tmp_path):
    members = [(f"{i}.{kind}", i if kind == "png" else "0.5") for i in range(COUNT)
               for kind in ("png", "cls")]  # fmt: skip
    path = write_tar(tmp_path / "x.tar", members)
    trained(path)
    with pytest.raises(ValueError, match=r"probe_every needs labelled images: .* got 0.5 for"):
        trained(path, probe_every=1, overwrite=True)
