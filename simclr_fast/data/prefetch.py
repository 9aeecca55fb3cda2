"""Makes the next batch in a thread while this one is in use, and keeps the memory of both.

On CUDA nothing here waits on the host, but for pinned memory that is about to be filled again:
streams wait for events.
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
# Makes one batch's tensors, uninitialised: one per view.
NewViews = Callable[[], list[Tensor]]


class Slot:
    """The views of one batch, which are filled and read in turn.

    _made is the event of the last fill, _read_by are those of its readers on any streams.
    """

    def __init__(self, views: list[Tensor], device: torch.device) -> None:
        self.views, self.device = views, device
        self._made: torch.cuda.Event | None = None
        self._read_by: list[torch.cuda.Event] = []

    def begin(self) -> None:
        """Let the current stream fill it once its readers are through."""
        for event in self._read_by:
            torch.cuda.current_stream(self.device).wait_event(event)
        self._read_by.clear()

    def end(self) -> None:
        """The current stream has filled it."""
        if self.device.type == "cuda":
            self._made = torch.cuda.current_stream(self.device).record_event()

    def read(self) -> None:
        """Let the current stream read it once it is filled."""
        if self._made is None:
            return
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self._made)
        for view in self.views:
            # The memory is the filling stream's; it must outlive its use on this one.
            view.record_stream(stream)

    def done(self) -> None:
        """The current stream has read it."""
        if self.device.type == "cuda":
            self._read_by.append(torch.cuda.current_stream(self.device).record_event())


class Slots:
    """Two slots in turn, for a loader's life: filling fresh memory costs more than the work.

    Who fills is at most one batch ahead of who reads.
    """

    def __init__(self, new_views: NewViews, device: torch.device) -> None:
        self._new_views, self._device = new_views, device
        self._slots: list[Slot] = []
        self._in_hand: Slot | None = None

    def fill_next(self) -> Slot:
        """The slot to fill next, for the current stream."""
        if len(self._slots) < 2:
            self._slots.append(Slot(self._new_views(), self._device))
        else:
            self._slots.reverse()
        slot = self._slots[-1]
        slot.begin()
        return slot

    def hand_out(self, slot: Slot) -> list[Tensor]:
        """The views of a filled slot, for the current stream to read until `take_back`."""
        slot.read()
        self._in_hand = slot
        return slot.views

    def take_back(self) -> None:
        """Let the last slot be filled again after all that the current stream has queued by now.

        Call it before another batch is asked for, and before a new epoch: a loop may have been left
        while it held a batch, and that batch may have been read since.
        """
        if self._in_hand is not None:
            self._in_hand.done()


class PinnedViews:
    """Views on their way from the CPU to another device, a part at a time, through pinned memory.

    Two parts in turn: the CPU fills one while the other is copied.
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
        """Copy what `next` gave into `targets`; on CUDA the current stream does, later."""
        # Elsewhere a copy that does not block may read the memory when it holds the next part.
        cuda = self._device.type == "cuda"
        for view, target in zip(views, targets, strict=True):
            target.copy_(view[: len(target)], non_blocking=cuda)
        copied = torch.cuda.current_stream(self._device).record_event() if cuda else None
        self._parts.append((views, copied))


def ahead(
    items: Generator[Item], within: Callable[[], AbstractContextManager[Any]]
) -> Generator[Item]:
    """What `items` yields, made by a thread one item ahead of its use, in the context `within()`.

    An item is begun when the one before the last has been used. An exception of `items` is raised
    at the item that it prevented.
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
