"""The Triton views in Triton's interpreter, beside the native op."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import needs_interpreter

pytest.importorskip("triton", reason="Triton is optional")

ROOT = Path(__file__).parents[2]
HELPERS = ROOT / "tests" / "helpers"
INTERPRETED = """
import numpy as np, torch
from interpreter import remember_builtins
from kernel_memory import checked_memory
from triton.runtime import interpreter
from simclr_fast.augment.views import apply_views, pack_params
from simclr_fast.augment.views import _apply_in_threes, _apply_torch, _apply_triton
from simclr_fast.ops import Implementation
from simclr_fast.augment.params import Augmentation, draw_params
from simclr_fast.kernels import augment as kernels
from sklearn.datasets import load_sample_image

remember_builtins()
photograph = torch.from_numpy(load_sample_image("china.jpg").copy())
shapes = [(60, 80), (17, 33), (40, 41), (9, 100)]
corners = [(10, 20), (100, 50), (200, 300), (50, 400)]
images = [photograph[y:y + h, x:x + w] for (h, w), (y, x) in zip(shapes, corners)]
planar, last = torch.contiguous_format, torch.channels_last
f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16

def close(out, exact):
    # 0.1/255, and a last place of the outputs' dtype: the interpreter cuts bfloat16 off.
    error = (out.float() - exact).abs()
    return (error <= 0.1 / 255 + torch.finfo(out.dtype).eps * exact.abs()).all().item()

for size, spec, floating, layout, dtype, options in (
    (37, "simclr", False, planar, f32, {}),
    (40, "torchvision", True, last, f16, {}),
    (33, "simclr", True, planar, bf16, {"brightness": "additive", "interpolation": "bilinear"}),
    (40, "torchvision", False, last, f32, {"mean": (0.4,) * 3, "std": (0.3,) * 3}),
):
    aug = Augmentation(size, spec, p_blur=0.75, **options)
    given = [(i.float() / 255).contiguous() if floating else i for i in images]
    p = draw_params(aug, size, 0, np.arange(4), 0, np.array(shapes))
    out = torch.full((4, 3, size, size), float("nan"), dtype=dtype)
    out = out.contiguous(memory_format=layout)
    _apply_triton(given, p, aug, out)
    assert close(out, apply_views(given, p, aug)), (size, spec, dtype, options)
    crops = torch.stack([photograph[y : y + size, x : x + size] for y, x in corners])
    p.box = np.tile(np.array([0, 0, size, size], np.int32), (4, 1))
    given = [torch.from_numpy(array) for array in pack_params(p)]
    normalize = torch.tensor(sum(aug.normalization, []))
    steps = aug.spec == "simclr", aug.brightness == "additive", aug.blur_radius
    out = torch.full_like(out, float("nan"))
    with checked_memory() as launches:
        kernels.augment_crops(crops, *given, normalize, *steps, out)
    assert launches == ["mean_kernel", "color_kernel", "blur_kernel", "blur_kernel"]
    assert close(out, apply_views(crops, p, aug)), ("crops", size, spec, dtype, options)


class Counter:
    def __init__(self, native):
        self.native, self.pixels = native, 0

    def __getattr__(self, name):
        return getattr(self.native, name)

    def load(self, pointers, mask, other, dtype):
        self.pixels += pointers.size == kernels.BLOCK and dtype == np.uint8
        return self.native.load(pointers, mask, other, dtype)


# Three channels of 4 x 4 taps of a bicubic filter, of 2 x 2 of a bilinear one; one block a view.
native = interpreter._interpreter
for interpolation, taps in (("bicubic", 4), ("bilinear", 2)):
    aug = Augmentation(24, interpolation=interpolation)
    p = draw_params(aug, 1, 0, np.arange(4), 0, np.array(shapes))
    out = torch.full((4, 3, 24, 24), float("nan"))
    interpreter._interpreter = counter = Counter(native)
    _apply_triton(images, p, aug, out)
    interpreter._interpreter = native
    assert counter.pixels == 4 * 3 * taps**2, (interpolation, counter.pixels)
    assert close(out, apply_views(images, p, aug))

# A batch in one tensor, whose rows and images are further apart than they are long; 1 x 1 views.
batch = photograph.unfold(0, 40, 170).unfold(1, 50, 250).flatten(0, 1).permute(0, 2, 3, 1)
for given, size in ((batch, 17), (batch.contiguous()[:, :33, :41], 24), (batch[:1], 1)):
    aug = Augmentation(size)
    n = len(given)
    p = draw_params(aug, 2, 0, np.arange(n), 1, np.array([given.shape[1:3]] * n))
    out = torch.full((n, 3, size, size), float("nan"))
    _apply_triton(given, p, aug, out)
    assert close(out, apply_views(given, p, aug)), (given.shape, given.stride())

# Other channels than three, in threes; each is the view of that channel in plain torch.
for channels, size, layout in ((2, 9, last), (5, 12, planar)):
    aug = Augmentation(size, channels=channels, p_blur=0.75, saturation=0, hue=0, p_gray=0)
    many = [torch.cat([i, i.flip(2)], 2)[..., :channels].contiguous() for i in images]
    p = draw_params(aug, size, 0, np.arange(4), 0, np.array(shapes))
    one = torch.stack([i[:9, :33] for i in many])
    for given in (many, one):
        if given is one:
            p = draw_params(aug, size, 0, np.arange(4), 0, np.array([(9, 33)] * 4))
        out = torch.full((4, channels, size, size), float("nan")).contiguous(memory_format=layout)
        _apply_in_threes(given, p, aug, out, Implementation.TRITON)
        assert close(out, _apply_torch(given, p, aug, torch.empty_like(out))), (channels, size)
"""


def run(program, **environment):
    path = os.pathsep.join([str(ROOT), str(HELPERS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]


@needs_interpreter
def test_interpreted_kernels_match_the_native_ones():
    run(INTERPRETED, TRITON_INTERPRET="1")
