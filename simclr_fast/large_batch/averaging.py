"""Gradients averaged over ranks after the backward, and equal weights at the start.

Nothing is remembered from one step to the next: which parameters are trained and which have a
gradient may change at any time. Averaging does not overlap with the backward. Per step that costs
the time to send all gradients once: for a ResNet-50 100 MB in float32, against a step that lasts
hundreds of milliseconds with the batches that need several GPUs.
"""

import zlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

# As large as a network needs for its full speed, in bytes.
_BUCKET = 32 << 20


@torch.no_grad()
def average_gradients(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Average .grad of every trained parameter over the ranks of `group`.

    A parameter without a gradient on some ranks counts as zero there, and gets the average too.
    Without a gradient on any rank, it keeps none. The host waits for the device only where this
    rank lacks a gradient.

    Raises:
        ValueError: a gradient is sparse; or, on CPUs, the ranks train different parameters. On
            other devices the host would wait for this check.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in trained.items():
        if p.grad is not None and p.grad.layout is not torch.strided:
            raise ValueError(
                f"the gradient of {name} has layout {p.grad.layout}, and only dense ones are "
                "averaged over ranks: build its layer with sparse=False"
            )
    _refuse_different(trained, group)
    started = [_Bucket(parameters, group) for parameters in _buckets(list(trained.values()))]
    for bucket in started:
        bucket.finish()


def _refuse_different(trained: dict[str, nn.Parameter], group: dist.ProcessGroup) -> None:
    """Refuse ranks whose buckets would not fit together. Only on CPUs."""
    if any(p.device.type != "cpu" for p in trained.values()):
        return
    names = "\n".join(f"{name} {list(p.shape)} {p.dtype}" for name, p in trained.items())
    own = zlib.crc32(names.encode())
    # The maximum of a number and that of its negative are its own only if all ranks have it.
    extremes = torch.tensor([own, -own], device="cpu")
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group)
    if extremes.tolist() != [own, -own]:
        raise ValueError(
            f"the ranks train different parameters (this one {len(trained)}): modules and "
            "requires_grad must be the same on all ranks"
        )


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
