"""Devices without float64, as MPS: every path runs and is as exact as plain torch in float32.

The CPU stands for such a device: no extension, and a mode that refuses to make a float64 tensor.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import copy, sys, warnings
sys.modules["simclr_fast._C"] = None
warnings.simplefilter("ignore")
import numpy as np, torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from simclr_fast import LARS, LargeBatch, SimCLRViews, nt_xent_loss, reference, sup_con_loss
from simclr_fast.evaluation.knn import votes
from simclr_fast.evaluation.linear import linear_probe
from simclr_fast.evaluation.online import OnlineProbe
from simclr_fast.ops import library
{allow}library._WITHOUT_FLOAT64.add("cpu")


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {{}}))
        if op is torch.ops.aten.lift_fresh.default:
            return out  # a numpy array, still in the host's memory
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64:
                raise TypeError(f"this device has no float64: {{op}}")
        return out


def error(actual, wanted):
    return ((actual.double() - wanted).norm() / (wanted.norm() + 1e-30)).item()


def run(function, tensors, upstream):
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    out.mul(upstream).sum().backward()
    return [out.detach(), *(t.grad for t in leaves)]


def check(ours, plain, tensors):
    upstream = torch.rand(ours(*tensors).shape) + 0.5
    exact = run(plain, [t.double() for t in tensors], upstream.double())
    same_dtype = run(plain, tensors, upstream)
    with NoFloat64():
        actual = run(ours, tensors, upstream)
    for a, p, e in zip(actual, same_dtype, exact, strict=True):
        # Two roundings of the denominators: in plain torch's gradient of the temperature they
        # cancel, as each row's softmax is divided by its own sum.
        rounding = 1e-6 if e.numel() > 1 else 1.2e-7 / tensors[-1].item()
        assert error(a, e) <= 2 * error(p, e) + rounding, (error(a, e), error(p, e))


torch.manual_seed(0)
for n, d in ((1, 3), (7, 5), (301, 33)):
    for noise in (1.0, 0.01):
        for tau in (0.05, 0.5):
            z1 = torch.randn(n, d)
            z2 = noise * torch.randn(n, d) + (1 - noise) * z1
            tensors = [z1, z2, torch.tensor(tau)]
            for decoupled in (False, True) if n > 1 else (False,):
                check(
                    lambda *x: nt_xent_loss(*x, reduction="none", decoupled=decoupled),
                    lambda *x: reference.nt_xent(*x, decoupled=decoupled),
                    tensors,
                )
            labels = torch.arange(2 * n) % max(n // 2, 1)
            check(
                lambda z, t: sup_con_loss(z, labels, t, reduction="none"),
                lambda z, t: reference.sup_con(z, labels, t),
                [torch.cat((z1, z2)), tensors[2]],
            )
            with NoFloat64():
                _, stats = nt_xent_loss(z1, z2, tau, return_stats=True)
            u = torch.nn.functional.normalize(torch.cat((z1, z2)).double(), dim=1)
            cosines = u @ u.T
            positive = cosines.diagonal(n).mean()
            assert abs(stats.positive_similarity - positive) < 1e-6
            if n > 1:
                outside = cosines.sum() - cosines.diagonal().sum() - 2 * cosines.diagonal(n).sum()
                negative = outside / (2 * n * (2 * n - 2))
                assert abs(stats.negative_similarity - negative) < 1e-5

for options in ({{}}, {{"norm": "joint"}}, {{"capturable": True}}, {{"momentum_order": "tf"}}):
    # The squares of the second and the third leave float32's range.
    start = [torch.randn(5, 3), 1e25 * torch.randn(9), 1e-25 * torch.randn(9), torch.zeros(4)]
    results = []
    for dtype in (torch.float64, torch.float32):
        params = [torch.nn.Parameter(t.to(dtype)) for t in start]
        library._WITHOUT_FLOAT64.discard("cpu")
        if dtype == torch.float32:
            {allow}library._WITHOUT_FLOAT64.add("cpu")
            mode = NoFloat64()
            mode.__enter__()
        optimizer = LARS(params, 0.3, weight_decay=1e-2, **options)
        for t in range(3):
            for p, s in zip(params, start, strict=True):
                p.grad = (s * 0.1 + (t + 1) * s.abs().mean() * 0.2).to(dtype)
            optimizer.grad_scale = torch.tensor(2.0)
            optimizer.found_inf = torch.tensor(0.0)
            optimizer.step()
        if dtype == torch.float32:
            mode.__exit__(None, None, None)
        results.append([p.detach() for p in params])
    for exact, actual in zip(*results, strict=True):
        assert error(actual, exact) < 1e-6, (options, error(actual, exact))
{allow}library._WITHOUT_FLOAT64.add("cpu")
image = torch.randint(0, 255, (2, 20, 17, 3), dtype=torch.uint8)
with NoFloat64():
    views = SimCLRViews(8)(image, ids=[0, 1])
assert all(view.isfinite().all() for view in views)

probe = OnlineProbe(np.arange(40) % 2, 1, torch.device("cpu"))


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 3, 3), torch.nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


model = torch.nn.Sequential(Block(), Block(), Block(), torch.nn.Flatten())
images = torch.randn(16, 3, 8, 8)


def gradient(memory):
    one = copy.deepcopy(model)
    z = []
    step = LargeBatch(one, memory=memory)
    step.backward(images, lambda out: (z.append(out), nt_xent_loss(out))[1])
    return z[0].detach(), torch.cat([p.grad.flatten() for p in one.parameters()])


_, exact = gradient("plain")
for memory in ("replay", "lockstep"):
    with NoFloat64():
        h, found = gradient(memory)
    assert error(found, exact.double()) < 1e-5, (memory, error(found, exact.double()))
with NoFloat64():
    for step in range(5):
        probe.take(h)
        row = probe.after_step(step + 1, torch.arange(8) + 8 * step)
    assert row["knn"] is not None
    assert votes(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int64), 2).dtype == torch.float32
# The fit itself needs float64, so it goes to the CPU.
library._WITHOUT_FLOAT64.discard("cpu")
linear_probe(torch.randn(30, 4), np.arange(30) % 2, images[:, 0, 0, :4], [0, 1] * 8, device="mps")
print("right")
"""


@pytest.mark.parametrize("knows", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_everything_runs_without_float64(knows):
    program = PROGRAM.format(allow="" if knows else "# ")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    if knows:
        assert done.stdout.strip() == "right", done.stderr
    else:
        # The stand-in does refuse.
        assert "this device has no float64" in done.stderr
