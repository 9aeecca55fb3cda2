"""What lockstep keeps, counted tensor by tensor."""

import weakref
from pathlib import Path

import pytest
import torch
from large_batch_cases import large_batch, loss_fn, simclr, views
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simclr_fast.large_batch import LargeBatch, malloc_trim
from simclr_fast.large_batch.schedule import Schedule, Stage
from simclr_fast.large_batch.store import Store, piece_bytes


class LiveBytes(TorchDispatchMode):
    """peak: the most bytes alive at once in tensors made within it."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for t in tree_leaves(made):
            storage = t.untyped_storage() if isinstance(t, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.freed, storage._cdata)
        self.peak = max(self.peak, self.now)
        return made

    def freed(self, key):
        self.now -= self.alive.pop(key)


class _Box(list):
    """A list that weak references can follow."""


class SavedBytes(saved_tensors_hooks):
    """peak: the most bytes that autograd graphs held at once."""

    def __init__(self):
        self.now = self.peak = 0
        super().__init__(self.pack, lambda held: held[0])

    def pack(self, t):
        held = [t]
        if not isinstance(t, torch.nn.Parameter):
            size = t.numel() * t.element_size()
            self.now += size
            self.peak = max(self.peak, self.now)
            box = _Box(held)
            weakref.finalize(box, self.freed, size)
            return box
        return held

    def freed(self, size):
        self.now -= size


def batch(rows):
    return views().repeat(-(-rows // 14), 1, 1, 1)[:rows]


def narrow():
    """More activations than parameters."""
    return simclr("resnet18", stem="cifar")


def peak(counter, rows, **mode):
    engine = large_batch(narrow(), **mode)
    x = batch(rows)
    with counter:
        engine.backward(x, lambda outputs: outputs[1].square().sum())
    return counter.peak


def test_graphs_hold_a_micro_batch_whatever_the_batch():
    lockstep = [peak(SavedBytes(), n, micro_batch=4, choices={}) for n in (16, 48)]
    # All rows' outputs are what the loss saves.
    outputs = 32 * 8 * 8
    assert lockstep[1] <= lockstep[0] + outputs
    assert peak(SavedBytes(), 48, memory="plain") > 2.5 * peak(SavedBytes(), 16, memory="plain")


def test_planned_bytes_are_the_real_ones():
    """What the passes keep, with the first and the last micro-batch of each, tensor by tensor."""
    model, x = simclr("resnet50"), batch(16)
    engine = large_batch(model, micro_batch=4, choices={"output": "once", "turn": "mask"})
    engine.backward(x, loss_fn)
    program = engine.lockstep.program
    kept = []

    class Watched(Store):
        def enter(self, access):
            super().enter(access)
            held = {t.untyped_storage()._cdata: t for t in self._here.values() if t is not None}
            if access % 4 == 0:
                kept.append(sum(t.nbytes for t in held.values()))

    engine.lockstep.store = Watched(torch.device("cpu"))
    engine.backward(x, loss_fn)
    planned = [
        sum(piece_bytes(key, program.specs[key.node], 4) for key in current.pieces_after) * 4
        for current in program.passes
    ]
    # Gradients of outputs that the loss does not use are planned, and None.
    assert len(kept) == len(planned)
    for found, expected in zip(kept[1:], planned, strict=False):
        assert 0.95 * expected <= found <= expected + 4 * 256


def small(name):
    """Activations as of 64² images, with few parameters. Kept: the narrow values."""
    return simclr(name, stem="imagenet", width=0.125)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "share"), [("resnet50", 0.14), ("resnet34", 0.3)])
def test_peak_is_a_fraction_of_plain(name, share):
    rows = 128
    x = views(size=64).repeat(10, 1, 1, 1)[:rows]

    def peak_of(make):
        model, counter = small(name), LiveBytes()
        engine = make(model)
        with counter:
            engine.backward(x, lambda outputs: outputs[1].square().sum())
        # The views count where parts of them are taken, and gradients anyway.
        views_too = x.nbytes if engine.memory == "lockstep" else 0
        return counter.peak - views_too - sum(p.nbytes for p in model.parameters())

    stem = Stage(1, last="again", turn="mask")
    stages = [Stage(n, input=i, turn="mask") for n, i in ((3, "kept"), (4, "again"), (9, "kept"))]
    narrow = Schedule(2, (stem, *stages, Stage(1)))
    lockstep = peak_of(lambda model: LargeBatch(model, schedule=narrow))
    plain = peak_of(lambda model: LargeBatch(model, memory="plain"))
    assert lockstep < share * plain


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(malloc_trim._trim is None, reason="glibc's malloc")
def test_gaps_of_the_heap_are_given_back():
    # From here on glibc takes 4 MB from the heap instead of mapping them.
    torch.ones(7 << 20)
    # Not from pages that other tests have left resident.
    malloc_trim._trim(0)
    before = resident()
    tensors = [torch.ones(1 << 20) for _ in range(50)]
    kept = tensors[::10]
    assert resident() > before + 190e6
    del tensors
    held = resident()
    due = malloc_trim.Heap()
    due.made = malloc_trim._EVERY - 4
    due.note(torch.ones(1))
    assert resident() < before + len(kept) * 4.2e6 + 20e6
    assert held > before + 100e6
