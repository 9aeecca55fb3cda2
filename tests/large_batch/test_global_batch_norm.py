"""Batch norm of the whole batch against torch's own, in float64: ranks, parts, both paths."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from cuda_batch_norm import cuda_batch_norm
from rank_runs import on_ranks
from torch import nn

from simclr_fast.large_batch import global_batch_norm as gbn
from simclr_fast.large_batch.replay import global_norms

PATHS = {"composed": nullcontext, "cuda": cuda_batch_norm}


def whole(dims):
    generator = torch.Generator().manual_seed(0)
    shape = (7, 4, *[3] * (dims - 2))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 5
    return x, torch.randn(shape, generator=generator, dtype=torch.float64)


def layer(dims, **options):
    norm = (nn.BatchNorm1d if dims == 2 else nn.BatchNorm2d)(4, **options).double()
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([1.0, -2, 0.5, 3]))
            norm.bias.copy_(torch.tensor([0.1, 0, -1, 2]))
    return norm


def run(norm, x, upstream, batch):
    """y, the gradients of x, weight and bias, and the buffers."""
    share = x.clone().requires_grad_()
    with global_norms(norm, batch, False):
        y = norm(share)
        y.backward(upstream)
    return [y.detach(), share.grad, *(p.grad for p in norm.parameters()), *norm.buffers()]


def expected(norm, dims):
    x, upstream = whole(dims)
    x.requires_grad_()
    y = norm(x)
    y.backward(upstream)
    return [y.detach(), x.grad, *(p.grad for p in norm.parameters()), *norm.buffers()]


def batch_of(rows, group=None):
    batch = gbn.WholeBatch(group)
    batch.rows = list(rows)
    return batch


def one_rank(rank, folder, sizes, dims, path):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(sizes)
    )
    x, upstream = whole(dims)
    first = sum(sizes[:rank])
    mine = slice(first, first + sizes[rank])
    with PATHS[path]():
        batch = batch_of(sizes, dist.group.WORLD)
        result = run(layer(dims), x[mine], upstream[mine], batch)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("sizes", "dims"), [((3, 4), 4), ((1, 6), 2), ((7, 0), 4), ((0, 2, 5), 4)], ids=str
)
def test_ranks_equal_one_process(tmp_path, sizes, dims, path):
    on_ranks(one_rank, (str(tmp_path), sizes, dims, path), len(sizes))
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(sizes))]
    for k, reference in enumerate(expected(layer(dims), dims)):
        found = [part[k] for part in parts]
        if k < 4:
            found = [torch.cat(found) if k < 2 else sum(found)]
        for one in found:
            assert torch.allclose(one.double(), reference.double(), rtol=1e-12, atol=1e-12), k


OPTIONS = {
    "plain": {},
    "no affine": {"affine": False},
    "no buffers": {"track_running_stats": False},
    "cumulative": {"momentum": None},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("limit", [2**31 - 1, 80, 40])
@pytest.mark.parametrize("dims", [2, 4])
def test_cuda_path_equals_torch(dims, limit, options, monkeypatch):
    """limit: what 32 bits could address and count. Smaller ones cut x [7, 4, 3, 3] in parts."""
    monkeypatch.setattr(gbn, "_INT32_MAX", limit)
    found = layer(dims, **OPTIONS[options])
    reference = expected(layer(dims, **OPTIONS[options]), dims)
    with cuda_batch_norm():
        for have, want in zip(run(found, *whole(dims), batch_of([7])), reference, strict=True):
            assert torch.allclose(have.double(), want.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [2**31 - 1, 2**31, 5 * 2**31 + 7])
def test_counts_beyond_32_bits(n):
    x, dy = whole(4)
    s = gbn.Statistics(x.new_full((4,), 5.0), x.new_full((4,), 0.3), n, 1e-5)
    sums = gbn.gradient_sums([(dy, x)], s, None).whole * 1e8
    expected = gbn.input_gradient(dy, x, s, None, sums, batch_of([7]))
    with cuda_batch_norm():
        sums = gbn.gradient_sums([(dy, x)], s, None).whole * 1e8
        found = gbn.input_gradient(dy, x, s, None, sums, batch_of([7]))
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_a_count_that_overflows_is_seen(monkeypatch):
    monkeypatch.setattr(gbn, "_in_32_bits", lambda n: [n % 2**31])
    with pytest.raises(AssertionError):
        test_counts_beyond_32_bits(5 * 2**31 + 7)


def test_rows_of_unequal_values_are_refused():
    batch = gbn.WholeBatch()
    batch.group, batch.rows = object(), [4, 6]
    assert batch.total(36) == 90
    with pytest.raises(ValueError, match="same number of values, got 7 values of 4 rows"):
        batch.total(7)


def test_counts_are_made_once():
    batch = batch_of([7])
    one = batch.counts([3, 4], torch.float32, torch.device("cpu"))
    assert batch.counts([3, 4], torch.float32, torch.device("cpu")) is one
    assert one.tolist() == [3, 4]
    for n in range(2 * gbn._KEPT_COUNTS):
        batch.counts([n], torch.int32, torch.device("cpu"))
    assert len(batch._counts) <= gbn._KEPT_COUNTS
