"""LARS in plain torch operations, for every device and without the extension.

`optim.LARS` has the definition.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from simclr_fast.ops import widest_float


class Batch(NamedTuple):
    """Parameters of one group on one device that are updated by the same rule."""

    params: list[Tensor]
    grads: list[Tensor]
    buffers: list[Tensor]  # empty when momentum is 0
    group: dict[str, Any]
    dampening: float
    weight_decay: float
    adapt: bool
    # [2, len(params)]: the norms of weights and gradients of the trust ratio, if they are known.
    norms: Tensor | None = None

    def select(self, indices: list[int]) -> "Batch":
        return self._replace(
            params=[self.params[i] for i in indices],
            grads=[self.grads[i] for i in indices],
            buffers=[self.buffers[i] for i in indices] if self.buffers else [],
        )


def one_dtype(batch: Batch) -> list[Batch]:
    """Batches whose parameters have one dtype, and whose gradients have one."""
    for g in batch.grads:
        if g.layout is not torch.strided:
            raise ValueError(f"LARS needs strided gradients, got layout {g.layout}")
    by_dtype: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for i, (p, g) in enumerate(zip(batch.params, batch.grads, strict=True)):
        by_dtype.setdefault((p.dtype, g.dtype), []).append(i)
    return [batch.select(indices) for indices in by_dtype.values()]


def foreach_step(batch: Batch, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Update parameters and momentum buffers in place. The gradients are not changed.

    batch: from `one_dtype`.
    """
    if found_inf is not None and _on_host(found_inf):
        if found_inf:
            return
        found_inf = None
    dtype, arithmetic = batch.params[0].dtype, _arithmetic_dtype(batch)
    if arithmetic != dtype or found_inf is not None:
        _update_copies(batch, arithmetic, grad_scale, found_inf)
        return
    other_grads = batch.grads[0].dtype != arithmetic
    if other_grads:
        batch = batch._replace(grads=[g.to(arithmetic) for g in batch.grads])
    _update(batch, grad_scale, own_grads=other_grads)


def norms_of_ratios(batch: Batch, grad_scale: Tensor | None) -> Tensor:
    """[2, len(params)]: the norms of weights and gradients of the trust ratios.

    batch: from `one_dtype`.
    """
    dtype = _arithmetic_dtype(batch)
    params = [p.to(dtype) for p in batch.params]
    vectors = _Vectors([g.to(dtype) for g in batch.grads], own=False)
    _unscale(vectors, batch, grad_scale)
    if batch.group["norm"] == "joint":
        vectors.add(params, batch.weight_decay)
    return torch.stack((_norms(params), _norms(vectors.tensors)))


