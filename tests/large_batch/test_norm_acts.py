"""Batch norms with a residual and ReLU that lockstep makes in one pass."""

import pytest
import torch
from large_batch_cases import assert_equal, large_batch, lively, step
from torch import nn

from simclr_fast.large_batch import global_batch_norm as gbn
from simclr_fast.large_batch.graph import Graph
from simclr_fast.large_batch.norm_acts import norm_acts


class Odd(nn.Module):
    """Every way in which a batch norm, a sum and ReLU may meet."""

    def __init__(self):
        super().__init__()
        # The third is costly to repeat, the fourth cheap.
        wide = [nn.Conv2d(4, 8, 3, padding=1), *(nn.Conv2d(i, 8, 1) for i in (4, 8, 8, 8, 8))]
        self.convs = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), *wide])
        self.norms = nn.ModuleList(nn.BatchNorm2d(conv.out_channels) for conv in self.convs)
        self.none = nn.Identity()
        self.head = nn.Linear(8, 5)

    def branch(self, i, x):
        return self.norms[i](self.convs[i](x))

    def forward(self, x):
        first = torch.relu(self.none(self.branch(0, x)))
        shortcut = nn.functional.relu(first + self.branch(1, first))
        both = (self.branch(2, shortcut) + self.none(self.branch(3, shortcut))).relu()
        no_act = self.branch(4, both) + both
        twice = self.branch(5, no_act)
        shared = twice.relu() + twice
        late = self.branch(6, shared) + nn.functional.gelu(self.branch(7, shared))
        late = late + torch.relu(late)
        return self.head(late.mean((2, 3)))


def odd():
    torch.manual_seed(0)
    return lively(Odd())


def found_in(held=()):
    graph = Graph(odd())
    specs = graph.measure(torch.randn(2, 3, 4, 4, dtype=torch.float64))
    sums = {n for n in graph.nodes if graph.is_sum(n, specs)}
    nodes = {node.name: node for node in graph.nodes}
    found = norm_acts(graph, specs, sums, {nodes[name] for name in held})
    return {
        node.name: ("+".join(n.name.rpartition("_")[2] for n in a.users), a.relu)
        for node, a in found.items()
    }


def test_what_follows_a_batch_norm_is_found():
    found = found_in()
    # Batch norms by their numbers; a sum where the other value is added as it is.
    assert {name: what for name, what in found.items() if "norms" not in name} == {
        "relu": ("0", True),
        "add": ("add+1", False),
        "relu_1": ("add+1", True),
        "add_1": ("2+3", False),
        "relu_2": ("2+3", True),
        "add_2": ("4+2", False),
        "add_4": ("6+4", False),
    }
    assert sum("norms" in name for name in found) == 8


def test_a_value_that_may_be_kept_is_made():
    found = found_in(held=["add_1"])
    assert "relu_2" not in found
    assert found["add_1"] == ("2+3", False)


CHOICES = [{}, {"turn": "mask", "input": "again"}, {"turn": "again", "input": "again"}]


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_gradients_equal_plain_autograd(choices):
    def run(model):
        large = large_batch(model, memory="lockstep", choices=choices)
        return large.backward(x.chunk(2), loss)

    x = torch.randn(12, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss(z):
        return (z.softmax(1) * torch.arange(60.0).sin().view(12, 5).double()).sum()

    def plain(model):
        made = loss(model(x))
        made.backward()
        return made.detach()

    assert_equal(step(odd(), run), step(odd(), plain))


def test_one_pass_makes_each(monkeypatch):
    """No ReLU and no sum is computed by itself, and memory is used again where it may be."""
    calls, original = [], gbn.norm_act

    def counted(x, norms, relu, overwrites=None):
        calls.append((len(x), overwrites))
        return original(x, norms, relu, overwrites)

    monkeypatch.setattr(gbn, "norm_act", counted)
    large = large_batch(odd(), memory="lockstep", choices=CHOICES[1])
    large.backward(torch.randn(10, 3, 4, 4, dtype=torch.float64).chunk(2), lambda z: z.sum())
    made = [op for p in large.lockstep.program.passes for op in p.ops if op.kind == "make"]
    alone = {op.node.name for op in made if op.norm_act is None}
    assert not alone & {"relu", "add", "relu_1", "add_1", "relu_2", "add_2", "add_4"}
    assert {count for count, _ in calls} == {1, 2}
    assert {place for _, place in calls} == {None, 0, 1}
