"""NT-Xent's ops in plain torch, by blocks of rows in O(M·D) memory.

They serve the devices and dtypes without a kernel. Arguments, results and the order of rows are
those of the kernels (see nt_xent.py): row 2k is view 1 of pair k and row 2k+1 its view 2, so the
positive of row i is row i ^ 1.

Steps that would lose digits are computed in the widest dtype of the device (`widest_float`). On
devices without float64 the denominators are rounded to float32, which changes gradients by about
6e-8 / temperature, relatively, and the temperature's by up to twice that.
"""

import math

import torch
from torch import Tensor

from simclr_fast.ops.library import widest_float

LOG2E = math.log2(math.e)
LN2 = math.log(2)
NORM_EPS = 1e-12
BLOCK_ROWS = 512
LARGEST_LOGIT = 1e30


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in float64, or in float32 on a device without float64."""
    return tensor.to(widest_float(tensor.device))


def interleave(z1: Tensor, z2: Tensor | None) -> Tensor:
    """Two [N, D], or one [2N, D] with view 1 first → [2N, D] with the rows of a pair adjacent."""
    pairs = z1.unflatten(0, (2, -1)) if z2 is None else torch.stack((z1, z2))
    return pairs.transpose(0, 1).flatten(0, 1)


def unit_rows(z: Tensor) -> tuple[Tensor, Tensor]:
    """z/|z| [M, D] and max(|z|, 1e-12) [M, 1], wide."""
    z = wide(z)
    norm = torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp_min(NORM_EPS)
    return z / norm, norm


def normalize(z1: Tensor, z2: Tensor | None, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(log2(e)/temperature)·z/|z| [2N, D] and 1/max(|z|, 1e-12) [2N], interleaved."""
    return scaled_unit_rows(interleave(z1, z2), temperature)


