"""Activation checkpointing that recomputes with the batch statistics of the first pass.

Plain `torch.utils.checkpoint` would compute the statistics again, with a second collective over
ranks, and update the running buffers twice (pytorch issue 96136).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simclr_fast.large_batch import global_batch_norm as gbn
from simclr_fast.large_batch.batch_norms import after_norm, batch_norms

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class _Tape:
    """The batch statistics of one run of a block, in order, for its recomputation."""

    def __init__(self, norms: "GlobalNorms") -> None:
        self.norms = norms
        self.statistics: list[gbn.Statistics] = []
        self.position: int | None = None

    @contextmanager
    def record(self) -> Iterator[None]:
        outer, self.norms.tape = self.norms.tape, self
        try:
            yield
        finally:
            self.norms.tape = outer

    @contextmanager
    def replay(self) -> Iterator[None]:
        self.position = 0
        with self.record():
            yield


class GlobalNorms:
    """The forward of batch norms that use the whole batch, and replay recorded statistics."""

    def __init__(self, batch: gbn.WholeBatch) -> None:
        self.batch = batch
        self.tape: _Tape | None = None

    def forward(self, norm: Any, x: Tensor) -> Tensor:
        y = gbn.NormalizeFunction.apply(
            x, norm.weight, norm.bias, self._statistics(norm, x), self.batch
        )
        for name in after_norm(norm):
            y = getattr(norm, name)(y)
        return y

    @torch.no_grad()
    def _statistics(self, norm: Any, x: Tensor) -> gbn.Statistics:
        tape = self.tape
        if tape is not None and tape.position is not None:
            tape.position += 1
            return tape.statistics[tape.position - 1]
        statistics = gbn.global_statistics(x, gbn.moments(x, norm.eps), norm, self.batch)
        if tape is not None:
            tape.statistics.append(statistics)
        return statistics


@contextmanager
def global_norms(model: nn.Module, batch: gbn.WholeBatch, recompute: bool) -> Iterator[None]:
    """A context in which the batch norms of `model` use the statistics of the whole batch.

    recompute: blocks keep only their inputs and are recomputed in the backward.
    """
    norms = GlobalNorms(batch)
    forwards: dict[nn.Module, Callable[..., Any]] = {
        norm: partial(norms.forward, norm) for norm in batch_norms(model).values()
    }
    if recompute:
        for block in recomputed_blocks(model):
            forwards[block] = partial(_checkpointed, block.forward, norms)
    before: dict[nn.Module, Any] = {m: vars(m).get("forward") for m in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
        batch.finish_forward()
    finally:
        for module, forward in before.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


def recomputed_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of `model`: items of a Sequential or ModuleList with several layers inside.

    A block with more than half of all parameters counts as a wrapper: its blocks are taken.

    Raises:
        ValueError: there are no blocks.
    """
    half = sum(p.numel() for p in model.parameters()) / 2

    def search(module: nn.Module, listed: bool) -> list[nn.Module]:
        layers = sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules())
        is_list = isinstance(module, _CONTAINERS)
        block = listed and not is_list and layers > 1
        if block and sum(p.numel() for p in module.parameters()) <= half:
            return [module]
        inside = [b for child in module.children() for b in search(child, is_list)]
        return inside or ([module] if block else [])

    found = search(model, False)
    if not found:
        raise ValueError(
            "memory='replay' recomputes the blocks in a model's Sequential or ModuleList; "
            f"{type(model).__name__} has none"
        )
    return found


def _checkpointed(
    forward: Callable[..., Any], norms: GlobalNorms, *args: Any, **kwargs: Any
) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    tape = _Tape(norms)
    # Copy lists, because a DenseNet appends to the list that it passes on.
    args = tuple(list(a) if isinstance(a, list) else a for a in args)
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        context_fn=lambda: (tape.record(), tape.replay()),
        **kwargs,
    )
