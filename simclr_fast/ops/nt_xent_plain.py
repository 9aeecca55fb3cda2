"""NT-Xent's ops in plain torch, for devices and dtypes without a kernel; by blocks of rows, O(M·D).

Same arguments, results and row order as the kernels (`simclr_fast.ops`): rows are interleaved,
2k is view 1 of pair k and 2k+1 its view 2, so the positive of row i is row i ^ 1.
"""

import math

import torch
from torch import Tensor

LOG2E = math.log2(math.e)
NORM_EPS = 1e-12
BLOCK_ROWS = 512
LARGEST_LOGIT = 1e30


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def interleave(z1: Tensor, z2: Tensor | None) -> Tensor:
    """[N, D] twice, or [2N, D] with view 1 first -> [2N, D] with the rows of a pair adjacent."""
    pairs = z1.unflatten(0, (2, -1)) if z2 is None else torch.stack((z1, z2))
    return pairs.transpose(0, 1).flatten(0, 1)


def unit_rows(z1: Tensor, z2: Tensor | None) -> tuple[Tensor, Tensor]:
    """z/|z| [2N, D] and max(|z|, 1e-12) [2N], interleaved, float64."""
    z = interleave(z1, z2).double()
    norm = torch.linalg.vector_norm(z, dim=1).clamp_min(NORM_EPS)
    return z / norm[:, None], norm


def normalize(z1: Tensor, z2: Tensor | None, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(log2(e)/temperature)·z/|z| [2N, D] and 1/max(|z|, 1e-12) [2N], interleaved."""
    u, norm = unit_rows(z1, z2)
    dtype = statistics_dtype(z1.dtype)
    return (u * (LOG2E / temperature.double()).sqrt()).to(dtype), norm.reciprocal().to(dtype)


def forward(
    u_all: Tensor,
    temperature: Tensor,
    row_offset: int,
    rows: int,
    decoupled: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [rows] of rows row_offset.. against all M rows, log of its denominator in float64.

    decoupled: the positive is left out of the denominator (Yeh et al. 2022, equation 5).

    Also [rows, 4] (else [0, 4]): whether the positive wins, and the entropy in nats, against the
    other view's rows, and the same two against all rows.
    """
    columns = torch.arange(u_all.size(0), device=u_all.device)
    losses, lses, stats = [], [], [u_all.new_empty(0, 4)]
    for start in range(row_offset, row_offset + rows, BLOCK_ROWS):
        i = columns[start : min(start + BLOCK_ROWS, row_offset + rows)]
        s = _matmul(u_all[i], u_all.T) * math.log(2)
        # Compared with its negatives as it was multiplied with them: equal rows must tie.
        compared = s.gather(1, (i ^ 1)[:, None])[:, 0]
        s[columns[None, :] // 2 == i[:, None] // 2] = -math.inf
        positive = (u_all[i].double() * u_all[i ^ 1].double()).sum(1) * math.log(2)
        highest = s.amax(1).clamp_min(-LARGEST_LOGIT)
        negatives = highest + (s - highest[:, None]).exp().sum(1).double().log()
        # log(pos + neg) - log(pos) without the cancellation of that difference.
        loss = negatives - positive
        if not decoupled:
            loss = torch.logaddexp(torch.zeros_like(loss), loss)
        losses.append(loss.to(u_all.dtype))
        lses.append(positive + loss)
        if statistics:
            same_view = (columns[None, :] ^ i[:, None]) & 1 == 0
            other = s.masked_fill(same_view, -math.inf)
            positive = positive.to(s.dtype)
            stats.append(
                torch.stack(
                    _statistics(other, positive, compared) + _statistics(s, positive, compared), 1
                )
            )
    return torch.cat(losses), torch.cat(lses), torch.cat(stats)


def backward(
    grad: Tensor,
    mean: bool,
    u_all: Tensor,
    lse_all: Tensor,
    loss: Tensor,
    inv_norm: Tensor,
    z1: Tensor,
    z2: Tensor | None,
    temperature: Tensor,
    row_offset: int,
    decoupled: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of sum(grad · loss): local rows of z, [R, D] view-major, and temperature.

    grad: [M], or [] for all rows; mean: divided by M.
    """
    count = inv_norm.numel()
    grad_all = (grad / u_all.size(0) if mean else grad).expand(u_all.size(0))
    columns = torch.arange(u_all.size(0), device=u_all.device)
    grad_u = u_all.new_empty(count, u_all.size(1))
    # In the dtype of u, and what that rounds off in a factor.
    lse2 = (lse_all * LOG2E).to(u_all.dtype)
    grad = (grad_all * (lse2 - lse_all * LOG2E).exp2()).to(u_all.dtype)
    for start in range(row_offset, row_offset + count, BLOCK_ROWS):
        i = columns[start : min(start + BLOCK_ROWS, row_offset + count)]
        x = _matmul(u_all[i], u_all.T)
        w = (x - lse2[i][:, None]).exp2() * grad[i][:, None] + (x - lse2).exp2() * grad
        w[columns[None, :] // 2 == i[:, None] // 2] = 0
        grad_u[i - row_offset] = _matmul(w, u_all)
    grad_u /= (LOG2E * temperature).sqrt()
    # The projection below removes u, so the positive's term may be q·(u - its positive): for
    # aligned views this difference is small, and taking it in float64 keeps its leading digits.
    u, norm = unit_rows(z1, z2)
    local = torch.arange(count, device=u.device)
    q = torch.full_like(loss, -1) if decoupled else torch.expm1(-loss.double())
    q = q * grad_all[row_offset : row_offset + count] / temperature
    q = (q + q[local ^ 1])[:, None]
    grad_u = grad_u.double() + q * (u[local ^ 1] - u)
    along = (grad_u * u).sum(1, keepdim=True)
    # A clamped norm is a constant: no projection, and the u that the difference left out is back.
    radial = torch.where(norm[:, None] > NORM_EPS, along, -q)
    grad_z = (grad_u - radial * u) / norm[:, None]
    grad_temperature = (along + q * (u * u).sum(1, keepdim=True)).sum() / (-2 * temperature)
    grad_z = grad_z.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
    return grad_z.to(z1.dtype).contiguous(), grad_temperature.to(temperature.dtype)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    # Autocast would round to 16 bits.
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _statistics(negatives: Tensor, positive: Tensor, compared: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the positive wins, and the entropy of softmax, of logits [B, M] and positives [B].

    compared: the positive as the negatives were computed.
    """
    logits = torch.cat((positive[:, None], negatives), 1)
    log_p = logits.log_softmax(1)
    entropy = -torch.where(logits == -math.inf, 0, log_p.exp() * log_p).sum(1)
    return (compared > negatives.amax(1)).to(positive.dtype), entropy
