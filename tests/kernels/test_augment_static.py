"""The Triton kernels of the views compiled ahead of time: registers, spills, shared memory.

Every architecture, spec and output runs with `pytest -m gpu_static`.
"""

import os
from typing import NamedTuple

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from benchmarks.gpu_static import ARCHITECTURES, compile_kernel, inspect
from simclr_fast.kernels.augment import BLOCK, WARPS, blur_kernel, color_kernel, mean_kernel
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
        "BLOCKS": 64,
        "VERTICAL": case.kernel == "blur",
        "REFLECT": not case.simclr,
        "BLOCK": BLOCK,
    }
    constants = {name: value for name, value in flags.items() if name in kernel.arg_names}
    types = {**TYPES, "out": f"*{case.out}"}
    types = {name: types[name] for name in kernel.arg_names if name not in constants}
    if case.kernel == "color":
        # Without crops their pointer is None, which a launch turns into a constant.
        if not case.crops:
            del types["crops"]
            constants["crops"] = None
        # Contiguous and 224 wide.
        del types["stride_x"]
        constants["stride_x"] = 1
    aligned = [name for name in types if name not in ("blocks", "most_radius")]
    compiled = compile_kernel(kernel, types, constants, case.arch, aligned, num_warps=WARPS)
    static = inspect(compiled, case.arch)
    assert static.stack == 0
    assert static.local_accesses == 0
    # Those that wait for memory need many warps: 32 at least. The resize computes: 16.
    assert static.registers <= (128 if case.kernel == "resize" else 64)
    assert static.resident * static.warps >= (16 if case.kernel == "resize" else 32)


@pytest.mark.parametrize("case", CORE, ids=str)
def test_no_spill_and_enough_warps(case):
    check(case)


@pytest.mark.gpu_static
@pytest.mark.parametrize("case", FULL, ids=str)
def test_every_architecture(case):
    check(case)
