"""Everything that a launch specialises on, compiled: no GPU is needed.

A launch compiles anew for dtypes, for integers that are multiples of 16 or equal to 1, and for
constants, so a kernel that compiles for one batch size may not compile for another. Here the public
functions run on a pretended GPU over batch sizes, dtypes, layouts and options, and each distinct
kernel is compiled once. `pytest -m gpu_static` reads the machine code of all of them too;
`make test-gpu-static` does so on the newest and on the oldest supported Triton.
"""

import itertools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import triton
import triton.language as tl
from norm_act_cases import DENSE, LAST, PATTERNS, Case
from pretended_driver import PROCESSORS, Launch, other_launches, pretended_gpu

from simclr_fast.augment.params import Augmentation, draw_params
from simclr_fast.augment.views import apply_views, finish_crops, pack_params
from simclr_fast.benchmarks.gpu_static import (
    SHARED_LIMIT,
    TENSOR_MEMORY,
    TIMED_SPILLS,
    Static,
    inspect,
)
from simclr_fast.kernels import nt_xent_configs
from simclr_fast.kernels import sup_con as sup_con_kernels
from simclr_fast.losses import ranks
from simclr_fast.losses.nt_xent import NTXentLoss, nt_xent_loss
from simclr_fast.losses.sup_con import multi_view_nt_xent_loss, sup_con_loss
from simclr_fast.ops.norm_act import norm_act

ARCHITECTURES = sorted(PROCESSORS)
QUICK_ARCHITECTURES = (80, 90, 120)
BATCH_SIZES = (1, 2, 3, 32, 64, 250, 256, 4096, 32768)
QUICK_BATCH_SIZES = (1, 2, 3, 32, 64, 250, 4096)
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
# The Triton that this run is meant for; set by `make test-gpu-static`.
WANTED_TRITON = os.environ.get("SIMCLR_FAST_TEST_TRITON")


def views(n: int, dim: int = 128, dtype: torch.dtype = BRAIN, rows: int = 1) -> Tensor:
    """[rows · n, dim] of some value; only addresses and strides matter."""
    return torch.ones(rows * n, dim, dtype=dtype).requires_grad_()


def backward(loss: Tensor) -> None:
    loss.backward(torch.full_like(loss, 0.5))


def separate(n: int, dim: int = 128, dtype: torch.dtype = BRAIN, **options) -> None:
    backward(nt_xent_loss(views(n, dim, dtype), views(n, dim, dtype), 0.1, **options))


def joined(n: int, dtype: torch.dtype = BRAIN, **options) -> None:
    backward(nt_xent_loss(views(n, dtype=dtype, rows=2), None, 0.1, **options))


def statistics(n: int, dtype: torch.dtype = BRAIN) -> None:
    loss, _ = nt_xent_loss(views(n, dtype=dtype), views(n, dtype=dtype), 0.1, return_stats=True)
    backward(loss)


def decoupled(n: int) -> None:
    # A single pair has no negatives and is refused.
    separate(max(n, 2), decoupled=True)


def learnable(n: int) -> None:
    backward(NTXentLoss(0.1, learnable=True)(views(n), views(n)))


def forward_only(n: int) -> None:
    with torch.no_grad():
        nt_xent_loss(views(n), views(n), 0.1, return_stats=True)


def strided(n: int) -> None:
    """Rows and features that are not adjacent, and views that share one row."""
    backward(nt_xent_loss(views(n, 256)[:, ::2], views(128, n).T, 0.1))
    backward(nt_xent_loss(views(n), views(1).expand(n, 128), 0.1))


