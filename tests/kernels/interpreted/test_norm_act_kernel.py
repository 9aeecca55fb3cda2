"""norm_act's Triton kernel against float64, and every load and store."""

import pytest
import torch
from kernel_memory import checked_memory, seeded
from norm_act_cases import DENSE, LAST, Case, relative

from simclr_fast.ops import norm_act
from simclr_fast.ops.norm_act import _launch

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
# The interpreter cuts off where a GPU rounds to bfloat16.
LIMITS = {SINGLE: 5e-7, HALF: 2**-11 * 1.01, BRAIN: 2**-7 * 1.01}
CASES = [
    Case((3, 5, 7, 9), DENSE, BRAIN, "both"),
    Case((3, 5, 7, 9), LAST, HALF, "plain", affine=False),
    Case((2, 144, 5, 3), LAST, SINGLE, "both", relu=False),
    Case((2, 3, 12, 12), DENSE, SINGLE, "plain first"),
    Case((70, 48), DENSE, BRAIN, "alone"),
    Case((1, 1, 1, 1), LAST, SINGLE, "both"),
    Case((5, 6, 31), DENSE, HALF, "alone", affine=False, relu=False),
    Case((40, 1, 20, 6), LAST, HALF, "both"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_equals_float64(case):
    arguments, exact = case.made(seeded(0))
    x = arguments[0]
    y = torch.full_like(x, float("nan"))
    with checked_memory():
        _launch(y, *arguments)
    assert relative(y, exact) <= LIMITS[case.dtype]
    assert torch.equal(_launch(x, *arguments), y)


def test_a_nan_stays():
    x = torch.tensor([[float("nan"), -1.0], [float("inf"), 2.0]])
    rest = torch.zeros(2), torch.ones(2), None, None, *[None] * 5, True
    y = _launch(torch.empty_like(x), x, *rest)
    assert y[0, 0].isnan()
    assert y.flatten()[1:].tolist() == [0, float("inf"), 2]


def test_devices_choose_the_kernel_or_plain_torch(monkeypatch):
    arguments, exact = CASES[0].made(seeded(0))
    used = []
    monkeypatch.setattr(norm_act, "_launch", lambda y, *rest: used.append(y))
    for triton in (True, False):
        monkeypatch.setattr(norm_act, "_on_triton", lambda x, triton=triton: triton)
        norm_act._norm_act(*arguments)
        norm_act._norm_act_in_place(*arguments)
    assert [y is arguments[0] for y in used] == [False, True]
    assert relative(arguments[0], exact) <= LIMITS[BRAIN]
