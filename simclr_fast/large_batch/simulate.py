"""Memory and operations of a training step, found by running it on tensors without data.

`LargeBatch` runs the step under torch's FakeTensorMode. Operations, shapes, dtypes and lifetimes
are those of a real step, but nothing is computed. A dispatch mode sees every operation and adds up
live storages, FLOPs and bytes moved. With real tensors it measures a real step.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from simclr_fast.large_batch import global_batch_norm as gbn
from simclr_fast.large_batch.api import LargeBatch, Memory
from simclr_fast.large_batch.schedule import Schedule

aten = torch.ops.aten


@dataclass
class Phase:
    """A part of a step: its peak memory in bytes, and its operations."""

    peak: float = 0
    flops: float = 0
    moved: float = 0
    seconds: float = 0


Phases = dict[tuple[str, int], Phase]


class Meter(TorchDispatchMode):
    """Counts memory and operations. clock(flops, bytes moved) → seconds of one operation."""

    def __init__(self, clock: Callable[[float, float], float] = lambda flops, moved: 0.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.clock = clock
        self.phase = ("step", 0)
        self.phases: Phases = defaultdict(Phase)
        self.alive = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def hold(self, *tensors: Tensor) -> None:
        """Count tensors that exist already."""
        for t in tensors:
            storage = t.untyped_storage()
            # Tensors on "meta" only stand for a shape.
            if storage not in self._known and not t.is_meta:
                size = storage.nbytes()
                self._known[storage] = size
                self.alive += size
                weakref.finalize(storage, self._freed, size)
        at = self.phases[self.phase]
        at.peak = max(at.peak, self.alive)

    def _freed(self, size: int) -> None:
        self.alive -= size

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        known = _CUDA_NORMS.get(func)
        out = func(*args, **kwargs) if known is None else known(*args, **kwargs)
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.hold(*made)
        if not func.is_view and made:
            at, read = self.phases[self.phase], tree_leaves((args, kwargs))
            read += _read_twice(func._overloadpacket, args)
            moved = sum(_bytes(t) for t in [*read, *made] if isinstance(t, Tensor))
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            at.flops += flops
            at.moved += moved
            at.seconds += self.clock(flops, moved)
        return out


def _read_twice(func: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """What a batch norm with statistics of the batch reads again once these are known."""
    if func in (aten.native_batch_norm, aten.cudnn_batch_norm) and args[5]:
        return [args[0]]
    if func is aten.native_batch_norm_backward and args[7] and args[9][0]:
        return [args[0], args[1]]
    return []


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.size(1), dtype=wide), x.new_empty(x.size(1), dtype=wide)


def _norm_merged(x: Tensor, mean: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return mean.new_empty(mean.size(1)), mean.new_empty(mean.size(1))


def _norm_sums(
    dy: Tensor, x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor | None, *wanted: bool
) -> tuple[Tensor, ...]:
    parameter = mean if weight is None else weight
    of_input, *of_parameters = (mean.shape if want else 0 for want in wanted)
    sums = mean.new_empty(of_input), mean.new_empty(of_input)
    return *sums, *(parameter.new_empty(shape) for shape in of_parameters)


# torch has no shape functions for these operations, which exist only on CUDA.
_CUDA_NORMS: dict[Any, Callable[..., Any]] = {
    aten.batch_norm_stats.default: _norm_stats,
    aten.batch_norm_gather_stats_with_counts.default: _norm_merged,
    aten.batch_norm_backward_reduce.default: _norm_sums,
    aten.batch_norm_backward_elemt.default: lambda dy, x, *_: torch.empty_like(dy),
}


@dataclass(frozen=True)
class Step:
    """A step to simulate.

    make: builds the model. shape: the shape of one view. dtype: that of autocast.
    cuda: use CUDA's batch norm operations; the other operations are the same on all devices.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    loss: Callable[[Any], Any]
    dtype: torch.dtype | None = None
    cuda: bool = False
    clock: Callable[[float, float], float] = field(default=lambda flops, moved: 0.0)

    def run(
        self,
        memory: Memory,
        rows: int,
        micro_batch: int | None = None,
        schedule: Schedule | None = None,
        *,
        fake: bool = True,
    ) -> Phases:
        """Run one step of `rows` views. Counts parameters, gradients, views and activations.

        schedule: for lockstep. What it keeps in host memory is counted too.
        """
        meter = Meter(self.clock)
        with FakeTensorMode() if fake else nullcontext(), norms_of_cuda(self.cuda):
            model = self.make().train()
            views = torch.empty(rows, *self.shape, dtype=self.dtype)
            if schedule is not None and self.cuda and views.dim() == 4:
                views = views.contiguous(memory_format=torch.channels_last)
            step = LargeBatch(
                model,
                memory=memory,
                micro_batch=micro_batch,
                autocast=self.dtype,
                schedule=schedule,
                allow_ghost_bn=True,
            )
            if memory == "lockstep":
                # Once for a model, so no part of a step.
                autocast = partial(torch.autocast, "cpu", self.dtype)
                step.lockstep.refuse_mixed_rows(views, autocast if self.dtype else nullcontext)
            with meter:
                meter.hold(views, *model.parameters(), *model.buffers())

                def loss(outputs: Any) -> Any:
                    meter.phase = ("backward", 0)
                    return self.loss(outputs)

                # Two views, as from the loader. For grad-cache one tensor, so that all
                # micro-batches are full and memory is linear in `rows`.
                whole = memory == "grad-cache"
                step.backward(views if whole else views.chunk(2), loss)
        return meter.phases


@contextmanager
def norms_of_cuda(wanted: bool) -> Iterator[None]:
    before = gbn.on_cuda
    if wanted:
        gbn.on_cuda = lambda x: True
    try:
        yield
    finally:
        gbn.on_cuda = before
