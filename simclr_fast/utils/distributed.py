"""Processes of one run (ranks): joining, common decisions, gathers of uneven numbers of rows."""

import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _abort_process_group
from torch.distributed.rendezvous import rendezvous

from simclr_fast.utils.device import bound_to_cores, resolve_device
from simclr_fast.utils.launch import Launch, launched
from simclr_fast.utils.rank_failure import RankFailure
from simclr_fast.utils.rank_watch import RankWatch

log = logging.getLogger(__name__)
# Bytes per message of World.share.
_CHUNK = 64 << 20
# Aborting the process group may take this many seconds.
_ABORT = 5.0


def gather_row_counts(rows: int, device: torch.device, group: dist.ProcessGroup) -> list[int]:
    """The number of rows of every rank, in rank order."""
    own = torch.tensor([rows], dtype=torch.int64, device=device)
    return _gather(own, dist.get_world_size(group), group).tolist()


def row_counts_of(
    rows: int, device: torch.device, group: dist.ProcessGroup, given: Sequence[int] | None = None
) -> list[int]:
    """Check `given`, or call `gather_row_counts` if it is None. rows: those of this rank."""
    if given is None:
        return gather_row_counts(rows, device, group)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    if len(given) != ranks or given[rank] != rows:
        raise ValueError(
            f"row_counts must hold the numbers of rows of {ranks} ranks, {rows} for rank {rank}, "
            f"got {list(given)}"
        )
    return list(given)


def all_gather_rows(
    rows: Tensor, group: dist.ProcessGroup, counts: Sequence[int] | None = None
) -> Tensor:
    """Concatenate `rows` [n_r, ...] of every rank r along dim 0, in rank order; no gradient.

    counts: `gather_row_counts` of the same rows, if known. Without it, an extra gather and, on
        CUDA, a device sync are needed.
    """
    if counts is None:
        counts = gather_row_counts(rows.size(0), rows.device, group)
    longest = max(counts)
    padded = rows.contiguous()
    if rows.size(0) < longest:
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: rows.size(0)] = rows
    gathered = _gather(padded, len(counts), group)
    if min(counts) == longest:
        return gathered
    parts = gathered.unflatten(0, (len(counts), longest))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _gather(rows: Tensor, ranks: int, group: dist.ProcessGroup) -> Tensor:
    """Concatenate `rows`, of one shape on all ranks, along dim 0."""
    gathered = rows.new_empty(ranks * rows.size(0), *rows.shape[1:])
    if dist.get_backend(group) == "mpi":
        dist.all_gather(list(gathered.chunk(ranks)), rows, group=group)
    else:
        # Into one tensor: with a list of tensors, NCCL's backend copies each of them. torch 2.14
        # renames the operation and warns of the old name.
        into_place = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        into_place(gathered, rows, group=group)
    return gathered