def _as_second_rank(n: int, loss: Callable[[], Tensor]) -> None:
    """As the second of two ranks with the same number of rows. Gathering repeats this rank's."""
    twice = {
        "row_counts_of": lambda rows, device, group, given: [rows, rows],
        "all_gather_rows": lambda rows, group, counts: torch.cat((rows, rows)),
        "dist": SimpleNamespace(get_rank=lambda group: 1),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in twice.items():
            patch.setattr(ranks, name, value)
        backward(loss())


def group(n: int) -> None:
    for stats in (False, True):
        _as_second_rank(
            n,
            lambda stats=stats: (
                nt_xent_loss(views(n), views(n), 0.1, group="a group", return_stats=True)[0]
                if stats
                else nt_xent_loss(views(n), views(n), 0.1, group="a group")
            ),
        )


def supervised(n: int, dtype: torch.dtype = BRAIN, **options) -> None:
    backward(sup_con_loss(views(n, dtype=dtype), torch.arange(n) // 3, 0.1, **options))


def supervised_group(n: int) -> None:
    labels = torch.arange(n) // 3
    _as_second_rank(n, lambda: sup_con_loss(views(n), labels, 0.1, group="a group"))


def three_views(n: int) -> None:
    backward(multi_view_nt_xent_loss([views(n) for _ in range(3)], temperature=0.1))


def features(n: int) -> None:
    """Every class of the launch table, and widths that are no multiple of 16 bytes."""
    for dim in (1, 16, 33, 64, 100, 256, 300, 512, 1024, 2048):
        for dtype in (BRAIN, SINGLE):
            separate(min(n, 256), dim, dtype)


LOSSES: dict[str, Callable[[int], None]] = {
    "separate views": separate,
    "float16": lambda n: separate(n, dtype=HALF),
    "float32": lambda n: separate(n, dtype=SINGLE),
    "joined views": joined,
    "per row": lambda n: separate(n, reduction="none"),
    "sum": lambda n: joined(n, reduction="sum"),
    "statistics": statistics,
    "statistics float32": lambda n: statistics(n, SINGLE),
    "decoupled": decoupled,
    "learnable temperature": learnable,
    "forward only": forward_only,
    "strided": strided,
    "ranks": group,
    "supervised": supervised,
    "supervised float32": lambda n: supervised(n, SINGLE),
    "supervised per row": lambda n: supervised(n, reduction="none"),
    "supervised ranks": supervised_group,
    "three views": three_views,
}
FEATURES = {"features": features}

SIZES = (*range(1, 34), 224)
QUICK_SIZES = (1, 2, 16, 31, 32, 33, 224)


class Picture(NamedTuple):
    """One way to ask for views of images."""

    spec: str = "simclr"
    source: str = "list"
    image: torch.dtype = torch.uint8
    out: torch.dtype = SINGLE
    channels_last: bool = False
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        dtypes = f"{self.image}-{self.out}".replace("torch.", "")
        layout = "channels_last" if self.channels_last else "contiguous"
        return "-".join((self.spec, self.source, dtypes, layout, *(v for _, v in self.options)))


PICTURES = [
    Picture(),
    Picture("torchvision", image=SINGLE, out=HALF),
    Picture(out=BRAIN, channels_last=True, options=(("brightness", "additive"),)),
    Picture(source="batch", out=HALF, channels_last=True, options=(("interpolation", "bilinear"),)),
    Picture(source="crops", out=BRAIN),
    Picture("torchvision", source="crops", out=HALF, channels_last=True),
]


def make_views(picture: Picture, size: int, n: int = 3) -> None:
    aug = Augmentation(size, picture.spec, **dict(picture.options))
    extents = np.tile([[40, 50]], (n, 1))
    params = draw_params(aug, 0, 0, np.arange(n), 0, extents)
    layout = torch.channels_last if picture.channels_last else torch.contiguous_format
    out = torch.empty(n, 3, size, size, dtype=picture.out).to(memory_format=layout)
    if picture.source == "crops":
        crops = torch.zeros(n, size, size, 3, dtype=torch.uint8)
        finish_crops(crops, *map(torch.from_numpy, pack_params(params)), aug, out)
        return
    images = torch.zeros(n, 40, 50, 3, dtype=picture.image)
    apply_views(images if picture.source == "batch" else list(images), params, aug, out=out)


# Whole units of channels or places, others of each width of a program, and a single one.
SHAPES = [
    *((3, 64, 4, 4), (3, 5, 3, 3), (2, 50, 7, 7), (2, 100, 14, 14)),
    *((2, 256, 1, 1), (1, 1, 1, 1), (16, 48)),
]


def of_activations(arch: int, pattern: str, dtypes: tuple[torch.dtype, ...]) -> list[Launch]:
    """norm_act for every layout, with weight and bias and without, with ReLU and without."""
    found = []
    for shape, layout, dtype, affine in itertools.product(SHAPES, (DENSE, LAST), dtypes, (0, 1)):
        if layout is LAST and len(shape) != 4:
            continue
        case = Case(shape, layout, dtype, pattern, bool(affine), relu=bool(affine))
        arguments, _ = case.made(torch.Generator().manual_seed(0))
        for in_place in (False, True):
            found += recorded(arch, lambda a=arguments, i=in_place: norm_act(*a, in_place=i))
    return found


def recorded(arch: int, run: Callable[[], object]) -> list[Launch]:
    with pretended_gpu(arch) as launches:
        run()
    assert launches
    return launches


def of_loss(arch: int, name: str, batch_sizes: tuple[int, ...]) -> list[Launch]:
    entry = (LOSSES | FEATURES)[name]
    return [x for n in batch_sizes for x in recorded(arch, lambda n=n: entry(n))]


def of_views(arch: int, picture: Picture, sizes: tuple[int, ...]) -> list[Launch]:
    return [x for s in sizes for x in recorded(arch, lambda s=s: make_views(picture, s))]


# What has been looked at in this process: the kernel → what is wrong with it.
_LANGUAGE: dict[str, str] = {}
_CODE: dict[str, list[str]] = {}


def refused(launches: list[Launch]) -> set[str]:
    """What Triton's language refuses of these launches."""
    for launch in launches:
        if launch.program not in _LANGUAGE:
            try:
                launch.check_language()
                _LANGUAGE[launch.program] = ""
            except Exception as error:
                _LANGUAGE[launch.program] = f"{launch.name} {_summary(error)}"
    return {_LANGUAGE[x.program] for x in launches} - {""}


def _summary(error: Exception) -> str:
    """The line that says what is wrong: ptxas's first error, or the last of Triton's message."""
    cause = error.__cause__ or error
    lines = [line for line in str(cause).splitlines() if line.strip()] or [""]
    errors = [line for line in lines if "error" in line.lower()]
    return f"{type(cause).__name__}: {errors[0] if errors else lines[-1]}"


def faulty_code(launches: list[Launch]) -> set[str]:
    """What is wrong with the machine code of these launches."""
    for launch in launches:
        if launch.variant not in _CODE:
            try:
                compiled = launch.compile()
            except Exception as error:
                _CODE[launch.variant] = [_summary(error)]
                continue
            arch = launch.target.arch
            features = launch.named.get("PADDED")
            kind = (launch.name, arch, launch.signature.get("u_ptr"), features)
            allowed = TIMED_SPILLS.get(kind, 0)
            code = inspect(compiled, arch)
            _CODE[launch.variant] = faults(code, launch.options.maxnreg, allowed)
    return {f"{x} {fault}" for x in launches for fault in _CODE[x.variant]}


def faults(code: Static, register_limit: int | None, allowed: int = 0) -> list[str]:
    """Spills beyond the bytes that are allowed, what does not fit a multiprocessor as many times as
    the plan counts on, and addresses of shared memory that are computed from something else."""
    planned = 65536 // (32 * code.warps * register_limit) if register_limit else 1
    found = []
    if max(code.stack, code.local_accesses) > allowed:
        found.append(f"spills: stack {code.stack}, {code.local_accesses} local accesses")
    if code.registers > (register_limit or 255):
        found.append(f"takes {code.registers} registers")
    if code.shared > SHARED_LIMIT[code.arch]:
        found.append(f"takes {code.shared} bytes of shared memory")
    if code.tensor_memory * planned > TENSOR_MEMORY:
        found.append(f"takes {code.tensor_memory} tensor-memory columns × {planned} programs")
    if code.resident < planned:
        found.append(f"fits {code.resident} times, planned {planned}")
    found += code.strays
    return found


def bad_grids(launches: list[Launch]) -> set[str]:
    """CUDA allows 2³¹ - 1 programs on the first axis, 65535 on the others, and never 0."""
    limits = (2**31 - 1, 65535, 65535)
    return {
        f"{x.name} {x.grid}"
        for x in launches
        if not all(0 < n <= limit for n, limit in zip(x.grid, limits, strict=False))
    }


def variants(launches: list[Launch]) -> dict[str, int]:
    """Kernel → how many times it is compiled."""
    names = {x.variant: x.name for x in launches}
    return {name: list(names.values()).count(name) for name in names.values()}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_accepted_at_every_batch_size(name):
    launches = [x for a in QUICK_ARCHITECTURES for x in of_loss(a, name, QUICK_BATCH_SIZES)]
    assert not refused(launches)
    assert not bad_grids(launches)


def test_losses_are_accepted_at_every_number_of_features():
    assert not refused(of_loss(90, "features", (2, 256)))


@pytest.mark.parametrize("picture", PICTURES, ids=str)
def test_views_are_accepted_at_every_size(picture):
    launches = of_views(90, picture, QUICK_SIZES)
    assert not refused(launches)
    assert not bad_grids(launches)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_activations_are_accepted_and_compile_few_variants(pattern):
    launches = of_activations(90, pattern, (BRAIN,))
    assert not refused(launches)
    assert not bad_grids(launches)
    # Two layouts; whole units or not; three widths of a program, not all of them with each; with
    # weight, bias and ReLU or without.
    assert max(variants(launches).values()) <= 18


def test_machine_code_of_an_activation_loads_wide_and_does_not_spill():
    launch = of_activations(90, "both", (BRAIN,))[-1]
    code = inspect(launch.compile(), 90)
    assert not faults(code, None)
    assert code.wide_loads > 0
    assert code.resident >= 3


@pytest.mark.gpu_static
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_machine_code_of_activations_has_no_fault(pattern, arch):
    assert not faulty_code(of_activations(arch, pattern, (HALF, BRAIN, SINGLE)))


@pytest.mark.gpu_static
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", LOSSES | FEATURES)
def test_machine_code_of_losses_has_no_fault(name, arch):
    launches = of_loss(arch, name, BATCH_SIZES if name in LOSSES else (2, 256))
    assert not faulty_code(launches)
    assert not bad_grids(launches)


@pytest.mark.gpu_static
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("picture", PICTURES, ids=str)
def test_machine_code_of_views_has_no_fault(picture, arch):
    launches = of_views(arch, picture, SIZES if arch == 90 else QUICK_SIZES)
    assert not faulty_code(launches)
    assert not bad_grids(launches)


@pytest.mark.gpu_static
def test_this_is_the_triton_that_was_asked_for():
    assert WANTED_TRITON in (None, triton.__version__)


@pytest.mark.parametrize("name", ["separate views", "statistics", "supervised"])
def test_batch_sizes_compile_few_variants(name):
    """A ragged last batch, or another batch size, must not wait for the compiler each time."""
    sizes = (*BATCH_SIZES, 17, 100, 255, 1000, 4095, 8192)
    counts = variants(of_loss(90, name, sizes))
    assert max(counts.values()) <= 2, counts


@pytest.mark.parametrize(("stats", "most"), [(False, 5), (True, 7)])
def test_a_step_takes_few_launches(stats, most):
    """At 256 pairs the host's time per launch is what a step takes."""
    z1, z2, tau = views(256), views(256), torch.tensor(0.1)
    upstream = torch.ones(())

    def step():
        loss = nt_xent_loss(z1, z2, tau, return_stats=stats)
        (loss[0] if stats else loss).backward(upstream)

    with pretended_gpu(90) as launches:
        others = other_launches(step)
    names = [x.name for x in launches]
    assert len(names) + len(others) <= most, (names, others)


# Each of the checks above must find a planted fault.


@triton.jit
def _casts_an_integer(out_ptr, rows, BLOCK: tl.constexpr):
    r = tl.arange(0, BLOCK)
    tl.store(out_ptr + rows.to(tl.int64) * r, r.to(tl.float32))


@triton.jit
def _needs_many_registers(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i[:, None] * BLOCK + i[None, :])
    y = tl.load(x_ptr + i[:, None] + i[None, :] * BLOCK)
    tl.store(out_ptr + i[:, None] * BLOCK + i[None, :], tl.dot(x, y) + tl.exp2(x) * tl.exp2(y))


@triton.jit
def _two_accumulators(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    a = tl.load(x_ptr + at)
    p = tl.dot(a, tl.trans(a))
    q = tl.dot(a, a)
    for _ in range(4):
        p = tl.dot(a, tl.trans(a), p)
        q = tl.dot(a, a, q)
    tl.store(out_ptr + at, p + q)


@triton.jit
def _turns_a_tile(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i[:, None] * BLOCK + i[None, :])
    tl.store(out_ptr + i[:, None] + i[None, :] * BLOCK, x)


def test_planted_integer_cast_is_found_at_one_row_only():
    def launch(rows: int) -> list[Launch]:
        out = torch.zeros(64)
        return recorded(90, lambda: _casts_an_integer[(1,)](out, rows, BLOCK=16))

    assert not refused(launch(2))
    assert "has no attribute 'to'" in refused(launch(1)).pop()


def test_planted_spill_is_found():
    x = torch.zeros(128, 128)
    launches = recorded(
        80, lambda: _needs_many_registers[(1,)](x, x, BLOCK=128, num_warps=4, maxnreg=32)
    )
    assert any("spills" in fault for fault in faulty_code(launches))


def test_planted_shared_memory_and_tensor_memory_are_found():
    x = torch.zeros(128, 128, dtype=HALF)
    launch = recorded(100, lambda: _two_accumulators[(1,)](x, x, BLOCK=128, num_warps=8))[0]
    code = inspect(launch.compile(), 100)
    assert code.tensor_memory >= 128
    assert not faults(code, None)
    # 24 registers a thread plan ten programs of 8 warps: too many for the columns.
    assert any("tensor-memory columns × 10" in fault for fault in faults(code, 24))
    x = torch.zeros(256, 256)
    launch = recorded(86, lambda: _turns_a_tile[(1,)](x, x, BLOCK=256, num_warps=32))[0]
    assert any("takes 262144 bytes of shared memory" in f for f in faulty_code([launch]))


@pytest.mark.gpu_static
def test_wrong_addresses_of_cuda_12_8_are_found(monkeypatch):
    """Tiles of 64 × 16 for eight warps are in no row of the launch table, because of this."""

    def forced(kernel, u_all, rows):
        plan = nt_xent_configs.plan_for(kernel, u_all, rows)
        return plan._replace(config=nt_xent_configs.Config(64, 16, 32, 8, 2))

    monkeypatch.setattr(sup_con_kernels, "plan_for", forced)
    labels = torch.arange(101) // 3
    launches = recorded(90, lambda: backward(sup_con_loss(views(101, 20, SINGLE), labels, 0.1)))
    found = {fault for fault in faulty_code(launches) if "comes from" in fault}
    # Triton 3.6 has the ptxas of CUDA 12.8.
    assert bool(found) == triton.__version__.startswith("3.6.")


def test_planted_grid_and_variants_are_found():
    out = torch.zeros(64)
    grids = [(1, 65536), (0,), (4, 1)]
    launches = [
        x
        for grid in grids
        for x in recorded(90, lambda grid=grid: _casts_an_integer[grid](out, 2, BLOCK=16))
    ]
    assert len(bad_grids(launches)) == 2
    sizes = [
        x
        for rows in (1, 2, 16, 17)
        for x in recorded(90, lambda rows=rows: _casts_an_integer[(1,)](out, rows, BLOCK=16))
    ]
    assert variants(sizes) == {"_casts_an_integer": 3}


def test_other_launches_are_counted():
    x = torch.ones(3, 4)
    counted = other_launches(lambda: (x.view(12).mul(2).to(torch.float64).sum(), torch.empty(2)))
    assert counted == ["mul", "_to_copy", "sum"]
