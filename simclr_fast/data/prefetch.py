"""The next batch, made by a thread while this one is in use."""

import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

_STOP = object()
Made = tuple[int, list[Tensor], Any]
"""A step's number, its views, and what else belongs to it."""


def ahead(batches: Generator[Made], device: torch.device) -> Generator[Made]:
    """What `batches` yields, one item ahead of its use, on a CUDA stream of its own.

    The item before last is free to be overwritten: a generator that fills two buffers in turn is
    never ahead of its reader. On CUDA, "free" and "made" are events: neither side waits on the
    host. An exception of `batches` is raised at the item that it prevented.
    """
    cuda = device.type == "cuda"
    asked: SimpleQueue[Any] = SimpleQueue()
    made: SimpleQueue[Any] = SimpleQueue()

    def work() -> None:
        try:
            with on_own_stream(device) as stream:
                while (freed := asked.get()) is not _STOP:
                    if freed is not None:
                        stream.wait_event(freed)
                    item = next(batches)
                    made.put((item, None if stream is None else stream.record_event()))
            batches.close()
        except BaseException as error:
            made.put((error, None))

    thread = threading.Thread(target=work, name="next-batch", daemon=True)
    thread.start()
    freed = None
    asked.put(None)
    try:
        while True:
            item, ready = made.get()
            if isinstance(item, StopIteration):
                return
            if isinstance(item, BaseException):
                raise item
            if ready is not None:
                stream = torch.cuda.current_stream(device)
                stream.wait_event(ready)
                for view in item[1]:
                    # The memory is the other stream's; it must outlive its use on this one.
                    view.record_stream(stream)
            asked.put(freed)
            yield item
            freed = torch.cuda.current_stream(device).record_event() if cuda else None
    finally:
        asked.put(_STOP)
        thread.join()


@contextmanager
def on_own_stream(device: torch.device) -> Iterator[Any]:
    """Within it, work for `device` goes to a stream of its own, which this yields; None on CPUs."""
    if device.type != "cuda":
        yield None
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield stream
