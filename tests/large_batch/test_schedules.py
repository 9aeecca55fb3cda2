"""Every schedule of lockstep against plain autograd of the whole batch, in float64."""

import copy
import itertools

import pytest
import torch
from large_batch_cases import (
    assert_equal,
    expanding,
    in_stages,
    large_batch,
    lively,
    loss_fn,
    plain_autograd,
    simclr,
    step,
    views,
)
from test_large_batch import chain, timm_norm_act, timm_resnet, torchvision_resnet
from torch import Tensor

from simclr_fast.large_batch import LargeBatch
from simclr_fast.large_batch import global_batch_norm as gbn
from simclr_fast.large_batch import lockstep as lockstep_module
from simclr_fast.large_batch.gram import Gram
from simclr_fast.large_batch.schedule import Schedule, Stage

CHOICES = [
    {},
    {"turn": "mask"},
    {"turn": "again", "input": "again"},
    {"turn": "mask", "input": "again", "last": "again"},
    {"input": "once", "last": "once", "inner": "once"},
    {"inner": "kept"},
    {"wide": "kept", "inner": "kept"},
    {"wide": "kept", "turn": "again"},
    {"gram": False},
    {"gram": False, "turn": "mask", "input": "again"},
]
# Nothing of the block's input is at hand, so bits are read.
MASKED = {"turn": "mask", "input": "again"}
REFERENCES = {}


def timm_blur_pool():
    """Bottlenecks that blur before they subsample, as timm's resnetblur50."""
    timm = pytest.importorskip("timm")
    return timm.models.resnet.ResNet(
        timm.models.resnet.Bottleneck,
        (1, 1, 1, 1),
        num_classes=8,
        channels=(4, 8, 8, 8),
        stem_width=4,
        output_stride=8,
        aa_layer=timm.layers.BlurPool2d,
    )


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


def reference(name):
    if name not in REFERENCES:
        REFERENCES[name] = step(simclr(name), plain_autograd)
    return REFERENCES[name]


def lockstep(model, micro_batch=5, compile=False, **choices):
    engine = large_batch(model, micro_batch=micro_batch, compile=compile, choices=choices)
    return engine.backward(views(), loss_fn)


@pytest.mark.parametrize("choices", CHOICES, ids=str)
@pytest.mark.parametrize("name", [slow("basic"), "bottleneck"])
def test_every_choice_equals_plain_autograd(name, choices):
    found = step(simclr(name), lambda m: lockstep(m, **choices))
    assert_equal(found, reference(name))


@pytest.mark.parametrize("times", [2, slow(3), slow(4)])
def test_wider_models(times):
    """Widths relative to that of the other tests."""
    make = lambda: simclr("bottleneck", width=times * 0.0625)  # noqa: E731
    expected = step(make(), plain_autograd)
    found = step(make(), lambda m: lockstep(m, last="once", turn="mask", output="once"))
    assert_equal(found, expected)


@pytest.mark.parametrize("micro_batch", [13, slow(7), slow(14)])
def test_micro_batches_of_any_size(micro_batch):
    found = step(simclr("bottleneck"), lambda m: lockstep(m, micro_batch=micro_batch, turn="mask"))
    assert_equal(found, reference("bottleneck"))


@pytest.mark.parametrize(
    "choices",
    [
        (
            {"output": a, "last": b, "turn": c}
            if (b == "once") is (c != "kept")
            else slow({"output": a, "last": b, "turn": c})
        )
        for a, b, c in itertools.product(
            ("kept", "once", "again"), ("kept", "once"), ("kept", "mask", "again")
        )
    ],
    ids=str,
)
def test_stages_of_several_blocks(choices):
    found = step(simclr("basic"), lambda m: lockstep(m, sizes=(1, 3, 2), **choices))
    assert_equal(found, reference("basic"))


@pytest.mark.parametrize("choices", [{}, {"turn": "mask", "last": "again"}], ids=str)
@pytest.mark.parametrize(
    "build", [timm_resnet, timm_blur_pool, timm_norm_act, torchvision_resnet, chain]
)
def test_models_of_other_libraries(build, choices):
    torch.manual_seed(0)
    model = lively(build())
    if build is chain:
        model[11].eval()
    expected = step(copy.deepcopy(model), plain_autograd)
    assert_equal(step(model, lambda m: lockstep(m, **choices)), expected)


@pytest.mark.parametrize("micro_batch", [5, slow(14)])
@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_expanding_convolutions_of_every_kind(choices, micro_batch):
    expected = step(expanding(), plain_autograd)
    found = step(expanding(), lambda m: lockstep(m, micro_batch, **choices))
    assert_equal(found, expected)


def forgets(name):
    """A planted fault: `name` of a Gram is zero once its sums are known."""

    def plant(original):
        def finish(self, s, whole):
            found = original(self, s, whole)
            setattr(self, name, getattr(self, name) * 0)
            return found

        return finish

    return plant


FAULTS = {
    "a Gram of one micro-batch": (Gram, "see", lambda f: lambda self, y: self.n or f(self, y)),
    "no term with the statistics": (Gram, "finish", forgets("back")),
    "no constant term": (Gram, "finish", forgets("constant")),
    "sums of one micro-batch": (gbn, "join_sums", lambda f: lambda parts, *a: f(parts[:1], *a)),
    "bits of the other sign": (lockstep_module, "pack", lambda f: lambda t, layout: f(-t, layout)),
    "no gradient of ones": (Tensor, "new_ones", lambda f: lambda *a, **k: f(*a, **k) * 0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault, monkeypatch):
    where, name, plant = FAULTS[fault]
    monkeypatch.setattr(where, name, plant(getattr(where, name)))
    with pytest.raises(AssertionError):
        assert_equal(
            step(simclr("bottleneck"), lambda m: lockstep(m, **MASKED)), reference("bottleneck")
        )


@pytest.fixture
def uncompiled(monkeypatch):
    """Regions as torch.compile gets them: all but its part, which takes seconds per graph."""
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)


@pytest.mark.parametrize("micro_batch", [5, slow(13)])
@pytest.mark.parametrize("choices", [{"output": "once"}, slow({"turn": "mask"})], ids=str)
@pytest.mark.parametrize("name", [slow("basic"), "bottleneck"])
def test_compiled_regions(uncompiled, name, choices, micro_batch):
    choices = choices | {"compile": True, "micro_batch": micro_batch}
    assert_equal(step(simclr(name), lambda m: lockstep(m, **choices)), reference(name))


@pytest.mark.parametrize("build", [timm_resnet, timm_norm_act, torchvision_resnet, chain])
def test_compiled_regions_of_other_libraries(uncompiled, build):
    torch.manual_seed(3)
    model = lively(build())
    if build is chain:
        model[11].eval()
    expected = step(copy.deepcopy(model), plain_autograd)
    assert_equal(step(model, lambda m: lockstep(m, compile=True)), expected)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"memory": "plain"}, "schedule is for memory='lockstep', got 'plain'"),
        ({"micro_batch": 3}, "micro_batch must be that of the schedule, 5, or None, got 3"),
    ],
)
def test_arguments_that_contradict_a_schedule(arguments, says):
    model = simclr("basic")
    with pytest.raises(ValueError, match=says):
        LargeBatch(model, schedule=in_stages(model), **arguments)


def test_a_schedule_of_another_model_is_refused():
    model = simclr("basic")
    with pytest.raises(ValueError, match=r"stages must cover the \d+ blocks of the model, got 3"):
        LargeBatch(model, schedule=Schedule(5, (Stage(3),))).backward(views(), loss_fn)
