"""Contrastive losses with several positives per row: with labels, and with more than two views."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from simclr_fast.losses.nt_xent import (
    _check_matrix,
    _reduction_code,
    _temperature_tensor,
    nt_xent_loss,
    refuse_transforms,
)
from simclr_fast.losses.ranks import RankRows
from simclr_fast.ops import nt_xent, sup_con
from simclr_fast.utils.numbers import as_int


def sup_con_loss(
    z: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Supervised contrastive loss, L_out (Khosla et al. 2020, equation 2).

    The positives of a row are the other rows of its class. Its loss is the mean over them of
    -log(softmax over all other rows). A row without positives has the loss 0, which counts in the
    mean, as in the authors' code. Memory is O(M·D). The result is deterministic. There is no double
    backward.

    z: [M, D], any strides, any views of any images; float64, float32, bfloat16 or float16;
        arithmetic and loss are float32 or wider. z is normalised here, as in `nt_xent_loss`.
    labels: [M], integers, on z's device.
    temperature, group: as in `nt_xent_loss`. Rows of other ranks are positives as well.
    reduction: "mean" or "sum" over the M rows, or "none": [M].
    """
    _check_matrix("z", z, least=1 if group is None else 0)
    refuse_transforms(z, temperature)
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.shape != z.shape[:1]:
        raise ValueError(
            f"labels must hold one label per row of z {list(z.shape)}, got shape "
            f"{list(labels.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.device != z.device:
        raise ValueError(f"labels must be on z's device, {z.device}, got {labels.device}")
    code = _reduction_code(reduction, group)
    tau = _temperature_tensor(temperature, z)
    if group is None:
        ids, inverse_count = _classes(labels, tau.dtype)
        return _SupCon.apply(z, tau, ids, inverse_count, code, None)
    ranks = RankRows.exchange(z.size(0), z.device, group)
    ids, inverse_count = _classes(ranks.gather(labels), tau.dtype)
    return _SupCon.apply(z, tau, ids, inverse_count, code, ranks)


def multi_view_nt_xent_loss(
    views: Tensor | Sequence[Tensor],
    n_views: int | None = None,
    temperature: float | Tensor = 0.5,
    *,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """NT-Xent of two or more views of N images (multi-crop): every other view is a positive.

    It is `sup_con_loss` with the image as the class (Khosla et al. 2020, section 3.2.1). For two
    views it is `nt_xent_loss`.

    views: a sequence of [N, D] tensors, one per view; or [n_views·N, D], view after view.
    temperature, reduction, group: as in `sup_con_loss`. Different ranks have different images.
    """
    if isinstance(views, Tensor):
        if n_views is None:
            raise ValueError("n_views must be given with a single tensor of views, got None")
        n_views, z = as_int("n_views", n_views, 2), views
    else:
        if len(views) < 2:
            raise ValueError(f"views must hold at least two views, got {len(views)}")
        if n_views not in (None, len(views)):
            raise ValueError(f"n_views is {n_views}, but views has {len(views)} tensors")
        shapes = [list(view.shape) for view in views]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"views must have one shape, got {shapes}")
        n_views, z = len(views), torch.cat(tuple(views))
    _check_matrix("views", z, least=1 if group is None else 0)
    if z.size(0) % n_views:
        raise ValueError(f"views must hold n_views={n_views} views, got {z.size(0)} rows")
    if n_views == 2:
        return nt_xent_loss(z, None, temperature, reduction=reduction, group=group)
    images = torch.arange(z.size(0) // n_views, device=z.device)
    if group is not None:
        # Different numbers on every rank.
        images = images + (dist.get_rank(group) << 40)
    return sup_con_loss(z, images.repeat(n_views), temperature, reduction=reduction, group=group)


def _classes(labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The class of each row as a number, int32 [M], and 1 / (number of its positives), [M].

    The latter is 0 for a row without positives. Does not sync.
    """
    ordered = labels.sort().values
    first = torch.searchsorted(ordered, labels)
    positives = torch.searchsorted(ordered, labels, right=True) - first - 1
    inverse = torch.where(positives > 0, positives.to(dtype).reciprocal(), 0)
    return first.to(torch.int32), inverse


class _Saved(NamedTuple):
    """Tensors that the backward pass needs. Those named "all" have the rows of all ranks."""

    u_all: Tensor
    lse_all: Tensor
    ids: Tensor
    inverse_count: Tensor
    inv_norm: Tensor
    z: Tensor
    temperature: Tensor


class _SupCon(torch.autograd.Function):
    """With ranks, gathers embeddings and losses in the forward, and nothing in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        temperature: Tensor,
        ids: Tensor,
        inverse_count: Tensor,
        reduction: int,
        ranks: RankRows | None,
    ) -> Tensor:
        u, inv_norm = sup_con.normalize(z, temperature)
        u_all = u if ranks is None else ranks.gather(u)
        ctx.row_offset = 0 if ranks is None else ranks.offset
        row_loss, lse = sup_con.row_loss(
            u_all, ids, inverse_count, temperature, ctx.row_offset, u.size(0)
        )
        if ranks is not None:
            values = ranks.gather(torch.stack((row_loss, lse), 1))  # [M, 2]
            row_loss, lse = values[:, 0].to(row_loss.dtype), values[:, 1].contiguous()
        ctx.save_for_backward(*_Saved(u_all, lse, ids, inverse_count, inv_norm, z, temperature))
        ctx.num_ranks = 1 if ranks is None else len(ranks.counts)
        ctx.mean = reduction == nt_xent.MEAN
        if reduction == nt_xent.NONE:
            return row_loss
        return row_loss.mean() if ctx.mean else row_loss.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = _Saved(*ctx.saved_tensors)
        total = saved.u_all.size(0)
        grad = grad * (ctx.num_ranks / total if ctx.mean else ctx.num_ranks)
        grad_z, grad_temperature = sup_con.backward(
            grad.expand(total),
            saved.u_all,
            saved.lse_all,
            saved.ids,
            saved.inverse_count,
            saved.inv_norm,
            saved.z,
            saved.temperature,
            ctx.row_offset,
        )
        return grad_z, grad_temperature, None, None, None, None
