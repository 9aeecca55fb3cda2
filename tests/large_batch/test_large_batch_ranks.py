"""Every memory mode over 1, 2 and 4 gloo ranks, unequal and empty shares, against one process."""

from collections import Counter
from functools import partial

import pytest
import torch
import torch.distributed as dist
from forks import context
from large_batch_cases import (
    MODES,
    PAIRS,
    assert_equal,
    crop_loss,
    crops,
    expanding,
    large_batch,
    loss_fn,
    mode_name,
    plain_autograd,
    plain_autograd_of_crops,
    simclr,
    step,
    views,
)
from made_once import made_once
from torch import nn

from simclr_fast.large_batch import LargeBatch, averaging

# Pairs of views per rank.
SHARES = {1: [PAIRS], 2: [4, 3], 4: [3, 0, 2, 2]}
LOCKSTEP = {"memory": "lockstep", "micro_batch": 5}
KEPT = {"memory": "lockstep", "micro_batch": 3}
CHOICES = [
    {"turn": "mask"},
    {"turn": "again", "input": "once", "output": "again"},
    {"wide": "kept", "inner": "kept"},
    {"gram": False, "turn": "mask"},
]
CASES = [
    (1, "basic", LOCKSTEP),
    *((ranks, "basic", mode) for ranks in (2, 4) for mode in [*MODES[:2], LOCKSTEP]),
    (2, "basic", LOCKSTEP | {"compile": True}),
    (4, "resnet50", {"memory": "replay"}),
    *(
        (ranks, name, KEPT | {"choices": choices})
        for ranks in (2, 4)
        for name, used in (("bottleneck", CHOICES[::2]), ("expanding", CHOICES))
        for choices in used
    ),
    (2, "bottleneck", KEPT | {"choices": {}, "compile": True}),
    *((ranks, "mlp", {"memory": "grad-cache", "micro_batch": 3}) for ranks in (2, 4)),
    *((2, name, {"memory": "plain", "compile": True}) for name in ("mlp", "expanding")),
]
COUNTED = [KEPT | {"choices": {}, "compile": True}, *(KEPT | {"choices": c} for c in CHOICES)]


def case_name(case):
    return f"{case[1]}-{mode_name(case[2])}-{case[0]}"


def build(name):
    if name == "expanding":
        return expanding()
    if name != "mlp":
        return simclr(name)
    torch.manual_seed(1)
    layers = nn.Flatten(), nn.Linear(768, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 8)
    return nn.Sequential(*layers).double()


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    # Several buckets, which are sent while batch norms send their sums.
    averaging._BUCKET = 1 << 14
    # Code generation is tested elsewhere, and takes seconds per graph.
    compiles, eager = torch.compile, lambda module, **_: module
    torch.compile = eager
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in SHARES}
    for case in CASES:
        ranks, name, mode = case
        if name == "mlp":
            torch.compile = partial(compiles, backend="aot_eager")
        if rank < ranks:
            result = step(build(name), one_step(rank, ranks, groups[ranks], mode))
            torch.save(result, f"{folder}/{case_name(case)}-{rank}.pt")
    torch.compile = eager
    for memory in ("plain", "replay"):
        result = step(simclr("basic"), crops_step(rank, groups[4], memory))
        torch.save(result, f"{folder}/crops-{memory}-{rank}.pt")
    if rank < 2:
        for mode in COUNTED:
            found = count_collectives(rank, groups[2], mode)
            torch.save(found, f"{folder}/collectives-{mode_name(mode)}-{rank}.pt")
        torch.save(overflow(rank, groups[2]), f"{folder}/overflow-{rank}.pt")
        for mode in ({"memory": "plain"}, LOCKSTEP):
            torch.save(
                accumulate(rank, groups[2], mode), f"{folder}/sum-{mode['memory']}-{rank}.pt"
            )
    dist.barrier()
    dist.destroy_process_group()


def share(rank, ranks):
    first = sum(SHARES[ranks][:rank])
    return views(first, first + SHARES[ranks][rank])


def one_step(rank, ranks, group, mode):
    def backward(model):
        engine = large_batch(model, group=group, **mode)
        return engine.backward(share(rank, ranks), lambda o: loss_fn(o, group))

    return backward


