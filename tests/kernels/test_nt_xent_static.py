"""The NT-Xent kernels compiled ahead of time for every GPU of the launch table: no GPU is needed.

A spill, a lost tensor-core instruction or a narrow copy is invisible in the numbers and costs
several times the speed. The full table runs with `pytest -m gpu_static`.
"""

import os
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from pretended_driver import pretended_gpu
from triton.runtime.errors import OutOfResources

from simclr_fast.benchmarks.gpu_model import gemm_units
from simclr_fast.benchmarks.gpu_static import (
    ARCHITECTURES,
    SHARED_LIMIT,
    TIMED_SPILLS,
    inspect,
    nt_xent_static,
    row_kernel_static,
)
from simclr_fast.kernels import nt_xent, nt_xent_autotune
from simclr_fast.kernels.nt_xent_configs import (
    SMALLEST,
    SYMMETRIC_SLOTS,
    TABLE,
    WAVES,
    best_splits,
    dot_precision,
    plan,
    table_config,
)
from simclr_fast.ops.nt_xent import padded_dim as ops_padded_dim

TENSOR_CORES = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
HALF, SINGLE = torch.float16, torch.float32


class Case(NamedTuple):
    kernel: str
    arch: int
    dtype: torch.dtype
    padded: int
    precision: str

    def __str__(self):
        parts = (self.kernel, f"sm{self.arch}", f"D{self.padded}", self.precision)
        return "-".join(parts)


CORE = [
    *(Case("forward", arch, HALF, 128, "ieee") for arch in (80, 90, 100)),
    *(Case("gradient", arch, HALF, 128, "ieee") for arch in (80, 86, 90, 100, 120)),
    Case("gradient", 90, HALF, 1024, "ieee"),
    Case("gradient", 90, SINGLE, 128, "tf32x3"),
    *(
        Case(kernel, 90, HALF, 128, "ieee")
        for kernel in ("symmetric", "moments", "symmetric_moments", "class_sums", "class_gradient")
    ),
]
ROW_KERNELS = (
    *("normalize", "losses", "statistics", "weights", "finish_gradient"),
    *("class_losses", "class_weights", "finish_class_gradient"),
)
TILE_KERNELS = (
    *("forward", "moments", "symmetric", "symmetric_moments"),
    *("gradient", "class_sums", "class_gradient"),
)
FULL = [
    Case(kernel, arch, dtype, padded, precision)
    for kernel in TILE_KERNELS
    for arch in ARCHITECTURES
    for dtype, precision in ((HALF, "ieee"), (SINGLE, "tf32x3"), (SINGLE, "tf32"))
    for padded in (16, 32, 64, 128, 192, 256, 512, 1024)
    if table_config(kernel, divmod(arch, 10), dtype, padded)
]


def check(case: Case, static):
    config = table_config(case.kernel, divmod(case.arch, 10), case.dtype, case.padded)
    kind = "*fp32" if case.dtype == SINGLE else "*fp16"
    allowed = TIMED_SPILLS.get((f"{case.kernel}_kernel", case.arch, kind, case.padded), 0)
    assert static.stack <= allowed
    assert static.local_accesses <= allowed
    assert not static.strays
    assert static.shared <= SHARED_LIMIT[case.arch]
    assert static.resident >= config.resident
    if case.padded >= 64:
        assert static.mma == {TENSOR_CORES[case.arch]}
    if case.padded >= 64:
        assert static.wide_copies > 0
    # Of 64 keys with 16 features, a thread of eight warps copies only 8 bytes.
    keys = config.block_m if case.kernel.startswith("symmetric") else config.block_n
    tiny = keys * case.padded * case.dtype.itemsize < 16 * 32 * config.warps
    if not tiny and case.kernel not in ("gradient", "class_sums", "class_gradient"):
        # These also copy a vector of weights or ids.
        assert static.narrow_copies == 0
    if config.block_d >= case.padded >= 64 and case.kernel in ("forward", "gradient"):
        per_thread = config.block_m * config.block_n // (32 * config.warps)
        # In small tiles over many features, two warps may compute the same exponentials.
        copies = 2 if case.kernel == "gradient" and case.padded > 128 else 1
        assert per_thread <= static.main_loop.exp2 <= copies * per_thread


