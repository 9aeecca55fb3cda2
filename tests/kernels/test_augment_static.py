"""The Triton kernels of the views compiled ahead of time: registers, spills, shared memory.

Every architecture, spec and output runs with `pytest -m gpu_static`.
"""

import os
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from pretended_driver import pretended_gpu

from benchmarks.gpu_static import ARCHITECTURES, compile_kernel, inspect
from simclr_fast.augment.params import Augmentation, draw_params
from simclr_fast.augment.views import apply_views, finish_crops, pack_params
from simclr_fast.kernels.augment import BLOCK, SUMS, WARPS, blur_kernel, color_kernel, mean_kernel
from simclr_fast.kernels.augment_resize import resize_kernel

TYPES = {
    "address": "*i64",
    "row_stride": "*i64",
    "crops": "*u8",
    "ints": "*i32",
    **dict.fromkeys(("floats", "planes", "partial", "normalize", "source"), "*fp32"),
    **{f"stride_{axis}": "i32" for axis in "ncyx"},
    **dict.fromkeys(("size", "blocks", "most_radius"), "i32"),
}
OUTPUTS = ("fp32", "fp16", "bf16")


class Case(NamedTuple):
    kernel: str
    arch: int
    simclr: bool = True
    out: str = "fp32"
    crops: bool = False

    def __str__(self):
        spec = "simclr" if self.simclr else "torchvision"
        return f"{self.kernel}-sm{self.arch}-{spec}-{self.out}" + ("-crops" if self.crops else "")


# Each kernel once, spread over the two architectures, specs and outputs.
CORE = [
    Case("resize", 80, simclr=False),
    Case("mean", 90),
    Case("color", 90, out="bf16", crops=True),
    Case("color", 80, simclr=False, out="fp16"),
    Case("blur", 90, out="fp16"),
]
FULL = [
    *(Case(k, a, s) for k in ("resize", "mean") for a in ARCHITECTURES for s in (True, False)),
    *(
        Case("color", a, s, out, crops)
        for a in ARCHITECTURES
        for s in (True, False)
        for out in OUTPUTS
        for crops in (True, False)
    ),
    *(Case("blur", a, s, out) for a in ARCHITECTURES for s in (True, False) for out in OUTPUTS),
]


def check(case):
    kernel = {
        "resize": resize_kernel,
        "mean": mean_kernel,
        "color": color_kernel,
        "blur": blur_kernel,
    }[case.kernel]
    flags = {
        "SIMCLR": case.simclr,
        "ADDITIVE": False,
        "BILINEAR": False,
        "BYTES": True,
        "CROPS": case.crops,
        "ALIGNED": True,
        "SUMS": SUMS,
        "VERTICAL": case.kernel == "blur",
        "REFLECT": not case.simclr,
        "BLOCK": BLOCK,
    }
    constants = {name: value for name, value in flags.items() if name in kernel.arg_names}
    types = {**TYPES, "out": f"*{case.out}"}
    types = {name: types[name] for name in kernel.arg_names if name not in constants}
    if case.kernel == "color" and not case.crops:
        # Without crops their pointer is None, which a launch turns into a constant.
        del types["crops"]
        constants["crops"] = None
    compiled = compile_kernel(kernel, types, constants, case.arch, list(types), num_warps=WARPS)
    static = inspect(compiled, case.arch)
    assert static.stack == 0
    assert static.local_accesses == 0
    # Kernels that wait for memory need at least 32 warps. The resize kernel computes: 16 suffice.
    assert static.registers <= (128 if case.kernel == "resize" else 64)
    assert static.resident * static.warps >= (16 if case.kernel == "resize" else 32)


@pytest.mark.parametrize("case", CORE, ids=str)
def test_no_spill_and_enough_warps(case):
    check(case)


def test_launches_of_all_batches_and_sizes_take_two_variants():
    """Also with arguments of 1 or multiples of 16, and with slices that are not aligned."""
    with pretended_gpu(90) as launches:
        for size in (1, 20, 31, 32, 96, 224):
            aug = Augmentation(size)
            for n in (1, 2, 3):
                image = torch.zeros(n, 9, 1, 3, dtype=torch.uint8)
                params = draw_params(aug, 0, 0, np.arange(n), 0, np.array([[9, 1]] * n))
                ints, floats = map(torch.from_numpy, pack_params(params))
                # The rows of a part of a batch need not begin at a multiple of 16 bytes.
                out = torch.empty(n + 1, 3, size, size)[1:]
                for images in (list(image), image):
                    apply_views(images, params, aug, out=out)
                crops = torch.zeros(n + 1, size, size, 3, dtype=torch.uint8)[1:]
                finish_crops(crops, ints, floats, aug, out)
    variants = defaultdict(dict)
    for launch in launches:
        variants[launch.name][launch.variant] = launch
    # The colour kernel starts from planes or from crops; the blur goes along x and along y.
    expected = {"resize_kernel": 2, "mean_kernel": 2, "color_kernel": 4, "blur_kernel": 4}
    assert {name: len(found) for name, found in variants.items()} == expected
    for found in variants.values():
        for launch in found.values():
            launch.check_language()


@pytest.mark.gpu_static
@pytest.mark.parametrize("case", FULL, ids=str)
def test_no_spill_on_any_architecture(case):
    check(case)
