"""A run on images of five channels, from files to the evaluation."""

import json

import numpy as np

from simclr_fast.commands.cli import run as simclr_fast

OPTIONS = "--augmentation.channels 5 --augmentation.saturation 0 --augmentation.hue 0"
TINY = "--preset demo --steps 2 --batch-size 8 --width 0.125 --augmentation.size 16 --device cpu"


def test_five_channels_from_files_to_the_evaluation(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for c, name in enumerate("ab"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(6):
                pixels = rng.random((12, 10, 5)) / 2
                pixels[..., c] += 0.5
                np.save(folder / f"{i}.npy", (pixels * 65535).astype(np.uint16))
    data, run = ["--data", str(tmp_path / "train")], str(tmp_path / "run")
    assert simclr_fast(["pretrain", *data, "--augmentation.channels", "5"]) != 0
    assert "p_gray=0" in " ".join(capsys.readouterr().err.split())
    options = [*data, *TINY.split(), *OPTIONS.split(), "--augmentation.p-gray", "0"]
    assert simclr_fast(["pretrain", *options, "--out", run]) == 0
    ours = ["--encoder", run, *data, "--test", str(tmp_path / "test"), "--device", "cpu"]
    assert simclr_fast(["eval", "knn", *ours, "--cache", str(tmp_path / "cache")]) == 0
    results = json.loads((tmp_path / "run/eval/knn.json").read_text())
    assert results["images"]["test"]["used"] == 12
    sheet = tmp_path / "sheet.png"
    assert simclr_fast(["preview", *options, "--to", str(sheet)]) == 0
    assert sheet.stat().st_size > 1000
