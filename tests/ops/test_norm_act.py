"""A batch norm, a residual and ReLU in one pass, on the CPU, against float64."""

import itertools

import pytest
import torch
from instruction_sets import under_isa
from norm_act_cases import DENSE, LAST, PATTERNS, Case, relative

from simclr_fast import ops
from simclr_fast.ops import norm_act_plain
from simclr_fast.ops.norm_act import norm_act

# Of the largest value: the arithmetic's, and one rounding to half a unit in the last place.
LIMITS = {
    torch.float64: 1e-15,
    torch.float32: 5e-7,
    torch.bfloat16: 2**-8 * 1.01,
    torch.float16: 2**-11 * 1.01,
}
SHAPES = [
    *(((3, 5, 7, 9), layout) for layout in (DENSE, LAST)),
    *(((2, 640, 3, 3), layout) for layout in (DENSE, LAST)),
    *(((n, c, 1, 1), LAST) for n, c in ((1, 1), (70, 33))),
    ((300, 17), DENSE),
    ((4, 6, 31), DENSE),
    ((2, 3, 2, 3, 4), torch.channels_last_3d),
    ((3, 4, 50, 50), DENSE),
    ((0, 4, 3, 3), LAST),
]
KINDS = list(itertools.product(PATTERNS, (True, False), (True, False)))


def cases(dtype, shape, layout):
    for pattern, affine, relu in KINDS:
        yield Case(shape, layout, dtype, pattern, affine, relu)


@pytest.mark.parametrize(("shape", "layout"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_it_equals_float64_and_rounds_once(dtype, shape, layout):
    generator = torch.Generator().manual_seed(0)
    for case in cases(dtype, shape, layout):
        arguments, exact = case.made(generator)
        kept = [t.clone() if isinstance(t, torch.Tensor) else t for t in arguments]
        y = norm_act(*arguments)
        assert (y.dtype, y.stride()) == (dtype, arguments[0].stride())
        assert relative(y, exact) <= LIMITS[dtype], str(case)
        same = [a is b or torch.equal(a, b) for a, b in zip(arguments, kept, strict=True)]
        assert all(same), str(case)
        over = norm_act(*arguments, in_place=True)
        assert over.data_ptr() == arguments[0].data_ptr()
        assert torch.equal(over, y), str(case)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_plain_torch_equals_float64(dtype):
    """It rounds after each operation."""
    generator = torch.Generator().manual_seed(0)
    for case in cases(dtype, (9, 5, 4, 3), LAST):
        arguments, exact = case.made(generator)
        y = norm_act_plain.norm_act(*arguments)
        assert relative(y, exact) <= 3 * LIMITS[dtype], str(case)
        over = norm_act_plain.norm_act_(*arguments)
        assert over is arguments[0]
        assert torch.equal(over, y), str(case)


def test_the_bits_are_those_of_any_number_of_threads():
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for dtype, layout in itertools.product((torch.float32, torch.bfloat16), (DENSE, LAST)):
                case = Case((9, 24, 33, 31), layout, dtype, "both")
                arguments, _ = case.made(torch.Generator().manual_seed(0))
                found.append(norm_act(*arguments))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, found[:4], found[4:]))


def test_nan_and_infinity_stay():
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), -2.0]]).repeat(40, 1)
    for dtype in LIMITS:
        wide = torch.promote_types(dtype, torch.float32)
        y = norm_act(x.to(dtype), torch.zeros(4, dtype=wide), torch.ones(4, dtype=wide), None, None,
                     relu=True)  # fmt: skip
        assert y[:, 0].isnan().all()
        assert y[:, 1:].tolist() == [[float("inf"), 0, 0]] * 40


@pytest.mark.skipif(not ops.has_extension(), reason="the extension is not built")
def test_arguments_that_do_not_belong_together_are_refused():
    x, c = torch.randn(2, 3, 4, 4), torch.ones(3)
    wrong = {
        "contiguous or channels_last": (x[..., ::2], c, c, None, None),
        "one per channel": (x, torch.ones(4), c, None, None),
        "in float32": (x, c, c.double(), None, None),
        "layout of x": (x, c, c, None, None, x.contiguous(memory_format=LAST)),
        "needs a mean": (x, None, None, None, None),
        "x must be": (torch.ones(3), c, c, None, None),
        "float16, bfloat16, float32": (x.int(), c, c, None, None),
    }
    for message, arguments in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            norm_act(*arguments)


def check_all():
    for shape, layout in SHAPES:
        for dtype in LIMITS:
            test_it_equals_float64_and_rounds_once(dtype, shape, layout)


@pytest.mark.skipif(not ops.has_extension(), reason="the extension is not built")
@pytest.mark.parametrize(
    "isa", ["base", *(pytest.param(isa, marks=pytest.mark.slow) for isa in ("avx2", "avx512"))]
)
def test_every_instruction_set(isa):
    under_isa(isa, check_all)
