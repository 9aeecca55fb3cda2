"""google-research/simclr: `from simclr_fast.compat.google_simclr import add_contrastive_loss`."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from simclr_fast.losses.nt_xent import nt_xent_loss
from simclr_fast.ops.library import has_ambient_state

# tf.math.l2_normalize divides by the norm, but by no less than this.
_LEAST_NORM = 1e-6


def add_contrastive_loss(
    hidden: Tensor,
    hidden_norm: bool = True,
    temperature: float = 1.0,
    tpu_context: None = None,
    weights: float | Tensor = 1.0,
    *,
    strategy: None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of both views' losses, each a mean over N rows. It is twice `nt_xent_loss`.

    hidden: [2N, D], view 1 first.
    hidden_norm: False: do not normalise the rows. The loss then needs O(N²) memory.
    tpu_context, strategy: must be None; `nt_xent_loss` has `group` for several processes. The first
        is an argument of the TensorFlow 1 version, the second of that for TensorFlow 2.
    weights: a number, or one for each pair, [N]. As in TensorFlow, the weighted losses are divided
        by the number of weights that are not zero.

    On the CPU, rows shorter than 1e-6 are divided by 1e-6, as TensorFlow does. On other devices and
    under torch.compile they get length 1, as in `nt_xent_loss`: the host would have to wait to see
    them.

    Returns:
        The loss, the logits of view 1 against view 2 [N, N], and the labels [N, 2N] (one-hot, for
        the logits [N, 2N] of a whole row). Logits and labels need O(N²) memory.
        `nt_xent_loss(..., return_stats=True)` has accuracy and entropy without them.
    """
    for name, value in (("tpu_context", tpu_context), ("strategy", strategy)):
        if value is not None:
            raise ValueError(
                f"{name} must be None, got {value!r}; for several processes use "
                "simclr_fast.nt_xent_loss(..., group=...)"
            )
    if hidden.dim() != 2 or len(hidden) % 2:
        raise ValueError(
            f"hidden must be [2N, D], both views of each image, got {list(hidden.shape)}"
        )
    num_pairs = len(hidden) // 2
    if isinstance(weights, Tensor) and weights.shape not in ((), (num_pairs,)):
        raise ValueError(
            f"weights must be a number or a tensor [{num_pairs}], got shape {list(weights.shape)}"
        )
    unit = hidden
    if hidden_norm:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        norms = torch.linalg.vector_norm(hidden, dim=1, keepdim=True, dtype=wide)
        unit = hidden / norms.clamp(min=_LEAST_NORM)
    if not hidden_norm or _has_short_rows(norms):
        logits = (unit @ unit.T / temperature).fill_diagonal_(-math.inf)
        positive = torch.arange(len(hidden), device=hidden.device).roll(num_pairs)
        loss = _weighted(F.cross_entropy(logits, positive, reduction="none"), weights)
    elif isinstance(weights, Tensor):
        loss = _weighted(nt_xent_loss(hidden, None, temperature, reduction="none"), weights)
    else:
        loss = 2 * weights * nt_xent_loss(hidden, None, temperature)
    first, second = unit.chunk(2)
    labels = torch.eye(num_pairs, 2 * num_pairs, dtype=unit.dtype, device=hidden.device)
    return loss, first @ second.T / temperature, labels


def _has_short_rows(norms: Tensor) -> bool:
    # Only plain tensors on the CPU have values that Python may branch on.
    can_look = norms.device.type == "cpu" and type(norms) is Tensor and not has_ambient_state()
    return can_look and bool((norms < _LEAST_NORM).any())


def _weighted(rows: Tensor, weights: float | Tensor) -> Tensor:
    """The weighted loss of rows [2N], view 1's first."""
    losses = rows.view(2, -1).sum(0)
    if not isinstance(weights, Tensor):
        return losses.mean() * weights
    weights = weights.to(losses.device).expand_as(losses)
    return (losses * weights).sum() / (weights != 0).sum().clamp(min=1)
