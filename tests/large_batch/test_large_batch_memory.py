"""What lockstep keeps, counted tensor by tensor."""

import weakref
from pathlib import Path

import pytest
import torch
from large_batch_cases import simclr, views
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simclr_fast.large_batch import LargeBatch, malloc_trim


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
    engine = LargeBatch(narrow(), **mode)
    x = batch(rows)
    with counter:
        engine.backward(x, lambda outputs: outputs[1].square().sum())
    return counter.peak


def test_graphs_hold_a_micro_batch_whatever_the_batch():
    lockstep = [peak(SavedBytes(), n, memory="lockstep", micro_batch=4) for n in (16, 48)]
    # All rows' outputs are what the loss saves.
    outputs = 32 * 8 * 8
    assert lockstep[1] <= lockstep[0] + outputs
    assert peak(SavedBytes(), 48, memory="plain") > 2.5 * peak(SavedBytes(), 16, memory="plain")


def block_inputs(model, x):
    """Bytes of what enters the residual blocks and the projector."""
    sizes = []
    blocks = [b for i in range(1, 5) for b in model.encoder.get_submodule(f"layer{i}")]
    for module in (*blocks, model.projector):
        module.register_forward_hook(lambda m, args, out: sizes.append(args[0].nbytes))
    with torch.no_grad():
        model(x)
    return sum(sizes)


def test_block_inputs_are_what_is_kept():
    model, x = narrow(), batch(20)
    engine = LargeBatch(model, memory="lockstep", micro_batch=8)
    engine.lockstep.autocast = lambda: torch.autocast("cpu", enabled=False)
    _, saved = engine.lockstep._forward(x.split(8))
    kept = sum(t.nbytes for stored in saved for t in stored.tensors) - x.nbytes
    assert kept == block_inputs(model, x)


def test_peak_is_a_fraction_of_plain():
    rows = 192
    plain = peak(LiveBytes(), rows, memory="plain")
    replay = peak(LiveBytes(), rows, memory="replay")
    lockstep = peak(LiveBytes(), rows, memory="lockstep", micro_batch=4)
    inputs = block_inputs(narrow(), batch(rows))
    assert inputs < lockstep < 1.6 * inputs
    assert lockstep < 0.8 * replay < 0.8 * plain
    sparse = peak(LiveBytes(), rows, memory="lockstep", micro_batch=4, keep_every=2)
    assert sparse < 0.9 * lockstep


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
