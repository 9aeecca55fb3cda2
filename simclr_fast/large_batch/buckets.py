"""Gradients in flat buffers, which are averaged over ranks while the backward goes on."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Buckets:
    """One bucket per list of parameters, and one all-reduce per bucket and dtype.

    A parameter in several lists belongs to the first. Gradients that are already in .grad are added
    and averaged too, as in DistributedDataParallel.
    """

    def __init__(
        self, lists: Sequence[Sequence[nn.Parameter]], group: dist.ProcessGroup | None
    ) -> None:
        self.group = group
        self.views: dict[nn.Parameter, Tensor] = {}
        self.filled: set[nn.Parameter] = set()
        self.flats: list[list[Tensor]] = []
        self.works: list[dist.Work | None] = []
        for parameters in lists:
            own = [p for p in dict.fromkeys(parameters) if p not in self.views]
            kinds = dict.fromkeys((p.dtype, p.device) for p in own)
            self.flats.append([])
            for dtype, device in kinds:
                alike = [p for p in own if (p.dtype, p.device) == (dtype, device)]
                flat = torch.zeros(sum(p.numel() for p in alike), dtype=dtype, device=device)
                self.flats[-1].append(flat)
                for p, part in zip(alike, flat.split([p.numel() for p in alike]), strict=True):
                    # The strides of the parameter, such as channels_last, as autograd's gradients.
                    strides = torch.empty_like(p, device="meta").stride()
                    self.views[p] = part.as_strided(p.shape, strides)
                    if p.grad is not None:
                        self.views[p].copy_(p.grad)

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        self.views[parameter].add_(gradient)
        self.filled.add(parameter)

    def reduce(self, index: int) -> None:
        """Start to average bucket `index` over the ranks. Nothing may be added to it afterwards."""
        if self.group is None:
            return
        for flat in self.flats[index]:
            flat.div_(dist.get_world_size(self.group))
            self.works.append(dist.all_reduce(flat, group=self.group, async_op=True))

    def finish(self) -> None:
        """Wait for the averages and store them in .grad."""
        for work in self.works:
            if work is not None:
                work.wait()
        for parameter, view in self.views.items():
            if parameter.grad is not None:
                parameter.grad.copy_(view)
            elif parameter in self.filled:
                parameter.grad = view
