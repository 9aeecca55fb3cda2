"""Predict the times of the NT-Xent kernels from their machine code. Nothing here ran on a GPU.

    python -m benchmarks.gpu_model [--arch 90] [--rows 8192] [--dim 128]

Cycles per tile and multiprocessor: tensor cores, exponentials (16 per cycle), instruction issue
(4 warps per cycle), L2 (24 bytes per cycle). Overlapped: their maximum. Serial: tensor cores, then
the larger of exponentials and issue. Both times the tiles of the busiest multiprocessor. The
row-wise kernels count their bytes at the memory's bandwidth, and every launch 1.5 µs.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

from simclr_fast.benchmarks import harness
from simclr_fast.benchmarks.gpu_static import ARCHITECTURES, Static, nt_xent_static
from simclr_fast.kernels.normalize import padded_dim
from simclr_fast.kernels.nt_xent_configs import SYMMETRIC, Plan, plan, table_config

ROWS = (2048, 8192, 65536)
DIMS = (64, 128, 256, 512)
# The forward with statistics, and the two of the supervised loss.
OTHERS = ("moments", "class_sums", "class_gradient")
EXP2_PER_CYCLE = 16
WARPS_PER_CYCLE = 4
L2_BYTES_PER_CYCLE = 24
LAUNCH_SECONDS = 1.5e-6


class Gpu(NamedTuple):
    """Vendor data: float16 tensor-core flop per cycle with float32 sums, boost clock."""

    name: str
    processors: int
    clock: float
    flop_per_cycle: int
    bandwidth: float


GPUS = {
    80: Gpu("A100", 108, 1.41e9, 2048, 2.04e12),
    86: Gpu("RTX 3090", 82, 1.695e9, 512, 0.936e12),
    89: Gpu("RTX 4090", 128, 2.52e9, 512, 1.01e12),
    90: Gpu("H100 SXM", 132, 1.83e9, 4096, 3.35e12),
    100: Gpu("B200", 148, 1.85e9, 8192, 8.0e12),
    120: Gpu("RTX 5090", 170, 2.41e9, 512, 1.79e12),
}


class Prediction(NamedTuple):
    overlapped: float
    serial: float
    limit: str


def launch_plan(arch: int, kernel: str, rows: int, dim: int) -> Plan:
    half, gpu = torch.float16, GPUS[arch]
    return plan(kernel, divmod(arch, 10), gpu.processors, half, padded_dim(dim), rows, rows)


class Work(NamedTuple):
    """Tiles of a kernel and what one of them multiplies."""

    programs: int
    tiles_per_program: int
    flop_per_tile: int
    product_flop: int
    """The flop of the matrix product that follows if W does not fit a program; else 0."""

    @property
    def flop(self) -> int:
        return self.programs * self.tiles_per_program * self.flop_per_tile + self.product_flop


def work_of(kernel: str, made: Plan, rows: int, dim: int) -> Work:
    """The work of a tile kernel for `rows` rows of `dim` features, with padding and masks."""
    config, padded = made.config, padded_dim(dim)
    block_m, block_n = config.block_m, config.block_n
    features = max(config.block_d, padded)
    flop = 2 * block_m * block_n * features
    if made.symmetric:
        tiles = rows // block_m
        keys = tiles // 2 + 1
        return Work(tiles * made.splits, -(-keys // made.splits), 2 * block_m**2 * features, 0)
    if kernel in ("gradient", "class_gradient"):
        row_tiles, key_tiles = triton.cdiv(rows, block_m), triton.cdiv(rows, block_n)
        if not config.holds_gradient(padded):
            return Work(row_tiles * key_tiles, 1, flop, 2 * rows * rows * padded)
        flop += 2 * block_m * block_n * triton.next_power_of_2(padded)
        return Work(row_tiles * made.splits, -(-key_tiles // made.splits), flop, 0)
    # The forward's tiles are of one view's rows and one view's keys.
    views = 2 if kernel in SYMMETRIC else 1
    row_tiles = views**2 * triton.cdiv(rows // views, block_m)
    keys = triton.cdiv(rows // views, block_n)
    return Work(row_tiles * made.splits, -(-keys // made.splits), flop, 0)


def gemm_units(kernel: str, made: Plan, rows: int, dim: int) -> float:
    """Multiply-adds, in units of the product of u and its transpose (M² D)."""
    return work_of(kernel, made, rows, dim).flop / (2 * rows * rows * dim)


def predict(arch: int, kernel: str, static: Static, made: Plan, rows: int, dim: int) -> Prediction:
    gpu, config, padded = GPUS[arch], made.config, padded_dim(dim)
    block_n = config.block_m if made.symmetric else config.block_n
    whole = config.block_d >= padded
    features = config.block_d if whole else padded
    work = work_of(kernel, made, rows, dim)
    busiest = triton.cdiv(work.programs, gpu.processors) * work.tiles_per_program

    loop = static.main_loop
    instructions, exp2 = loop.instructions, loop.exp2
    if not whole:
        blocks = features // config.block_d - 1
        instructions, exp2 = loop.outer_instructions + blocks * instructions, loop.outer_exp2
    cycles = {
        "tensor": work.flop_per_tile / gpu.flop_per_cycle,
        "exp": exp2 * 32 * config.warps / EXP2_PER_CYCLE,
        "issue": instructions * config.warps / WARPS_PER_CYCLE,
        "L2": (block_n if whole else config.block_m + block_n) * features * 2 / L2_BYTES_PER_CYCLE,
    }
    limit = max(cycles, key=cycles.__getitem__)
    overlapped = cycles[limit]
    serial = max(overlapped, cycles["tensor"] + max(cycles["exp"], cycles["issue"]))
    product = work.product_flop / (gpu.processors * gpu.clock * gpu.flop_per_cycle)
    seconds = busiest / gpu.clock
    return Prediction(seconds * overlapped + product, seconds * serial + product, limit)


def row_seconds(arch: int, rows: int, dim: int, forward: Plan, gradient: Plan) -> list[float]:
    """The row-wise kernels of the forward, and of the backward, with every launch."""
    u, padded = 2 * rows * dim, padded_dim(dim)
    slots = 2 * forward.splits
    if forward.symmetric:
        slots = forward.splits + rows // forward.config.block_m // 2
    forward_bytes = 3 * u + 8 * rows * slots
    backward_bytes = 16 * rows + 4 * rows * padded * gradient.splits + 2 * u
    # normalize, tiles, losses; tiles, finish.
    return [
        size / GPUS[arch].bandwidth + launches * LAUNCH_SECONDS
        for size, launches in ((forward_bytes, 3), (backward_bytes, 2))
    ]


def _needed(arch: int, dims: tuple[int, ...]):
    for dim in dims:
        for kernel in ("forward", "gradient", *SYMMETRIC.values(), *OTHERS):
            if table_config(kernel, divmod(arch, 10), torch.float16, padded_dim(dim)):
                yield kernel, arch, torch.float16, padded_dim(dim), "ieee"


def table(archs: tuple[int, ...], rows: tuple[int, ...], dims: tuple[int, ...]) -> str:
    keys = [key for arch in archs for key in _needed(arch, dims)]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        statics = dict(zip(keys, pool.map(nt_xent_static, *zip(*keys, strict=True)), strict=True))
    lines = [
        "Predicted, µs, float16 or bfloat16; never run on a GPU. o: overlapped, s: serial; "
        "all: with the row-wise kernels and launches, overlapped.",
        "",
        "| GPU | 2N | D | forward | regs | shared KB | resident | instr./tile | o | s | limit "
        "| backward o | s | limit | regs | floor fwd, both | all fwd | all both | all / floor "
        "| forward with statistics o | s | classes: forward o | s | backward o | s |",
        "|" + "---|" * 25,
    ]
    for arch in archs:
        for count in rows:
            for dim in dims:
                lines.append(_row(arch, count, dim, statics))
    return "\n".join(lines)


def _row(arch: int, rows: int, dim: int, statics: dict) -> str:
    gpu = GPUS[arch]
    plans = {k: launch_plan(arch, k, rows, dim) for k in ("forward", "gradient")}
    kind = "symmetric" if plans["forward"].symmetric else "plain"

    def static(kernel, made=None):
        if made is not None and made.symmetric:
            kernel = SYMMETRIC[kernel]
        return statics[(kernel, arch, torch.float16, padded_dim(dim), "ieee")]

    code = static("forward", plans["forward"])
    forward = predict(arch, "forward", code, plans["forward"], rows, dim)
    backward = predict(arch, "gradient", static("gradient"), plans["gradient"], rows, dim)
    unit = rows * rows * dim / (gpu.processors * gpu.clock * gpu.flop_per_cycle)
    around = row_seconds(arch, rows, dim, plans["forward"], plans["gradient"])
    both = forward.overlapped + backward.overlapped + sum(around)
    other_plans = {k: launch_plan(arch, k, rows, dim) for k in OTHERS}
    others = (predict(arch, k, static(k, p), p, rows, dim) for k, p in other_plans.items())
    cells = [
        gpu.name, rows, dim, kind, code.registers,
        f"{code.shared / 1024:.0f}", code.resident, code.main_loop.outer_instructions,
        *(f"{1e6 * x:.1f}" for x in forward[:2]), forward.limit,
        *(f"{1e6 * x:.1f}" for x in backward[:2]), backward.limit, static("gradient").registers,
        f"{1e6 * unit:.1f}, {5e6 * unit:.1f}", f"{1e6 * (forward.overlapped + around[0]):.1f}",
        f"{1e6 * both:.1f}", f"{both / (5 * unit):.2f}",
        *(f"{1e6 * x:.1f}" for prediction in others for x in prediction[:2]),
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


@dataclass(frozen=True)
class CommandLine:
    arch: tuple[int, ...] = tuple(ARCHITECTURES)
    """Compute capabilities, such as 90."""
    rows: tuple[int, ...] = ROWS
    """Rows of z: two for each image."""
    dim: tuple[int, ...] = DIMS
    """Features of z."""


def main() -> None:
    given = harness.parse(CommandLine, "gpu_model", __doc__)
    print(table(given.arch, given.rows, given.dim))


if __name__ == "__main__":
    main()
