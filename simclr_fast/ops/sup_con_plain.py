"""The supervised contrastive loss's ops in plain torch. They are built like nt_xent_plain.py.

ids: [M], equal for rows of one class. inverse_count: [M], 1 / (the number of a row's positives), or
0 without positives.
"""

import math

import torch
from torch import Tensor

from simclr_fast.ops.nt_xent_plain import (
    BLOCK_ROWS,
    LARGEST_LOGIT,
    LN2,
    LOG2E,
    NORM_EPS,
    matmul,
    scaled_unit_rows,
    unit_rows,
    wide,
)

normalize = scaled_unit_rows


def forward(
    u_all: Tensor,
    ids: Tensor,
    inverse_count: Tensor,
    temperature: Tensor,
    row_offset: int,
    num_rows: int,
) -> tuple[Tensor, Tensor]:
    """Losses of `num_rows` rows from `row_offset` on, against all M rows.

    Returns:
        loss: [R], 0 without positives. lse: [R], wide: the logarithm of the denominator.
    """
    columns = torch.arange(u_all.size(0), device=u_all.device)
    losses, lses = [], []
    for start in range(row_offset, row_offset + num_rows, BLOCK_ROWS):
        i = columns[start : min(start + BLOCK_ROWS, row_offset + num_rows)]
        x = matmul(u_all[i], u_all.T)
        positives = _positives(ids, i, columns)
        positive = wide(torch.where(positives, x, 0)).sum(1) * inverse_count[i] * LN2
        x[columns[None, :] == i[:, None]] = -math.inf
        highest = x.amax(1).clamp_min(-LARGEST_LOGIT)
        sums = (x - highest[:, None]).exp2().sum(1)
        lse = wide(highest) * LN2 + wide(sums).log()
        losses.append(torch.where(inverse_count[i] > 0, lse - positive, 0).to(u_all.dtype))
        lses.append(lse)
    return torch.cat(losses), torch.cat(lses)


def backward(
    grad: Tensor,
    u_all: Tensor,
    lse_all: Tensor,
    ids: Tensor,
    inverse_count: Tensor,
    inv_norm: Tensor,
    z: Tensor,
    temperature: Tensor,
    row_offset: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of sum(grad · loss): of this rank's rows of z, [R, D], and of temperature.

    grad: [M].
    """
    num_rows = inv_norm.numel()
    columns = torch.arange(u_all.size(0), device=u_all.device)
    grad_u = u_all.new_empty(num_rows, u_all.size(1))
    share = grad.to(u_all.dtype) * inverse_count
    grad = torch.where(inverse_count > 0, grad, 0).to(u_all.dtype)
    for start in range(row_offset, row_offset + num_rows, BLOCK_ROWS):
        i = columns[start : min(start + BLOCK_ROWS, row_offset + num_rows)]
        s = wide(matmul(u_all[i], u_all.T)) * LN2
        s[columns[None, :] == i[:, None]] = -math.inf
        w = (s - lse_all[i][:, None]).exp() * grad[i][:, None] + (s - lse_all).exp() * grad
        w -= torch.where(_positives(ids, i, columns), share[i][:, None] + share, 0)
        grad_u[i - row_offset] = matmul(w.to(u_all.dtype), u_all)
    grad_u = wide(grad_u) / (LOG2E * temperature).sqrt()
    u, norm = unit_rows(z)
    along = (grad_u * u).sum(1, keepdim=True)
    grad_z = (grad_u - torch.where(norm > NORM_EPS, along, 0) * u) / norm
    return grad_z.to(z.dtype), (along.sum() / (-2 * temperature)).to(temperature.dtype)


def _positives(ids: Tensor, i: Tensor, columns: Tensor) -> Tensor:
    """Whether the columns are positives of rows i: bool [rows, columns]."""
    return (ids[i][:, None] == ids) & (columns[None, :] != i[:, None])
