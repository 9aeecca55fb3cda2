"""Run training code on device "cuda" without a GPU, and see each operation that it would launch.

torch's FakeTensorMode computes shapes, dtypes, strides and devices, but no values. `walk` adds what
it needs to believe in a GPU, and records per operation whether the host would wait for the device
(`waits`) and whether it reads the other device's memory (`copies`).

`pretend` changes torch for the rest of the process: use it in a process of its own. Not seen: what
kernels do inside, and copies that C++ code makes below the dispatcher. Values read from a tensor
are invented.
"""

import contextlib
import ctypes
import mmap
import sys
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.parallel.distributed as ddp
from cuda_batch_norm import strides
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda:0")
# The value that `tolist` returns for every element.
INVENTED = 1
_aten = torch.ops.aten
_PACKAGE = str(Path(__file__).parents[2] / "simclr_fast") + "/"

# Operations whose kernels copy a size or a flag to the host.
_WAITING = {
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "equal",
    "bincount",
    "repeat_interleave",
    "_linalg_eigh",
    "_linalg_check_errors",
    "histc",
}
# Operations that launch nothing.
_FREE = {
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_local_scalar_dense",
    "lift_fresh",
    "set_",
    "_unsafe_view",
    "_reshape_alias",
}


@dataclass
class Record:
    """What a walk saw; operations by name, the others by what and where in simclr_fast."""

    operations: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    collectives: Counter[str] = field(default_factory=Counter)
    convolutions: Counter[str] = field(default_factory=Counter)
    """By dtype, "channels_last" if all operands are."""

    @property
    def launches(self) -> int:
        return sum(self.operations.values())

    def clear(self) -> None:
        for counter in vars(self).values():
            counter.clear()


RECORD = Record()
# Tensors in pinned memory. They are kept: another storage could get the address of a freed one.
_PINNED: list[Tensor] = []
_MODE = FakeTensorMode(allow_non_fake_inputs=True)
_NO_CONTEXT = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_byte)(lambda *_: False)


def pretend(world: int = 1) -> None:
    """Make torch believe in `world` GPUs, this process holding the first."""
    _without_driver()
    _streams()
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.is_initialized = lambda: True
    cuda._lazy_init = lambda: None
    cuda.device_count = lambda: world
    cuda.current_device = lambda: 0
    cuda.set_device = lambda device: None
    cuda.device = cuda.device_of = lambda device: contextlib.nullcontext()
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.is_current_stream_capturing = lambda: False
    cuda.mem_get_info = lambda device=None: (80 * 10**9, 80 * 10**9)
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.get_device_properties = lambda device=None: types.SimpleNamespace(
        **{"name": "pretended", "major": 9, "minor": 0, "multi_processor_count": 132},
        **{"total_memory": 80 * 10**9, "shared_memory_per_block_optin": 232448},
    )
    cuda.synchronize = lambda device=None: waits("torch.cuda.synchronize")
    # The state of a GPU's generator lies in host memory.
    cuda.get_rng_state = lambda device=None: torch.empty(16, dtype=torch.uint8)
    cuda.set_rng_state = lambda state, device=None: None
    nn.Module._apply = _apply  # type: ignore[method-assign]
    patched: Any = FakeTensor
    patched.tolist = _tolist
    patched.record_stream = lambda self, stream: None
    torch.Tensor.pin_memory = _pin  # type: ignore[method-assign, assignment]
    if world > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        torch.distributed.init_process_group("fake", rank=3, world_size=world, store=FakeStore())
        # They compare values between ranks.
        for name in ("_verify_param_shape_across_processes", "_sync_module_states"):
            setattr(ddp, name, lambda *args, **kwargs: None)


@contextlib.contextmanager
def walk() -> Iterator[Record]:
    """Within it, tensors on DEVICE are fake, and what happens to them is recorded."""
    RECORD.clear()
    with _MODE, _Walk():
        yield RECORD


def waits(what: str) -> None:
    """Record that the host waits for the device."""
    RECORD.waits[f"{what} @ {_where()}"] += 1


def _where() -> str:
    """The innermost function of simclr_fast, and the one of torch that it called, if any."""
    frame, inner = sys._getframe(1), ""
    while frame is not None:
        name = frame.f_code.co_filename
        # For a comprehension, take the function around it.
        if name.startswith(_PACKAGE) and not frame.f_code.co_name.startswith("<"):
            return f"{name.removeprefix(_PACKAGE)}:{frame.f_code.co_name}{inner}"
        place = name.partition("site-packages/torch/")[2]
        if place.startswith(("optim/", "amp/", "nn/", "distributed/", "utils/checkpoint")):
            inner = f" in torch/{place}:{frame.f_code.co_name}"
        frame = frame.f_back
    return f"elsewhere{inner}"


