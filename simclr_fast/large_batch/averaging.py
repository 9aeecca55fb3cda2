"""Gradients averaged over ranks during the backward, and equal weights at the start.

Nothing is remembered from one step to the next: which parameters are trained and which have a
gradient may change at any time.
"""

import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# As large as a network needs for its full speed, in bytes.
_BUCKET = 32 << 20


def host_group(group: dist.ProcessGroup) -> dist.ProcessGroup | None:
    """A group of the same ranks for messages in host memory; None if torch has none.

    All ranks of `group` call this together.
    """
    try:
        group._get_backend(torch.device("cpu"))
    except RuntimeError:
        if not dist.is_gloo_available():
            return None
        ranks = dist.get_process_group_ranks(group)
        made = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        assert isinstance(made, dist.ProcessGroup)
        return made
    return group


def agree(model: nn.Module, loss: Tensor, host: dist.ProcessGroup) -> bool:
    """Whether the backward of `loss` has the same operations on all ranks, in the same order.

    Only then may the ranks send gradients during the backward: batch norms send there too, and all
    ranks must send in one order. The ranks compare numbers in host memory. No device waits.

    Raises:
        ValueError: on every rank, if the ranks train different parameters, so that their buckets
            would not fit together. The message names the first ones.
    """
    names = {p: name for name, p in model.named_parameters()}
    trained = [f"{n} {list(p.shape)} {p.dtype}" for p, n in names.items() if p.requires_grad]
    numbers = [zlib.crc32("\n".join(text).encode()) for text in (trained, _operations(loss, names))]
    # The maximum of a number and that of its negative are its own only if all ranks have it.
    own = torch.tensor([numbers, [-n for n in numbers]], device="cpu")
    extremes = own.clone()
    dist.all_reduce(extremes, dist.ReduceOp.MAX, host)
    same_parameters, same_operations = (own == extremes).all(0).tolist()
    if same_parameters:
        return same_operations
    every: list[list[str]] = [[] for _ in range(dist.get_world_size(host))]
    dist.all_gather_object(every, trained, host)
    found: dict[str, list[str]] = {}
    for rank, one in enumerate(every):
        for text in one:
            found.setdefault(text, []).append(str(rank))
    some = [f"{t} on rank {', '.join(r)}" for t, r in found.items() if len(r) < len(every)]
    more = f" and {len(some) - 3} more" if len(some) > 3 else ""
    what = f"only {'; '.join(some[:3])}{more}" if some else "the same ones in another order"
    raise ValueError(
        f"the ranks train different parameters: {what}. Modules and requires_grad must be the same "
        "on all ranks"
    )


def _operations(loss: Tensor, names: dict[nn.Parameter, str]) -> list[str]:
    """The names of the operations of a backward and of the parameters that it reaches."""
    found: list[str] = []
    waiting: list[Any] = [loss.grad_fn]
    seen = {None}
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        found.append(node.name() if variable is None else names.get(variable, "another tensor"))
        waiting += [following for following, _ in node.next_functions]
    return found