def scaled_unit_rows(z: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    u, norm = unit_rows(z)
    dtype = statistics_dtype(z.dtype)
    scale = (LOG2E / wide(temperature)).sqrt()
    return (u * scale).to(dtype), norm[:, 0].reciprocal().to(dtype)


def forward(
    u_all: Tensor,
    temperature: Tensor,
    row_offset: int,
    num_rows: int,
    decoupled: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of `num_rows` rows from `row_offset` on, against all M rows.

    decoupled: leave the positive out of the denominator (Yeh et al. 2022, equation 5).

    Returns:
        loss: [R]. lse: [R], wide: the logarithm of the denominator.
        stats: [R, 4], or [0, 4] without statistics. Columns 0 and 1 are for the rows of the other
            view: whether the positive is above all negatives, and the entropy in nats. Columns 2
            and 3 are the same for all rows.
    """
    columns = torch.arange(u_all.size(0), device=u_all.device)
    losses, lses, stats = [], [], [u_all.new_empty(0, 4)]
    for start in range(row_offset, row_offset + num_rows, BLOCK_ROWS):
        i = columns[start : min(start + BLOCK_ROWS, row_offset + num_rows)]
        # Logits in base 2, computed as in the backward pass: both must get the same numbers.
        x = matmul(u_all[i], u_all.T)
        # From the same product as the negatives, so that equal rows tie but for rounding: BLAS may
        # add up the last columns in another order than the others.
        rounding = 2 * math.sqrt(u_all.size(1)) * torch.finfo(x.dtype).eps / temperature
        compared = x.gather(1, (i ^ 1)[:, None])[:, 0] * LN2 - rounding
        x[columns[None, :] // 2 == i[:, None] // 2] = -math.inf
        positive = (wide(u_all[i]) * wide(u_all[i ^ 1])).sum(1) * LN2
        highest = x.amax(1).clamp_min(-LARGEST_LOGIT)
        sums = (x - highest[:, None]).exp2().sum(1)
        negatives = wide(highest) * LN2 + wide(sums).log()
        # This is log(pos + neg) - log(pos), without cancellation.
        loss = negatives - positive
        if not decoupled:
            loss = torch.logaddexp(torch.zeros_like(loss), loss)
        losses.append(loss.to(u_all.dtype))
        lses.append(positive + loss)
        if statistics:
            s = x * LN2
            same_view = (columns[None, :] ^ i[:, None]) & 1 == 0
            other = s.masked_fill(same_view, -math.inf)
            positive = positive.to(s.dtype)
            contrastive = _statistics(other, positive, compared)
            stats.append(torch.stack(contrastive + _statistics(s, positive, compared), 1))
    return torch.cat(losses), torch.cat(lses), torch.cat(stats)


def backward(
    grad: Tensor,
    mean: bool,
    u_all: Tensor,
    lse_all: Tensor,
    row_loss: Tensor,
    inv_norm: Tensor,
    z1: Tensor,
    z2: Tensor | None,
    temperature: Tensor,
    row_offset: int,
    decoupled: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of sum(grad · loss): of this rank's rows of z, [R, D] view 1 first, and of
    temperature.

    grad: [M], or [] for all rows; with `mean` it is divided by M.
    """
    num_rows = inv_norm.numel()
    grad_all = (grad / u_all.size(0) if mean else grad).expand(u_all.size(0))
    columns = torch.arange(u_all.size(0), device=u_all.device)
    grad_u = u_all.new_empty(num_rows, u_all.size(1))
    # Round lse to u's dtype and fold the rounding error into the gradient's factor.
    lse2 = (lse_all * LOG2E).to(u_all.dtype)
    factor = (grad_all * (lse2 - lse_all * LOG2E).exp2()).to(u_all.dtype)
    for start in range(row_offset, row_offset + num_rows, BLOCK_ROWS):
        i = columns[start : min(start + BLOCK_ROWS, row_offset + num_rows)]
        x = matmul(u_all[i], u_all.T)
        w = (x - lse2[i][:, None]).exp2() * factor[i][:, None] + (x - lse2).exp2() * factor
        w[columns[None, :] // 2 == i[:, None] // 2] = 0
        grad_u[i - row_offset] = matmul(w, u_all)
    grad_u /= (LOG2E * temperature).sqrt()
    # The projection below removes u, so the positive's term may be q·(u - its positive): for
    # aligned views this difference is small, and taking it wide keeps its leading digits.
    u, norm = unit_rows(interleave(z1, z2))
    local = torch.arange(num_rows, device=u.device)
    q = torch.full_like(row_loss, -1) if decoupled else torch.expm1(-wide(row_loss))
    q = q * grad_all[row_offset : row_offset + num_rows] / temperature
    q = (q + q[local ^ 1])[:, None]
    grad_u = wide(grad_u) + q * (u[local ^ 1] - u)
    along = (grad_u * u).sum(1, keepdim=True)
    # A clamped norm is a constant: there is no projection, and the q·u that was subtracted above is
    # added again.
    radial = torch.where(norm > NORM_EPS, along, -q)
    grad_z = (grad_u - radial * u) / norm
    grad_temperature = (along + q * (u * u).sum(1, keepdim=True)).sum() / (-2 * temperature)
    grad_z = grad_z.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
    return grad_z.to(z1.dtype).contiguous(), grad_temperature.to(temperature.dtype)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    # Autocast would round to 16 bits.
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _statistics(negatives: Tensor, positive: Tensor, compared: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the positive is above all negatives, and the entropy of the softmax: [B] each.

    negatives: logits [B, M]. positive: [B], wide, for the entropy. compared: [B], the same computed
    like the negatives, less what rounding may add to it, for the comparison with them.
    """
    logits = torch.cat((positive[:, None], negatives), 1)
    log_p = logits.log_softmax(1)
    entropy = -torch.where(logits == -math.inf, 0, log_p.exp() * log_p).sum(1)
    return (compared > negatives.amax(1)).to(positive.dtype), entropy


def mean_statistics(
    row_loss: Tensor, lse: Tensor, stats: Tensor, u: Tensor, temperature: Tensor
) -> Tensor:
    """The six values of `NTXentStats`, [6], from interleaved rows."""
    contrastive = stats[0::2, :2].mean(0)
    both_views = stats[:, 2:].mean(0)
    positive = wide(lse - row_loss).mean() * temperature
    u, num_rows = wide(u), u.size(0)
    # Row by row first: over all values the order of torch's sum depends on the number of threads.
    squares = u.square().sum(1).sum()
    total = (u.sum(0).square().sum() - squares) * temperature / LOG2E
    if num_rows > 2:
        negative = (total - num_rows * positive) / (num_rows * (num_rows - 2))
    else:
        negative = total * math.nan
    similarities = torch.stack((positive, negative))
    return torch.cat((contrastive, both_views, similarities)).to(row_loss.dtype)
