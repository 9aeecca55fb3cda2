"""Losses that are not NT-Xent: not taken for a variant of it, and seen to be none soon."""

import pytest
import torch
from torch.nn import functional as F

from simclr_fast.doctor import loss_match
from simclr_fast.doctor.loss_match import Observed, find


def observe(loss_of, rows=512, dim=128):
    torch.manual_seed(0)
    image = torch.randn(rows // 2, dim).repeat(2, 1)
    z = (image + 0.7 * torch.randn(rows, dim)).requires_grad_()
    loss = loss_of(z)
    loss.backward()
    reached = torch.ones(rows, dtype=torch.bool)
    return Observed(z.detach().double(), z.grad.double(), reached, [rows], value=loss.item())


def attraction(z):
    """BYOL's loss, without negatives."""
    a, b = F.normalize(z, dim=1).chunk(2)
    return 2 - 2 * (a * b).sum(1).mean()


def squared_distance(z):
    return F.mse_loss(*z.chunk(2))


def textbook(z, own=-torch.inf):
    u = F.normalize(z, dim=1)
    logits = (u @ u.T / 0.1).diagonal_scatter(torch.full((len(z),), own))
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


def with_penalty(z):
    return textbook(z) + 0.3 * z.square().mean()


@pytest.mark.parametrize("loss", [attraction, squared_distance])
def test_an_attraction_is_not_taken_for_self_similarity(loss):
    assert find(observe(loss)) is None


@pytest.mark.parametrize("own", [-torch.inf, 10.0])
def test_temperature_and_self_similarity_are_found(own):
    match = find(observe(lambda z: textbook(z, own)))
    assert match.loss.own == (own == 10)
    assert match.loss.temperature == pytest.approx(0.1, rel=1e-5)


def test_few_temperatures_of_a_strange_loss_are_tried_with_all_rows(monkeypatch):
    calls = []
    real = loss_match.measure
    monkeypatch.setattr(loss_match, "measure", lambda *a: calls.append(a) or real(*a))
    assert find(observe(with_penalty)) is None
    # One for each of the 28 losses at most. Each takes milliseconds.
    assert len(calls) <= 28
