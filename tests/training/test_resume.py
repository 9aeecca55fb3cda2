"""What a resumed run starts from, and which settings it may change."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import TINY

from simclr_fast.data.sources import ArraySource
from simclr_fast.training import config as settings
from simclr_fast.training import pretrain as module
from simclr_fast.training.config import PretrainConfig
from simclr_fast.training.pretrain import pretrain
from simclr_fast.utils.checkpoint import checkpoints, load_checkpoint


class Images(ArraySource):
    first = 0

    def name(self, i):
        return f"/somewhere/class{i % 3}/{i + self.first}.jpg"


@pytest.fixture
def config(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 255, (24, 16, 16, 3), dtype=np.uint8)
    monkeypatch.setattr(module, "open_data", lambda config: Images(images))
    own = {"steps": 6, "checkpoint_every": 2, "memory": "plain"}
    return replace(TINY, data="noise", out=tmp_path / "run", **own)


def saved(config):
    return checkpoints(config.out / "checkpoints")


def contents(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_setting_is_in_one_list():
    lists = settings.FIXED, settings.MAY_CHANGE, settings.NOT_COMPARED, settings.IGNORED
    listed = [name for names in lists for name in names]
    assert sorted(listed) == sorted(f.name for f in dataclasses.fields(PretrainConfig))


OTHER = {
    "model": "resnet18",
    "width": 0.25,
    "stem": "imagenet",
    "projector": "linear",
    "projector_dim": 9,
    "projector_depth": 3,
    "projector_hidden": 9,
    "projector_batch_norm": False,
    "batch_size": 6,
    "optimizer": "adam",
    "lars_variant": "lightly",
    "decay_norms": True,
    "queue": 8,
    "ema": 0.9,
    "seed": 7,
    "image_key": "png",
}


def test_fixed_settings_are_refused_before_anything_is_written(config):
    assert OTHER.keys() == set(settings.FIXED)
    pretrain(replace(config, steps=2))
    before = contents(config.out)
    for name, value in OTHER.items():
        assert getattr(config, name) != value
        with pytest.raises(ValueError, match=rf"--resume cannot change {name}: .* → {value}"):
            pretrain(replace(config, resume=True, **{name: value}))
    assert contents(config.out) == before


def damage_bytes(path):
    path.write_bytes(path.read_bytes()[:-500])


def damage_values(path):
    state = load_checkpoint(path)
    next(t for t in state["model"].values() if t.dim() > 1)[0] = torch.nan
    torch.save(state, path)


@pytest.mark.parametrize("damage", [damage_bytes, damage_values])
def test_resume_falls_back_to_the_newest_good_checkpoint(config, caplog, damage):
    whole = replace(config, out=config.out.with_name("whole"))
    pretrain(whole)
    pretrain(replace(config, steps=4))
    damage(saved(config)[-1])
    pretrain(replace(config, resume=True))
    assert "not resuming from" in caplog.text
    assert "now unusable-step-00000004.pt" in caplog.text
    assert (config.out / "checkpoints" / "unusable-step-00000004.pt").exists()
    assert [p.name for p in saved(config)] == [f"step-0000000{n}.pt" for n in (4, 6)]
    a, b = (load_checkpoint(saved(run)[-1])["model"] for run in (whole, config))
    assert all(torch.equal(value, b[name]) for name, value in a.items())


def test_resume_without_a_good_checkpoint_is_refused(config):
    pretrain(replace(config, steps=4))
    for path in saved(config):
        damage_bytes(path)
    before = contents(config.out)
    with pytest.raises(ValueError, match=r"no usable checkpoint.*00000004\.pt.*00000002\.pt"):
        pretrain(replace(config, resume=True))
    assert contents(config.out) == before


def test_data_that_changed_are_refused(config, monkeypatch):
    pretrain(replace(config, steps=2))
    before = contents(config.out)
    with monkeypatch.context() as patch:
        patch.setattr(Images, "first", 1)
        with pytest.raises(ValueError, match="24 images of other names"):
            pretrain(replace(config, resume=True))
    fewer = Images(np.zeros((23, 16, 16, 3), np.uint8))
    with monkeypatch.context() as patch:
        patch.setattr(module, "open_data", lambda config: fewer)
        with pytest.raises(ValueError, match="images=24; this one has 23"):
            pretrain(replace(config, resume=True))
    assert contents(config.out) == before
    # The same images in another place.
    monkeypatch.setattr(Images, "name", lambda self, i: f"/elsewhere/class{i % 3}/{i}.jpg")
    pretrain(replace(config, resume=True))
