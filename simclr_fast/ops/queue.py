"""The ops of the loss against a queue of keys, by tiles of rows and keys, on every device.

They are plain torch: nearly all of their time is matrix products. Steps that would lose digits are
computed in the widest dtype of the device, as in nt_xent_plain.py.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from simclr_fast.ops.library import define_op, refuse_gradient_of, widest_float
from simclr_fast.ops.nt_xent_plain import (
    BLOCK_ROWS,
    LARGEST_LOGIT,
    LN2,
    LOG2E,
    NORM_EPS,
    matmul,
    statistics_dtype,
    unit_rows,
    wide,
)

# Keys of a tile: with BLOCK_ROWS rows, 8 MB of float32 logits.
_TILE_KEYS = 4096


def _row_loss(z: Tensor, keys: Tensor, queue: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(z.dtype)
    u, positive = _unit_and_positive(z, keys, temperature)
    scale = LOG2E / temperature
    losses, lses = [z.new_empty(0, dtype=dtype)], [u.new_empty(0)]
    for rows in _slices(len(z), BLOCK_ROWS):
        block = u[rows].to(dtype)
        lse = None
        for tile in _slices(len(queue), _TILE_KEYS):
            # Logits in base 2.
            x = matmul(block, queue[tile].to(dtype).T) * scale
            highest = x.amax(1).clamp_min(-LARGEST_LOGIT)
            sums = (x - highest[:, None]).exp2().sum(1)
            part = wide(highest) * LN2 + wide(sums).log()
            lse = part if lse is None else torch.logaddexp(lse, part)
        assert lse is not None
        # log(pos + neg) - log(pos), without cancellation.
        loss = torch.logaddexp(torch.zeros_like(lse), lse - positive[rows])
        losses.append(loss.to(dtype))
        lses.append(positive[rows] + loss)
    return torch.cat(losses), torch.cat(lses)


def _row_loss_shapes(z: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    rows = z.size(0)
    return (
        z.new_empty(rows, dtype=statistics_dtype(z.dtype)),
        z.new_empty(rows, dtype=widest_float(z.device)),
    )


def _backward(
    grad: Tensor,
    z: Tensor,
    keys: Tensor,
    queue: Tensor,
    temperature: Tensor,
    row_loss: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    dtype = row_loss.dtype
    u, norm = unit_rows(z)
    k, _ = unit_rows(keys)
    scale = LOG2E / temperature
    # Round lse to the dtype of the logits and fold the rounding error into the gradient's factor.
    lse2 = (lse * LOG2E).to(dtype)
    factor = (grad * (lse2 - lse * LOG2E).exp2()).to(dtype)
    negatives = torch.zeros_like(u, dtype=dtype)
    for rows in _slices(len(z), BLOCK_ROWS):
        block = u[rows].to(dtype)
        for tile in _slices(len(queue), _TILE_KEYS):
            others = queue[tile].to(dtype)
            x = matmul(block, others.T) * scale
            w = (x - lse2[rows, None]).exp2() * factor[rows, None]
            negatives[rows] += matmul(w, others)
    # The projection below removes u, so the positive's term may be q·(k - u): for aligned views
    # this difference is small, and taking it wide keeps its leading digits.
    q = (torch.expm1(-wide(row_loss)) * grad / temperature)[:, None]
    grad_u = wide(negatives) / temperature + q * (k - u)
    along = (grad_u * u).sum(1, keepdim=True)
    # A clamped norm is a constant: there is no projection, and the q·u that was subtracted above is
    # added again.
    radial = torch.where(norm > NORM_EPS, along, -q)
    grad_z = (grad_u - radial * u) / norm
    grad_temperature = (along + q * (u * u).sum(1, keepdim=True)).sum() / -temperature
    return grad_z.to(z.dtype), grad_temperature.to(temperature.dtype)


def _backward_shapes(
    grad: Tensor, z: Tensor, keys: Tensor, queue: Tensor, temperature: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), torch.empty_like(temperature)


def _unit_and_positive(z: Tensor, keys: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """z/|z| [R, D], and the logit of each row's own key [R]; both wide."""
    u, _ = unit_rows(z)
    return u, (u * unit_rows(keys)[0]).sum(1) / temperature


def _slices(count: int, size: int) -> Iterator[slice]:
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


# z: [R, D]. keys: [R, D], of any length. queue: [K, D], unit vectors. row_loss: [R], float32 or
# wider. lse: [R], wide: the logarithm of the denominator.
row_loss = define_op(
    "queue_row_loss(Tensor z, Tensor keys, Tensor queue, Tensor temperature)"
    " -> (Tensor row_loss, Tensor lse)",
    kernel=_row_loss,
    shapes=_row_loss_shapes,
)
# Gradients of sum(grad · row_loss): of z and of temperature. grad: [R].
backward = define_op(
    "queue_backward(Tensor grad, Tensor z, Tensor keys, Tensor queue, Tensor temperature,"
    " Tensor row_loss, Tensor lse) -> (Tensor grad_z, Tensor grad_temperature)",
    kernel=_backward,
    shapes=_backward_shapes,
)
refuse_gradient_of("queue_backward")
