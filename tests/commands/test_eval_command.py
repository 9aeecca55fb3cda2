"""simclr-fast eval on a part of the embedded data: tables, JSON, pictures, errors."""

import json
import os
import shutil
import signal
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from simclr_fast.commands import protocol
from simclr_fast.commands.cli import run
from simclr_fast.data.demo import CLASSES, demo_images
from simclr_fast.evaluation import features, linear
from simclr_fast.evaluation.layers import Taps, load_run, projector_layers
from simclr_fast.evaluation.subsets import labelled_pair
from simclr_fast.models.encoders import SimCLR, build_encoder, build_projector
from simclr_fast.training.config import demo
from simclr_fast.training.pretrain import pretrain
from simclr_fast.utils.checkpoint import checkpoints
from simclr_fast.utils.distributed import World
from simclr_fast.utils.launch import Launch

pytest.importorskip("nvidia.dali", reason="decoding needs DALI (Linux)")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A short run, and small train and test folders of the embedded data."""
    home = tmp_path_factory.mktemp("eval")
    for split, per_class in (("train", 12), ("test", 5)):
        images, labels = demo_images(split)
        for label, name in enumerate(CLASSES):
            folder = home / split / name
            folder.mkdir(parents=True)
            for i in np.flatnonzero(labels == label)[:per_class]:
                Image.fromarray(images[i]).save(folder / f"{name}_{i}.png")
    config = replace(demo(), data=str(home / "train"), out=home / "run", batch_size=40, steps=4)
    pretrain(replace(config, width=0.125, device="cpu", warmup_epochs=1))
    return home


def evaluate(home, protocol, *more, test=True):
    arguments = ["eval", protocol, "--encoder", str(home / "run"), "--data", str(home / "train")]
    if test:
        arguments += ["--test", str(home / "test")]
    return run([*arguments, "--cache", str(home / "cache"), "--device", "cpu", *more])


def results(home, protocol):
    return json.loads((home / "run" / "eval" / f"{protocol}.json").read_text())["results"]


def check_scores(scores):
    top1, top5 = scores["top1"], scores["top5"]
    assert top1["n"] == top5["n"] == 50
    assert 0 <= top1["low"] <= top1["value"] <= top1["high"] <= top5["high"] <= 1
    assert top1["value"] == pytest.approx(np.mean(list(scores["per_class"].values())))
    assert sorted(scores["per_class"]) == sorted(CLASSES)


def test_eval_linear_prints_and_reuses_its_results(home, capsys):
    assert evaluate(home, "linear", "--epochs", "2", "--batch-size", "60") == 0
    printed = capsys.readouterr().out
    for word in ("logistic regression", "SGD, 2 epochs", "top-5", "lowest classes", "linear.json"):
        assert word in printed
    found = results(home, "linear")
    for name in ("logistic", "sgd"):
        check_scores(found[name])
    assert len(found["logistic"]["validation"]) == 45
    assert found["logistic"]["converged"]
    assert not list((home / "run" / "eval").glob("*sweep*"))
    # Again: features and linear layer are read, the result is the same.
    stamps = {path: path.stat().st_mtime_ns for path in (home / "cache").glob("*.npy")}
    assert evaluate(home, "linear", "--epochs", "2", "--batch-size", "60", "--no-logistic") == 0
    assert results(home, "linear")["sgd"] == found["sgd"]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_eval_knn_leaves_out_too_large_k(home, capsys):
    assert evaluate(home, "knn", "--k", "1", "20", "200") == 0
    found = results(home, "knn")
    # 200 is more than the 120 training images.
    assert list(found) == ["k=1", "k=20"]
    for scores in found.values():
        check_scores(scores)
    assert "20 neighbours" in capsys.readouterr().out


def test_eval_finetune_trains_on_a_subset(home, tmp_path):
    options = ("--epochs", "2", "--batch-size", "40", "--shares", "0.1", "1")
    assert evaluate(home, "finetune", *options) == 0
    found = results(home, "finetune")
    assert [(name, scores["images"]) for name, scores in found.items()] == [("0.1", 10), ("1", 120)]
    for scores in found.values():
        check_scores(scores)
    listing = tmp_path / "mine.txt"
    listing.write_text("bag_4800.png\ndress_1801.png\n")
    assert evaluate(home, "finetune", "--epochs", "1", "--subset", str(listing)) == 0
    assert results(home, "finetune")["mine"]["images"] == 2


@pytest.fixture
def damaged(home, tmp_path):
    """The training and test images, some of them not decodable; without them; their names.

    A file cut off, an empty one, bytes that are no image, a wrong checksum.
    """
    changes = (lambda b: b[:-30], lambda b: b"", lambda b: b"x" * 99, lambda b: b[:50] + b"?" * 9)
    names = []
    for split in ("train", "test"):
        for kind in ("damaged", "rest"):
            shutil.copytree(home / split, tmp_path / kind / split)
        files = sorted((tmp_path / "damaged" / split).rglob("*.png"))[3::11][:4]
        for path, change in zip(files, changes, strict=True):
            path.write_bytes(change(path.read_bytes()))
            (tmp_path / "rest" / split / path.relative_to(tmp_path / "damaged" / split)).unlink()
            names.append(str(path))
    return tmp_path, names


@pytest.mark.parametrize("protocol", ["knn", "linear", "finetune"])
def test_eval_without_corrupt_images_is_eval_of_the_others(home, damaged, protocol, caplog, capsys):
    """--on-error skip: scores equal those of the same folders without the corrupt images, so
    features and labels are still aligned; every one is named and counted."""
    folder, names = damaged
    short = {"linear": ["--no-sgd"], "finetune": ["--epochs", "1", "--shares", "1"]}
    found = {}
    for kind in ("damaged", "rest"):
        given = ["--data", f"{folder}/{kind}/train"]
        given += ["--test", f"{folder}/{kind}/test", "--out", f"{folder}/{kind}/out"]
        given += ["--encoder", str(home / "run"), "--cache", str(folder / "cache")]
        given += ["--device", "cpu", *short.get(protocol, [])]
        if kind == "damaged":
            assert run(["eval", protocol, *given]) == 1
            assert "corrupt images: " in capsys.readouterr().err
            given += ["--on-error", "skip"]
        assert run(["eval", protocol, *given]) == 0
        written = json.loads((folder / kind / "out" / f"{protocol}.json").read_text())
        found[kind] = written["results"]
        if kind == "damaged":
            assert all(f"skipping {name}: " in caplog.text for name in names)
            for part, images in (("train", 116), ("test", 46)):
                assert written["images"][part]["used"] == images
                assert written["images"][part]["left_out"] == {"corrupt": 4}
            assert capsys.readouterr().out.count("4 corrupt") == 2
    assert found["damaged"] == found["rest"]


def test_eval_embed_leaves_out_corrupt_images(home, damaged):
    """The page shows the images that can be decoded, and names each."""
    folder, names = damaged
    given = ["--data", f"{folder}/damaged/test", "--on-error", "skip", "--methods", "pca"]
    given += ["--encoder", str(home / "run"), "--cache", str(folder / "cache")]
    assert run(["eval", "embed", *given, "--device", "cpu", "--out", str(folder / "out")]) == 0
    page = (folder / "out" / "embed.html").read_text()
    assert not any("/".join(name.split("/")[-2:]) in page for name in names[4:])
    assert json.loads((folder / "out" / "embed.json").read_text())["results"]["images"] == 46


def test_eval_layers_probes_every_layer(home, capsys):
    assert evaluate(home, "layers") == 0
    found = results(home, "layers")
    assert [(name, scores["width"]) for name, scores in found.items()] == [
        ("h", 64),
        ("projector layer 1", 64),
        ("z", 128),
    ]
    for scores in found.values():
        check_scores(scores)
    assert min(Image.open(home / "run" / "eval" / "layers.png").size) > 300
    assert "layers.png" in capsys.readouterr().out


@pytest.mark.parametrize(("kind", "depth"), [("nonlinear", 3), ("linear", 2), ("none", 2)])
def test_layer_features_equal_the_projectors_outputs(kind, depth):
    encoder, dim = build_encoder("resnet10", width=0.125, image_size=16)
    model = SimCLR(encoder, build_projector(kind, dim, 24, depth)).eval()
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    taps = Taps(model).eval()
    out = taps(images)
    parts = out.split(taps.widths(out.shape[1]), dim=1)
    h, z = model(images)
    assert len(parts) == len(taps.names) == {"nonlinear": depth + 1, "linear": 2, "none": 1}[kind]
    assert torch.equal(parts[0], h)
    assert torch.equal(parts[-1], z)
    if kind == "nonlinear":
        assert torch.equal(parts[1], model.projector[:3](h))
    assert sum(len(layer) for layer in projector_layers(model.projector)) == len(
        list(model.projector.children())
    )


def test_a_run_is_loaded_with_its_augmentation(home, tmp_path):
    model, augmentation = load_run(home / "run")
    assert augmentation.size == 32
    state = torch.load(checkpoints(home / "run" / "checkpoints")[-1], weights_only=True)["model"]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_run(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_and_the_same_command_goes_on(home, tmp_path, capsys, monkeypatch, number):
    """Once after the training images' features, once in the sweep, once in the third epoch."""
    arguments = ("linear", "--epochs", "4", "--batch-size", "60", "--out", str(tmp_path / "out"))
    assert evaluate(home, *arguments) == 0
    whole = json.loads((tmp_path / "out" / "linear.json").read_text())["results"]

    def count(patch, target, name, stop_after=None):
        calls, real = [], getattr(target, name)

        def counted(*given, **options):
            if len(calls) == stop_after:
                os.kill(os.getpid(), number)
            calls.append(given)
            return real(*given, **options)

        patch.setattr(target, name, counted)
        return calls

    arguments = (*arguments[:-1], str(tmp_path / "cut"), "--cache", str(tmp_path / "cache"))
    watched = ((features, "ImageLoader"), (linear._Problem, "fit"), (torch.optim.SGD, "step"))
    for (target, name), stop_after in zip(watched, (1, 7, 5), strict=True):
        with monkeypatch.context() as patch:
            count(patch, target, name, stop_after)
            assert evaluate(home, *arguments) == 128 + number
        assert "goes on where it stopped" in capsys.readouterr().err
        assert not (tmp_path / "cut" / "linear.json").exists()
    calls = [count(monkeypatch, *each) for each in watched]
    assert evaluate(home, *arguments) == 0
    # Nothing is extracted, the chosen penalty is fitted once more, two of four epochs are left.
    assert [len(made) for made in calls] == [0, 1, 4]
    assert json.loads((tmp_path / "cut" / "linear.json").read_text())["results"] == whole


