"""Make the next batch in a thread while this one is in use, in memory that is reused.

On CUDA, streams wait for events and the host does not wait. The only exception is pinned memory,
which the host must not overwrite before its copy has ended, nor read before it is filled.
"""

import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor

_STOP = object()
Item = TypeVar("Item")
# Makes the uninitialised tensors of one batch, one per view.
NewViews = Callable[[], list[Tensor]]


class Slot:
    """The memory for the views of one batch, which is filled and read in turn.

    device: where the views are made. on_host: they lie in the host's pinned memory instead.
    _made is the event at the end of the last fill. _read_by are the events after its uses, on any
    stream.
    """

    def __init__(self, views: list[Tensor], device: torch.device, on_host: bool = False) -> None:
        self.views, self.device, self._on_host = views, device, on_host
        self._made: torch.cuda.Event | None = None
        self._read_by: list[torch.cuda.Event] = []

    def begin(self) -> None:
        """Wait for all uses of the slot, before it is filled again.

        The current stream waits; for pinned memory the host does.
        """
        for event in self._read_by:
            if self._on_host:
                event.synchronize()
            else:
                torch.cuda.current_stream(self.device).wait_event(event)
        self._read_by.clear()

    def end(self) -> None:
        """Record that the work queued on the current stream fills the slot."""
        if self.device.type == "cuda":
            self._made = torch.cuda.current_stream(self.device).record_event()

    def read(self) -> None:
        """Wait until the slot is filled. The current stream waits; for pinned memory the host."""
        if self._made is None:
            return
        if self._on_host:
            self._made.synchronize()
            return
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self._made)
        for view in self.views:
            # The memory belongs to the stream that fills it; keep it alive while this one uses it.
            view.record_stream(stream)

    def done(self) -> None:
        """Record that the work queued on the current stream uses the slot."""
        if self.device.type == "cuda":
            self._read_by.append(torch.cuda.current_stream(self.device).record_event())


class Slots:
    """Two slots in turn, for the lifetime of a loader. First writes to new memory would be slow.

    Filling is at most one batch ahead of reading.
    """

    def __init__(self, new_views: NewViews, device: torch.device, on_host: bool = False) -> None:
        self._new_views, self._device, self._on_host = new_views, device, on_host
        self._slots: list[Slot] = []
        self._in_hand: Slot | None = None

    def fill_next(self) -> Slot:
        """The slot that the current stream fills next."""
        if len(self._slots) < 2:
            self._slots.append(Slot(self._new_views(), self._device, self._on_host))
        else:
            self._slots.reverse()
        slot = self._slots[-1]
        slot.begin()
        return slot

    def hand_out(self, slot: Slot) -> list[Tensor]:
        """The views of a filled slot. The current stream may read them until `take_back`."""
        slot.read()
        self._in_hand = slot
        return slot.views

    def take_back(self) -> None:
        """Take the last slot back. It is filled again after all work queued on the current stream.

        Call it before another batch is requested, and before a new epoch: a loop may have been left
        while it held a batch, and that batch may have been used since.
        """
        if self._in_hand is not None:
            self._in_hand.done()


class PinnedViews:
    """Copies views from the CPU to another device through pinned memory, a part at a time.

    There are two buffers: the CPU fills one while the other is copied.
    """

    def __init__(self, new_views: NewViews, device: torch.device) -> None:
        self._new_views, self._device = new_views, device
        self._parts: list[tuple[list[Tensor], torch.cuda.Event | None]] = []

    def next(self) -> list[Tensor]:
        """Memory on the CPU for the views of the next part."""
        if len(self._parts) < 2:
            return self._new_views()
        views, copied = self._parts.pop(0)
        if copied is not None:
            copied.synchronize()
        return views

    def send(self, views: list[Tensor], targets: list[Tensor]) -> None:
        """Copy the views of `next` into `targets`; on CUDA the current stream does it later."""
        # On other devices a non-blocking copy could still read when the next part is written.
        cuda = self._device.type == "cuda"
        for view, target in zip(views, targets, strict=True):
            target.copy_(view[: len(target)], non_blocking=cuda)
        copied = torch.cuda.current_stream(self._device).record_event() if cuda else None
        self._parts.append((views, copied))


def ahead(
    items: Generator[Item], within: Callable[[], AbstractContextManager[Any]]
) -> Generator[Item]:
    """Yield from `items`, which runs in a thread one item ahead, in the context `within()`.

    While one item is in use, the thread makes the next one, and no more. An exception of `items` is
    raised instead of the item that failed.
    """
    asked: SimpleQueue[Any] = SimpleQueue()
    made: SimpleQueue[Any] = SimpleQueue()

    def work() -> None:
        try:
            with within():
                while asked.get() is not _STOP:
                    made.put(next(items))
            items.close()
        except BaseException as error:
            made.put(error)

    thread = threading.Thread(target=work, name="next-batch", daemon=True)
    thread.start()
    asked.put(None)
    try:
        while True:
            item = made.get()
            if isinstance(item, StopIteration):
                return
            if isinstance(item, BaseException):
                raise item
            asked.put(None)
            yield item
    finally:
        asked.put(_STOP)
        thread.join()
