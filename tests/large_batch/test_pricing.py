"""Counted schedules against real steps: bytes and FLOPs. The search against random schedules."""

import random
from functools import cache

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from simclr_fast.large_batch import global_batch_norm as gbn
from simclr_fast.large_batch.lockstep import Lockstep
from simclr_fast.large_batch.pricing import Prices
from simclr_fast.large_batch.schedule import CHOICES, Schedule, Stage
from simclr_fast.large_batch.search import Search, stage_sizes
from simclr_fast.large_batch.simulate import Meter
from simclr_fast.models.encoders import SimCLR, build_encoder, build_projector

pytest.importorskip("torchvision")
SIZE, MICRO, COUNT = 32, 4, 12


def make(name):
    encoder, dim = build_encoder(name, width=0.125, image_size=SIZE)
    return SimCLR(encoder, build_projector("nonlinear", dim))


@cache
def prices(name, dtype=None, compile=False):
    clock = lambda flops, moved: flops / 100 + moved  # noqa: E731
    found = Prices(lambda: make(name), (3, SIZE, SIZE), dtype, False, clock, compile)
    return found.at(MICRO)


@cache
def search(name):
    return Search(prices(name), lambda flops, seconds: seconds)


def schedule(name, **choices):
    sizes = stage_sizes(prices(name))
    return Schedule(MICRO, tuple(Stage(size, **choices) for size in sizes))


def drawn(name, seed):
    """Random choices for every stage."""
    rng = random.Random(seed)
    sizes = stage_sizes(prices(name))
    return Schedule(
        MICRO,
        tuple(Stage(n, **{k: rng.choice(values) for k, values in CHOICES.items()}) for n in sizes),
    )


def measured(name, dtype, given, fake):
    """Peak bytes and FLOPs of a real step, without model, views and gradients of parameters."""
    meter, batch = Meter(), gbn.WholeBatch()
    batch.rows = [MICRO * COUNT]

    class Watched(Lockstep):
        def run(self, op, env):
            meter.phase = ("operations", 0)
            super().run(op, env)
            meter.phase = ("others", 0)

    def loss_of(outputs):
        sum(t.float().sum() for t in outputs).backward()

    def step():
        model = make(name).train()
        views = torch.empty(MICRO * COUNT, 3, SIZE, SIZE, dtype=dtype)
        engine = Watched(model, batch, lambda graph: given)
        with meter:
            tensors = [views, *model.parameters(), *model.buffers()]
            meter.hold(*tensors)
            on = torch.autocast("cpu", dtype, dtype is not None, False)
            engine.backward(views.split(MICRO), loss_of, lambda: on)
        peak = max(phase.peak for phase in meter.phases.values())
        return peak - sum(t.nbytes for t in tensors), meter.phases["operations", 0].flops

    if not fake:
        return step()
    with FakeTensorMode():
        return step()


@pytest.mark.parametrize(
    ("name", "dtype", "seed"),
    [
        ("resnet18", None, 0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("resnet18", torch.bfloat16, 1), ("resnet50", torch.bfloat16, 2))
        ),
    ],
)
def test_a_price_is_what_a_step_takes(name, dtype, seed):
    given = drawn(name, seed)
    found = prices(name, dtype)
    price = found.in_detail(given)
    # The first with real tensors.
    peak, flops = measured(name, dtype, given, fake=seed > 0)
    assert COUNT * price.flops == pytest.approx(flops, rel=0.005)
    # While one micro-batch is in work, each other one is as before or as after the pass.
    priced = max((COUNT - 1) * p.kept + max(p.local, p.kept) + p.fixed for p in price.passes)
    assert priced == pytest.approx(peak, rel=0.03)


def test_compiled_regions_move_fewer_bytes():
    """A run of operations reads its inputs and writes its outputs once, and computes the same."""
    given = schedule("resnet18", output="kept", inner="again")
    eager, compiled = prices("resnet18"), prices("resnet18", compile=True)
    for (current, one, _), (_, other, _) in zip(
        eager.walk(given), compiled.walk(given), strict=True
    ):
        assert sum(c.flops for c in one) == sum(c.flops for c in other)
        assert sum(c.moved for c in other) <= sum(c.moved for c in one)
        if current.name == "forward 18":
            # The last block's output, and the pooling that reads it.
            kinds = [op.node for op in current.ops if op.kind == "make"]
            relu, _, _, _ = kinds
            spare = 2 * eager.nbytes(eager.graph.values[relu])
            spared = sum(c.moved for c in one) - sum(c.moved for c in other)
            assert relu in eager.graph.relus
            assert spared >= spare
    assert compiled.price(given).seconds < eager.price(given).seconds


def test_a_batch_norm_with_what_follows_reads_and_writes_once():
    given = schedule("resnet18", output="kept", inner="again")
    found = prices("resnet18")
    counts = []
    for current, costs, _ in found.walk(given):
        for op, cost in zip(current.ops, costs, strict=True):
            if op.norm_act is not None:
                counts.append(len(op.reads))
                tensors = sum(map(found.nbytes, (*op.reads, *op.writes)))
                channels = found.specs[op.node].shape[0]
                # Beside them the statistics, γ and β in float32.
                norms = sum(node in found.graph.norms for node in op.norm_act.users)
                assert cost.moved == tensors + 16 * channels * norms
    assert set(counts) == {1, 2}


def test_everything_kept_costs_no_convolution_twice():
    kept = schedule("resnet18", **dict.fromkeys(CHOICES, "kept"))
    again = schedule("resnet18", input="once", last="again", inner="again", output="again")
    plain = prices("resnet18").price(kept)
    small = prices("resnet18").price(again)
    assert small.kept < plain.kept
    assert small.flops > 1.2 * plain.flops


@pytest.mark.parametrize("name", ["resnet18"])
def test_no_random_schedule_beats_the_search(name):
    found = [search(name).prices.price(drawn(name, seed)) for seed in range(60)]
    limits = sorted(p.kept for p in found)
    for limit in limits[::12]:
        best = search(name).best(limit)
        assert best is not None
        assert best.kept <= limit
        rivals = [cost(p) for p in found if p.kept <= limit]
        assert cost(best) <= 1.01 * min(rivals)


def cost(price):
    return price.seconds


def test_neighbours_of_the_best_are_not_better():
    """Changing one choice of one stage: nothing that fits is more than 1% cheaper."""
    name = "resnet18"
    most = search(name).prices.price(schedule(name, **dict.fromkeys(CHOICES, "kept"))).kept
    for share in (0.3, 0.6):
        best = search(name).best(share * most)
        stages = best.schedule.stages
        for i, stage in enumerate(stages):
            for choice, values in CHOICES.items():
                for value in values:
                    changed = Stage(**{**vars(stage), choice: value})
                    other = Schedule(MICRO, (*stages[:i], changed, *stages[i + 1 :]))
                    price = search(name).prices.price(other)
                    if price.kept <= share * most:
                        assert 0.99 * cost(best) <= cost(price)


def test_more_memory_never_costs_more():
    found = search("resnet18")
    least = found.least()
    bests = [found.best(least * factor) for factor in (1.05, 1.5, 2, 4)]
    costs = list(map(cost, bests))
    assert costs == sorted(costs, reverse=True)
    assert found.best(0.9 * least) is None