@pytest.mark.parametrize("case", CORE, ids=str)
def test_core_configurations_do_not_spill(case):
    check(case, nt_xent_static(*case))


@pytest.mark.gpu_static
@pytest.mark.parametrize("case", FULL, ids=str)
def test_no_configuration_spills(case):
    check(case, nt_xent_static(*case))


@pytest.mark.parametrize("kernel", ROW_KERNELS)
def test_core_row_kernels_do_not_spill(kernel):
    check_row_kernel(kernel, 90, torch.bfloat16, 128)


@pytest.mark.gpu_static
@pytest.mark.parametrize("dim", [16, 20, 128, 2048])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", ROW_KERNELS)
def test_no_row_kernel_spills(kernel, arch, dtype, dim):
    check_row_kernel(kernel, arch, dtype, dim)


def check_row_kernel(kernel, arch, dtype, dim):
    static = row_kernel_static(kernel, arch, dtype, dim)
    assert static.stack == 0
    assert static.local_accesses == 0
    assert not static.strays
    assert static.resident >= 2
    if dim % 16 == 0 and kernel in ("normalize", "losses", "finish_gradient"):
        assert static.wide_loads > 0


def test_a_spill_is_seen():
    """The planted fault: a third of the registers that the kernel needs."""
    case = Case("gradient", 80, HALF, 128, "ieee")
    static = nt_xent_static(*case, maxnreg=64)
    assert static.stack > 0
    assert static.local_accesses > 0
    with pytest.raises(AssertionError):
        check(case, static)


@pytest.mark.parametrize("pairs", [512, 511])
@pytest.mark.parametrize("statistics", [False, True])
def test_launches_compile_as_the_arguments_specialise(pairs, statistics):
    """The launchers' own calls, up to the launch itself, on a pretended H100."""
    z1, z2 = torch.ones(2, pairs, 128, dtype=torch.bfloat16)
    tau = torch.tensor(0.1)
    with pretended_gpu(90) as launches:
        u, inv_norm = nt_xent.normalize(z1, z2, tau)
        made = nt_xent.losses(u, tau, 0, 2 * pairs, False, statistics)
        nt_xent.backward(
            torch.ones(()), True, u, made.lse, made.loss, inv_norm, z1, z2, tau, 0, False,
            made.factor,
        )  # fmt: skip
    assert [launch.name for launch in launches] == [
        "normalize_kernel",
        "symmetric_kernel" if pairs == 512 else "negatives_kernel",
        "losses_kernel",
        "gradient_kernel",
        "finish_gradient_kernel",
    ]
    if pairs == 512:
        for launch in launches:
            static = inspect(launch.compile(), 90)
            assert static.stack == 0
            assert static.local_accesses == 0


@pytest.mark.parametrize("capability", TABLE)
@pytest.mark.parametrize("dim", [64, 128, 256, 512, 576, 1024, 2048])
@pytest.mark.parametrize("rows", [8192, 65536])
def test_no_score_is_computed_twice_in_the_gradient(rows, dim, capability):
    for kernel in ("gradient", "class_gradient"):
        made = plan(kernel, capability, 132, HALF, dim, rows, rows)
        assert gemm_units(kernel, made, rows, dim) <= 2.5


@pytest.mark.parametrize("capability", TABLE)
@pytest.mark.parametrize("dim", [64, 128, 512])
@pytest.mark.parametrize("rows", [512, 8192])
def test_statistics_multiply_hardly_more_than_the_loss(rows, dim, capability):
    units = [
        gemm_units(kernel, plan(kernel, capability, 132, HALF, dim, rows, rows), rows, dim)
        for kernel in ("forward", "moments")
    ]
    assert units[1] <= 1.15 * units[0]


def test_every_architecture_is_in_the_table():
    assert {10 * major + minor for major, minor in TABLE} == set(ARCHITECTURES)


def test_an_unlisted_gpu_takes_the_smallest_configuration():
    made = plan("forward", (13, 0), 48, HALF, 128, 8192, 8192)
    assert made.config == SMALLEST
    assert not made.symmetric
    assert plan("gradient", (7, 5), 40, SINGLE, 16, 64, 64).config.block_d == 16