def _arithmetic_dtype(batch: Batch) -> torch.dtype:
    dtype = batch.params[0].dtype
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _update_copies(
    batch: Batch, dtype: torch.dtype, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Run `_update` on copies in `dtype`, and write them back unless the gradients overflowed.

    The overflow flag may be on a device, where Python cannot branch on it without waiting.
    """
    copies = batch._replace(
        params=[t.to(dtype, copy=True) for t in batch.params],
        grads=[t.to(dtype, copy=True) for t in batch.grads],
        buffers=[t.to(dtype, copy=True) for t in batch.buffers],
    )
    _update(copies, grad_scale, own_grads=True)
    for old, new in ((batch.params, copies.params), (batch.buffers, copies.buffers)):
        if not old:
            continue
        if found_inf is not None:
            skip = found_inf.to(old[0].device) != 0
            new = [torch.where(skip, o, n.to(o)) for o, n in zip(old, new, strict=True)]
        torch._foreach_copy_(old, new)


class _Vectors:
    """Tensors to compute with. If they are not `own`, the first change makes a copy."""

    def __init__(self, tensors: list[Tensor], own: bool):
        self.tensors, self._own = tensors, own

    def scale(self, factors: float | Tensor | list[Tensor]) -> None:
        if self._own:
            torch._foreach_mul_(self.tensors, factors)
        else:
            self.tensors, self._own = list(torch._foreach_mul(self.tensors, factors)), True

    def add(self, others: list[Tensor], alpha: float) -> None:
        if self._own:
            torch._foreach_add_(self.tensors, others, alpha=alpha)
        else:
            new = torch._foreach_add(self.tensors, others, alpha=alpha)
            self.tensors, self._own = list(new), True


def _update(batch: Batch, grad_scale: Tensor | None, *, own_grads: bool) -> None:
    """Update params and buffers in place, all in one dtype. With `own_grads`, change grads too."""
    params, group, lr = batch.params, batch.group, batch.group["lr"]
    device, dtype = params[0].device, params[0].dtype
    if isinstance(lr, Tensor):
        lr = lr.to(device, widest_float(device)).reshape(())
    update = _Vectors(batch.grads, own_grads)
    _unscale(update, batch, grad_scale)

    joint = group["norm"] == "joint"
    norms = batch.norms
    if batch.adapt and norms is None and not joint:
        norms = torch.stack((_norms(params), _norms(update.tensors)))
    if batch.weight_decay:
        update.add(params, batch.weight_decay)
    if batch.adapt and norms is None:
        norms = torch.stack((_norms(params), _norms(update.tensors)))
    ratios = _trust_ratios(norms, batch, lr) if batch.adapt and norms is not None else None

    lr_in_momentum = group["momentum_order"] == "tf"
    if ratios is not None:
        factors = ratios * lr if lr_in_momentum else ratios
        update.scale(list(factors.to(dtype).unbind()))
    elif lr_in_momentum:
        update.scale(lr.to(dtype) if isinstance(lr, Tensor) else lr)

    if batch.buffers:
        torch._foreach_mul_(batch.buffers, group["momentum"])
        torch._foreach_add_(batch.buffers, update.tensors, alpha=1 - batch.dampening)
        if group["nesterov"]:
            update.add(batch.buffers, group["momentum"])
        else:
            update = _Vectors(batch.buffers, own=False)

    if lr_in_momentum:
        torch._foreach_sub_(params, update.tensors)
    elif isinstance(lr, Tensor):
        update.scale(lr.to(dtype))
        torch._foreach_sub_(params, update.tensors)
    else:
        torch._foreach_add_(params, update.tensors, alpha=-lr)


def _unscale(gradients: _Vectors, batch: Batch, grad_scale: Tensor | None) -> None:
    """Divide by the scale of the GradScaler, and change the sign to maximize."""
    sign = -1.0 if batch.group["maximize"] else 1.0
    if grad_scale is not None:
        p = batch.params[0]
        scale = grad_scale.to(p.device, widest_float(p.device))
        gradients.scale((sign / scale).to(_arithmetic_dtype(batch)))
    elif sign < 0:
        gradients.scale(sign)


def _trust_ratios(norms: Tensor, batch: Batch, lr: float | Tensor) -> Tensor:
    """Trust ratio of each tensor, [len(params)], in the widest dtype of the device."""
    group = batch.group
    joint = group["norm"] == "joint"
    w, g = norms.unbind()
    decay = 0.0 if joint else batch.weight_decay
    ratios = group["trust_coefficient"] * w / (g + decay * w + group["eps"])
    skip = not joint and group["when_zero"] == "skip"
    if not skip:
        ratios = torch.where((w > 0) & (g > 0), ratios, 1.0)
    if group["trust_clip"]:
        ratios = (ratios / lr).clamp(max=1.0)
    if skip:
        # For a zero gradient the update is the weight decay; a ratio of 0 leaves it out.
        ratios = torch.where(g == 0, 0.0, ratios).masked_fill(w == 0, 1.0)
    return ratios


def _norms(tensors: list[Tensor]) -> Tensor:
    """The norm of each tensor, [len(tensors)], in the widest dtype of the device."""
    if widest_float(tensors[0].device) != torch.float64:
        return _float32_norms(tensors)
    if not _on_host(tensors[0]):
        return torch.stack(torch._foreach_norm(tensors, dtype=torch.float64))
    norms = torch.stack(torch._foreach_norm(tensors)).double()
    # Repeat in float64, which is several times slower, only if squares may have left float32's
    # range.
    doubtful = ~((norms > 1e-15) & (norms < 1e15))
    for i in doubtful.nonzero().flatten().tolist():
        norms[i] = torch.linalg.vector_norm(tensors[i], dtype=torch.float64)
    return norms


def _float32_norms(tensors: list[Tensor]) -> Tensor:
    """Norms whose squares stay in float32's range.

    Each tensor is divided by its largest element first. Does not sync.
    """
    largest = [t.abs().amax() if t.numel() else t.new_zeros(()) for t in tensors]
    # If the largest element is 0, infinity or NaN, the divisor is 1, and the norm is the same.
    divisors = [torch.where((m > 0) & m.isfinite(), m, 1.0) for m in largest]
    norms = torch._foreach_norm(torch._foreach_div(tensors, divisors))
    return torch.stack(norms) * torch.stack(divisors)


def _on_host(tensor: Tensor) -> bool:
    """Whether Python may branch on the value without a device sync or a graph break."""
    plain = not torch.compiler.is_compiling() and not is_traceable_wrapper_subclass(tensor)
    return plain and tensor.device.type == "cpu"
