"""DTensor parameters: each rank updates its own elements, by the norms of whole tensors."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from simclr_fast.optim.lars_torch import Batch, norms_of_ratios


def localize(batches: list[Batch], grad_scale: Tensor | None) -> list[Batch]:
    """Batches with local tensors in place of DTensors, and with the norms that sharded ones need.

    batches: from `lars_torch.one_dtype`. Every rank must have the same parameters and gradients.

    Communicates once for all parameters that are sharded over the same processes.
    """
    local: list[Batch] = []
    # Positions in `local` of the batches that need norms, by device and processes to sum over.
    unknown: dict[tuple[torch.device, tuple[dist.ProcessGroup, ...]], list[int]] = {}
    for batch in batches:
        by_groups: dict[tuple[dist.ProcessGroup, ...], list[int]] = {}
        for i, p in enumerate(batch.params):
            by_groups.setdefault(_sharding_groups(p), []).append(i)
        for groups, indices in by_groups.items():
            part = _local_batch(batch.select(indices))
            if part.adapt and groups:
                unknown.setdefault((part.params[0].device, groups), []).append(len(local))
            local.append(part)
    for (_, groups), positions in unknown.items():
        norms = [norms_of_ratios(local[i], grad_scale) for i in positions]
        total = torch.cat(norms, 1).square_()
        for group in groups:
            dist.all_reduce(total, group=group)
        parts = total.sqrt_().split([part.size(1) for part in norms], 1)
        for i, part in zip(positions, parts, strict=True):
            local[i] = local[i]._replace(norms=part)
    return local


def _sharding_groups(p: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The groups of processes over which the elements of p are spread."""
    if not isinstance(p, DTensor):
        return ()
    if any(placement.is_partial() for placement in p.placements):
        raise ValueError(f"LARS cannot update a parameter with placements {p.placements}")
    mesh = p.device_mesh
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(p.placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    )


def _local_batch(batch: Batch) -> Batch:
    params, grads, buffers = batch.params, batch.grads, batch.buffers
    return batch._replace(
        params=[p.to_local() if isinstance(p, DTensor) else p for p in params],
        grads=[_local_grad(g, p) for g, p in zip(grads, params, strict=True)],
        buffers=[_local_buffer(v, p) for v, p in zip(buffers, params, strict=False)],
    )


def _local_grad(grad: Tensor, p: Tensor) -> Tensor:
    if not isinstance(p, DTensor):
        return grad
    if not isinstance(grad, DTensor):
        raise ValueError(f"the gradient of a DTensor must be a DTensor, got {type(grad).__name__}")
    return grad.redistribute(p.device_mesh, p.placements).to_local()


def _local_buffer(buffer: Tensor, p: Tensor) -> Tensor:
    if not isinstance(p, DTensor):
        return buffer
    if not isinstance(buffer, DTensor) or buffer.placements != p.placements:
        raise ValueError(
            "the momentum_buffer of a DTensor must be sharded as its parameter is; load states "
            "with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )
    return buffer.to_local()