def test_autotune_takes_the_fastest_that_runs(monkeypatch):
    made = plan("forward", (9, 0), 132, HALF, 128, 8192, 8192)
    plans = nt_xent_autotune.candidates("forward", made, HALF, 128, 8192, 8192, 132)
    assert plans[0] == made
    assert all(p.symmetric and 8192 % (2 * p.config.block_m) == 0 for p in plans)
    assert len(set(plans)) == len(plans) > 1

    def milliseconds(step):
        chosen = step()
        if chosen == plans[0]:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return float(plans.index(chosen) != len(plans) - 1)

    assert nt_xent_autotune.fastest(plans, lambda p: p, milliseconds) == plans[-1]

    def out_of_memory(step):
        if step() == plans[0]:
            return 2.0
        raise torch.OutOfMemoryError("tried to allocate 256 MiB")

    assert nt_xent_autotune.fastest(plans, lambda p: p, out_of_memory) == plans[0]

    def nothing_fits(step):
        raise torch.OutOfMemoryError("tried to allocate 256 MiB")

    with pytest.warns(RuntimeWarning, match="could not time any .*tried to allocate 256 MiB"):
        assert nt_xent_autotune.fastest(plans, lambda p: p, nothing_fits) == plans[0]

    gradient = plan("gradient", (8, 0), 108, SINGLE, 64, 100, 100)
    plans = nt_xent_autotune.candidates("gradient", gradient, SINGLE, 64, 100, 100, 108)
    assert not any(p.symmetric for p in plans)
    # Off by default, and never on the CPU.
    monkeypatch.setattr(nt_xent_autotune, "ENABLED", True)
    assert nt_xent_autotune.tuned("forward", made, torch.ones(4, 16), 4, None) == made


@pytest.mark.parametrize(("unlisted", "listed"), [((10, 3), (10, 0)), ((8, 7), (8, 6))])
def test_an_unlisted_gpu_of_a_listed_family_takes_its_row(unlisted, listed):
    for kernel in ("forward", "symmetric", "gradient"):
        row = table_config(kernel, listed, HALF, 128)
        assert table_config(kernel, unlisted, HALF, 128) == row


@pytest.mark.parametrize("capability", TABLE)
@pytest.mark.parametrize("padded", [16, 128, 2048])
@pytest.mark.parametrize("rows", [2, 8192, 1 << 20])
def test_partial_sums_stay_linear_in_rows(rows, padded, capability):
    for kernel, planes, limit in (("forward", 1, SYMMETRIC_SLOTS), ("moments", 3, 6)):
        made = plan(kernel, capability, 132, HALF, padded, rows, rows)
        if made.symmetric:
            half = rows // made.config.block_m // 2
            slots = made.splits * (1 if kernel == "forward" else 2) + half
            assert planes * slots <= limit * padded
    for kernel in ("forward", "moments", "gradient", "class_gradient"):
        made = plan(kernel, capability, 132, HALF, padded, rows, rows)
        tiles = -(-rows // made.config.block_m)
        assert made.splits == 1 or made.splits * tiles <= WAVES * 132 * made.config.resident


def test_padded_dim_is_the_one_that_fake_tensors_get():
    assert all(nt_xent.padded_dim(dim) == ops_padded_dim(dim) for dim in range(1, 700))


def test_local_rows_and_ragged_tiles_are_never_symmetric():
    assert plan("forward", (9, 0), 132, HALF, 128, 8192, 8192).symmetric
    assert not plan("forward", (9, 0), 132, HALF, 128, 8192, 16384).symmetric
    assert not plan("forward", (9, 0), 132, HALF, 128, 8190, 8190).symmetric
    # Whole tiles of all rows, but not of either view's.
    assert not plan("forward", (9, 0), 132, HALF, 128, 8192 + 128, 8192 + 128).symmetric


def test_splits_fill_the_processors():
    assert best_splits(64, 64, 132, 8) == 2
    assert best_splits(512, 512, 132, 8) == 1
    assert best_splits(1, 1, 132, 8) == 1


def test_tf32_only_where_torch_allows_it():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for allowed, expected in (("tf32", "tf32"), ("ieee", "tf32x3"), ("none", "tf32x3")):
            matmul.fp32_precision = allowed
            assert dot_precision(SINGLE) == expected
            assert dot_precision(HALF) == "ieee"
    finally:
        matmul.fp32_precision = before
