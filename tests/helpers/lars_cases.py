"""What the tests of LARS share."""

import pytest
import torch
from torch import nn

from simclr_fast import ops

needs_extension = pytest.mark.skipif(not ops.has_extension(), reason="the extension is not built")
each_path = pytest.mark.parametrize(
    "path",
    [
        pytest.param({"fused": True}, id="native", marks=needs_extension),
        pytest.param({"foreach": True}, id="foreach"),
        pytest.param({"foreach": False}, id="loop"),
    ],
)
SHAPES = [(), (1,), (17,), (3, 5), (64, 3, 7, 7), (0,), (2, 0, 3), (129, 33)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def gradients(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) * 0.3 for p in params]


def run(params, optimizer, steps, grads=gradients):
    for t in range(steps):
        for p, g in zip(params, grads(params, t), strict=True):
            p.grad = g
        optimizer.step()
    return params
