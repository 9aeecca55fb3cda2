"""The store: pinned bytes, pieces that come back bit for bit, copies that wait for each other."""

import random
from itertools import pairwise

import pytest
import torch
from fake_cuda import FakeCuda, FakeStream
from large_batch_cases import assert_equal, in_stages, loss_fn, plain_autograd, simclr, step, views

from simclr_fast.large_batch import LargeBatch
from simclr_fast.large_batch import global_batch_norm as gbn
from simclr_fast.large_batch.graph import Graph
from simclr_fast.large_batch.lockstep import Lockstep
from simclr_fast.large_batch.program import Program
from simclr_fast.large_batch.schedule import Schedule, uniform
from simclr_fast.large_batch.store import HostMemory, Store, accesses
from simclr_fast.large_batch.transfers import Access, Transfers, transfers

CPU = torch.device("cpu")


def test_memory_that_the_host_lacks_is_refused():
    with pytest.raises(ValueError, match="host_memory must fit the host's memory, got 1e"):
        HostMemory(10**18, False)


@pytest.mark.parametrize("seed", range(5))
def test_lent_parts_are_apart_and_join_again(seed):
    rng = random.Random(seed)
    memory = HostMemory(50_000, False)
    assert memory.capacity == 50_176
    lent = []
    for _ in range(300):
        size = rng.randrange(1, 6000)
        if memory.used + size + 256 <= memory.capacity and rng.random() < 0.6:
            lent.append(memory.lend(size))
            assert sum(len(part.memory) for part in lent[-1]) == size
        elif lent:
            memory.take_back(lent.pop(rng.randrange(len(lent))))
        places = sorted((p.start, p.start + len(p.memory)) for parts in lent for p in parts)
        assert all(end <= start for (_, end), (start, _) in pairwise(places))
        # Writing into a part changes no other one.
        for i, parts in enumerate(lent):
            for part in parts:
                part.memory.fill_(i % 251)
        assert all((p.memory == i % 251).all() for i, parts in enumerate(lent) for p in parts)
    for parts in lent:
        memory.take_back(parts)
    assert memory.used == 0
    # All of it again, in one part.
    assert len(memory.lend(memory.capacity)) == 1
    with pytest.raises(MemoryError, match="do not fit"):
        memory.lend(1)


def tensors():
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(n, 3, 5, 7, generator=generator) for n in (4, 1, 0, 9, 2)]
    made[0] = made[0].contiguous(memory_format=torch.channels_last)
    made[1] = made[1].bfloat16()
    made[3] = made[3].double().transpose(1, 3)
    made[4] = made[4].expand(3, 2, 3, 5, 7)
    return made


def test_pieces_come_back_bit_for_bit():
    kept = tensors()
    store = Store(CPU, HostMemory(20_000, False))
    names = list(range(len(kept)))
    # None, where a step has no gradient, is not moved.
    store.begin(Transfers(out={0: [*names, "none"]}, back={1: names}), {})
    for name, t in enumerate(kept):
        store.put(name, t.clone(memory_format=torch.preserve_format))
    store.put("none", None)
    store.enter(0)
    assert all(store.has(name) for name in names)
    assert store.host.used > 0
    store.enter(1)
    for name, t in enumerate(kept):
        assert torch.equal(store.get(name), t)
        assert store.get(name).dtype == t.dtype
    assert store.get("none") is None
    store.end()
    assert store.host.used == 0


