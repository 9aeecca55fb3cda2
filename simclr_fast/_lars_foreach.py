"""LARS in plain torch operations: every device, no extension. The definition is in optim.LARS."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Parameters of one group on one device that one rule updates."""

    params: list[Tensor]
    grads: list[Tensor]
    buffers: list[Tensor]  # empty when momentum is 0
    group: dict[str, Any]
    dampening: float
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
    by_dtype: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for i, (p, g) in enumerate(zip(batch.params, batch.grads, strict=True)):
        by_dtype.setdefault((p.dtype, g.dtype), []).append(i)
    for (dtype, _), indices in by_dtype.items():
        lists = [[tensors[i] for i in indices] for tensors in batch[:3] if tensors]
        work = lists
        half = dtype in (torch.float16, torch.bfloat16)
        if half or found_inf is not None:
            wide = torch.float32 if half else dtype
            work = [[t.to(wide, copy=True) for t in tensors] for tensors in lists]
        elif lists[1][0].dtype != dtype:
            work = [lists[0], [g.to(dtype) for g in lists[1]], *lists[2:]]
        _foreach_update(work, batch, grad_scale)
        if work[0] is lists[0]:
            continue
        new = [work[0], *work[2:]]
        for old_tensors, new_tensors in zip([lists[0], *lists[2:]], new, strict=True):
            if found_inf is not None:
                skip = found_inf.to(old_tensors[0].device) != 0
                new_tensors = [
                    torch.where(skip, o, n.to(o.dtype))
                    for o, n in zip(old_tensors, new_tensors, strict=True)
                ]
            torch._foreach_copy_(old_tensors, new_tensors)


def _foreach_update(work: list[Any], batch: Batch, grad_scale: Tensor | None) -> None:
    """Updates work = [params, grads, buffers] in place, but for grads, in their own dtype."""
    params, grads = work[:2]
    group, lr, decay = batch.group, batch.group["lr"], batch.group["weight_decay"]
    device, dtype = params[0].device, params[0].dtype
    if isinstance(lr, Tensor):
        lr = lr.to(device, torch.float64).reshape(())
    if grad_scale is not None:
        inverse = grad_scale.to(device).double().reciprocal().to(dtype)
        grads = torch._foreach_mul(grads, inverse)
    if group["maximize"]:
        grads = torch._foreach_neg(grads)
    updates = torch._foreach_add(grads, params, alpha=decay) if decay else grads
    if batch.adapt:
        ratios = _trust(params, updates if group["norm"] == "joint" else grads, group, lr)
        updates = torch._foreach_mul(updates, list(ratios.to(dtype).unbind()))
    if isinstance(lr, Tensor):
        lr = lr.to(dtype)
    inside = group["momentum_order"] == "tf"
    if inside:
        updates = torch._foreach_mul(updates, lr)
    if len(work) == 3:
        buffers = work[2]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates, alpha=1 - batch.dampening)
        if group["nesterov"]:
            updates = torch._foreach_add(updates, buffers, alpha=group["momentum"])
        else:
            updates = buffers
    if inside:
        torch._foreach_sub_(params, updates)
    elif isinstance(lr, Tensor):
        torch._foreach_sub_(params, torch._foreach_mul(updates, lr))
    else:
        torch._foreach_add_(params, updates, alpha=-lr)


def _trust(
    params: list[Tensor],
    vectors: list[Tensor] | tuple[Tensor, ...],
    group: dict[str, Any],
    lr: float | Tensor,
) -> Tensor:
    """Trust ratio of each tensor, float64  # [len(params)]."""
    joint = group["norm"] == "joint"
    w = torch.stack(torch._foreach_norm(params, dtype=torch.float64))
    g = torch.stack(torch._foreach_norm(vectors, dtype=torch.float64))
    decay = 0.0 if joint else group["weight_decay"]
    ratios = group["trust_coefficient"] * w / (g + decay * w + group["eps"])
    skip = not joint and group["when_zero"] == "skip"
    if not skip:
        ratios = torch.where((w > 0) & (g > 0), ratios, 1.0)
    if group["trust_clip"]:
        ratios = (ratios / lr).clamp(max=1.0)
    if skip:
        # Ratio 0 leaves out the decay that was added to a gradient of zero.
        ratios = torch.where(g == 0, 0.0, ratios).masked_fill(w == 0, 1.0)
    return ratios
