"""Weighted k-NN beside scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from simclr_fast.evaluation import knn
from simclr_fast.evaluation.accuracy import true_class_rank
from simclr_fast.evaluation.knn import TAU, knn_ranks, nearest, votes


def data(n, m, dim=6, classes=4):
    generator = torch.Generator().manual_seed(n)
    labels = [torch.randint(0, classes, (count,), generator=generator) for count in (n, m)]
    centers = torch.randn(classes, dim, generator=generator)
    features = [centers[y] + 0.9 * torch.randn(len(y), dim, generator=generator) for y in labels]
    return features[0], labels[0], features[1], labels[1]


@pytest.mark.parametrize("k", [1, 20, 200])
def test_weighted_knn_equals_scikit_learns(k):
    train, labels, test, test_labels = data(500, 101)
    theirs = KNeighborsClassifier(
        k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / TAU)
    ).fit(train.double().numpy(), labels)
    probability = theirs.predict_proba(test.double().numpy())
    similarities, indices = nearest(test, train, k)
    ours = votes(similarities, labels[indices], 4)
    assert torch.allclose(
        ours / ours.sum(1, keepdim=True), torch.from_numpy(probability), atol=1e-5
    )
    found = knn_ranks(train, labels, test, test_labels, 4, ks=(k,))[k]
    assert torch.equal(found, true_class_rank(torch.from_numpy(probability), test_labels))
    assert torch.equal(
        found == 0, torch.from_numpy(theirs.predict(test.double().numpy())) == test_labels
    )


@pytest.mark.parametrize(("query_block", "bank_block"), [(7, 11), (1, 1000), (1000, 3)])
def test_results_do_not_depend_on_the_block_sizes(query_block, bank_block):
    train, _, test, _ = data(150, 40)
    similarities, indices = nearest(test, train, 9)
    parts = nearest(test, train, 9, query_block=query_block, bank_block=bank_block)
    assert torch.allclose(parts[0], similarities, atol=1e-6)
    assert torch.equal(parts[1], indices)
    exact = torch.nn.functional.cosine_similarity(test[:, None], train[None], dim=2)
    assert torch.equal(indices, exact.topk(9).indices)


def test_memory_stays_below_queries_times_bank():
    """Blocks of 64 × 256 in a 2,000 × 2,000 problem: no allocation comes near the whole."""
    rows = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        nearest(rows, rows, 5, query_block=64, bank_block=256)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 2000 * 2000 * 4 / 10


def test_votes_of_small_tau_stay_finite():
    similarities = torch.tensor([[0.9, 0.8, 0.8], [-0.5, -0.6, -0.9]])
    labels = torch.tensor([[0, 1, 1], [1, 0, 0]])
    found = votes(similarities, labels, 2, tau=1e-3)
    assert torch.isfinite(found).all()
    assert found.argmax(1).tolist() == [0, 1]
    assert votes(similarities, labels, 2, tau=1e3).argmax(1).tolist() == [1, 0]


def test_k_beyond_the_bank_is_left_out_and_bad_arguments_are_named():
    train, labels, test, test_labels = data(30, 9)
    assert list(knn_ranks(train, labels, test, test_labels, 4)) == [20]
    assert list(knn_ranks(train[:8], labels[:8], test, test_labels, 4)) == [8]
    with pytest.raises(ValueError, match="k must be"):
        nearest(test, train, 31)
    with pytest.raises(ValueError, match="tau"):
        knn_ranks(train, labels, test, test_labels, 4, tau=0)
    test[0, 0] = torch.inf
    with pytest.raises(ValueError, match="test features"):
        knn_ranks(train, labels, test, test_labels, 4)


@pytest.mark.parametrize("cached", [1e9, 40 * (4 * 8 + 12 * 5)])
def test_the_bank_is_moved_once_per_share_of_the_queries(monkeypatch, cached):
    """Not once per block of queries: on a GPU every pass of the bank is an upload of all of it."""
    rows = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    moved = []

    def count(part, device):
        moved.append(len(part))
        return torch.nn.functional.normalize(part, dim=1)

    whole = nearest(rows, rows, 5)
    monkeypatch.setattr(knn, "_normalized", count)
    found = nearest(rows, rows, 5, query_block=10, bank_block=64, cached_bytes=cached)
    passes = 1 if cached == 1e9 else 5
    assert sum(moved) == 200 + passes * 200
    assert torch.equal(found[1], whole[1])
    assert torch.allclose(found[0], whole[0], atol=1e-6)