def crops_step(rank, group, memory):
    first = sum(SHARES[4][:rank])
    own = crops(first, first + SHARES[4][rank])
    rows = [5 * images for images in SHARES[4]]

    def backward(model):
        engine = large_batch(model, group=group, memory=memory)
        # A second model, whose batch statistics are also those of all ranks.
        again = simclr("basic").requires_grad_(False)
        outputs = engine.forward(again, own, rows)
        loss = engine.backward(own, lambda o: crop_loss(o, group), rows)
        assert torch.equal(crop_loss(outputs, group), loss)
        for mine, other in zip(again.buffers(), model.buffers(), strict=True):
            assert torch.equal(mine, other)
        return loss

    return backward


def count_collectives(rank, group, mode):
    counts = Counter()
    # Of one collective torch has several names, old and new.
    kinds = {
        "all_gather": "gather",
        "all_gather_into_tensor": "gather",
        "all_gather_single": "gather",
        "all_reduce": "all_reduce",
        "broadcast": "broadcast",
    }
    originals = {name: getattr(dist, name) for name in kinds if hasattr(dist, name)}

    def counting(name):
        def call(*args, **kwargs):
            counts[kinds[name]] += 1
            return originals[name](*args, **kwargs)

        return call

    model = simclr("basic")
    engine = large_batch(model, group=group, **mode)
    try:
        for name in originals:
            setattr(dist, name, counting(name))
        # A loss that does not communicate.
        engine.backward(share(rank, 2), lambda o: o[1].square().sum())
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return dict(counts), len(engine.lockstep.graph.blocks)


def overflow(rank, group):
    """One rank's loss overflows: (parameters moved, the new scale)."""
    model = simclr("basic").float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    engine = large_batch(model, group=group, autocast=torch.float16, choices={}, **LOCKSTEP)
    before = [p.detach().clone() for p in model.parameters()]

    def loss(outputs):
        # Through the last linear layer's weight alone, so that this rank's share overflows.
        return scaler.scale(loss_fn(outputs, group)) * (float("inf") if rank == 1 else 1)

    engine.backward(share(rank, 2).float(), loss)
    scaler.step(optimizer)
    scaler.update()
    moved = any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    return moved, scaler.get_scale()


def accumulate(rank, group, mode):
    """Two backwards, the first without averaging: twice the gradient of one."""
    model = simclr("basic")
    engine = LargeBatch(model, group=group, **mode)
    x = share(rank, 2)
    with engine.no_sync():
        engine.backward(x, lambda o: loss_fn(o, group))
    engine.backward(x, lambda o: loss_fn(o, group))
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def run_ranks(folder):
    folder.mkdir()
    processes = [context.Process(target=worker, args=(rank, str(folder))) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return made_once(tmp_path_factory, "large-batch-ranks", run_ranks)


@pytest.fixture(scope="module")
def expected():
    names = {name for _, name, _ in CASES}
    return {name: step(build(name), plain_autograd) for name in names}


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_equals_one_process(ranks, expected, case):
    for rank in range(case[0]):
        assert_equal(torch.load(ranks / f"{case_name(case)}-{rank}.pt"), expected[case[1]])


@pytest.mark.parametrize("memory", ["plain", "replay"])
def test_views_of_two_sizes(ranks, memory):
    expected = step(simclr("basic"), plain_autograd_of_crops)
    for rank in range(4):
        found = torch.load(ranks / f"crops-{memory}-{rank}.pt")
        assert_equal(found, expected)


@pytest.mark.parametrize("mode", COUNTED, ids=mode_name)
def test_collectives(ranks, mode):
    """One per batch norm and direction, and one per block for the gradients."""
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in simclr("basic").modules())
    for rank in range(2):
        counts, blocks = torch.load(ranks / f"collectives-{mode_name(mode)}-{rank}.pt")
        # One gather more: the ranks tell each other their numbers of rows.
        # One all-reduce compares the parameters of the ranks.
        assert counts == {"gather": norms + 1, "all_reduce": norms + blocks + 1}


def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks):
    for rank in range(2):
        assert torch.load(ranks / f"overflow-{rank}.pt") == (False, 512.0)


@pytest.mark.parametrize("memory", ["plain", "lockstep"])
def test_no_sync_accumulates(ranks, expected, memory):
    gradients = expected["basic"][1]
    for rank in range(2):
        found = torch.load(ranks / f"sum-{memory}-{rank}.pt")
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (found[name] - 2 * gradient).norm() <= 1e-11 * max(1, gradient.norm()), name