class Apart:
    """Host memory with an allocation per piece, which the watch takes for a whole."""

    def __init__(self, pieces):
        self.pieces = [torch.empty(1024, dtype=torch.uint8) for _ in range(pieces)]

    def __getitem__(self, place):
        assert place.stop - place.start == 1024
        return self.pieces[place.start // 1024]


def steps(seed, stop=60):
    """Two steps of random accesses under a bound, on streams of a GPU that is not there.

    stop: the first step ends with an error at this access, after its copies were begun.
    """
    device = torch.device("cuda", 0)
    rng = random.Random(seed)
    alive, todo = {}, []
    for number in range(60):
        reads = rng.sample(sorted(alive), min(len(alive), 2))
        drops = [name for name in reads if rng.random() < 0.3]
        for name in drops:
            del alive[name]
        makes = [number] if len(alive) < 8 else []
        alive.update(dict.fromkeys(makes))
        todo.append((reads, makes, drops))
    order = [Access(r, [(name, 1024) for name in m], d) for r, m, d in todo]
    moves = transfers(order, 6 * 1024)
    assert moves.bytes_out > 10 * 1024
    seen = []
    with FakeCuda() as cuda:
        host = HostMemory(moves.host_peak, True)
        host.memory = Apart(moves.host_peak // 1024)
        store = Store(device, host)
        for step in range(2):
            store.begin(moves, {})
            for access, (reads, makes, drops) in enumerate(todo):
                store.enter(access)
                if step == 0 and access == stop:
                    break
                # Looked at after the step, because the host waits for what it looks at.
                seen += [(store.get(name) * 1, name + step) for name in reads]
                for name in drops:
                    store.drop(name)
                for name in makes:
                    made = torch.full((256,), name + step, dtype=torch.float32, device=device)
                    store.put(name, made * 1)
            store.end()
    assert all((found == expected).all() for found, expected in seen)
    return cuda.faults


@pytest.mark.parametrize("seed", range(3))
def test_copies_wait_for_what_they_read_and_are_waited_for(seed):
    assert not steps(seed)


@pytest.mark.parametrize("missing", ["wait_stream", "wait_event"])
def test_a_missing_wait_is_found(missing, monkeypatch):
    monkeypatch.setattr(FakeStream, missing, lambda self, other: None)
    assert steps(0)


def careless_lend(self, nbytes):
    while self._leaving:
        self.host.take_back(self._leaving.pop(0)[1])
    # The last one is lent first.
    self.host._ends = dict(reversed(self.host._ends.items()))
    return self.host.lend(nbytes)


def careless_end(self):
    self.host.clear()
    self.begin(Transfers(), {})


@pytest.mark.parametrize("careless", [careless_lend, careless_end])
def test_host_memory_that_is_lent_too_early_is_found(careless, monkeypatch):
    """Without waiting for what is copied back, within a step, and by a step after an error."""
    cases = [(seed, stop) for seed in range(3) for stop in (20, 30, 40)]
    assert not any(steps(*case) for case in cases)
    monkeypatch.setattr(Store, {careless_lend: "_lend", careless_end: "end"}[careless], careless)
    assert any(steps(*case) for case in cases)


def test_memory_that_is_not_recorded_is_found(monkeypatch):
    monkeypatch.setattr(FakeCuda, "_record_stream", lambda self, tensor, stream: None)
    assert any("not recorded" in fault for fault in steps(0))


class Watched(Store):
    """device, host: the most bytes that were held in the device's and the host's memory."""

    device_peak = host_peak = 0

    def put(self, piece, value):
        super().put(piece, value)
        self.watch()

    def enter(self, access):
        super().enter(access)
        self.watch()

    def watch(self):
        held = {t.untyped_storage()._cdata: t for t in self._here.values() if t is not None}
        self.device_peak = max(self.device_peak, sum(t.nbytes for t in held.values()))
        if self.host is not None:
            self.host_peak = max(self.host_peak, self.host.used)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("share", [pytest.param(0.7, marks=SLOW), 0.35])
@pytest.mark.parametrize(
    "choices", [{}, {"turn": "mask"}, {"turn": "again", "input": "once"}], ids=str
)
@pytest.mark.parametrize("name", ["basic", pytest.param("bottleneck", marks=SLOW)])
def test_bounded_steps_equal_plain_autograd(name, choices, share, monkeypatch):
    """With the planned bytes on both sides."""
    monkeypatch.setattr("simclr_fast.large_batch.lockstep.Store", Watched)
    x, micro_batch = views(), 2
    parts = x.split(micro_batch)
    graph = Graph(simclr(name))
    schedule = uniform(len(graph.blocks), micro_batch, **choices)
    program = Program(graph, schedule, graph.measure(x))
    order = accesses(program, [len(part) for part in parts], False)
    limit = int(share * transfers(order, float("inf")).device_peak)
    moves = transfers(order, limit)
    assert moves.host_peak > 0
    bounded = Schedule(micro_batch, schedule.stages, True, limit, moves.host_peak)
    batch = gbn.WholeBatch()
    batch.rows = [len(x)]
    engines = []

    def run(model):
        engines.append(Lockstep(model, batch, lambda graph: bounded))

        def loss_of(outputs):
            loss = loss_fn(outputs)
            loss.backward()
            return loss.detach()

        plain = torch.autocast("cpu", enabled=False)
        return engines[0].backward(parts, loss_of, lambda: plain)

    assert_equal(step(simclr(name), run), step(simclr(name), plain_autograd))
    (engine,) = engines
    assert engine.store.host_peak == moves.host_peak == engine.store.host.capacity
    # What an access drops lies beside what it makes for as long as it runs.
    beside = max(sum(size for _, size in access.makes) for access in order)
    assert 0.8 * limit < engine.store.device_peak <= limit + beside


def test_bounds_that_no_moves_can_keep_are_refused():
    model = simclr("basic")
    schedule = in_stages(model, bytes=(1000, 10**9))
    with pytest.raises(ValueError, match="device_bytes 1000 and host_bytes 1000000000 do not"):
        LargeBatch(model, schedule=schedule).backward(views(), loss_fn)
