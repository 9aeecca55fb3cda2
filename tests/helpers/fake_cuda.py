"""Streams and events of GPUs that are not there, watched for missing waits.

    with FakeCuda(devices=4, current=3) as cuda:
        ...  # code that uses device "cuda", its streams and its events
    assert not cuda.faults

Tensors that are created on "cuda" lie on the CPU, and operations on them run there at once. Each
read and write, with its stream, is reported to torch's race detector for real GPUs
(torch/cuda/_sanitizer.py). The host is a stream of its own: what it launches comes after what it
did before, and it sees a stream's work only after it has waited for it. If a tensor is used on
another stream than the one it was allocated on, `record_stream` must have been called.
"""

import threading
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.cuda._sanitizer import EventHandler
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_HOST = -1
# Operations that read no value.
_SHAPES_ONLY = {"aten::empty_like", "aten::new_empty", "aten::new_empty_strided"}


class FakeCuda:
    """Replaces what torch.cuda has of streams, events and devices, in all threads.

    faults: what was found. used_devices: the current device of each thread that launched something.
    """

    def __init__(self, devices: int = 1, current: int = 0) -> None:
        self.faults: list[str] = []
        self.used_devices: set[tuple[str, int]] = set()
        self._handler = EventHandler()
        self._lock = threading.RLock()
        self._numbers = 0
        self._defaults = [FakeStream(self, torch.device("cuda", i)) for i in range(devices)]
        self._first_current = current
        self._local = threading.local()
        # Stream of allocation, and streams recorded, by storage. None: memory that is not torch's.
        self._allocated_on: dict[int, int | None] = {}
        self._recorded: set[tuple[int, int]] = set()
        # Kept, because another storage could get the address of a freed one.
        self._alive: list[torch.UntypedStorage] = []
        self._stack = ExitStack()

    def __enter__(self) -> "FakeCuda":
        cuda = self

        class Stream(FakeStream):
            def __init__(self, device: Any = None, **_: Any) -> None:
                super().__init__(cuda, cuda._device(device))

        class Event(FakeEvent):
            def __init__(self, *_: Any, **__: Any) -> None:
                super().__init__(cuda)

        replaced = {
            "Stream": Stream,
            "Event": Event,
            "current_stream": self.current_stream,
            "default_stream": lambda device=None: self._defaults[self._device(device).index],
            "current_device": lambda: self._thread().device,
            "stream": self.use_stream,
            "device": self.use_device,
            "set_device": self.set_device,
            "is_available": lambda: True,
            "synchronize": self.synchronize,
        }
        for name, value in replaced.items():
            self._stack.enter_context(mock.patch.object(torch.cuda, name, value))
        self._stack.enter_context(
            mock.patch.object(
                torch.Tensor,
                "record_stream",
                lambda tensor, stream: cuda._record_stream(tensor, stream),
            )
        )
        self._stack.enter_context(self._watching())
        self._thread().device = self._first_current
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def current_stream(self, device: Any = None) -> "FakeStream":
        index = self._device(device).index
        return self._thread().streams.get(index, self._defaults[index])

    @contextmanager
    def use_stream(self, stream: "FakeStream"):
        """torch.cuda.stream; a thread that enters it is watched from then on."""
        thread = self._thread()
        before = (dict(thread.streams), thread.device)
        thread.streams[stream.device.index] = stream
        thread.device = stream.device.index
        try:
            with self._watching():
                yield
        finally:
            thread.streams, thread.device = before

    @contextmanager
    def use_device(self, device: Any):
        thread = self._thread()
        before, thread.device = thread.device, self._device(device).index
        try:
            yield
        finally:
            thread.device = before

    def set_device(self, device: Any) -> None:
        self._thread().device = self._device(device).index

    def synchronize(self, device: Any = None) -> None:
        for stream in range(1, self._numbers + 1):
            self._wait(_HOST, stream)

    def launched(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Record the storages that a call has read and written, on the stream that it ran on."""
        reads: set[int] = set()
        writes: set[int] = set()
        given = dict(zip((a.name for a in function._schema.arguments), args, strict=False))
        for argument in function._schema.arguments:
            value = {**given, **kwargs}.get(argument.name)
            alias = argument.alias_info
            if alias is not None and not alias.is_write:
                continue
            written = alias is not None
            if function._schema.name in _SHAPES_ONLY:
                continue
            for tensor in self._tensors(value):
                (writes if written else reads).add(tensor)
        for returned in function._schema.returns:
            if returned.alias_info is None:
                fresh = set(self._tensors(result)) - reads - writes
                writes |= fresh
        if not reads and not writes:
            return
        with self._lock:
            thread = self._thread()
            on_device = [s for s in reads | writes if s in self._allocated_on]
            stream = self.current_stream().number if on_device else _HOST
            if on_device:
                self.used_devices.add((threading.current_thread().name, thread.device))
                self._wait(stream, _HOST)
                for storage in writes - self._allocated_on.keys():
                    if function._schema.name != "aten::copy_":
                        self._allocated_on[storage] = stream
                for storage in on_device:
                    owner = self._allocated_on[storage]
                    known = owner in (None, stream) or (storage, stream) in self._recorded
                    if not known:
                        self.faults.append(f"{function}: stream {stream} was not recorded")
            errors = self._handler._handle_kernel_launch(
                stream,
                reads - writes,
                writes,
                set(),
                str(function),
                {storage: [] for storage in reads | writes},
            )
            self.faults += [
                f"{function}: stream {e.current_access.stream} {e.current_access.type} what stream "
                f"{e.previous_access.stream} was {e.previous_access.type}"
                for e in errors
            ]
            if on_device and function._schema.name == "aten::_local_scalar_dense":
                self._wait(_HOST, stream)

    def allocate(self, tensor: torch.Tensor, foreign: bool = False) -> torch.Tensor:
        """Treat `tensor`, which lies on the CPU, as one on the current device.

        foreign: not from torch's allocator, so that no stream needs to be recorded.
        """
        with self._lock:
            (storage,) = self._tensors(tensor)
            self._allocated_on[storage] = None if foreign else self.current_stream().number
        return tensor

    @contextmanager
    def _watching(self):
        thread = self._thread()
        if thread.watched:
            yield
            return
        thread.watched = True
        try:
            with _OnDevice(self), _Watch(self):
                yield
        finally:
            thread.watched = False

    def _tensors(self, value: Any) -> list[int]:
        """The storages of tensors within `value`."""
        tensors = [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
        storages = [t.untyped_storage() for t in tensors if not t.is_meta]
        self._alive += storages
        return [s.data_ptr() for s in storages if s.nbytes()]

    def _record_stream(self, tensor: torch.Tensor, stream: "FakeStream") -> None:
        with self._lock:
            self._recorded |= {(storage, stream.number) for storage in self._tensors(tensor)}

    def _wait(self, waiting: int, other: int) -> None:
        with self._lock:
            event = self._number()
            self._handler._handle_event_record(event, other)
            self._handler._handle_event_wait(event, waiting)
            self._handler._handle_event_deletion(event)

    def _number(self) -> int:
        with self._lock:
            self._numbers += 1
            return self._numbers

    def _thread(self) -> Any:
        local = self._local
        if not hasattr(local, "streams"):
            # A new thread's current device is the first one.
            local.streams, local.device, local.watched = {}, 0, False
        return local

    def _device(self, device: Any) -> torch.device:
        if device is None:
            return torch.device("cuda", self._thread().device)
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        index = self._thread().device if device.index is None else device.index
        return torch.device("cuda", index)


class FakeStream:
    def __init__(self, cuda: FakeCuda, device: torch.device) -> None:
        self.cuda, self.device = cuda, device
        self.number = cuda._number()
        # What DALI and DLPack are given.
        self.cuda_stream = 0x1000 + self.number

    def record_event(self, event: "FakeEvent | None" = None) -> "FakeEvent":
        event = event or FakeEvent(self.cuda)
        event.record(self)
        return event

    def wait_event(self, event: "FakeEvent") -> None:
        event.wait(self)

    def wait_stream(self, stream: "FakeStream") -> None:
        self.cuda._wait(self.number, stream.number)

    def synchronize(self) -> None:
        self.cuda._wait(_HOST, self.number)


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.number = cuda._number()

    def record(self, stream: FakeStream | None = None) -> None:
        stream = stream or self.cuda.current_stream()
        with self.cuda._lock:
            self.cuda._handler._handle_event_record(self.number, stream.number)

    def wait(self, stream: FakeStream | None = None) -> None:
        stream = stream or self.cuda.current_stream()
        with self.cuda._lock:
            self.cuda._handler._handle_event_wait(self.number, stream.number)

    def synchronize(self) -> None:
        with self.cuda._lock:
            self.cuda._handler._handle_event_wait(self.number, _HOST)


class _Watch(TorchDispatchMode):
    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.cuda.launched(function, args, kwargs or {}, result)
        return result


class _OnDevice(TorchFunctionMode):
    """Factories and copies to "cuda", and pinned memory, on the CPU."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self.cuda = cuda

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        if function is torch.Tensor.pin_memory:
            return args[0].clone()
        device = kwargs.get("device")
        if function is torch.Tensor.to and len(args) > 1:
            device = args[1] if isinstance(args[1], str | torch.device) else device
        if device is None or torch.device(device).type != "cuda":
            return function(*args, **kwargs)
        with self.cuda.use_device(device):
            if function is torch.Tensor.to:
                target = self.cuda.allocate(torch.empty_like(args[0]))
                return target.copy_(args[0], non_blocking=True)
            return self.cuda.allocate(function(*args, **{**kwargs, "device": "cpu"}))
