"""Activation checkpointing that recomputes with the batch statistics of the first pass.

Plain `torch.utils.checkpoint` would compute the statistics again, with a second collective over
ranks, and update the running buffers twice (pytorch issue 96136).

A block gives the right gradient only if its recomputation is the same computation. Its random
numbers are restored. What else would differ is found by comparing both runs, and refused.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from simclr_fast.large_batch import global_batch_norm as gbn
from simclr_fast.large_batch.batch_norms import (
    Replaced,
    after_norm,
    batch_norms,
    replaced_forwards,
)
from simclr_fast.large_batch.blocks import Block, recomputed_blocks
from simclr_fast.large_batch.second_run import HostNumbers, State, differ, samples, version


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
            if tape.position == len(tape.statistics):
                raise _checkpoints_itself()
            tape.position += 1
            return tape.statistics[tape.position - 1]
        if torch._C._current_graph_task_id() != -1:
            # Inside a backward, and not by our recomputation.
            raise _checkpoints_itself()
        statistics = gbn.global_statistics(x, gbn.moments(x, norm.eps), norm, self.batch)
        if tape is not None:
            tape.statistics.append(statistics)
        return statistics


@contextmanager
def global_norms(
    model: nn.Module, batch: gbn.WholeBatch, recompute: bool, compare: bool = False
) -> Iterator[None]:
    """A context in which the batch norms of `model` use the statistics of the whole batch.

    recompute: blocks keep only their inputs and are recomputed in the backward. compare: raise
    ValueError if the recomputation of a block is another computation.
    """
    norms = GlobalNorms(batch)
    forwards: dict[nn.Module, Callable[..., Any]] = {
        norm: Replaced(norms.forward, norm) for norm in batch_norms(model).values()
    }
    parts: dict[nn.Module, list[Callable[..., Any]]] = {}
    for block in recomputed_blocks(model) if recompute else ():
        run = _Recomputed(block, norms, compare)
        if block.first is None:
            forwards[block.owner] = run
        else:
            parts.setdefault(block.owner, []).append(run)
    forwards |= {owner: partial(_one_after_the_other, runs) for owner, runs in parts.items()}
    with replaced_forwards(forwards):
        yield
        batch.finish_forward()


def _one_after_the_other(runs: list[Callable[..., Any]], x: Any) -> Any:
    for run in runs:
        x = run(x)
    return x


class _Recomputed:
    """The forward of a block that is recomputed in the backward."""

    def __init__(self, block: Block, norms: GlobalNorms, compare: bool) -> None:
        self.block, self.norms, self.compare = block, norms, compare
        self.forward = block.forward
        own = set(batch_norms(block.owner).values())
        self.watched = {name: m for name, m in block.modules.items() if m not in own}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        tape = _Tape(self.norms)
        # Copy lists, because a DenseNet appends to the list that it passes on.
        args = tuple(list(a) if isinstance(a, list) else a for a in args)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        runs = _Runs(self, given)
        # With early stop a recomputation ends before the outputs that are compared.
        with set_checkpoint_early_stop(not self.compare):
            return checkpoint(
                runs,
                *args,
                use_reentrant=False,
                context_fn=lambda: (tape.record(), tape.replay()),
                **kwargs,
            )


class _Runs:
    """Both runs of a block in one step. given: the tensors among its arguments."""

    def __init__(self, of: _Recomputed, given: list[Tensor]) -> None:
        self.forward, self.block, self.watched = of.forward, of.block, of.watched
        self.given, self.compare = given, of.compare
        self.numbers: HostNumbers | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.numbers is None:
            self.numbers = HostNumbers()
            versions = list(map(version, self.given))
            outputs = self._run(args, kwargs, filled=False)
            if versions != list(map(version, self.given)):
                raise self._refusal("its forward overwrites its input")
            self.given = []
            self.samples = samples(outputs) if self.compare else []
            return outputs
        with self.numbers.again():
            outputs = self._run(args, kwargs, filled=True)
        if self.compare and differ(self.samples, samples(outputs)):
            raise self._refusal(
                "its output was another the second time, so it draws random numbers that cannot "
                "be restored, or reads something that its forward changes"
            )
        return outputs

    def _run(self, args: Any, kwargs: Any, filled: bool) -> Any:
        if not self.compare:
            return self.forward(*args, **kwargs)
        before = State(self.watched)
        outputs = self.forward(*args, **kwargs)
        if what := before.changed(State(self.watched), filled=filled):
            raise self._refusal(f"its forward changes {what}")
        return outputs

    def _refusal(self, why: str) -> ValueError:
        return ValueError(
            f"memory='replay' computes {self.block.name or 'the model'} "
            f"({type(self.block.owner).__name__}) twice, and {why}; memory='plain' can run it"
        )


def _checkpoints_itself() -> ValueError:
    return ValueError(
        "the model recomputes batch norms itself (torch.utils.checkpoint, or timm's "
        "set_grad_checkpointing), which would take their statistics twice: switch that off, as "
        "memory='replay' and memory='lockstep' do this"
    )
