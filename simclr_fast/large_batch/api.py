"""`LargeBatch.backward`: a training step with a batch whose activations do not fit into memory."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from simclr_fast.large_batch import grad_cache
from simclr_fast.large_batch.averaging import Average, agree, host_group, share_weights
from simclr_fast.large_batch.batch_norms import batch_norms
from simclr_fast.large_batch.blocks import recomputed_blocks
from simclr_fast.large_batch.compiled_model import CompiledModel
from simclr_fast.large_batch.compiled_regions import compile_failures
from simclr_fast.large_batch.global_batch_norm import WholeBatch
from simclr_fast.large_batch.graph import Graph
from simclr_fast.large_batch.lockstep import Lockstep
from simclr_fast.large_batch.outputs import rebuild, refuse_other_rows, tensors
from simclr_fast.large_batch.refusals import (
    compile_refusal,
    naming_a_mode_for,
    refusal,
    refuse_grad_cache,
    refuse_model,
    refuse_views,
)
from simclr_fast.large_batch.replay import global_norms
from simclr_fast.large_batch.schedule import Schedule
from simclr_fast.large_batch.second_run import Comparing, State
from simclr_fast.large_batch.traced_batch_norm import TracedNorms
from simclr_fast.utils.device import free_memory
from simclr_fast.utils.distributed import row_counts_of
from simclr_fast.utils.numbers import as_float, as_int

Memory = Literal["plain", "replay", "lockstep", "grad-cache"]
_MICRO_BATCH = 256
# The share of memory that values may take for which no planner is asked.
_GENEROUS = 0.25
# Arguments of earlier versions.
_REPLACED = {
    "offload_gb": "give host_memory, in bytes",
    "keep_every": "give gpu_memory, in bytes, and what is kept is chosen to fit",
}

# The planner's `schedule_of`. The planner simulates steps of LargeBatch, so it imports this module
# and not the reverse.
_PLANNERS: list[Callable[..., Schedule]] = []


def plan_with(schedule_of: Callable[..., Schedule]) -> None:
    """Choose the schedules of `LargeBatch` with this function, when its user gives none."""
    _PLANNERS.append(schedule_of)


class LargeBatch:
    """Gradients of a loss over all rows of a batch, in a chosen amount of memory.

    With several ranks, give the group here and to the loss: `nt_xent_loss(z, group=group)`.

    ::

        step = LargeBatch(model, memory="lockstep", micro_batch=256)
        loss = step.backward(views, lambda z: nt_xent_loss(z, temperature=0.1))
        optimizer.step()

    memory:
        "plain": keep all activations.
        "replay": keep only the inputs of blocks, and recompute each block in the backward with the
            batch statistics and random numbers of its first pass. For any model with blocks in a
            Sequential or ModuleList whose forward changes nothing. Forward hooks in a block run
            twice.
        "lockstep": all micro-batches go through a layer before any goes on, so batch statistics are
            those of the whole batch. For any model that torch.fx can trace and that draws no random
            numbers, except those of drop path; see `simclr_fast.large_batch.lockstep`.
        "grad-cache": compute all outputs without a graph, then repeat each micro-batch with one.
            For models without batch statistics. Others raise ValueError, unless allow_ghost_bn.
    All modes give the same gradient up to rounding, except grad-cache with allow_ghost_bn. A model
    that a mode would run differently raises ValueError, which names the module and a mode that can
    run it. In all modes, no layer except batch norm may mix the rows of a batch. Modules,
    parameters, hooks and flags of the model may change between steps.

    micro_batch: rows per micro-batch in lockstep (default: what the planner chooses) and grad-cache
        (default 256). The last one may be smaller.
    group: ranks whose batches form one batch, each with any number of rows. All ranks begin with
        the weights of the first one. Batch statistics are over all ranks, and .grad is averaged
        over them, as in DistributedDataParallel. Do not wrap the model in it. Parameters may lack
        a gradient on some ranks or all. Parameters of the loss itself are not averaged.
    autocast: dtype of torch.autocast for the model. The loss runs outside of it.
    gpu_memory: the bytes of the device that lockstep may use in all, with the model. None: what is
        free at the first step. On the CPU: of host memory. On GPUs start Python with the variable
        PYTORCH_ALLOC_CONF=expandable_segments:True if memory ran out below this: less is then lost
        between blocks.
    host_memory: the bytes of host memory in which lockstep may keep what does not fit on a GPU.
    compile: run the model through torch.compile. plain and grad-cache compile its forward; the
        model itself stays as it is, and so do the names of its weights. lockstep compiles the
        layers between batch norms and convolutions. replay cannot.
    schedule: what lockstep keeps, and its micro_batch. None: the planner chooses one at the first
        step, with the least predicted work for gpu_memory and host_memory.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        memory: Memory = "lockstep",
        micro_batch: int | None = None,
        group: dist.ProcessGroup | None = None,
        autocast: torch.dtype | None = None,
        gpu_memory: float | None = None,
        host_memory: float = 0,
        schedule: Schedule | None = None,
        compile: bool = False,
        allow_ghost_bn: bool = False,
        **removed: Any,
    ) -> None:
        if memory not in get_args(Memory):
            raise ValueError(f"memory must be one of {', '.join(get_args(Memory))}, got {memory!r}")
        if micro_batch is not None:
            micro_batch = as_int("micro_batch", micro_batch, 1)
        for name in removed:
            if name not in _REPLACED:
                raise TypeError(f"LargeBatch got an unexpected argument {name!r}")
            raise TypeError(f"{name} is gone: {_REPLACED[name]}")
        if gpu_memory is not None:
            gpu_memory = as_float("gpu_memory", gpu_memory)
            if not gpu_memory > 0:
                raise ValueError(f"gpu_memory must be positive or None, got {gpu_memory}")
        host_memory = as_float("host_memory", host_memory)
        if not host_memory >= 0:
            raise ValueError(f"host_memory must be at least 0, got {host_memory}")
        for name, given in {
            "gpu_memory": gpu_memory,
            "host_memory": host_memory,
            "schedule": schedule,
        }.items():
            if given and memory != "lockstep":
                raise ValueError(f"{name} is for memory='lockstep', got {memory!r}")
            if given and schedule is not None and name.endswith("_memory"):
                raise ValueError(f"{name} is for choosing a schedule, but schedule is given")
        if schedule is not None and micro_batch not in (None, schedule.micro_batch):
            raise ValueError(
                f"micro_batch must be that of the schedule, {schedule.micro_batch}, or None, "
                f"got {micro_batch}"
            )
        self.model, self.memory, self.autocast = model, memory, autocast
        self.micro_batch = micro_batch
        self.gpu_memory, self.host_memory, self.schedule = gpu_memory, host_memory, schedule
        self.group = group if group is not None and dist.get_world_size(group) > 1 else None
        self.batch = WholeBatch(self.group)
        self.allow_ghost_bn, self.compile = allow_ghost_bn, compile
        self._sync = True
        self._refuse_model()
        self._host: dist.ProcessGroup | None = None
        if self.group is not None:
            share_weights(model, self.group)
            self._host = host_group(self.group)
        if memory == "lockstep":
            with naming_a_mode_for(model):
                self.lockstep = Lockstep(model, self.batch, self._current_schedule, compile)
        if memory == "replay":
            recomputed_blocks(model)
        self._compiled: CompiledModel | None = None
        if compile and memory != "lockstep":
            self._compiled = CompiledModel(model)
        self._traced: TracedNorms | None = None
        if self._compiled and memory == "plain" and self.group is not None:
            self._traced = TracedNorms(self.batch)
        self._comparing = Comparing()
        self._chosen: tuple[Any, Schedule] | None = None

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """A context in which `backward` does not average gradients over ranks.

        The next `backward` outside averages the accumulated gradients.
        """
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def backward(
        self,
        views: Tensor | Sequence[Tensor],
        loss_fn: Callable[[Any], Any],
        row_counts: Sequence[int] | None = None,
    ) -> Any:
        """Add the gradients of loss_fn(model(views)) to .grad; return the result of loss_fn.

        views: this rank's rows, [N, ...], N ≥ 0; or parts of them in order, such as (view1, view2).
            Parts save memory: modes with micro-batches do not concatenate them. Parts may have
            several shapes, such as small crops of their own size, except in lockstep. Each shape
            then goes through the model by itself, with batch statistics of its own, and all parts
            need the same number of rows.
        loss_fn: gets the result of model(views) for all N rows. It returns a 0-dim loss, or a tuple
            that begins with one. It is called once. The loss is returned detached.
        row_counts: the number of rows of `views` on every rank of the group, in rank order, if
            known. Without it the ranks exchange these numbers first, and the host waits for that.
            `LargeBatch.row_counts` holds them when loss_fn is called.
        """
        parts = (views,) if isinstance(views, Tensor) else tuple(views)
        if not parts:
            raise ValueError("views must hold at least one tensor")
        refuse_views(self.memory, parts)
        self._refuse_model()
        self._begin(parts, row_counts)
        device = self._device(parts[0]).type
        ambient = _ambient_dtype(device)
        dtype = self.autocast or ambient

        def autocast(cache: bool = False) -> AbstractContextManager[Any]:
            # No cache: a cast that was cached under no_grad would lose the gradient.
            return torch.autocast(device, dtype, dtype is not None, cache)

        average: Average | None = None

        def loss_of(outputs: Any) -> Any:
            nonlocal average
            with torch.autocast(device, ambient, ambient is not None):
                result = loss_fn(outputs)
            loss = result[0] if isinstance(result, tuple) else result
            if not isinstance(loss, Tensor) or loss.dim():
                raise TypeError(f"loss_fn must return a 0-dim loss first, got {loss!r}")
            at_once = False
            if self._sync and self.group is not None:
                if self._host is not None:
                    at_once = agree(self.model, loss, self._host) and self.memory != "grad-cache"
                if self.memory != "lockstep":
                    average = Average(self.model, self.group)
            during = average.during_backward() if average and at_once else nullcontext()
            with during, compile_failures() if self._compiled else nullcontext():
                loss.backward()
            if isinstance(result, tuple):
                return (loss.detach(), *result[1:])
            return loss.detach()

        with torch.autocast(device, enabled=False), naming_a_mode_for(self.model):
            if self.memory == "lockstep":
                schedule = self._schedule_of(parts, dtype, autocast)
                split = _split(parts, schedule.micro_batch)
                checked = self._unchanged(loss_of, self._device(parts[0]))
                return self.lockstep.backward(split, checked, autocast, self._sync)
            if self.memory == "grad-cache":
                compare = self._comparing.next_step(self.model, parts[0].device)
                result = grad_cache.backward(
                    self.model,
                    _split(parts, self.micro_batch or _MICRO_BATCH),
                    loss_of,
                    autocast,
                    compare,
                    lambda: average.during_backward() if average else nullcontext(),
                    self._compiled,
                )
            else:
                # A rank with few rows would have a graph, and collectives, of its own.
                compiled = self._compiled if min(self.batch.rows) > 1 else None
                norms = (
                    self._traced.during(self.model)
                    if compiled and self._traced
                    else self._norms(self.model, parts[0].device)
                )
                with norms:
                    with autocast(True):
                        outputs = self._run_by_shape(compiled or self.model, parts)
                    result = loss_of(outputs)
            if average is not None:
                average.finish()
            return result

    @torch.no_grad()
    def forward(
        self,
        model: nn.Module,
        views: Tensor | Sequence[Tensor],
        row_counts: Sequence[int] | None = None,
    ) -> Any:
        """The result of model(views) without a graph, as `backward` would compute it.

        It is for a second model of the same kind, such as a momentum encoder: batch statistics are
        over all ranks, and grad-cache runs micro-batches. Not for lockstep.

        views, row_counts: as in `backward`.
        """
        parts = (views,) if isinstance(views, Tensor) else tuple(views)
        if self.memory == "lockstep":
            raise ValueError(
                "memory='lockstep' runs one model, the one it was made for; memory='plain', "
                "memory='replay' and memory='grad-cache' can run a second one"
            )
        self._begin(parts, row_counts)
        device = parts[0].device.type
        dtype = self.autocast or _ambient_dtype(device)
        with (
            torch.autocast(device, dtype, dtype is not None),
            self._norms(model, parts[0].device, recompute=False),
        ):
            if self.memory != "grad-cache":
                return self._run_by_shape(model, parts)
            split = _split(parts, self.micro_batch or _MICRO_BATCH)
            return _joined([model(part) for part in split])

    def _begin(self, parts: Sequence[Tensor], row_counts: Sequence[int] | None) -> None:
        """Note the rows of all ranks in this step. The arguments are those of `backward`."""
        rows = sum(map(len, parts))
        if self.group is None:
            self.batch.begin([rows])
        else:
            own = self._device(parts[0])
            self.batch.begin(row_counts_of(rows, own, self.group, row_counts))

    def _run_by_shape(self, model: Callable[[Tensor], Any], parts: Sequence[Tensor]) -> Any:
        """model(all parts), once for each shape; inside of `_norms`."""
        shapes = [part.shape[1:] for part in parts]
        if len(set(shapes)) == 1:
            return model(parts[0] if len(parts) == 1 else torch.cat(tuple(parts)))
        counts, outputs, first = self.batch.rows, [], 0
        while first < len(parts):
            last = first + 1
            while last < len(parts) and shapes[last] == shapes[first]:
                last += 1
            # Every view has a row of every image, so this share is that of all ranks.
            self.batch.rows = [count * (last - first) // len(parts) for count in counts]
            rows = torch.cat(tuple(parts[first:last]))
            outputs.append(model(rows))
            refuse_other_rows(outputs[-1], len(rows), self.memory)
            first = last
        self.batch.rows = counts
        return _joined(outputs)

    def _device(self, views: Tensor) -> torch.device:
        """The device of the model. Lockstep takes views that lie in host memory."""
        if self.memory == "lockstep":
            return self.lockstep.device(views)
        return views.device

    @property
    def row_counts(self) -> list[int]:
        """The number of rows of every rank of the group in this step, in rank order."""
        return self.batch.rows

    def _current_schedule(self, graph: Graph) -> Schedule:
        """The schedule of this step."""
        if self.schedule is not None:
            return self.schedule
        assert self._chosen is not None
        return self._chosen[1]

    def _schedule_of(
        self,
        parts: Sequence[Tensor],
        dtype: torch.dtype | None,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> Schedule:
        """What lockstep keeps, equal on all ranks. Chosen anew for other views or another model."""
        if self.schedule is not None:
            return self.schedule
        key = (max(self.batch.rows), parts[0].shape[1:], dtype, self.lockstep.look())
        if self._chosen is None or self._chosen[0] != key:
            device = self.lockstep.device(parts[0])
            limit = free_memory(device) + self._counted(parts, device)
            if self.gpu_memory is not None:
                limit = self.gpu_memory
            if self.group is not None:
                least = torch.tensor(limit, dtype=torch.float32, device=device)
                dist.all_reduce(least, dist.ReduceOp.MIN, group=self.group)
                limit = float(least)
            rows = max(self.batch.rows)
            size = self.micro_batch or min(_MICRO_BATCH, max(rows, 1))
            left = _GENEROUS * limit
            chosen = self.lockstep.generous(parts[0], rows, size, left, autocast)
            if chosen is None:
                assert _PLANNERS, "simclr_fast.large_batch imports the planner"
                # The planner counts bytes as of float32, or of autocast's dtype.
                wide = parts[0].is_floating_point() and dtype is None
                scale = parts[0].element_size() / 4 if wide else 1
                chosen = _PLANNERS[-1](
                    self.model,
                    tuple(parts[0].shape[1:]),
                    rows,
                    dtype,
                    limit / scale,
                    self.host_memory / scale,
                    self.micro_batch,
                    cuda=device.type == "cuda",
                    compile=self.lockstep.regions is not None,
                )
                chosen = _scaled(chosen, scale)
            self._chosen = (key, chosen)
        return self._chosen[1]

    def _counted(self, parts: Sequence[Tensor], device: torch.device) -> int:
        """Bytes that the planner counts, and that are in use already."""
        tensors = [*self.model.parameters(), *self.model.buffers(), *parts]
        tensors += [p.grad for p in self.model.parameters() if p.grad is not None]
        return sum(t.nbytes for t in tensors if t.device == device)

    def _unchanged(
        self, loss_of: Callable[[Any], Any], device: torch.device
    ) -> Callable[[Any], Any]:
        """`loss_of`, after a check that the forward changed nothing: lockstep runs layers twice."""
        if not self._comparing.next_step(self.model, device):
            return loss_of
        norms = set(batch_norms(self.model).values())
        watched = {name: m for name, m in self.model.named_modules() if m not in norms}
        before = State(watched)

        def checked(outputs: Any) -> Any:
            if what := before.changed(State(watched), filled=False):
                raise refusal(f"its forward changes {what}, and it runs twice", "plain")
            return loss_of(outputs)

        return checked

    def _norms(
        self, model: nn.Module, device: torch.device, recompute: bool = True
    ) -> AbstractContextManager[Any]:
        """A context in which the batch norms of `model` do as this mode needs it.

        recompute: also recompute blocks, in replay.
        """
        if self.memory == "replay" and recompute:
            compare = self._comparing.next_step(model, device)
            return global_norms(model, self.batch, recompute=True, compare=compare)
        if self.memory == "grad-cache" or self.group is None or not batch_norms(model):
            return nullcontext()
        return global_norms(model, self.batch, recompute=False)

    def _refuse_model(self) -> None:
        refuse_model(self.model, self.memory, ranks=self.group is not None)
        if self.memory == "grad-cache":
            refuse_grad_cache(self.model, self.allow_ghost_bn)
        if self.compile and (why := compile_refusal(self.memory)):
            raise ValueError(why)


def _ambient_dtype(device: str) -> torch.dtype | None:
    """The dtype of the autocast around this call, if there is one."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _joined(outputs: Sequence[Any]) -> Any:
    """The outputs of several calls of a model as that of one: the rows of one after the other."""
    columns = zip(*(tensors(o) for o in outputs), strict=True)
    return rebuild(outputs[0], iter([torch.cat(column) for column in columns]))


def _split(parts: Sequence[Tensor], micro_batch: int) -> list[Tensor]:
    """The micro-batches. If there are no rows, a single empty one."""
    split = [p for part in parts for p in part.split(micro_batch) if len(p)]
    return split or [parts[0][:0]]


def _scaled(schedule: Schedule, scale: float) -> Schedule:
    """The schedule for values of `scale` times the bytes."""
    device = schedule.device_bytes
    return replace(
        schedule,
        device_bytes=None if device is None else math.ceil(device * scale),
        host_bytes=math.ceil(schedule.host_bytes * scale),
    )
