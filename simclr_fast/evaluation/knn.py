"""Weighted k-nearest-neighbour classification by cosine similarity, exact.

The protocol of arXiv:1805.01978, section 3.4: each of the k most similar training images votes for
its class with the weight exp(similarity / τ).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from simclr_fast.evaluation.accuracy import true_class_rank
from simclr_fast.ops import widest_float

K = (20, 200)
TAU = 0.07
_QUERIES, _BANK = 1024, 16384
# Of queries on the device with their best rows: 150,000 of ResNet-50's features with k = 200.
_HELD_BYTES = 2e9


def nearest(
    queries: Tensor,
    bank: Tensor,
    k: int,
    *,
    device: torch.device | str = "cpu",
    query_block: int = _QUERIES,
    bank_block: int = _BANK,
    held_bytes: float = _HELD_BYTES,
) -> tuple[Tensor, Tensor]:
    """The k most similar rows of `bank` for every query, most similar first.

    queries: [n, D], bank: [m, D], on any device or mapped from a file; k ≤ m. As many queries as
    fit `held_bytes` are kept on `device` with their best rows so far, and the bank passes once by
    all of them. Beside them memory holds query_block × (bank_block + 2k) similarities, never n × m.

    Returns:
        cosine similarities, float32 [n, k], and row numbers, int64 [n, k], on the CPU. Of equally
        similar rows any may come first.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must be in [1, {len(bank)}], the size of the bank, got {k}")
    similarities = torch.empty(len(queries), k)
    indices = torch.empty(len(queries), k, dtype=torch.int64)
    # A query's features, and its k similarities and row numbers.
    held = max(query_block, int(held_bytes / (4 * queries.shape[1] + 12 * k)))
    for first in range(0, len(queries), held):
        part = slice(first, first + held)
        found = _nearest_of_held(
            _normalized(queries[part], device), bank, k, query_block, bank_block
        )
        similarities[part], indices[part] = found
    return similarities, indices


def _nearest_of_held(
    queries: Tensor, bank: Tensor, k: int, query_block: int, bank_block: int
) -> tuple[Tensor, Tensor]:
    """`nearest` for normalised queries on the device: every row of the bank is moved there once."""
    best = queries.new_full((len(queries), k), -torch.inf)
    which = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
    for b in range(0, len(bank), bank_block):
        rows = _normalized(bank[b : b + bank_block], queries.device)
        for q in range(0, len(queries), query_block):
            mine = slice(q, q + query_block)
            value, at = (queries[mine] @ rows.T).topk(min(k, len(rows)), dim=1)
            value, at = torch.cat([best[mine], value], 1), torch.cat([which[mine], at + b], 1)
            best[mine], order = value.topk(k, dim=1)
            which[mine] = at.gather(1, order)
    return best, which


def votes(
    similarities: Tensor, neighbour_labels: Tensor, n_classes: int, tau: float = TAU
) -> Tensor:
    """[n, C] sums of exp(similarity / tau) over neighbours of each class, from two [n, k]."""
    # Less the largest: a common factor per query, which keeps float32 in range for small tau.
    weights = ((similarities - similarities[:, :1]) / tau).exp()
    weights = weights.to(widest_float(weights.device))
    out = weights.new_zeros(len(weights), n_classes)
    return out.scatter_add_(1, neighbour_labels, weights)


def knn_ranks(
    train: Tensor,
    train_labels: Any,
    test: Tensor,
    test_labels: Any,
    n_classes: int,
    *,
    ks: tuple[int, ...] = K,
    tau: float = TAU,
    device: torch.device | str = "cpu",
) -> dict[int, Tensor]:
    """k → `true_class_rank` of every test image, int64 [m], for each of `ks` up to len(train)."""
    if tau <= 0:
        raise ValueError(f"tau must be positive, got {tau}")
    for name, features in (("train", train), ("test", test)):
        if not all(torch.isfinite(part).all() for part in features.split(_BANK)):
            raise ValueError(f"the {name} features are not finite: the encoder has diverged")
    targets = torch.as_tensor(np.asarray(train_labels), dtype=torch.int64)
    truth = torch.as_tensor(np.asarray(test_labels), dtype=torch.int64)
    ks = tuple(k for k in ks if k <= len(train)) or (len(train),)
    similarities, indices = nearest(test, train, max(ks), device=device)
    return {
        k: true_class_rank(
            votes(similarities[:, :k], targets[indices[:, :k]], n_classes, tau), truth
        )
        for k in ks
    }


def _normalized(rows: Tensor, device: torch.device | str) -> Tensor:
    return torch.nn.functional.normalize(rows.to(device, torch.float32), dim=1)
