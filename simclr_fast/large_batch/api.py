"""`LargeBatch.backward`: a training step with a batch whose activations do not fit into memory."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from simclr_fast.large_batch import demand, grad_cache
from simclr_fast.large_batch.averaging import average_gradients, share_weights
from simclr_fast.large_batch.batch_norms import batch_norms
from simclr_fast.large_batch.global_batch_norm import WholeBatch
from simclr_fast.large_batch.lockstep import Lockstep
from simclr_fast.large_batch.refusals import (
    refusal,
    refuse_grad_cache,
    refuse_model,
    refuse_views,
)
from simclr_fast.large_batch.replay import global_norms, recomputed_blocks
from simclr_fast.large_batch.schedule import Schedule
from simclr_fast.large_batch.second_run import Comparing, State
from simclr_fast.utils.distributed import row_counts_of
from simclr_fast.utils.numbers import as_float, as_int

Memory = Literal["plain", "replay", "lockstep", "grad-cache"]
_MICRO_BATCH = 256


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
            numbers; see `simclr_fast.large_batch.lockstep`.
        "grad-cache": compute all outputs without a graph, then repeat each micro-batch with one.
            For models without batch statistics. Others raise ValueError, unless allow_ghost_bn.
    All modes give the same gradient up to rounding, except grad-cache with allow_ghost_bn. A model
    that a mode would run differently raises ValueError, which names the module and a mode that can
    run it. In all modes, no layer except batch norm may mix the rows of a batch. Modules,
    parameters, hooks and flags of the model may change between steps.

    micro_batch: rows per micro-batch in lockstep and grad-cache (default 256). The last one may be
        smaller.
    group: ranks whose batches form one batch, each with any number of rows. All ranks begin with
        the weights of the first one. Batch statistics are over all ranks, and .grad is averaged
        over them, as in DistributedDataParallel. Do not wrap the model in it. Parameters may lack
        a gradient on some ranks or all. Parameters of the loss itself are not averaged.
    autocast: dtype of torch.autocast for the model. The loss runs outside of it.
    offload_gb: lockstep keeps up to that many GB (10⁹ bytes) of block inputs in host memory.
    keep_every: lockstep keeps every k-th block's input, and recomputes the rest in the backward.
        With 2 it keeps half as much, and convolutions cost 3/2 of plain's instead of 4/3.
    compile: lockstep uses torch.compile for the layers between batch norms and convolutions.
    schedule: what lockstep keeps; see `simclr_fast.large_batch.schedule`. Instead of micro_batch,
        offload_gb and keep_every.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        memory: Memory = "lockstep",
        micro_batch: int | None = None,
        group: dist.ProcessGroup | None = None,
        autocast: torch.dtype | None = None,
        offload_gb: float = 0,
        keep_every: int = 1,
        compile: bool = False,
        allow_ghost_bn: bool = False,
        schedule: Schedule | None = None,
    ) -> None:
        if memory not in get_args(Memory):
            raise ValueError(f"memory must be one of {', '.join(get_args(Memory))}, got {memory!r}")
        if micro_batch is not None:
            micro_batch = as_int("micro_batch", micro_batch, 1)
        offload_gb = as_float("offload_gb", offload_gb)
        if not offload_gb >= 0:
            raise ValueError(f"offload_gb must be at least 0, got {offload_gb}")
        if offload_gb and memory != "lockstep":
            raise ValueError(f"offload_gb is for memory='lockstep', got {memory!r}")
        keep_every = as_int("keep_every", keep_every, 1)
        if keep_every > 1 and memory != "lockstep":
            raise ValueError(f"keep_every is for memory='lockstep', got {memory!r}")
        if compile and memory != "lockstep":
            raise ValueError(f"compile is for memory='lockstep', got {memory!r}")
        if schedule is not None:
            if memory != "lockstep":
                raise ValueError(f"schedule is for memory='lockstep', got {memory!r}")
            if micro_batch not in (None, schedule.micro_batch):
                raise ValueError(
                    f"micro_batch must be that of the schedule, {schedule.micro_batch}, or None, "
                    f"got {micro_batch}"
                )
            micro_batch = schedule.micro_batch
        self.model, self.memory, self.autocast = model, memory, autocast
        self.micro_batch = micro_batch or _MICRO_BATCH
        self.group = group if group is not None and dist.get_world_size(group) > 1 else None
        self.batch = WholeBatch(self.group)
        self.allow_ghost_bn = allow_ghost_bn
        self._sync = True
        self._refuse_model()
        if self.group is not None:
            share_weights(model, self.group)
        self.lockstep: Lockstep | demand.Lockstep
        if schedule is not None:
            self.lockstep = demand.Lockstep(model, self.batch, lambda graph: schedule, compile)
        elif memory == "lockstep":
            self.lockstep = Lockstep(model, self.batch, offload_gb, keep_every, compile)
        if memory == "replay":
            recomputed_blocks(model)
        self._comparing = Comparing()

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
            Parts save memory: modes with micro-batches do not concatenate them.
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
        rows = sum(map(len, parts))
        if self.group is None:
            self.batch.begin([rows])
        else:
            self.batch.begin(row_counts_of(rows, parts[0].device, self.group, row_counts))
        device = parts[0].device.type
        ambient = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        dtype = self.autocast or ambient

        def autocast(cache: bool = False) -> AbstractContextManager[Any]:
            # No cache: a cast that was cached under no_grad would lose the gradient.
            return torch.autocast(device, dtype, dtype is not None, cache)

        def loss_of(outputs: Any) -> Any:
            with torch.autocast(device, ambient, ambient is not None):
                result = loss_fn(outputs)
            loss = result[0] if isinstance(result, tuple) else result
            if not isinstance(loss, Tensor) or loss.dim():
                raise TypeError(f"loss_fn must return a 0-dim loss first, got {loss!r}")
            loss.backward()
            if isinstance(result, tuple):
                return (loss.detach(), *result[1:])
            return loss.detach()

        with torch.autocast(device, enabled=False):
            if self.memory == "lockstep":
                checked = self._unchanged(loss_of, parts[0].device)
                return self.lockstep.backward(self._split(parts), checked, autocast, self._sync)
            if self.memory == "grad-cache":
                compare = self._comparing.next_step(self.model, parts[0].device)
                result = grad_cache.backward(
                    self.model, self._split(parts), loss_of, autocast, compare
                )
            else:
                with self._norms(parts[0].device):
                    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
                    with autocast(True):
                        outputs = self.model(joined)
                    result = loss_of(outputs)
            if self._sync and self.group is not None:
                average_gradients(self.model, self.group)
            return result

    @property
    def row_counts(self) -> list[int]:
        """The number of rows of every rank of the group in this step, in rank order."""
        return self.batch.rows

    def _split(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The micro-batches. If there are no rows, a single empty one."""
        split = [p for part in parts for p in part.split(self.micro_batch) if len(p)]
        return split or [parts[0][:0]]

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

    def _norms(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.memory == "replay":
            compare = self._comparing.next_step(self.model, device)
            return global_norms(self.model, self.batch, recompute=True, compare=compare)
        if self.group is None or not batch_norms(self.model):
            return nullcontext()
        return global_norms(self.model, self.batch, recompute=False)

    def _refuse_model(self) -> None:
        refuse_model(self.model, self.memory, ranks=self.group is not None)
        if self.memory == "grad-cache":
            refuse_grad_cache(self.model, self.allow_ghost_bn)
