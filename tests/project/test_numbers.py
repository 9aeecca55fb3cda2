"""Numbers of every kind, wherever the package takes one; and what can be pickled and copied."""

import copy
import json
import pickle
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import simclr_fast.compat.lightly
import simclr_fast.compat.pytorch_metric_learning
import simclr_fast.compat.solo_learn
import simclr_fast.compat.timm
from simclr_fast import (
    LARS,
    LargeBatch,
    NTXentLoss,
    SimCLRViews,
    multi_view_nt_xent_loss,
    nt_xent_loss,
    sup_con_loss,
)
from simclr_fast.augment.params import Augmentation
from simclr_fast.data import TwoViewLoader
from simclr_fast.optim.schedule import scaled_lr, warmup_cosine
from simclr_fast.training.config import PretrainConfig, to_json
from simclr_fast.training.pretrain import pretrain

FLOATS = [
    *(np.float16(0.25), np.float32(0.25), np.float64(0.25), np.array(0.25)),
    *(Fraction(1, 4), Decimal("0.25")),
]
INTEGERS = [np.int64(2), np.int32(2), np.uint8(2), np.array(2), torch.tensor(2)]
Z = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) // 2
IMAGES = torch.randint(256, (8, 20, 20, 3), dtype=torch.uint8)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))


def lars(**options):
    p = nn.Parameter(torch.ones(3, 3))
    p.grad = torch.full((3, 3), 2.0)
    optimizer = LARS([p], **{"lr": 0.1} | options)
    optimizer.step()
    # What a checkpoint must be able to hold.
    assert all(type(v) in (int, float, bool, str, type(None), list)
               for v in optimizer.state_dict()["param_groups"][0].values())  # fmt: skip
    return p.detach()


def batch(**options):
    model = net()
    LargeBatch(model, **options).backward(Z, nt_xent_loss)
    return model[0].weight.grad


def factors(warmup, total):
    optimizer = torch.optim.SGD(net().parameters(), lr=1)
    return torch.tensor(
        [warmup_cosine(optimizer, warmup, total).lr_lambdas[0](t) for t in range(9)]
    )


TAKE_FLOATS = {
    "temperature": lambda v: nt_xent_loss(Z, temperature=v),
    "module": lambda v: NTXentLoss(v)(Z),
    "learnable": lambda v: NTXentLoss(v, learnable=True)(Z).detach(),
    "sup-con": lambda v: sup_con_loss(Z, LABELS, v),
    "multi-view": lambda v: multi_view_nt_xent_loss(Z, 4, v),
    **{name: lambda v, name=name: lars(**{name: v}) for name in (
        "lr", "momentum", "dampening", "weight_decay", "trust_coefficient", "eps")},
    "s": lambda v: torch.cat(SimCLRViews(16, s=v)(IMAGES, ids=range(8))),
    "area": lambda v: torch.cat(SimCLRViews(16, area=(v, 1))(IMAGES, ids=range(8))),
}  # fmt: skip
TAKE_INTEGERS = {
    "micro_batch": lambda v: batch(memory="grad-cache", micro_batch=v),
    "n_views": lambda v: multi_view_nt_xent_loss(Z, v),
    "warm-up": lambda v: factors(v, 5),
    "steps": lambda v: factors(1, v),
    "batch": lambda v: torch.tensor(scaled_lr(v)),
    "size": lambda v: torch.cat(SimCLRViews(v)(IMAGES, ids=range(8))),
    "seed": lambda v: torch.cat(SimCLRViews(16, seed=v)(IMAGES, ids=range(8))),
}


@pytest.mark.parametrize("take", TAKE_FLOATS)
def test_every_real_number_is_taken(take):
    expected = TAKE_FLOATS[take](0.25)
    for value in FLOATS:
        assert torch.equal(TAKE_FLOATS[take](value), expected), repr(value)
    for value in ("0.25", None, True, 1j, np.array([0.25])):
        if not (take == "learnable" and value is None):
            with pytest.raises((TypeError, ValueError)):
                TAKE_FLOATS[take](value)


@pytest.mark.parametrize("take", TAKE_INTEGERS)
def test_every_integer_is_taken(take):
    expected = TAKE_INTEGERS[take](2)
    for value in INTEGERS:
        assert torch.equal(TAKE_INTEGERS[take](value), expected), repr(value)
    for value in ("2", 2.5, True, np.float32(2)):
        with pytest.raises(TypeError, match="must be an integer, got"):
            TAKE_INTEGERS[take](value)


def test_settings_are_written_as_numbers():
    numbers = {"batch_size": np.int64(8), "seed": np.int32(3), "temperature": np.float32(0.5)}
    augmentation = Augmentation(size=np.int64(16), s=np.float32(0.5), area=(np.float64(0.5), 1))
    values = json.loads(to_json(PretrainConfig(augmentation=augmentation, **numbers)))
    assert {name: values[name] for name in numbers} == {
        "batch_size": 8, "seed": 3, "temperature": 0.5
    }  # fmt: skip
    assert values["augmentation"]["s"] == 0.5
    assert values["augmentation"]["area"] == [0.5, 1]


