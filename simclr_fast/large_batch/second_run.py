"""Whether a module that runs twice in a step gives the same twice, and changes nothing twice.

Replay and grad-cache run the layers again. That gives the gradient of the first run only if the
second draws the same random numbers and finds the same state. Random numbers of torch, of
Python's `random` and of `numpy.random` are restored. Everything else is compared: attributes and
buffers before and after a run, and outputs of both runs.
"""

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Proxy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simclr_fast.large_batch.refusals import computed_attribute, refusal

_OWN = frozenset(vars(nn.Module())) - {"training"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
# How often a model is traced if random numbers are drawn meanwhile.
_TRACES = 3
T = TypeVar("T")
# Larger differences, relative to the largest value, are no rounding errors.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 0.01, torch.bfloat16: 0.05, torch.float16: 0.05}


class Comparing:
    """Decides in which steps both runs are compared: always on the CPU, and on other devices in the
    steps 1, 2, 4, 8, … after a change of the modules, because a comparison waits for the device."""

    def __init__(self) -> None:
        self._modules: Any = None
        self._steps = 0

    def next_step(self, model: nn.Module, device: torch.device) -> bool:
        """Begin a step of `model`; return whether to compare."""
        modules = [(id(m), m.training) for m in model.modules()]
        if modules != self._modules:
            self._modules, self._steps = modules, 0
        self._steps += 1
        return device.type == "cpu" or self._steps & (self._steps - 1) == 0


class HostNumbers:
    """The states of Python's and numpy's global random number generators."""

    def __init__(self) -> None:
        self.python, self.numpy = random.getstate(), np.random.get_state()  # noqa: NPY002

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002

    def drawn(self) -> bool:
        """Whether numbers were drawn since."""
        now = HostNumbers()
        return now.python != self.python or str(now.numpy) != str(self.numpy)

    @contextmanager
    def again(self) -> Iterator[None]:
        """A context that draws the same numbers again, and continues as if it had not."""
        now = HostNumbers()
        self.restore()
        try:
            yield
        finally:
            now.restore()


class AllNumbers(HostNumbers):
    """`HostNumbers`, and torch's on the CPU and on the devices of some tensors."""

    def __init__(self, devices: set[torch.device]) -> None:
        super().__init__()
        self.torch = torch.get_rng_state()
        self.devices = {
            device: torch.get_device_module(device).get_rng_state(*_where(device))
            for device in devices
            if device.type not in ("cpu", "meta")
        }

    def drawn(self) -> bool:
        now = AllNumbers(set(self.devices))
        pairs = [(now.torch, self.torch), *((now.devices[d], s) for d, s in self.devices.items())]
        return super().drawn() or not all(torch.equal(a, b) for a, b in pairs)

    def restore(self) -> None:
        super().restore()
        torch.set_rng_state(self.torch)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, *_where(device))


def _where(device: torch.device) -> tuple[torch.device, ...]:
    # There is only one device of this kind.
    return () if device.type == "mps" else (device,)


class _Draws(TorchDispatchMode):
    """Notes whether this thread lets torch draw random numbers."""

    drawn = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.drawn = self.drawn or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def traced_once(model: nn.Module, trace: Callable[[], T]) -> T:
    """Call trace(), which runs the forward of `model`, and return what it returns.

    Other threads may draw random numbers meanwhile. From Python's and numpy's generators they
    cannot be told from this one, so then it is traced again.

    Raises:
        ValueError: the forward draws random numbers or changes its attributes. Both would happen
            while it is traced, and never again.
    """
    before = State(dict(model.named_modules()))
    for _ in range(_TRACES):
        host, numbers = HostNumbers(), torch.get_rng_state()
        with _Draws() as draws:  # type: ignore[no-untyped-call]
            made = trace()
        if draws.drawn or not host.drawn():
            break
    if draws.drawn:
        torch.set_rng_state(numbers)
    if draws.drawn or host.drawn():
        host.restore()
        threads = "" if threading.active_count() == 1 else " (or other threads drew meanwhile)"
        raise refusal(
            f"its forward draws random numbers{threads}, and only once, when it is traced"
        )
    if what := before.changed(State(dict(model.named_modules())), filled=False):
        raise refusal(f"its forward changes {what}, and only once, when it is traced", "plain")
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Proxy):
                setattr(module, key, None)
                what = f"{name}.{key}" if name else key
                why = f"its forward stores a value in {what}, which is traced once"
                raise refusal(why, "plain")
    return made


