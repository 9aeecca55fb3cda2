"""Models that change after LargeBatch was made, and gradients over ranks of whatever has one."""

import copy

import pytest
import torch
import torch.distributed as dist
from made_once import made_once
from rank_runs import on_ranks
from torch import nn
from torch.nn import functional as F

from simclr_fast.large_batch import LargeBatch, averaging
from simclr_fast.losses.nt_xent import nt_xent_loss

MODES = ["plain", "replay", "grad-cache", "lockstep"]
RANKS, ROWS = 2, 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(x)))


class Adapted(nn.Module):
    """A layer with a low-rank term, as LoRA inserts."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.down, self.up = inner, nn.Linear(6, 2), nn.Linear(2, 6)

    def forward(self, x):
        return self.inner(x) + self.up(self.down(x))


def build():
    torch.manual_seed(0)
    blocks = nn.Sequential(Block(), Block(), Block())
    return nn.Sequential(nn.Linear(6, 6), blocks, nn.Linear(6, 6)).double()


def views(rank=None):
    x = torch.randn(RANKS * ROWS, 6, generator=torch.Generator().manual_seed(1)).double()
    # Rows of both views: rank 0 has the first pairs.
    return x if rank is None else x.unflatten(0, (2, RANKS, -1))[:, rank].flatten(0, 1)


def thaw(model):
    model.requires_grad_(True)


def freeze(model):
    model[1][1].requires_grad_(False)


def insert(model):
    torch.manual_seed(5)
    model[1][1].first = Adapted(model[1][1].first).double()


def append(model):
    torch.manual_seed(5)
    model[1].append(Block().double())


def replace(model):
    torch.manual_seed(5)
    model[2] = nn.Linear(6, 6).double()


def new_parameters(model):
    model[2].weight = nn.Parameter(model[2].weight.detach() * 2)


def tie(model):
    model[1][2].first.weight = model[1][0].first.weight


def delete(model):
    del model[1][2]


def to_float(model):
    model.float().double()


def parametrize(model):
    nn.utils.parametrizations.weight_norm(model[1][0].first)


def drop(model):
    model[1][0] = nn.Sequential(model[1][0], nn.Dropout(0.0))


CHANGES = [thaw, freeze, insert, append, replace, new_parameters, tie, delete, to_float,
           parametrize, drop]  # fmt: skip


def loss_fn(z, group=None):
    return nt_xent_loss(z, temperature=0.3, group=group)


def two_steps(model, change, backward):
    """Gradients of a second step, after `change`; the first one trains a little."""
    if change is thaw:
        model[1][0].requires_grad_(False)
    for later in (False, True):
        if later:
            change(model)
        model.zero_grad(set_to_none=True)
        backward(model)
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
    return {n: p.grad for n, p in model.named_parameters()}


def expected(change):
    return two_steps(build(), change, lambda model: loss_fn(model(views())).backward())


def assert_equal(found, want):
    assert found.keys() == want.keys()
    for name, gradient in want.items():
        if gradient is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change, memory):
    model = build()
    step = LargeBatch(model, memory=memory, micro_batch=3)
    found = two_steps(model, change, lambda model: step.backward(views(), loss_fn))
    assert_equal(found, expected(change))


class Sometimes(nn.Module):
    """Uses one of its layers on each rank, and one on none."""

    def __init__(self):
        super().__init__()
        self.body, self.parts = build(), nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.used = 0

    def forward(self, x):
        return self.parts[self.used](self.body(x))


def sometimes():
    torch.manual_seed(3)
    return Sometimes().double()


def unused_expected():
    model, total = sometimes(), 0
    for rank in range(RANKS):
        model.used = rank
        total = total + F.mse_loss(model(views(rank)), views(rank)) / RANKS
    total.backward()
    return {n: p.grad for n, p in model.named_parameters()}


class Normed(nn.Module):
    """Batch norms between layers of which some are used on one rank only."""

    def __init__(self):
        super().__init__()
        blocks = [nn.Sequential(Block(), nn.BatchNorm1d(6)) for _ in range(3)]
        self.blocks, self.side = nn.Sequential(*blocks), nn.Linear(6, 6)
        self.last = nn.Linear(6, 6)
        self.uses_side = True

    def forward(self, x):
        x = self.blocks(x)
        return self.last(x + self.side(x) if self.uses_side else x)


def normed():
    torch.manual_seed(4)
    return Normed().double()


def normed_expected(sides):
    """Gradients of one process that has the rows of both ranks."""
    model = normed()
    h = model.blocks(views()).unflatten(0, (2, RANKS, -1))
    each = []
    for rank in range(RANKS):
        x = h[:, rank].flatten(0, 1)
        z = model.last(x + model.side(x) if sides[rank] else x)
        each.append(F.mse_loss(z, views(rank)))
    (sum(each) / RANKS).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def sent_during_backward(step, run):
    """How many buckets were sent during run(), before the end of its backward, and of how many."""
    counts = []
    finish = averaging.Average.finish

    def counting(self):
        counts.append((len(self.started), len(self.buckets)))
        finish(self)

    averaging.Average.finish = counting
    try:
        run()
    finally:
        averaging.Average.finish = finish
    return counts


def on_rank(rank, folder):
    torch.set_num_threads(1)
    # A bucket for each parameter.
    averaging._BUCKET = 1
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = dist.group.WORLD
    found = {}
    for memory in MODES:
        for change in CHANGES:
            model = build()
            step = LargeBatch(model, memory=memory, micro_batch=3, group=group)
            found[memory, change.__name__] = two_steps(
                model,
                change,
                lambda m, s=step: s.backward(views(rank), lambda z: loss_fn(z, group)),
            )
    for memory in MODES[:3]:
        model = sometimes()
        step = LargeBatch(model, memory=memory, micro_batch=3, group=group)
        model.used = rank
        with step.no_sync():
            step.backward(views(rank), lambda z: F.mse_loss(z, views(rank)))
        found[memory, "own"] = {n: p.grad is None for n, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        step.backward(views(rank), lambda z: F.mse_loss(z, views(rank)))
        found[memory, "unused"] = {n: p.grad for n, p in model.named_parameters()}
    torch.manual_seed(rank)
    other = nn.Linear(6, 6)
    LargeBatch(other, memory="plain", group=group)
    found["weights"] = other.weight.detach()
    sparse = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
    try:
        LargeBatch(sparse, memory="plain", group=group).backward(
            torch.arange(4), lambda z: z.square().sum()
        )
    except ValueError as error:
        found["sparse"] = str(error)
    for memory in MODES:
        model = build()
        step = LargeBatch(model, memory=memory, micro_batch=3, group=group)
        model[1][rank].requires_grad_(False)
        try:
            step.backward(views(rank), lambda z: loss_fn(z, group))
        except ValueError as error:
            found["different", memory] = str(error)
        model.requires_grad_(True)
        step.backward(views(rank), lambda z: loss_fn(z, group))
    for memory in MODES[:3]:
        model = build()
        step = LargeBatch(model, memory=memory, micro_batch=3, group=group)
        found["sent", memory] = sent_during_backward(
            step, lambda s=step: s.backward(views(rank), lambda z: loss_fn(z, group))
        )
    for memory in ("plain", "replay"):
        for sides in ((True, True), (True, False), (False, True), (False, False)):
            model = normed()
            step = LargeBatch(model, memory=memory, group=group)
            model.uses_side = sides[rank]
            sent = sent_during_backward(
                step,
                lambda s=step: s.backward(views(rank), lambda z: F.mse_loss(z, views(rank))),
            )
            gradients = {n: p.grad for n, p in model.named_parameters()}
            found["normed", memory, sides] = sent, gradients
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run_ranks(folder):
    folder.mkdir()
    on_ranks(on_rank, (str(folder),), RANKS)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = made_once(tmp_path_factory, "changes", run_ranks)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_on_all_ranks(ranks, change, memory):
    for found in ranks:
        assert_equal(found[memory, change.__name__], expected(change))


@pytest.mark.parametrize("memory", MODES[:3])
def test_parameters_without_a_gradient_on_some_or_all_ranks(ranks, memory):
    want = unused_expected()
    assert want["parts.2.weight"] is None
    for rank, found in enumerate(ranks):
        assert found[memory, "own"] == {
            n: n.startswith((f"parts.{1 - rank}", "parts.2")) for n in want
        }
        assert_equal(found[memory, "unused"], want)


def test_ranks_begin_with_the_weights_of_the_first(ranks):
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])


def test_sparse_gradients_are_refused_by_name(ranks):
    assert all("0.weight has layout torch.sparse_coo" in found["sparse"] for found in ranks)


@pytest.mark.parametrize("memory", MODES)
def test_ranks_that_train_different_parameters_are_refused(ranks, memory):
    said = {found["different", memory] for found in ranks}
    assert len(said) == 1
    (text,) = said
    assert "different parameters: only 1.1.first.weight [6, 6] torch.float64 on rank 0; " in text
    assert "and 5 more. Modules and requires_grad must be the same on all ranks" in text


@pytest.mark.parametrize("memory", MODES[:3])
def test_gradients_are_sent_during_the_backward(ranks, memory):
    """All of them: each parameter has a bucket, and the last one arrives before the end."""
    assert all(found["sent", memory] == [(16, 16)] for found in ranks)


@pytest.mark.parametrize("memory", ["plain", "replay"])
@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True), (False, False)])
def test_batch_norms_and_buckets_send_in_one_order(ranks, memory, sides):
    """Ranks that use different layers would send buckets and batch statistics in different orders.
    Then gradients are sent after the backward."""
    for found in ranks:
        ((sent, buckets),), gradients = found["normed", memory, sides]
        assert_equal(gradients, normed_expected(sides))
        if sides[0] != sides[1]:
            assert sent == 0
        else:
            # Without the side branch, its buckets and those behind them wait.
            assert sent == (buckets if sides[0] else 2)


def test_gradients_of_a_copy_do_not_mix():
    """A deep copy of a stepped model and its LargeBatch shares nothing with it."""
    model = build()
    step = LargeBatch(model, memory="replay")
    step.backward(views(), loss_fn)
    other = copy.deepcopy(step)
    other.backward(views(), loss_fn)
    for p, q in zip(model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
