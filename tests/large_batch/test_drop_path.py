"""Drop path: lockstep leaves out the same rows as the model itself, whatever it computes again."""

import copy

import pytest
import torch
from large_batch_cases import (
    assert_equal,
    large_batch,
    lively,
    loss_fn,
    plain_autograd,
    step,
    views,
)
from torch import nn

from simclr_fast.large_batch.drop_path import DropPath, drop_path


class Residual(nn.Module):
    """Blocks of two convolutions, whose branch is dropped by torchvision's module."""

    def __init__(self, mode):
        super().__init__()
        depth = pytest.importorskip("torchvision").ops.StochasticDepth
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.branches = nn.ModuleList(
            nn.Sequential(
                *(nn.Conv2d(6, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
                *(nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6), depth(p, mode)),
            )
            for p in (0.4, 0.2, 1.0, 0.0)
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 8))

    def forward(self, x):
        x = self.stem(x)
        for branch in self.branches:
            x = torch.relu(x + branch(x))
        return self.head(x)


def timm_resnet():
    resnet = pytest.importorskip("timm").models.resnet
    return resnet.ResNet(
        resnet.Bottleneck,
        (1, 2, 1, 1),
        num_classes=8,
        channels=(4, 8, 8, 8),
        stem_width=4,
        drop_path_rate=0.5,
    )


MODELS = {
    "timm": timm_resnet,
    "row": lambda: Residual("row"),
    "batch": lambda: Residual("batch"),
}
CHOICES = ({"micro_batch": 5}, {"micro_batch": 4, "turn": "mask", "input": "again"})


def seeded(backward):
    def run(model):
        torch.manual_seed(5)
        return backward(model)

    return run


@pytest.mark.parametrize("choices", CHOICES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_rows_that_plain_drops_are_dropped(name, choices):
    torch.manual_seed(0)
    model = lively(MODELS[name]())
    choices = dict(choices)
    micro_batch = choices.pop("micro_batch")

    def lockstep(model):
        engine = large_batch(model, micro_batch=micro_batch, choices=choices)
        return engine.backward(views(), loss_fn)

    expected = step(copy.deepcopy(model), seeded(plain_autograd))
    other = step(copy.deepcopy(model), plain_autograd)
    assert other[0] != expected[0]
    assert_equal(step(model, seeded(lockstep)), expected)


def test_every_step_draws_anew_and_evaluation_drops_nothing():
    torch.manual_seed(0)
    model = lively(Residual("row"))
    engine = large_batch(model, choices={})
    first, second = (engine.backward(views(), loss_fn) for _ in range(2))
    assert first != second
    for module in model.modules():
        if drop_path(module) is not None:
            module.eval()
    first, second = (engine.backward(views(), loss_fn) for _ in range(2))
    assert first == second
    assert first == pytest.approx(loss_fn(model(views())).item(), rel=1e-12)


def test_how_often_rows_are_kept():
    given = DropPath(0.8, 0.8, False, True)
    factors = given.draw(40_000, 4, torch.float64, torch.device("cpu"))
    assert factors.shape == (40_000, 1, 1, 1)
    assert set(factors.unique().tolist()) == {0.0, 1.25}
    assert float(factors.mean()) == pytest.approx(1, abs=5 * 1.25 * (0.2 * 0.8 / 40_000) ** 0.5)


def test_a_recomputation_with_other_numbers_is_found(monkeypatch):
    """A planted fault: each use of the factors draws them again."""
    from simclr_fast.large_batch.lockstep import Lockstep

    torch.manual_seed(0)
    model = lively(Residual("row"))
    expected = step(copy.deepcopy(model), seeded(plain_autograd))
    run = Lockstep.run

    def careless(self, op, env):
        if op.node in self.factors and op.kind == "make":
            for factors in self.factors[op.node]:
                factors.copy_(factors[torch.randperm(len(factors))])
        run(self, op, env)

    monkeypatch.setattr(Lockstep, "run", careless)
    engine = seeded(lambda m: large_batch(m, choices={}).backward(views(), loss_fn))
    with pytest.raises(AssertionError):
        assert_equal(step(model, engine), expected)
