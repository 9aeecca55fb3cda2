"""LARS in plain torch operations: every device, no extension. The definition is in optim.LARS."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class Batch(NamedTuple):
    """Parameters of one group on one device that one rule updates."""

    params: list[Tensor]
    grads: list[Tensor]
    buffers: list[Tensor]  # empty when momentum is 0
    group: dict[str, Any]
    apart: bool  # of the tensors that a subclass of LARS treats otherwise than the group's others
    dampening: float
    weight_decay: float
    adapt: bool

    def select(self, indices: list[int]) -> "Batch":
        return self._replace(
            params=[self.params[i] for i in indices],
            grads=[self.grads[i] for i in indices],
            buffers=[self.buffers[i] for i in indices] if self.buffers else [],
        )


def foreach_step(batch: Batch, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    for g in batch.grads:
        if g.layout is not torch.strided:
            raise ValueError(f"LARS needs strided gradients, got layout {g.layout}")
    if found_inf is not None and _on_host(found_inf):
        if found_inf:
            return
        found_inf = None
    by_dtype: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for i, (p, g) in enumerate(zip(batch.params, batch.grads, strict=True)):
        by_dtype.setdefault((p.dtype, g.dtype), []).append(i)
    for (dtype, grad_dtype), indices in by_dtype.items():
        lists = [[tensors[i] for i in indices] for tensors in batch[:3] if tensors]
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        work, own_grads = lists, wide != grad_dtype
        if wide != dtype or found_inf is not None:
            work, own_grads = [[t.to(wide, copy=True) for t in ts] for ts in lists], True
        elif own_grads:
            work = [lists[0], [g.to(wide) for g in lists[1]], *lists[2:]]
        _update(work, own_grads, batch, grad_scale)
        if work[0] is lists[0]:
            continue
        for old, new in zip([lists[0], *lists[2:]], [work[0], *work[2:]], strict=True):
            if found_inf is not None:
                skip = found_inf.to(old[0].device) != 0
                new = [torch.where(skip, o, n.to(o)) for o, n in zip(old, new, strict=True)]
            torch._foreach_copy_(old, new)


def _update(work: list[Any], own: bool, batch: Batch, grad_scale: Tensor | None) -> None:
    """Updates work = [params, grads, buffers] in place, in their own dtype; grads only if own."""
    params, updates = work[:2]
    group, lr, decay = batch.group, batch.group["lr"], batch.weight_decay
    device, dtype = params[0].device, params[0].dtype
    if isinstance(lr, Tensor):
        lr = lr.to(device, torch.float64).reshape(())
    sign = -1.0 if group["maximize"] else 1.0
    if grad_scale is not None:
        factor = (sign / grad_scale.to(device).double()).to(dtype)
        updates, own = _scaled(updates, factor, own), True
    elif sign < 0:
        updates, own = _scaled(updates, sign, own), True
    joint = group["norm"] == "joint"
    ratios = None
    if batch.adapt and not joint:
        ratios = _trust(params, updates, batch, lr)
    if decay:
        updates, own = _added(updates, params, decay, own), True
    if batch.adapt and joint:
        ratios = _trust(params, updates, batch, lr)
    inside = group["momentum_order"] == "tf"
    if ratios is not None:
        factors = list((ratios * lr if inside else ratios).to(dtype).unbind())
        updates, own = _scaled(updates, factors, own), True
    elif inside:
        updates, own = _scaled(updates, _as(lr, dtype), own), True
    if len(work) == 3:
        buffers = work[2]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates, alpha=1 - batch.dampening)
        if group["nesterov"]:
            updates, own = _added(updates, buffers, group["momentum"], own), True
        else:
            updates, own = buffers, False
    if inside:
        torch._foreach_sub_(params, updates)
    elif isinstance(lr, Tensor):
        torch._foreach_sub_(params, _scaled(updates, _as(lr, dtype), own))
    else:
        torch._foreach_add_(params, updates, alpha=-lr)


def _scaled(tensors: list[Tensor], factor: Any, in_place: bool) -> Any:
    if in_place:
        torch._foreach_mul_(tensors, factor)
        return tensors
    return torch._foreach_mul(tensors, factor)


def _added(tensors: list[Tensor], others: list[Tensor], alpha: float, in_place: bool) -> Any:
    if in_place:
        torch._foreach_add_(tensors, others, alpha=alpha)
        return tensors
    return torch._foreach_add(tensors, others, alpha=alpha)


def _as(lr: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return lr.to(dtype) if isinstance(lr, Tensor) else lr


def _trust(params: list[Tensor], vectors: list[Tensor], batch: Batch, lr: float | Tensor) -> Tensor:
    """Trust ratio of each tensor, float64  # [len(params)]."""
    group = batch.group
    joint = group["norm"] == "joint"
    w, g = _norms(params), _norms(vectors)
    decay = 0.0 if joint else batch.weight_decay
    ratios = group["trust_coefficient"] * w / (g + decay * w + group["eps"])
    skip = not joint and group["when_zero"] == "skip"
    if not skip:
        ratios = torch.where((w > 0) & (g > 0), ratios, 1.0)
    if group["trust_clip"]:
        ratios = (ratios / lr).clamp(max=1.0)
    if skip:
        # Ratio 0 leaves out the decay that is added to a gradient of zero.
        ratios = torch.where(g == 0, 0.0, ratios).masked_fill(w == 0, 1.0)
    return ratios


def _norms(tensors: list[Tensor]) -> Tensor:
    """Norm of each tensor, float64  # [len(tensors)]."""
    if not _on_host(tensors[0]):
        return torch.stack(torch._foreach_norm(tensors, dtype=torch.float64))
    norms = torch.stack(torch._foreach_norm(tensors)).double()
    # The double pass is several times slower: only where squares may have left float32's range.
    doubtful = ~((norms > 1e-15) & (norms < 1e15))
    for i in doubtful.nonzero().flatten().tolist():
        norms[i] = torch.linalg.vector_norm(tensors[i], dtype=torch.float64)
    return norms


def _on_host(tensor: Tensor) -> bool:
    """Whether Python may branch on values: without waiting for a device or breaking a graph."""
    plain = not torch.compiler.is_compiling() and not is_traceable_wrapper_subclass(tensor)
    return plain and tensor.device.type == "cpu"
