"""Checks every load and store of Triton kernels that run in the interpreter.

Within one launch: no address outside the tensors it was given, no element written twice, none both
read and written. The interpreter runs programs one after the other, so it cannot show these by
wrong numbers. One exception: when an atomic addition with acquire and release has told a program
that all others have made theirs, it may read what they wrote before.
"""

import math
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from triton import knobs
from triton._C.libtriton.interpreter import MEM_SEMANTIC, RMW_OP
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction


class MemoryFault(AssertionError):
    pass


class _Recorder:
    """Stands in for the interpreter's load and store functions during a launch."""

    def __init__(self, native, dry: bool, programs: int):
        self.native, self.dry, self.programs = native, dry, programs
        self.released: np.ndarray | None = None
        self.spans: list[tuple[int, int]] = []
        self.reads: list[np.ndarray] = []
        self.writes: list[np.ndarray] = []

    def __getattr__(self, name):
        return getattr(self.native, name)

    def load(self, pointers, mask, other, dtype):
        read = self._inside(pointers, mask, np.dtype(dtype).itemsize, "load")
        if self.released is not None:
            read = np.setdiff1d(read, self.released)
        self.reads.append(read)
        if self.dry and pointers.size > 1:
            return np.zeros(pointers.shape, dtype)
        return self.native.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        self.writes.append(self._inside(pointers, mask, value.dtype.itemsize, "store"))
        if not self.dry:
            self.native.store(pointers, value, mask)

    def atomic_rmw(self, operation, pointers, value, mask, semantic):
        self._inside(pointers, mask, value.dtype.itemsize, "atomic operation")
        before = np.full(pointers.shape, self.programs - 1, value.dtype)
        if not self.dry:
            before = self.native.atomic_rmw(operation, pointers, value, mask, semantic)
        addition = operation == RMW_OP.ADD and semantic == MEM_SEMANTIC.ACQUIRE_RELEASE
        if addition and before.item() == self.programs - 1:
            self.released = np.concatenate([np.zeros(0, np.int64), *self.writes])
        return before

    def _inside(self, pointers, mask, size: int, what: str) -> np.ndarray:
        inside = np.broadcast_to(mask, pointers.shape).astype(bool)
        addresses = pointers[inside].astype(np.int64)
        ok = np.zeros(addresses.shape, bool)
        for begin, end in self.spans:
            ok |= (addresses >= begin) & (addresses + size <= end)
        if not ok.all():
            raise MemoryFault(f"{what} of {(~ok).sum()} elements out of bounds")
        return addresses

    def finish(self):
        written = np.concatenate([np.zeros(0, np.int64), *self.writes])
        unique, counts = np.unique(written, return_counts=True)
        if (counts > 1).any():
            raise MemoryFault(f"{(counts > 1).sum()} elements written twice in one launch")
        read = np.unique(np.concatenate([np.zeros(0, np.int64), *self.reads]))
        shared = np.intersect1d(unique, read, assume_unique=True)
        if shared.size:
            raise MemoryFault(f"{shared.size} elements both read and written in one launch")


def _span(tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + ((last + 1) * tensor.element_size() if tensor.numel() else 0)


def seeded(seed: int) -> torch.Generator:
    """A generator on the device on which the test makes its tensors."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


@contextmanager
def _native_launches():
    names: list[str] = []
    run = JITFunction.run

    def named_run(self, *args, warmup, **kwargs):
        if not warmup:
            names.append(self.fn.__name__)
        return run(self, *args, warmup=warmup, **kwargs)

    with mock.patch.object(JITFunction, "run", named_run):
        yield names


@contextmanager
def checked_memory(dry: bool = False):
    """Check every launch inside. dry: compute addresses only; tensors are neither read nor written.

    Yields a list of the launches' kernel names. Natively nothing is checked but those.
    """
    if not knobs.runtime.interpret:
        with _native_launches() as names:
            yield names
        return
    executor = interpreter.GridExecutor
    call, native, restore = executor.__call__, interpreter._interpreter, executor._restore_args_dev
    launches: list[str] = []

    def checked_call(self, *args, **kwargs):
        recorder = _Recorder(native, dry, math.prod(self.grid))
        tensors = [a for a in (*args, *kwargs.values()) if hasattr(a, "data_ptr")]
        recorder.spans = [_span(t) for t in tensors]
        launches.append(self.fn.__name__)
        interpreter._interpreter = recorder
        try:
            call(self, *args, **kwargs)
        finally:
            interpreter._interpreter = native
        recorder.finish()

    executor.__call__ = checked_call
    if dry:
        executor._restore_args_dev = lambda *_: None
    try:
        yield launches
    finally:
        executor.__call__, executor._restore_args_dev = call, restore
