"""Gradient caching, for models that do not mix the rows of a batch before the loss.

Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
(arXiv:2101.06983). First the outputs of all micro-batches are computed without a graph, then the
gradient of the loss with respect to them. Finally each micro-batch runs forward again, and backward
with its part of that gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from simclr_fast.large_batch.batch_norms import batch_norms
from simclr_fast.large_batch.compiled_model import CompiledModel
from simclr_fast.large_batch.compiled_regions import compile_failures
from simclr_fast.large_batch.outputs import (
    rebuild,
    refuse_other_constants,
    refuse_other_rows,
    tensors,
)
from simclr_fast.large_batch.second_run import AllNumbers, State, differ, half_of


def backward(
    model: nn.Module,
    parts: Sequence[Tensor],
    loss_of: Callable[[Any], Any],
    autocast: Callable[[], AbstractContextManager[Any]],
    compare: bool,
    last_backward: Callable[[], AbstractContextManager[Any]] = nullcontext,
    compiled: CompiledModel | None = None,
) -> Any:
    """See `LargeBatch.backward`. parts: the micro-batches.

    compare: raise ValueError if a micro-batch runs differently the second time.
    last_backward: makes the context for the backward of the last micro-batch.
    compiled: the model, if it is to run compiled. Its first pass makes a graph too: without, it
        would be another compiled function, which draws other random numbers.
    """
    devices = {parts[0].device, *(p.device for p in model.parameters())}
    norms = set(batch_norms(model).values())
    watched = {name: m for name, m in model.named_modules() if m not in norms}

    def run(part: Tensor, filled: bool, eager: bool = compiled is None) -> Any:
        before = State(watched) if compare and part is parts[0] else None
        with autocast():
            made = model(part) if eager or compiled is None else compiled(part)
        if before is not None and (what := before.changed(State(watched), filled=filled)):
            raise _refusal(f"its forward changes {what}")
        return made

    numbers, outputs = [], []
    with torch.set_grad_enabled(compiled is not None), _untracked(model):
        for part in parts:
            numbers.append(AllNumbers(devices))
            outputs.append(run(part, filled=False))
            if compiled is not None:
                made = [t.detach() for t in tensors(outputs[-1])]
                outputs[-1] = rebuild(outputs[-1], iter(made))
            if compare and part is parts[0] and not norms:
                # Not compiled: half of the rows would need a graph of their own.
                whole = outputs[0] if compiled is None else run(part, filled=True, eager=True)
                _refuse_mixed_rows(part, whole, numbers[0], partial(run, filled=True, eager=True))
            refuse_other_rows(outputs[-1], len(part), "grad-cache")
            refuse_other_constants(outputs[0], outputs[-1], "grad-cache")
    columns = list(zip(*(tensors(o) for o in outputs), strict=True))
    leaves = [torch.cat(column) for column in columns]
    for leaf in leaves:
        leaf.requires_grad_(leaf.is_floating_point() or leaf.is_complex())
    # Clones, because loss_fn may overwrite its argument, and no leaf may be overwritten.
    result = loss_of(rebuild(outputs[0], iter([leaf.clone() for leaf in leaves])))
    sizes = [len(part) for part in parts]
    cached = list(zip(*(leaf.detach().split(sizes) for leaf in leaves), strict=True))
    del outputs, columns
    shares = [None if leaf.grad is None else leaf.grad.split(sizes) for leaf in leaves]
    after = AllNumbers(devices)
    try:
        for i, part in enumerate(parts):
            numbers[i].restore()
            made = tensors(run(part, filled=True))
            if compare and differ(cached[i], made):
                raise _refusal(
                    "its output was another the second time, so it draws random numbers that "
                    "cannot be restored, or reads something that its forward changes"
                )
            ends = [
                (m, s[i])
                for m, s in zip(made, shares, strict=True)
                if s is not None and m.requires_grad
            ]
            if ends:
                last = last_backward() if i == len(parts) - 1 else nullcontext()
                with last, compile_failures() if compiled else nullcontext():
                    torch.autograd.backward([m for m, _ in ends], [g for _, g in ends])
    finally:
        after.restore()
    return result


def _refuse_mixed_rows(
    part: Tensor, outputs: Any, before: AllNumbers, run: Callable[[Tensor], Any]
) -> None:
    """Run half of the views of a micro-batch, and refuse a model whose outputs are others then.

    A model that draws random numbers is not tried, because it would draw others.
    """
    rows = len(part)
    if rows < 2 or isinstance(part, FakeTensor) or before.drawn():
        return
    kept = half_of(rows)
    try:
        found = tensors(run(part[kept]))
    except Exception as error:
        raise ValueError(
            f"memory='grad-cache' runs the model on micro-batches, and it fails for fewer views: "
            f"{error}; memory='plain' can run it"
        ) from error
    whole = tensors(outputs)
    if all(t.dim() and len(t) == rows for t in whole) and differ([t[kept] for t in whole], found):
        raise ValueError(
            "memory='grad-cache' runs the model on micro-batches, and the output of a view depends "
            "on the other views in the batch; memory='plain' can run it"
        )


@contextmanager
def _untracked(model: nn.Module) -> Iterator[None]:
    """A context in which running statistics are not updated: the second pass updates them."""
    tracking = [m for m in batch_norms(model).values() if m.track_running_stats]
    try:
        for norm in tracking:
            norm.track_running_stats = False  # type: ignore[assignment]
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True  # type: ignore[assignment]


def _refusal(why: str) -> ValueError:
    return ValueError(
        f"memory='grad-cache' runs the model twice, and {why}; memory='plain' can run it"
    )
