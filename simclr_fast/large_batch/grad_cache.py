"""Gradient caching, for models that do not mix the rows of a batch before the loss.

Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"
(arXiv:2101.06983). First the outputs of all micro-batches are computed without a graph, then the
gradient of the loss with respect to them. Finally each micro-batch runs forward again, and backward
with its part of that gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from simclr_fast.large_batch.batch_norms import batch_norms


def refuse_ghost_batch_norm(model: nn.Module) -> None:
    """Raise ValueError if `model` has batch norms in training mode."""
    if norms := batch_norms(model):
        raise ValueError(
            f"memory='grad-cache' normalises each micro-batch by its own statistics ({len(norms)} "
            f"batch norms, {next(iter(norms))!r} first), so the gradient is not that of the batch: "
            "its cosine to the true one was 0.94, 0.85, 0.75 and 0.61 at micro-batches of 256, "
            "128, 64 and 32 of 512 views on a small ResNet. Use memory='lockstep', which is exact, "
            "or allow_ghost_bn"
        )


def backward(
    model: nn.Module,
    run: nn.Module,
    parts: Sequence[Tensor],
    loss_of: Callable[[Any], Any],
    autocast: Callable[[], AbstractContextManager[Any]],
    sync: bool,
) -> Any:
    """See `LargeBatch.backward`. run: `model`, or DistributedDataParallel around it. parts: the
    micro-batches."""
    device = parts[0].device
    states, outputs = [], []
    with torch.no_grad(), _untracked(model):
        for part in parts:
            states.append(_random_state(device))
            with autocast():
                outputs.append(model(part))
    columns = list(zip(*(tensors(o) for o in outputs), strict=True))
    leaves = [torch.cat(column).requires_grad_() for column in columns]
    result = loss_of(rebuild(outputs[0], iter(leaves)))
    sizes = [len(part) for part in parts]
    del outputs, columns
    shares = [None if leaf.grad is None else leaf.grad.split(sizes) for leaf in leaves]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        for i, part in enumerate(parts):
            _set_random_state(states[i], device)
            # DDP averages once, in the backward of the last micro-batch.
            waits = isinstance(run, DistributedDataParallel) and not (sync and i == len(parts) - 1)
            with run.no_sync() if waits else nullcontext():  # type: ignore[operator]
                with autocast():
                    made = tensors(run(part))
                ends = [(m, s[i]) for m, s in zip(made, shares, strict=True) if s is not None]
                torch.autograd.backward([m for m, _ in ends], [g for _, g in ends])
    return result


def tensors(outputs: Any) -> list[Tensor]:
    """The tensors of a model's outputs: a tensor, or tuples, lists and dicts of such."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    if isinstance(outputs, (list, tuple)):
        return [t for o in outputs for t in tensors(o)]
    raise TypeError(
        f"the model must return tensors, or tuples, lists and dicts of them, got "
        f"{type(outputs).__name__}"
    )


def rebuild(like: Any, found: Iterator[Tensor]) -> Any:
    """A copy of `like` in which the tensors of `found` replace its tensors, in order."""
    if isinstance(like, Tensor):
        return next(found)
    if isinstance(like, dict):
        return type(like)((key, rebuild(value, found)) for key, value in like.items())
    items = [rebuild(value, found) for value in like]
    return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)


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


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
