"""NT-Xent's ops in plain torch, for devices and dtypes without a kernel; by blocks of rows, O(M·D).

Same arguments, results and row order as the kernels (`simclr_fast/ops.py`): rows are interleaved,
2k is view 1 of pair k and 2k+1 its view 2, so the positive of row i is row i ^ 1.
"""

import math

import torch
from torch import Tensor

LOG2E = math.log2(math.e)
NORM_EPS = 1e-12
BLOCK_ROWS = 512


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def interleave(z1: Tensor, z2: Tensor | None) -> Tensor:
    """[N, D] twice, or [2N, D] with view 1 first -> [2N, D] with the rows of a pair adjacent."""
    pairs = z1.unflatten(0, (2, -1)) if z2 is None else torch.stack((z1, z2))
    return pairs.transpose(0, 1).flatten(0, 1)


def normalize(z1: Tensor, z2: Tensor | None, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """u = sqrt(log2(e)/temperature)·z/|z| [2N, D] and 1/max(|z|, 1e-12) [2N], interleaved."""
    z = interleave(z1, z2).to(statistics_dtype(z1.dtype))
    norm = torch.linalg.vector_norm(z, dim=1, dtype=torch.float64).clamp_min(NORM_EPS)
    scale = (LOG2E / temperature.double()).sqrt()
    return z * (scale / norm).to(z.dtype)[:, None], norm.reciprocal().to(z.dtype)


def forward(
    u_all: Tensor, temperature: Tensor, row_offset: int, rows: int, statistics: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and log-sum-exp [rows] of rows row_offset.. against all M rows; statistics [rows, 4]."""
    columns = torch.arange(u_all.size(0), device=u_all.device)
    losses, lses, stats = [], [], [u_all.new_empty(0, 4)]
    for start in range(row_offset, row_offset + rows, BLOCK_ROWS):
        i = columns[start : min(start + BLOCK_ROWS, row_offset + rows)]
        s = _logits(u_all[i], u_all)
        positive = s.gather(1, (i ^ 1)[:, None])[:, 0]
        s[columns[None, :] // 2 == i[:, None] // 2] = -math.inf
        negatives = s.logsumexp(1)
        # log(pos + neg) - log(pos) without the cancellation of that difference.
        loss = torch.logaddexp(torch.zeros_like(positive), negatives - positive)
        losses.append(loss)
        lses.append(positive + loss)
        if statistics:
            same_view = (columns[None, :] ^ i[:, None]) & 1 == 0
            other = s.masked_fill(same_view, -math.inf)
            stats.append(torch.stack(_statistics(other, positive) + _statistics(s, positive), 1))
    return torch.cat(losses), torch.cat(lses), torch.cat(stats)


def backward(
    grad_all: Tensor,
    u_all: Tensor,
    lse_all: Tensor,
    loss: Tensor,
    inv_norm: Tensor,
    temperature: Tensor,
    row_offset: int,
    dim: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradients of sum(grad_all · loss): local rows of z, [R, dim] view-major, and temperature."""
    count = inv_norm.numel()
    u = u_all[row_offset : row_offset + count]
    grad = grad_all[row_offset : row_offset + count]
    q = -torch.expm1(-loss) * grad
    scale = (LOG2E / temperature).sqrt()
    grad_u = torch.empty_like(u)
    columns = torch.arange(u_all.size(0), device=u_all.device)
    for start in range(0, count, BLOCK_ROWS):
        block = slice(start, min(start + BLOCK_ROWS, count))
        i = columns[row_offset:][block]
        s = _logits(u_all[i], u_all)
        w = grad_all[i][:, None] * (s - lse_all[i][:, None]).exp() + grad_all * (s - lse_all).exp()
        w.scatter_(1, i[:, None], 0.0)
        partner = torch.arange(start, block.stop, device=u.device) ^ 1
        w.scatter_(1, (i ^ 1)[:, None], -(q[block] + q[partner])[:, None])
        grad_u[block] = w @ u_all
    grad_u /= temperature * scale
    u = u / scale
    radial = (grad_u * u).sum(1)
    unclamped = inv_norm < 1 / NORM_EPS
    grad_z = (grad_u - torch.where(unclamped, radial, 0)[:, None] * u) * inv_norm[:, None]
    grad_temperature = radial.sum() / (-2 * temperature)
    grad_z = grad_z[:, :dim].unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
    return grad_z.to(dtype).contiguous(), grad_temperature


def _logits(rows: Tensor, columns: Tensor) -> Tensor:
    # Autocast would round the embeddings to 16 bits.
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ columns.T * math.log(2)


def _statistics(negatives: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the positive wins, and the entropy of softmax, of logits [B, M] and positives [B]."""
    logits = torch.cat((positive[:, None], negatives), 1)
    log_p = logits.log_softmax(1)
    entropy = -torch.where(logits == -math.inf, 0, log_p.exp() * log_p).sum(1)
    return (positive > negatives.amax(1)).to(positive.dtype), entropy