@pytest.mark.parametrize("value", [1e39, 1e300, float("inf"), float("nan"), -1e300])
def test_what_float32_cannot_hold_is_refused(value):
    for name in ("lr", "momentum", "weight_decay", "trust_coefficient", "eps"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            lars(**{name: value})
    for name in ("temperature", "lr", "trust_coefficient", "weight_decay"):
        with pytest.raises(ValueError, match=f"{name} must be .*finite"):
            PretrainConfig(**{name: value})
    with pytest.raises(ValueError, match="temperature must be"):
        nt_xent_loss(Z, temperature=value)


def test_a_batch_of_one_image_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="at least 2 for pretraining, got 1: a single image has no"
    ):
        pretrain(PretrainConfig(batch_size=1, out=tmp_path / "run"))
    assert not list(tmp_path.iterdir())


def test_a_temperature_with_a_gradient_is_not_taken_silently():
    with pytest.raises(ValueError, match="learnable=True"):
        NTXentLoss(torch.tensor(0.1, requires_grad=True))
    assert NTXentLoss(torch.tensor(0.25)).temperature == 0.25


def test_the_loss_shows_its_current_temperature():
    loss = NTXentLoss(0.5, learnable=True)
    loss.log_temperature.data.fill_(np.log(0.25))
    assert "temperature=0.25" in repr(loss)
    fixed = NTXentLoss(0.5)
    fixed.temperature = 0.125
    assert "temperature=0.125" in repr(fixed)


def trained():
    model = net()
    optimizer = LARS(model.parameters(), lr=0.1)
    scheduler = warmup_cosine(optimizer, 2, 8)
    step = LargeBatch(model, memory="grad-cache", micro_batch=3)
    step.backward(Z, nt_xent_loss)
    optimizer.step()
    scheduler.step()
    return {"optimizer": optimizer, "scheduler": scheduler, "step": step}


OBJECTS = {
    "loss": lambda: NTXentLoss(0.1, learnable=True),
    "views": lambda: SimCLRViews(16, seed=3),
    "augmentation": lambda: Augmentation(16),
    "config": PretrainConfig,
    "training": trained,
    "lockstep": lambda: LargeBatch(net(), memory="lockstep"),
    "timm": lambda: simclr_fast.compat.timm.Lars(net().parameters()),
    "solo-learn": lambda: simclr_fast.compat.solo_learn.LARS(net().parameters(), lr=0.1),
    "lightly": lambda: simclr_fast.compat.lightly.LARS(net().parameters(), lr=0.1),
    "lightly's loss": simclr_fast.compat.lightly.NTXentLoss,
    "lightly's transform": lambda: simclr_fast.compat.lightly.SimCLRTransform(16),
    "metric-learning": simclr_fast.compat.pytorch_metric_learning.NTXentLoss,
}


@pytest.mark.parametrize("make", OBJECTS)
@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_objects_can_be_copied_and_pickled(make, way):
    made = OBJECTS[make]()
    other = way(made)
    if make == "views":
        assert torch.equal(*(torch.cat(v(IMAGES, ids=range(8))) for v in (made, other)))
    if make == "training":
        for each in (made, other):
            each["step"].backward(Z, nt_xent_loss)
            each["optimizer"].step()
            each["scheduler"].step()
        assert made["scheduler"].get_last_lr() == other["scheduler"].get_last_lr()
        a, b = (list(each["step"].model.parameters()) for each in (made, other))
        assert len(a) == len(b)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_loader_can_be_copied_and_pickled(way):
    loader = TwoViewLoader(IMAGES.numpy(), 2, size=16)
    next(iter(loader))
    other = way(loader)
    resumed = TwoViewLoader(IMAGES.numpy(), 2, size=16)
    resumed.load_state_dict(loader.state_dict())
    for ours, theirs in zip(resumed, other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_closure_goes_to_hooks_and_is_called_once():
    seen = {}
    for kind in (torch.optim.SGD, LARS):
        model, calls = net(), []
        optimizer = kind(model.parameters(), lr=0.1)

        def closure(model=model, calls=calls):
            calls.append(torch.is_grad_enabled())
            model.zero_grad()
            loss = nt_xent_loss(model(Z))
            loss.backward()
            return loss

        found = seen[kind] = []
        optimizer.register_step_pre_hook(lambda o, a, k, f=found: f.append((len(a), sorted(k))))
        optimizer.register_step_post_hook(lambda o, a, k, f=found: f.append((len(a), sorted(k))))
        assert optimizer.step(closure).item() > 0
        assert optimizer.step(closure=closure).item() > 0
        assert calls == [True, True]
    assert seen[LARS] == seen[torch.optim.SGD]