def test_eval_refuses_several_processes(home, capsys, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    encoder = ["--encoder", str(home / "run")]
    export = ["export", *encoder, "--to", str(home / "never"), "--format", "safetensors"]
    alone = (["finetune"], ["layers"], ["linear", "--no-logistic"])
    evals = [["eval", *protocol, *encoder] for protocol in alone]
    for command in (*evals, ["ablate"], export):
        assert run(command) == 1
        assert "one process, but 2 were started" in capsys.readouterr().err
    assert not (home / "never").exists()


def test_eval_errors_are_one_line(home, tmp_path, capsys):
    assert evaluate(home, "knn", test=False) == 1
    assert "pass --test" in capsys.readouterr().err
    assert evaluate(home, "knn", "--test", str(home / "test" / "bag"), test=False) == 1
    assert "no labels" in capsys.readouterr().err
    (tmp_path / "hat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "hat" / "a.png")
    assert evaluate(home, "linear", "--test", str(tmp_path), test=False) == 1
    assert "classes without training images" in capsys.readouterr().err
    assert run(["eval", "knn", "--encoder", str(tmp_path / "none.safetensors")]) == 1
    assert "none.safetensors" in capsys.readouterr().err
    assert run(["eval", "--help"]) == 0
    assert "finetune" in capsys.readouterr().out
    assert run(["eval"]) == run(["eval", "probe"]) == 2
    assert run(["eval", "knn", "--help"]) == 0
    assert run(["eval", "knn"]) == 2
    assert "--tau" in capsys.readouterr().out


def test_unlabelled_images_are_left_out(monkeypatch):
    from simclr_fast.data.sources import ArraySource

    images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.array([1, -1, 0, 1])
    monkeypatch.setattr(
        "simclr_fast.evaluation.subsets.named_source",
        lambda *_, **__: ArraySource(images, labels),
    )
    pair = labelled_pair("stl10:somewhere", None)
    assert len(pair.train) == 3
    assert pair.train_labels.tolist() == [1, 0, 1]
    assert pair.classes == ("0", "1")


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_share_features_and_the_first_goes_on(home, monkeypatch, capsys, rank):
    monkeypatch.setattr(protocol, "launched", lambda: Launch(rank, 2, rank, 2))
    world = World(rank, 2, torch.device("cpu"))
    monkeypatch.setattr(protocol, "join_world", lambda device: nullcontext(world))
    given = []
    monkeypatch.setattr(
        protocol, "extract_features", lambda *_, name, world, **__: given.append((name, world))
    )
    assert evaluate(home, "knn") == 0
    assert given == [(f"features of the {n} images", world) for n in ("training", "test")]
    assert ("20 neighbours" in capsys.readouterr().out) is (rank == 0)
