"""Supervised contrastive loss's ops in plain torch: as nt_xent_plain.py, for classes of rows.

ids: [M], equal for rows of one class. inverse_count: [M], 1 / (a row's positives), 0 without any.
"""

import math

import torch
from torch import Tensor

from simclr_fast.ops.nt_xent_plain import (
    BLOCK_ROWS,
    LARGEST_LOGIT,
    LOG2E,
    NORM_EPS,
    _matmul,
    statistics_dtype,
)


def normalize(z: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(log2(e)/temperature)·z/|z| [M, D] and 1/max(|z|, 1e-12) [M]."""
    norm = torch.linalg.vector_norm(z.double(), dim=1).clamp_min(NORM_EPS)
    u = z / norm[:, None] * (LOG2E / temperature.double()).sqrt()
    dtype = statistics_dtype(z.dtype)
    return u.to(dtype), norm.reciprocal().to(dtype)


def forward(
    u_all: Tensor,
    ids: Tensor,
    inverse_count: Tensor,
    temperature: Tensor,
    row_offset: int,
    rows: int,
) -> tuple[Tensor, Tensor]:
    """Loss [rows] of rows row_offset.. against all M rows, 0 without positives; lse [rows]."""
    columns = torch.arange(u_all.size(0), device=u_all.device)
    losses, lses = [], []
    for start in range(row_offset, row_offset + rows, BLOCK_ROWS):
        i = columns[start : min(start + BLOCK_ROWS, row_offset + rows)]
        s = _matmul(u_all[i], u_all.T) * math.log(2)
        positives = _positives(ids, i, columns)
        positive = torch.where(positives, s, 0).sum(1, dtype=torch.float64) * inverse_count[i]
        s[columns[None, :] == i[:, None]] = -math.inf
        highest = s.amax(1).clamp_min(-LARGEST_LOGIT)
        lse = highest + (s - highest[:, None]).exp().sum(1).double().log()
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
    """Gradients of sum(grad · loss), grad [M]: to local rows of z, [R, D], and temperature."""
    count = inv_norm.numel()
    columns = torch.arange(u_all.size(0), device=u_all.device)
    grad_u = u_all.new_empty(count, u_all.size(1))
    share = grad.to(u_all.dtype) * inverse_count
    grad = torch.where(inverse_count > 0, grad, 0).to(u_all.dtype)
    for start in range(row_offset, row_offset + count, BLOCK_ROWS):
        i = columns[start : min(start + BLOCK_ROWS, row_offset + count)]
        s = _matmul(u_all[i], u_all.T).double() * math.log(2)
        s[columns[None, :] == i[:, None]] = -math.inf
        w = (s - lse_all[i][:, None]).exp() * grad[i][:, None] + (s - lse_all).exp() * grad
        w -= torch.where(_positives(ids, i, columns), share[i][:, None] + share, 0)
        grad_u[i - row_offset] = _matmul(w.to(u_all.dtype), u_all)
    grad_u = grad_u.double() / (LOG2E * temperature).sqrt()
    norm = torch.linalg.vector_norm(z.double(), dim=1, keepdim=True)
    u = z / norm.clamp_min(NORM_EPS)
    along = (grad_u * u).sum(1, keepdim=True)
    grad_z = (grad_u - torch.where(norm > NORM_EPS, along, 0) * u) / norm.clamp_min(NORM_EPS)
    return grad_z.to(z.dtype), (along.sum() / (-2 * temperature)).to(temperature.dtype)


def _positives(ids: Tensor, i: Tensor, columns: Tensor) -> Tensor:
    return (ids[i][:, None] == ids) & (columns[None, :] != i[:, None])
