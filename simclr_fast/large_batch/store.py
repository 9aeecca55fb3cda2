"""The kept pieces of a batch, on the GPU and in host memory. Copies overlap with the computation.

`transfers` decides beforehand which pieces move when. The store does the copies: one stream takes
pieces to the host and one brings them back, so that both directions of the bus are busy. On the CPU
the same code copies without streams.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simclr_fast.large_batch.graph import Key, Spec
from simclr_fast.large_batch.malloc_trim import Heap
from simclr_fast.large_batch.program import Program
from simclr_fast.large_batch.refusals import refusal
from simclr_fast.large_batch.transfers import Access, Transfers
from simclr_fast.utils.pinned import pinned_empty

# Pieces begin at multiples of this, so that every copy is aligned.
_ALIGNMENT = 256


def piece_bytes(key: Key, spec: Spec, rows: int) -> int:
    """The bytes of a piece of `rows` rows. spec: of the key's node."""
    elements = rows * math.prod(spec.shape)
    size = -(-elements // 8) if key.kind == "bits" else elements * spec.dtype.itemsize
    return _padded(size)


def accesses(program: Program, rows: Sequence[int], views: bool) -> list[Access]:
    """What every pass does with the pieces of every micro-batch, in the order of the step.

    A piece is a key and the number of its micro-batch. rows: of every micro-batch. views: whether
    the views are pieces too, because they lie in host memory.
    """
    given = program.graph.values[program.graph.input]
    found = []
    for number, current in enumerate(program.passes):
        reads = [key for key in current.reads if views or key != given]
        for m in sweep(number, len(rows)):
            makes = []
            for key in current.makes:
                spec = program.specs[key.node]
                if spec is None:
                    raise refusal(
                        f"{key.node.format_node()} is no tensor, and it is needed behind a batch "
                        "norm"
                    )
                makes.append(((key, m), piece_bytes(key, spec, rows[m])))
            found.append(Access([(k, m) for k in reads], makes, [(k, m) for k in current.frees]))
    return found


def sweep(number: int, count: int) -> Sequence[int]:
    """The order of micro-batches in pass `number`. It alternates, because what was made last is
    most likely to be still on the GPU."""
    return range(count - 1, -1, -1) if number % 2 else range(count)


class Part(NamedTuple):
    """Lent host memory. start: its place."""

    start: int
    memory: Tensor


class HostMemory:
    """Host memory (pinned for CUDA) that is allocated once and lent in parts."""

    def __init__(self, nbytes: int, pinned: bool) -> None:
        self.capacity = _padded(nbytes)
        make = pinned_empty if pinned else torch.empty
        try:
            self.memory = make((self.capacity,), dtype=torch.uint8)
        except (RuntimeError, MemoryError) as error:
            raise ValueError(
                f"host_memory must fit the host's memory, got {nbytes / 1e9:g} GB: {error}"
            ) from error
        self.clear()

    def clear(self) -> None:
        """Make all memory free."""
        self.used = 0
        # Free parts: their ends by their starts, and the reverse.
        self._ends = {0: self.capacity} if self.capacity else {}
        self._starts = {end: start for start, end in self._ends.items()}

    def lend(self, nbytes: int) -> list[Part]:
        """`nbytes` bytes, in one part if possible.

        Raises:
            MemoryError: so many are not free.
        """
        if self.used + _padded(nbytes) > self.capacity:
            raise MemoryError(
                f"{nbytes} bytes do not fit beside {self.used} of {self.capacity} bytes"
            )
        self.used += _padded(nbytes)
        parts = []
        while nbytes:
            wanted = _padded(nbytes)
            sizes = {start: end - start for start, end in self._ends.items()}
            enough = [start for start, size in sizes.items() if size >= wanted]
            start = (
                min(enough, key=sizes.__getitem__) if enough else max(sizes, key=sizes.__getitem__)
            )
            end = self._ends.pop(start)
            del self._starts[end]
            if end - start > wanted:
                self._note(start + wanted, end)
            size = min(nbytes, end - start)
            parts.append(Part(start, self.memory[start : start + size]))
            nbytes -= size
        return parts

    def take_back(self, parts: Sequence[Part]) -> None:
        """Parts that `lend` gave."""
        for part in parts:
            start, end = part.start, part.start + _padded(len(part.memory))
            self.used -= end - start
            if end in self._ends:
                end = self._ends.pop(end)
            if start in self._starts:
                start = self._starts.pop(start)
            self._note(start, end)

    def _note(self, start: int, end: int) -> None:
        self._ends[start], self._starts[end] = end, start


class _OnHost(NamedTuple):
    """A piece in host memory. like: its shape, strides and dtype. copied: when it is there."""

    parts: list[Part]
    like: Tensor
    copied: Any


class Store:
    """Holds the pieces of one step after the other.

    device: of the computation. host: for the pieces that `Transfers.out` names; None if there are
    none.
    """

    def __init__(self, device: torch.device, host: HostMemory | None = None) -> None:
        self.device, self.host = device, host
        cuda = device.type == "cuda"
        self._out = torch.cuda.Stream(device) if cuda else None
        self._back = torch.cuda.Stream(device) if cuda else None
        self._heap = Heap()
        self.begin(Transfers(), {})

    def begin(self, moves: Transfers, given: dict[Hashable, Tensor]) -> None:
        """Forget all pieces. given: pieces that lie in host memory and stay there: the views."""
        self._moves, self._given = moves, given
        self._here: dict[Hashable, Any] = {}
        self._there: dict[Hashable, _OnHost] = {}
        # Pieces that are to move out as soon as they are made.
        self._late: set[Hashable] = set()
        # When the copy of a piece arrives.
        self._arrival: dict[Hashable, Any] = {}
        # Host memory that is free after an event.
        self._leaving: list[tuple[Any, list[Part]]] = []

    def enter(self, access: int) -> None:
        """Do the moves before an access."""
        for piece in self._moves.out.get(access, ()):
            self._move_out(piece)
        for piece in self._moves.back.get(access, ()):
            if piece not in self._here:
                self._move_back(piece)

    def has(self, piece: Hashable) -> bool:
        return piece in self._here or piece in self._there

    def put(self, piece: Hashable, value: Any) -> None:
        self._here[piece] = value
        if isinstance(value, Tensor):
            self._heap.note(value)
        if piece in self._late:
            self._late.remove(piece)
            self._move_out(piece)

    def get(self, piece: Hashable) -> Any:
        """The piece, for the computing stream."""
        if piece not in self._here:
            self._move_back(piece)
        if piece in self._arrival:
            torch.cuda.current_stream(self.device).wait_event(self._arrival.pop(piece))
        return self._here[piece]

    def drop(self, piece: Hashable) -> None:
        self._here.pop(piece, None)
        self._arrival.pop(piece, None)
        if piece in self._there:
            there = self._there.pop(piece)
            self._leaving.append((there.copied, there.parts))

    def _move_out(self, piece: Hashable) -> None:
        if piece in self._given:
            self._here.pop(piece, None)
            return
        if piece not in self._here:
            self._late.add(piece)
            return
        t = self.get(piece)
        del self._here[piece]
        if not isinstance(t, Tensor):
            self._here[piece] = t
            return
        like = torch.empty_like(t, device="meta")
        dense = t if t.stride() == like.stride() else t.clone(memory_format=torch.preserve_format)
        parts = self._lend(dense.numel() * dense.element_size())
        copied = None
        if self._out is not None:
            self._out.wait_stream(torch.cuda.current_stream(self.device))
            # The allocator must not reuse the memory before the copy has ended.
            dense.record_stream(self._out)
        with torch.cuda.stream(self._out):
            for host, part in zip(parts, _bytes(dense, parts), strict=True):
                host.memory.copy_(part, non_blocking=True)
        if self._out is not None:
            copied = self._out.record_event()
        self._there[piece] = _OnHost(parts, like, copied)

    def _move_back(self, piece: Hashable) -> None:
        given = self._given.get(piece)
        there = None if given is not None else self._there.pop(piece)
        like = self._given[piece] if there is None else there.like
        # Allocated on the computing stream, so the copy waits for the memory's previous use.
        t = torch.empty_like(like, device=self.device)
        if self._back is not None:
            self._back.wait_stream(torch.cuda.current_stream(self.device))
            # After an error nobody may take it, and the copy goes on.
            t.record_stream(self._back)
            if there is not None:
                self._back.wait_event(there.copied)
        with torch.cuda.stream(self._back):
            if there is None:
                t.copy_(like, non_blocking=True)
            else:
                for part, host in zip(_bytes(t, there.parts), there.parts, strict=True):
                    part.copy_(host.memory, non_blocking=True)
        if self._back is not None:
            self._arrival[piece] = self._back.record_event()
        if there is not None:
            self._leaving.append((self._arrival.get(piece), there.parts))
        self._here[piece] = t

    def _lend(self, nbytes: int) -> list[Part]:
        """Host memory that the stream of copies to the host may write into."""
        assert self.host is not None
        while self._leaving and self.host.used + _padded(nbytes) > self.host.capacity:
            event, parts = self._leaving.pop(0)
            if event is not None and self._out is not None:
                self._out.wait_event(event)
            self.host.take_back(parts)
        return self.host.lend(nbytes)

    def end(self) -> None:
        """Forget all pieces and free the host memory, also after an error."""
        if self._out is not None and self._back is not None:
            # The next copies to the host may overwrite what is still being copied back.
            self._out.wait_stream(self._back)
        if self.host is not None:
            self.host.clear()
        self.begin(Transfers(), {})


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _bytes(t: Tensor, like: Sequence[Part]) -> list[Tensor]:
    """The memory of a dense tensor, cut into the sizes of the parts."""
    flat = t.as_strided((t.numel(),), (1,)).view(torch.uint8)
    return list(flat.split([len(part.memory) for part in like]))
