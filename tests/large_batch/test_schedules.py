"""Every schedule of lockstep against plain autograd of the whole batch, in float64."""

import copy
import itertools

import pytest
import torch
from large_batch_cases import assert_equal, lively, loss_fn, plain_autograd, simclr, step, views
from test_large_batch import chain, timm_norm_act, timm_resnet, torchvision_resnet

from simclr_fast.large_batch import global_batch_norm as gbn
from simclr_fast.large_batch.demand import Lockstep
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
REFERENCES = {}


def reference(name):
    if name not in REFERENCES:
        REFERENCES[name] = step(simclr(name), plain_autograd)
    return REFERENCES[name]


def in_stages(graph, micro_batch=5, gram=True, sizes=(), **choices):
    """Stages of the given numbers of blocks, then of one block each."""
    sizes = [*sizes, *[1] * (len(graph.blocks) - sum(sizes))]
    return Schedule(micro_batch, tuple(Stage(n, **choices) for n in sizes), gram)


def lockstep(model, x=None, micro_batch=5, **choices):
    x = views() if x is None else x
    batch = gbn.WholeBatch()
    batch.rows = [len(x)]
    engine = Lockstep(model, batch, lambda graph: in_stages(graph, micro_batch, **choices))

    def loss_of(outputs):
        loss = loss_fn(outputs)
        loss.backward()
        return loss.detach()

    plain = torch.autocast("cpu", enabled=False)
    return engine.backward(x.split(micro_batch), loss_of, lambda: plain)


@pytest.mark.parametrize("choices", CHOICES, ids=str)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_every_choice_equals_plain_autograd(name, choices):
    found = step(simclr(name), lambda m: lockstep(m, **choices))
    assert_equal(found, reference(name))


@pytest.mark.parametrize("micro_batch", [7, 13, 14])
def test_micro_batches_of_any_size(micro_batch):
    found = step(simclr("resnet50"), lambda m: lockstep(m, micro_batch=micro_batch, turn="mask"))
    assert_equal(found, reference("resnet50"))


@pytest.mark.parametrize(
    "choices",
    [
        {"output": a, "last": b, "turn": c}
        for a, b, c in itertools.product(
            ("kept", "once", "again"), ("kept", "once"), ("kept", "mask", "again")
        )
    ],
    ids=lambda choices: "-".join(choices.values()),
)
def test_stages_of_several_blocks(choices):
    found = step(simclr("resnet18"), lambda m: lockstep(m, sizes=(1, 3, 4), **choices))
    assert_equal(found, reference("resnet18"))


@pytest.mark.parametrize("choices", [{}, {"turn": "mask", "last": "again"}], ids=str)
@pytest.mark.parametrize("build", [timm_resnet, timm_norm_act, torchvision_resnet, chain])
def test_models_of_other_libraries(build, choices):
    torch.manual_seed(0)
    model = lively(build())
    if build is chain:
        model[11].eval()
    expected = step(copy.deepcopy(model), plain_autograd)
    assert_equal(step(model, lambda m: lockstep(m, **choices)), expected)