@dataclass(frozen=True)
class World:
    """This process among those that a launcher started; rank 0 of 1 without a launcher."""

    rank: int
    size: int
    device: torch.device
    watch: RankWatch | None = None

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All ranks; None for a single process."""
        return dist.group.WORLD if self.size > 1 else None

    def least(self, value: float) -> float:
        """The smallest `value` of all ranks."""
        if self.size == 1:
            return value
        values = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(values, op=dist.ReduceOp.MIN)
        return values.item()

    def meet(self) -> None:
        """Wait until every rank is here."""
        self.least(0.0)

    def share(self, make: Callable[[], Any]) -> Any:
        """Call make() on rank 0 and return its value on every rank. If it raises, all ranks raise.

        The value must be readable by torch.load with weights_only: tensors, numbers, text,
        containers. Only rank 0 needs access to the files that make() reads.
        """
        if self.size == 1:
            return make()
        value: Any = None
        error: Exception | None = None
        packed = io.BytesIO()
        if self.rank == 0:
            try:
                value = make()
            except Exception as raised:
                error = raised
            torch.save({"value": value, "error": None if error is None else str(error)}, packed)
        size = torch.tensor(packed.getbuffer().nbytes, device=self.device)
        dist.broadcast(size, 0)
        if self.rank != 0:
            packed = io.BytesIO(bytes(int(size)))
        message = torch.frombuffer(packed.getbuffer(), dtype=torch.uint8)
        for part in message.split(_CHUNK):
            sent = part.to(self.device)
            dist.broadcast(sent, 0)
            if self.rank != 0:
                part.copy_(sent)
        if error is not None:
            raise error
        if self.rank == 0:
            return value
        received = torch.load(packed, weights_only=True)
        if received["error"] is not None:
            raise RankFailure(f"rank 0 ended: {received['error']}")
        return received["value"]

    def check_alike(self, model: nn.Module, step: int) -> None:
        """Raise RankFailure unless all ranks have the same weights at the same step."""
        if self.size == 1:
            return
        own = torch.tensor([step, fingerprint(model)], device=self.device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own)
        first = found[0].tolist()
        if others := [rank for rank, one in enumerate(found) if one.tolist() != first]:
            steps = ", ".join(f"rank {rank}: step {int(one[0])}" for rank, one in enumerate(found))
            raise RankFailure(
                f"rank {', '.join(map(str, others))} has other weights than rank 0 ({steps}): "
                "use the same versions of all packages on all ranks"
            )

    def mark(self, step: int, doing: str) -> None:
        """Tell the other ranks that this one is doing `doing` in `step`, counted from 1."""
        if self.watch is not None:
            self.watch.mark(step, doing)

    def stop_signal(self, step: int, caught: Sequence[int]) -> int | None:
        """The signal that ends the run after `step`, the same on all ranks; None to go on.

        caught: the list of `catch_signals` on this rank. Waits for other ranks only after a signal,
        and never for the GPU.
        """
        if self.watch is None:
            return caught[0] if caught else None
        return self.watch.stop_signal(step, caught)

    def leave(self) -> None:
        """Tell the other ranks that this one ends on purpose."""
        if self.watch is not None:
            self.watch.leave()


@torch.no_grad()
def fingerprint(model: nn.Module) -> int:
    """A 63-bit hash of the weights' bits. It is the same on every device and memory format."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = 0
    for place, tensor in enumerate(model.state_dict().values(), 1):
        bits = tensor.detach().contiguous().reshape(-1)
        # Memory formats only change the order of elements, and a sum does not depend on it.
        bits = bits.view(integers[bits.element_size()])
        total += place * int(bits.sum(dtype=torch.int64))
    return total % (1 << 63)


@contextmanager
def join_world(device: str, timeout: float = 600) -> Iterator[World]:
    """Join the launcher's process group (NCCL on GPUs, gloo on CPUs), and leave it at the end.

    Within it the processes of a machine have cores of their own: see `bound_to_cores`.

    device: as for `resolve_device`.
    timeout: the run ends after this many seconds without progress.

    Raises:
        RankFailure: another rank died, stalled, raised an error or never joined; the message names
            it. A rank that hangs cannot raise: its process prints the message and exits with 1.
    """
    launch, chosen = launched(), resolve_device(device)
    with bound_to_cores(launch.local_rank, launch.local_size):
        yield from _joined(launch, chosen, timeout)


def _joined(launch: Launch, chosen: torch.device, timeout: float) -> Iterator[World]:
    rank, size = launch.rank, launch.size
    if size == 1:
        yield World(0, 1, chosen)
        return
    try:
        meeting = rendezvous(launch.url, rank, size, timeout=timedelta(seconds=timeout))
        store, *_ = next(meeting)
    except dist.DistError as error:
        raise RankFailure(f"not all {size} ranks joined within {timeout:g} s: {error}") from error
    watch = RankWatch(store, rank, size, timeout)
    nccl = chosen.type == "cuda"
    try:
        dist.init_process_group(
            "nccl" if nccl else "gloo",
            store=dist.PrefixStore("default_pg", store),
            rank=rank,
            world_size=size,
            # Longer than the watch's, which can say which rank failed.
            timeout=timedelta(seconds=timeout + 60),
            device_id=chosen if nccl else None,
        )
        assert dist.group.WORLD is not None
        watch.watch(dist.group.WORLD)
        yield World(rank, size, chosen, watch)
    except BaseException as error:
        if watch.left:
            # This rank left on purpose after a signal, and so do the others.
            dist.destroy_process_group()
            raise
        explained = watch.explain(error)
        cause = "" if explained is not error else f"{type(error).__name__}: "
        # Print before anything that may hang.
        print(
            f"simclr-fast: rank {rank}: {watch.where}: {cause}{explained}",
            file=sys.stderr,
            flush=True,
        )
        watch.let_others_read()
        watch.leave()
        _abort()
        if explained is error:
            raise
        raise explained from error
    watch.leave()
    if dist.is_initialized():
        dist.destroy_process_group()


def _abort() -> None:
    """Drop the process group without waiting for collectives that other ranks never join.

    destroy_process_group would wait for them, with NCCL until the timeout.
    """
    if not dist.is_initialized():
        return
    thread = threading.Thread(target=_abort_process_group, name="abort", daemon=True)
    thread.start()
    thread.join(_ABORT)
    if thread.is_alive():
        print(
            "simclr-fast: the process group does not end: exiting anyway",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
