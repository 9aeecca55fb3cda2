"""Batch norm over ranks against torch's batch norm of the whole batch, in float64."""

import pytest
import torch
import torch.distributed as dist
from rank_runs import on_ranks
from torch import nn

from simclr_fast.large_batch.global_batch_norm import GlobalBatchNorm, convert_batch_norm


def whole(dims):
    generator = torch.Generator().manual_seed(0)
    shape = (7, 4, *[3] * (dims - 2))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 5
    return x, torch.randn(shape, generator=generator, dtype=torch.float64)


def layer(dims):
    norm = (nn.BatchNorm1d if dims == 2 else nn.BatchNorm2d)(4).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2, 0.5, 3]))
        norm.bias.copy_(torch.tensor([0.1, 0, -1, 2]))
    return norm


def one_rank(rank, folder, sizes, dims):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(sizes)
    )
    x, upstream = whole(dims)
    first = sum(sizes[:rank])
    mine = slice(first, first + sizes[rank])
    share = x[mine].clone().requires_grad_()
    norm = GlobalBatchNorm(layer(dims))
    y = norm(share)
    y.backward(upstream[mine])
    result = [y.detach(), share.grad, norm.weight.grad, norm.bias.grad]
    torch.save([*result, norm.running_mean, norm.running_var], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("sizes", "dims"), [((3, 4), 4), ((1, 6), 2), ((7, 0), 4)])
def test_equals_one_process(tmp_path, sizes, dims):
    on_ranks(one_rank, (str(tmp_path), sizes, dims), len(sizes))
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(sizes))]
    x, upstream = whole(dims)
    x.requires_grad_()
    norm = layer(dims)
    y = norm(x)
    y.backward(upstream)
    expected = [y.detach(), x.grad, norm.weight.grad, norm.bias.grad]
    for k, reference in enumerate(expected):
        found = [part[k] for part in parts]
        found = torch.cat(found) if k < 2 else sum(found)
        assert torch.allclose(found, reference, rtol=1e-12, atol=1e-12), k
    for part in parts:
        assert torch.allclose(part[4], norm.running_mean, rtol=1e-14, atol=0)
        assert torch.allclose(part[5], norm.running_var, rtol=1e-14, atol=0)


def test_conversion_keeps_weights_and_evaluation():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(layer(4).float()), nn.ReLU())
    model[1][0].bias.requires_grad_(False)
    x = torch.rand(2, 3, 8, 8)
    expected = model.eval()(x)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    converted = convert_batch_norm(model, torch.device("cpu"))
    assert isinstance(converted[1][0], GlobalBatchNorm)
    assert not converted[1][0].bias.requires_grad
    assert torch.equal(converted.eval()(x), expected)
    assert all(torch.equal(v, state[k]) for k, v in converted.state_dict().items())
    with pytest.raises(ValueError, match="4"):
        converted[1][0](torch.rand(2, 5, 3, 3))