def _without_driver() -> None:
    """The autograd engine asks in each backward whether a device is in use; no driver answers."""
    root = Path(torch.__file__).parent
    header = (root / "include/ATen/detail/AcceleratorHooksInterface.h").read_text()
    before = header.partition("virtual bool hasPrimaryContext")[0]
    # A destructor takes two places of the table of virtual functions.
    place = before.count("  virtual ") + 1
    library = ctypes.CDLL(str(root / "lib/libtorch_cpu.so"))
    hooks = library["_ZN2at6detail12getCUDAHooksEv"]
    hooks.restype = ctypes.c_void_p
    table = ctypes.cast(hooks(), ctypes.POINTER(ctypes.c_size_t))[0]
    entry = table + place * ctypes.sizeof(ctypes.c_size_t)
    page = mmap.PAGESIZE
    start = ctypes.c_void_p(entry // page * page)
    readable_writable = mmap.PROT_READ | mmap.PROT_WRITE
    assert ctypes.CDLL(None).mprotect(start, ctypes.c_size_t(page), readable_writable) == 0
    ctypes.c_size_t.from_address(entry).value = ctypes.cast(_NO_CONTEXT, ctypes.c_void_p).value
    torch._C._ensureCUDADeviceGuardSet()
    FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[assignment]
    original = torch._C._select_conv_backend

    def select(*operands: Any, **options: Any) -> Any:
        # Whether cuDNN takes bfloat16, torch asks the driver; for float16 it knows.
        return original(*map(_as_half, operands), **options)

    torch._C._select_conv_backend = select


def _as_half(t: Any) -> Any:
    if not isinstance(t, Tensor) or t.dtype is not torch.bfloat16:
        return t
    return torch.empty_strided(t.shape, t.stride(), dtype=torch.float16, device=t.device)


class _Event:
    def __init__(self, **_: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    wait = record

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 1.0

    def synchronize(self) -> None:
        waits("event.synchronize")


class _Stream:
    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device = DEVICE

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> _Event:
        return event or _Event()

    def synchronize(self) -> None:
        waits("stream.synchronize")


class Graph:
    """record: what a walk saw in the capture, which is not in RECORD."""

    record: dict[str, dict[str, int]]

    def replay(self) -> None:
        pass


@contextlib.contextmanager
def _capture(graph: Graph, **_: Any) -> Iterator[None]:
    before = {name: Counter(counter) for name, counter in vars(RECORD).items()}
    RECORD.clear()
    yield
    graph.record = {name: dict(counter) for name, counter in vars(RECORD).items()}
    RECORD.clear()
    for name, counter in before.items():
        getattr(RECORD, name).update(counter)


def _streams() -> None:
    cuda: Any = torch.cuda
    cuda.Event, cuda.Stream = _Event, _Stream
    cuda.CUDAGraph, cuda.graph = Graph, _capture
    cuda.stream = lambda stream: contextlib.nullcontext()
    computing = _Stream()
    cuda.current_stream = cuda.default_stream = lambda device=None: computing


def _apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """Module.to cannot swap the data of fake parameters: it gets new parameters."""
    for child in self.children():
        child._apply(fn)
    for name, p in self._parameters.items():
        if p is not None:
            new = fn(p.detach())
            if new.device != p.device or new.dtype != p.dtype or new.stride() != p.stride():
                self._parameters[name] = nn.Parameter(new.detach(), p.requires_grad)
    for name, b in self._buffers.items():
        if b is not None:
            self._buffers[name] = fn(b)
    return self


def _tolist(self: FakeTensor) -> Any:
    if self.is_cuda:
        waits("tolist")
    return [INVENTED] * self.numel()


class _Walk(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_cuda = [t for t in given if t.is_cuda]
        if name == "_local_scalar_dense":
            return _scalar(func, args)
        if on_cuda:
            if name in _WAITING:
                waits(name)
            args = _indexed(name, args)
            self._mixed(name, given)
        if func.namespace == "c10d":
            RECORD.collectives[f"{name} @ {_where()}"] += 1
        fake = _BATCH_NORM.get(name) if on_cuda else None
        out = func(*args, **kwargs) if fake is None else fake(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if kwargs.get("pin_memory"):
            _PINNED.extend(made)
        if name in ("_to_copy", "copy_"):
            _copied(name, given[0] if name == "_to_copy" else given[1], made[0], args, kwargs)
        if (
            not func.is_view
            and name not in _FREE
            and func.namespace not in ("c10d", "prim")
            and any(t.is_cuda for t in made + on_cuda)
        ):
            RECORD.operations[name] += 1
        if name in ("convolution", "convolution_backward") and on_cuda:
            operands = given[: 2 if name == "convolution" else 3]
            last = all(t.is_contiguous(memory_format=torch.channels_last) for t in operands)
            dtypes = {str(t.dtype).removeprefix("torch.") for t in operands}
            RECORD.convolutions[" ".join([*sorted(dtypes), *["channels_last"] * last])] += 1
        return out

    def _mixed(self, name: str, given: list[Tensor]) -> None:
        """A CPU scalar is an argument of the launch. If it is stacked or selected, it is copied."""
        numbers = [t for t in given if t.device.type == "cpu"]
        if numbers and name in ("cat", "stack", "where", "masked_fill", "masked_fill_"):
            RECORD.copies[f"{name} of a CPU tensor @ {_where()}"] += 1


def _scalar(func: Any, args: Any) -> Any:
    (t,) = args
    if not isinstance(t, FakeTensor):
        return func(t)
    if t.is_cuda:
        waits("item")
    elif t.constant is not None:
        return t.constant.item()
    return True if t.dtype is torch.bool else 1.0 if t.is_floating_point() else 1


def _indexed(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return args
    chosen = [t for t in args[1] if t is not None]
    if any(t.dtype in (torch.bool, torch.uint8) for t in chosen):
        waits(f"{name} by a mask")
    if any(t.device.type == "cpu" for t in chosen):
        RECORD.copies[f"{name} by a CPU index @ {_where()}"] += 1

    def whole(t: Any) -> Any:
        if t is None or t.dtype is not torch.bool or t.dim() != 1:
            return t
        return torch.arange(t.numel(), device=t.device)

    return (args[0], [whole(t) for t in args[1]], *args[2:])


def _copied(name: str, source: Tensor, target: Tensor, args: Any, kwargs: Any) -> None:
    if source.device.type == target.device.type:
        return
    how = args[2] if name == "copy_" and len(args) > 2 else kwargs.get("non_blocking", False)
    to = "to" if target.is_cuda else "from"
    what = f"copy {to} CUDA of {list(target.shape)}"
    # If the memory is not pinned, the host waits until it was read.
    if (target.is_cuda and how and _pinned(source)) or (
        not target.is_cuda and how and _pinned(target)
    ):
        RECORD.copies[f"{what} @ {_where()}"] += 1
    else:
        waits(what)


def _pinned(t: Tensor) -> bool:
    return any(t.untyped_storage()._cdata == p.untyped_storage()._cdata for p in _PINNED)


def _pin(self: Tensor, device: Any = None) -> Tensor:
    _PINNED.append(self.clone())
    return _PINNED[-1]


def _norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    assert x.numel()
    assert _dense(x)
    return _channels(x), _channels(x)


def _norm_gather(
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    scalar = x.dtype if running_mean is None else running_mean.dtype
    assert counts.dtype == scalar, (counts.dtype, scalar)
    assert mean.dtype == inverse.dtype == torch.promote_types(scalar, torch.float32)
    assert mean.shape == inverse.shape == (len(counts), mean.size(1))
    return mean.new_empty(mean.size(1)), mean.new_empty(mean.size(1))


def _norm_reduce(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    input_g: bool,
    weight_g: bool,
    bias_g: bool,
) -> tuple[Tensor, ...]:
    assert dy.dtype == x.dtype
    assert strides(dy) == strides(x)
    assert x.numel()
    assert _dense(x)
    assert mean.dtype == inverse.dtype == torch.promote_types(x.dtype, torch.float32)
    assert weight is not None or not weight_g
    kind = x.dtype if weight is None else weight.dtype
    sums = (_channels(x) if input_g else x.new_empty(0) for _ in range(2))
    return *sums, *(mean.new_empty(mean.shape if g else 0, dtype=kind) for g in (weight_g, bias_g))


def _norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:
    assert dy.dtype == x.dtype
    assert strides(dy) == strides(x)
    assert x.numel()
    assert _dense(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    for t in (mean, inverse, sum_dy, sum_dy_xmu, *(() if weight is None else (weight,))):
        assert t.dtype == wide
        assert t.is_contiguous()
        assert t.is_cuda
    assert count.dtype == torch.int32
    assert count.dim() == 1
    assert count.is_cuda
    return torch.empty_like(x)


def _channels(x: Tensor) -> Tensor:
    return x.new_empty(x.size(1), dtype=torch.promote_types(x.dtype, torch.float32))


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


# CUDA operations for which torch has no shape functions. These assert what the kernels require.
_BATCH_NORM = {
    "batch_norm_stats": _norm_stats,
    "batch_norm_gather_stats_with_counts": _norm_gather,
    "batch_norm_backward_reduce": _norm_reduce,
    "batch_norm_backward_elemt": _norm_backward,
}