class State:
    """What the modules hold beside gradients: attributes, parameters and buffers.

    Tensors are compared by identity and version. Copies of the buffers show what torch does not
    count as a new version, such as changes through `.data`.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.found: dict[str, Any] = {}
        self.values: dict[str, Tensor] = {}
        for name, module in modules.items():
            prefix = f"{name}." if name else ""
            computed = set(map(computed_attribute, module._forward_pre_hooks.values()))
            for key, value in vars(module).items():
                if key in ("_parameters", "_buffers"):
                    for inner, t in value.items():
                        self.found[prefix + inner] = _mark(t)
                elif key not in _OWN and key not in computed:
                    self.found[prefix + key] = _mark(value)
            for key, buffer in module._buffers.items():
                if buffer is not None and not isinstance(buffer, FakeTensor):
                    self.values[prefix + key] = buffer.detach().clone()

    def changed(self, later: "State", *, filled: bool) -> str | None:
        """The name of something that is different in `later`; None if all is the same.

        filled: whether it counts that something was missing or None before, such as a cache that
        the first forward makes.
        """
        for name, mark in later.found.items():
            if name not in self.found or self.found[name] == _mark(None):
                if filled and mark != _mark(None):
                    return name
            elif self.found[name] != mark:
                return name
        for name, value in later.values.items():
            if name in self.values and not torch.equal(self.values[name], value):
                return name
        return None


def _mark(value: Any, depth: int = 0) -> Any:
    """Something that is equal as long as `value` does not change."""
    if isinstance(value, _PLAIN):
        return (type(value), value)
    if isinstance(value, Tensor):
        return (id(value), version(value), value.untyped_storage()._cdata)
    if isinstance(value, torch.Generator):
        return (id(value), value.get_state().numpy().tobytes())
    if isinstance(value, random.Random):
        return (id(value), value.getstate())
    if isinstance(value, np.random.Generator):
        return (id(value), str(value.bit_generator.state))
    if isinstance(value, np.random.RandomState):
        return (id(value), str(value.get_state()))
    if isinstance(value, np.ndarray):
        return (id(value), value.tobytes() if value.nbytes < 1 << 16 else None)
    if depth > 2 or callable(value):
        return id(value)
    if isinstance(value, Mapping):
        return (id(value), [(id(k), _mark(v, depth + 1)) for k, v in list(value.items())])
    if isinstance(value, (list, tuple, deque)):
        return (id(value), [_mark(v, depth + 1) for v in value])
    if isinstance(value, (set, frozenset)):
        return (id(value), sorted(map(id, value)))
    inner = getattr(value, "__dict__", None)
    if isinstance(inner, dict):
        return (id(value), [(k, _mark(v, depth + 1)) for k, v in inner.items()])
    return id(value)


def version(t: Tensor) -> int:
    """How often `t` was written to; 0 for tensors that do not count it."""
    return 0 if t.is_inference() else t._version


def half_of(rows: int) -> slice:
    """Half of some rows, to see whether they depend on the others.

    From the middle, so that sums from either end change, and from an odd row on, so that pairs of
    neighbours are parted.
    """
    first = rows // 4 | 1
    return slice(first, first + rows // 2)


def samples(outputs: Any) -> list[Tensor]:
    """A few values of every row of each floating-point tensor in `outputs`."""
    made = []
    for t in tree_leaves(outputs):
        if isinstance(t, Tensor) and t.is_floating_point():
            t = t.detach()
            made.append((t.select(-1, t.size(-1) // 2) if t.dim() > 1 and t.numel() else t).clone())
    return made


@torch.no_grad()
def differ(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two runs gave different values, beyond rounding. Waits for the device."""
    if [t.shape for t in first] != [t.shape for t in second]:
        return True
    for a, b in zip(first, second, strict=True):
        if not a.is_floating_point():
            if not isinstance(a, FakeTensor) and not torch.equal(a, b):
                return True
            continue
        error, scale = (a - b).abs(), torch.maximum(a.abs(), b.abs())
        if not a.numel() or isinstance(a, FakeTensor):
            continue
        allowed = _TOLERANCE.get(a.dtype, 0.05) * scale.amax()
        same = (error <= allowed) | (a == b) | (a.isnan() & b.isnan())
        if not bool(same.all()):
            return True
    return False
