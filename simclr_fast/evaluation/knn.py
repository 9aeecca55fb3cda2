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
# Memory on the device for queries and their best rows so far. With ResNet-50's features and
# k = 200 it holds 150,000 queries.
_CACHED_BYTES = 2e9


def nearest(
    queries: Tensor,
    bank: Tensor,
    k: int,
    *,
    device: torch.device | str = "cpu",
    query_block: int = _QUERIES,
    bank_block: int = _BANK,
    cached_bytes: float = _CACHED_BYTES,
) -> tuple[Tensor, Tensor]:
    """The k most similar rows of `bank` for every query, most similar first.

    queries: [n, D], bank: [m, D], on any device or mapped from a file; k ≤ m.

    The n × m similarities are never in memory at once. `device` keeps as many queries as fit
    `cached_bytes`, with their best rows so far. The bank is read once for all of them, in blocks of
    `bank_block` rows; each block's similarities to `query_block` queries are computed at a time.

    Returns:
        cosine similarities, float32 [n, k], and row numbers, int64 [n, k], on the CPU. The order of
        equally similar rows is undefined.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must be in [1, {len(bank)}], the size of the bank, got {k}")
    similarities = torch.empty(len(queries), k)
    indices = torch.empty(len(queries), k, dtype=torch.int64)
    # A query takes 4 bytes per feature, 4 per similarity and 8 per row number.
    count = max(query_block, int(cached_bytes / (4 * queries.shape[1] + 12 * k)))
    for first in range(0, len(queries), count):
        part = slice(first, first + count)
        found = _nearest_on_device(
            _normalized(queries[part], device), bank, k, query_block, bank_block
        )
        similarities[part], indices[part] = found
    return similarities, indices


def _nearest_on_device(
    queries: Tensor, bank: Tensor, k: int, query_block: int, bank_block: int
) -> tuple[Tensor, Tensor]:
    """`nearest` for normalised queries that are on the device. Copies the bank there once."""
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
    """The votes of k neighbours for each class: sums of exp(similarity / tau), [n, C].

    similarities: float32 [n, k], the largest first; neighbour_labels: int64 [n, k]. The result is
    float64 where the device has it. Each of its rows is divided by exp(largest similarity / tau),
    which does not change the order.
    """
    # Without the division a small tau would overflow.
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
    """`true_class_rank` of every test image by k-NN, int64 [m], for each k of `ks`.

    Leaves out values of `ks` above len(train); if all are, uses k = len(train).
    """
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
