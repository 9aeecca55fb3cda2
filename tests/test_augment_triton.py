"""The Triton views: in Triton's interpreter against the reference, and compiled ahead of time."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is optional")

INTERPRETED = """
import numpy as np, torch
from simclr_fast.augment import Augmentation, apply_views, draw_params, _apply_triton
from sklearn.datasets import load_sample_image

photograph = torch.from_numpy(load_sample_image("china.jpg").copy())
shapes = [(60, 80), (17, 33), (40, 41), (9, 100)]
corners = [(10, 20), (100, 50), (200, 300), (50, 400)]
images = [photograph[y:y + h, x:x + w] for (h, w), (y, x) in zip(shapes, corners)]
worst = 0.0
planar, last = torch.contiguous_format, torch.channels_last
for size, spec, floating, layout, options in (
    (37, "simclr", False, planar, {}),
    (40, "torchvision", True, last, {}),
    (33, "simclr", True, planar, {"brightness": "additive", "interpolation": "bilinear"}),
    (40, "torchvision", False, last, {"mean": (0.4,) * 3, "std": (0.3,) * 3}),
):
    aug = Augmentation(size, spec, p_blur=0.75, **options)
    given = [(i.float() / 255).contiguous() if floating else i for i in images]
    p = draw_params(aug, size, 0, np.arange(4), 0, np.array(shapes))
    out = torch.full((4, 3, size, size), float("nan")).contiguous(memory_format=layout)
    _apply_triton(given, p, aug, out)
    error = (out - apply_views(given, p, aug)).abs().max().item() * 255
    assert error < 0.1, (size, spec, options, error)
    worst = max(worst, error)
print("worst", worst)
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from simclr_fast.kernels import augment as k

I32, I64, P32 = "i32", "i64", "*fp32"
params = {"ints": "*i32", "floats": P32, "planes": P32, "partial": P32}
strides = {f"stride_{a}": I32 for a in "ncyx"}
for element, cc, simclr in (("*fp32", 80, True), ("*bf16", 90, False)):
    target = GPUTarget("cuda", cc, 32)
    flags = {"SIMCLR": simclr, "ADDITIVE": False}
    for kernel, signature, constants in (
        (
            k.resize_kernel,
            {"address": "*i64", "row_stride": "*i64", **params, "size": I32, "blocks": I32},
            {**flags, "BILINEAR": False, "BYTES": True, "BLOCK": k.BLOCK},
        ),
        (
            k.color_kernel,
            {**params, "normalize": P32, "out": element, **strides, "size": I32,
             "blocks": I32, "most_radius": I32},
            {**flags, "BLOCKS": 64, "BLOCK": k.BLOCK},
        ),
        (
            k.blur_kernel,
            {"floats": P32, "source": P32, "normalize": P32, "out": element, **strides,
             "size": I32, "blocks": I32, "most_radius": I32},
            {"VERTICAL": True, "REFLECT": not simclr, "BLOCK": k.BLOCK},
        ),
    ):
        full = {**signature, **{name: "constexpr" for name in constants}}
        compiled = triton.compile(
            ASTSource(kernel, full, constexprs=constants), target=target
        )
        assert "cubin" in compiled.asm
        assert compiled.metadata.shared <= 48 * 1024
print("compiled")
"""


def run(program, **environment):
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", **environment}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_interpreted_kernels_match_the_native_ones():
    assert run(INTERPRETED, TRITON_INTERPRET="1").startswith("worst")


@pytest.mark.slow
def test_kernels_compile_ahead_of_time():
    assert "compiled" in run(COMPILED)
