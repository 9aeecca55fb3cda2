"""The exponential moving average of a model's weights."""

import pytest
import torch
from torch import nn

from simclr_fast.models import WeightAverage


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last
    )


def change(model):
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            if t.is_floating_point():
                t.add_(torch.randn_like(t))
            else:
                t.add_(1)


@pytest.mark.parametrize("warm_up", [False, True])
@pytest.mark.parametrize("buffers", [False, True])
def test_it_is_the_moving_average(warm_up, buffers):
    followed = model()
    average = WeightAverage(followed, 0.7, warm_up=warm_up, buffers=buffers)
    first = {name: t.double() for name, t in followed.state_dict().items()}
    expected = dict(first)
    for update in range(1, 26):
        change(followed)
        average.update(followed)
        decay = min(0.7, (1 + update) / (10 + update)) if warm_up else 0.7
        for name, t in followed.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * t.double()
    names = {name for name, _ in followed.named_parameters()}
    for name, t in average.module.state_dict().items():
        if name in names or (buffers and t.is_floating_point()):
            torch.testing.assert_close(t.double(), expected[name], rtol=1e-5, atol=1e-5)
        else:
            assert t == 25 * buffers if t.dim() == 0 else torch.equal(t.double(), first[name])
    assert average.module[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(p.requires_grad for p in average.parameters())


def test_a_copy_from_its_state_continues_alike():
    followed = model()
    average = WeightAverage(followed, 0.9, warm_up=True)
    change(followed)
    average.update(followed)
    copy = WeightAverage(followed, 0.9, warm_up=True)
    copy.load_state_dict(average.state_dict())
    change(followed)
    for each in (average, copy):
        each.update(followed)
    for one, two in zip(average.parameters(), copy.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_bad_decay_is_named():
    for decay in (1, -0.1, float("nan")):
        with pytest.raises(ValueError, match=f"decay must be at least 0 and below 1, got {decay}"):
            WeightAverage(nn.Linear(2, 2), decay)