class Average:
    """Average .grad of every trained parameter of `model` over the ranks of `group`.

    Gradients are gathered in buckets, the last layers first. A bucket is sent as soon as all of its
    gradients are there, while the backward goes on. All ranks send the buckets in one order. A
    parameter without a gradient on some ranks counts as zero there, and gets the average too.
    Without a gradient on any rank, it keeps none. The host waits for the device only where this
    rank lacks a gradient.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup) -> None:
        self.group = group
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.names: dict[Tensor, str] = {p: name for name, p in trained}
        self.buckets = list(_buckets([p for _, p in reversed(trained)]))
        self.bucket_of: dict[Tensor, int] = {}
        for number, bucket in enumerate(self.buckets):
            self.bucket_of |= dict.fromkeys(bucket, number)
        self.missing: list[set[Tensor]] = [set(bucket) for bucket in self.buckets]
        self.started: list[_Bucket] = []
        self.streams: set[torch.cuda.Stream] = set()
        # The backward has a thread for every device.
        self.lock = threading.Lock()

    @contextmanager
    def during_backward(self) -> Iterator[None]:
        """A context for the last backward of a step: buckets are sent when they are complete."""
        hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in self.names]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def finish(self) -> None:
        """Send what is left, wait, and store the averages in .grad.

        Raises:
            ValueError: a gradient is sparse.
        """
        while len(self.started) < len(self.buckets):
            self._start()
        for bucket in self.started:
            bucket.finish()

    def _arrived(self, parameter: Tensor) -> None:
        with self.lock:
            number = self.bucket_of[parameter]
            if number < len(self.started):
                raise ValueError(
                    f"the gradient of {self.names[parameter]} grew after it was averaged over "
                    "ranks: the layer is used several times under torch.utils.checkpoint with "
                    "use_reentrant=True; pass use_reentrant=False"
                )
            self.missing[number].discard(parameter)
            if parameter.is_cuda:
                self.streams.add(torch.cuda.current_stream(parameter.device))
            while len(self.started) < len(self.buckets) and not self.missing[len(self.started)]:
                self._start()

    @torch.no_grad()
    def _start(self) -> None:
        bucket = self.buckets[len(self.started)]
        for p in bucket:
            if p.grad is not None and p.grad.layout is not torch.strided:
                raise ValueError(
                    f"the gradient of {self.names[p]} has layout {p.grad.layout}, and only dense "
                    "ones are averaged over ranks: build its layer with sparse=False"
                )
        # The gradients may have been made on other streams than the one that is current now.
        device = bucket[0].device
        for stream in self.streams:
            if stream.device == device:
                torch.cuda.current_stream(device).wait_stream(stream)
        self.started.append(_Bucket(bucket, self.group))


class _Bucket:
    """Gradients of parameters of one dtype and device in a flat buffer, being summed over ranks."""

    def __init__(self, parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
        self.parameters = parameters
        sizes = [p.numel() for p in parameters]
        # At the end one number per parameter: on how many ranks it has a gradient.
        flat = parameters[0].new_empty(sum(sizes) + len(sizes))
        *parts, self.counts = flat.split([*sizes, len(sizes)])
        # With the strides of the parameters, so that equal strides are copied in one launch.
        self.sums = [
            part.as_strided(p.shape, torch.empty_like(p, device="meta").stride())
            for part, p in zip(parts, parameters, strict=True)
        ]
        if have := self._have():
            torch._foreach_copy_([s for _, s in have], [g for g, _ in have])
        self.counts.fill_(1)
        for i, p in enumerate(parameters):
            if p.grad is None:
                self.sums[i].zero_()
                self.counts[i].zero_()
        flat.div_(dist.get_world_size(group))
        self.work = dist.all_reduce(flat, group=group, async_op=True)

    @torch.no_grad()
    def finish(self) -> None:
        if self.work is not None:
            self.work.wait()
        have = self._have()
        if have:
            torch._foreach_copy_([g for g, _ in have], [s for _, s in have])
        if len(have) == len(self.parameters):
            return
        counts = self.counts.tolist()
        for p, average, count in zip(self.parameters, self.sums, counts, strict=True):
            if p.grad is None and count:
                p.grad = average.clone()

    def _have(self) -> list[tuple[Tensor, Tensor]]:
        """The gradients of this rank, each with its place in the buffer."""
        pairs = zip(self.parameters, self.sums, strict=True)
        return [(p.grad, place) for p, place in pairs if p.grad is not None]


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype and device each, in buckets of about `_BUCKET` bytes."""
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for p in parameters:
        kinds.setdefault((p.dtype, p.device), []).append(p)
    for alike in kinds.values():
        bucket: list[nn.Parameter] = []
        size = 0
        for p in alike:
            bucket.append(p)
            size += p.numel() * p.element_size()
            if size >= _BUCKET:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket


@torch.no_grad()
def share_weights(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Give every rank the parameters and buffers of the group's first rank."""
    for tensor in (*model.parameters(), *model.buffers()):
        dense: Tensor = tensor.detach().contiguous()
        dist.broadcast(dense, group=group, group_src=0)
        if dense.data_ptr() != tensor.data_ptr():
            tensor.copy_(dense)
