"""Export for a hub: timm, load_weights and HubEncoder read it; nothing is uploaded unasked."""

import json
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from test_export import IMAGES, pretrained
from tiny_runs import TINY

from simclr_fast.commands.cli import run
from simclr_fast.models.export import export_encoder
from simclr_fast.models.weights import load_weights
from simclr_fast.training.pretrain import pretrain


@torch.no_grad()
def test_timm_and_load_weights_read_the_same_folder(tmp_path):
    timm = pytest.importorskip("timm")
    weights = pretrained(tmp_path / "run", "resnet18", stem="imagenet")
    h = weights.encoder(IMAGES)
    exported = export_encoder(weights, tmp_path / "hub", "hub")
    assert f'timm.create_model("local-dir:{tmp_path / "hub"}"' in exported.usage
    theirs = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert torch.allclose(theirs(IMAGES), h, rtol=1e-5, atol=1e-6)
    assert theirs.pretrained_cfg["mean"] == [0.5, 0.4, 0.3]
    again = load_weights(tmp_path / "hub")
    assert torch.equal(again.encoder(IMAGES), h)
    # What timm's own file does not say.
    assert again.augmentation == weights.augmentation
    card = (tmp_path / "hub" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    assert 'timm.create_model("hf-hub:USER/NAME", pretrained=True)' in card


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run with its report."""
    out = tmp_path_factory.mktemp("ran") / "run"
    config = replace(TINY, data="demo", out=out, steps=2)
    pretrain(config)
    probe = {"pretrained encoder": {"value": 0.798, "low": 0.774, "high": 0.822}}
    (out / "probe.json").write_text(json.dumps(probe))
    (out / "loss.png").write_bytes(b"picture")
    return out


@torch.no_grad()
def test_an_encoder_that_timm_lacks_goes_by_the_mixin(ran, tmp_path):
    hub = pytest.importorskip("simclr_fast.models.hub", exc_type=ImportError)
    weights = load_weights(ran)
    export_encoder(weights, tmp_path / "hub", "hub")
    encoder = hub.HubEncoder.from_pretrained(str(tmp_path / "hub"))
    images = IMAGES[:, :, :16, :16]
    assert torch.equal(encoder(images), weights.encoder(images))
    assert not encoder.training
    assert encoder.weights.feature_dim == weights.feature_dim
    encoder.save_pretrained(tmp_path / "again")
    again = hub.HubEncoder.from_pretrained(str(tmp_path / "again"))
    assert torch.equal(again(images), weights.encoder(images))
    assert json.loads((tmp_path / "again" / "config.json").read_text())["simclr_fast"]["model"]


def test_the_card_has_data_recipe_results_curves_and_usage(ran, tmp_path):
    config = json.loads((ran / "config.json").read_text())
    config["data"] = "/home/somebody/photos/"
    (ran / "config.json").write_text(json.dumps(config))
    export_encoder(load_weights(ran), tmp_path, "hub")
    card = (tmp_path / "README.md").read_text()
    last = json.loads((ran / "metrics.jsonl").read_text().splitlines()[-1])
    for part in (
        f"`photos`: {config['images']['used']:,} images. Labels were not used.",
        "| batch_size | 8 |",
        "| augmentation.size | 16 |",
        f"Loss after 2 steps: {last['loss']:.3f} (guessing gives {last['chance_loss']:.3f}).",
        "| pretrained encoder | 79.8% | 77.4% to 82.2% |",
        "![Loss during training](loss.png)",
        'HubEncoder.from_pretrained("USER/NAME")',
        "trained at 16×16 pixels, values in [0, 1]",
    ):
        assert part in card
    assert "somebody" not in card
    assert "| steps | 2 |" in card
    assert "| epochs |" not in card
    assert (tmp_path / "loss.png").read_bytes() == b"picture"
    assert "embedding.png" not in card


class Api:
    told: ClassVar[list] = []

    def create_repo(self, name, *, private, exist_ok):
        self.told.append(("create", name, private, exist_ok))
        return f"hub/{name}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.told.append(("upload", repo_id, sorted(p.name for p in folder_path.iterdir())))


def test_push_only_when_asked(ran, tmp_path, monkeypatch, capsys):
    library = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(library, "HfApi", Api)
    monkeypatch.setattr(Api, "told", [])
    options = ["export", "--encoder", str(ran), "--to", str(tmp_path / "hub"), "--format"]
    assert run([*options, "hub"]) == 0
    assert Api.told == []
    assert run([*options, "safetensors", "--push", "me/mine"]) == 1
    assert "push is for format hub" in capsys.readouterr().err
    assert run([*options, "hub", "--push", "me/mine"]) == 0
    files = ["README.md", "config.json", "loss.png", "model.safetensors"]
    assert Api.told == [("create", "me/mine", True, True), ("upload", "me/mine", files)]
    assert "uploaded       hub/me/mine" in capsys.readouterr().out
