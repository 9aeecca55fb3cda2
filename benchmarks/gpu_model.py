"""Predicted times of the NT-Xent kernels, read off their machine code; nothing here ran on a GPU.

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
from simclr_fast.kernels.nt_xent_configs import VALUE_BLOCK, Plan, plan, table_config

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


def predict(arch: int, kernel: str, static: Static, made: Plan, rows: int, dim: int) -> Prediction:
    gpu, config, padded = GPUS[arch], made.config, padded_dim(dim)
    block_n = config.block_m if kernel == "symmetric" else config.block_n
    whole = config.block_d >= padded
    features = config.block_d if whole else padded
    # The moments' tiles are of one view's rows and one view's keys.
    views = 2 if kernel == "moments" else 1
    tiles = views**2 * triton.cdiv(rows // views, config.block_m)
    keys = tiles // 2 + 1 if kernel == "symmetric" else triton.cdiv(rows // views, block_n)
    slices = 1
    flop = 2 * config.block_m * block_n * features
    if "gradient" in kernel:
        value_block = config.block_d if whole else VALUE_BLOCK
        slices = triton.cdiv(padded, value_block)
        flop += 2 * config.block_m * block_n * value_block
    programs = tiles * made.splits * slices
    busiest = triton.cdiv(programs, gpu.processors) * triton.cdiv(keys, made.splits)

    loop = static.main_loop
    blocks = 0 if whole else features // config.block_d - 1
    instructions = loop.outer_instructions + blocks * loop.instructions
    cycles = {
        "tensor": flop / gpu.flop_per_cycle,
        "exp": max(loop.exp2, loop.outer_exp2) * 32 * config.warps / EXP2_PER_CYCLE,
        "issue": instructions * config.warps / WARPS_PER_CYCLE,
        "L2": (block_n if whole else config.block_m + block_n) * features * 2 / L2_BYTES_PER_CYCLE,
    }
    limit = max(cycles, key=cycles.__getitem__)
    overlapped = cycles[limit]
    serial = max(overlapped, cycles["tensor"] + max(cycles["exp"], cycles["issue"]))
    return Prediction(busiest * overlapped / gpu.clock, busiest * serial / gpu.clock, limit)


def row_seconds(arch: int, rows: int, dim: int, forward: Plan, gradient: Plan) -> list[float]:
    """The row-wise kernels of the forward, and of the backward, with every launch."""
    u, padded = 2 * rows * dim, padded_dim(dim)
    slots = forward.splits
    if forward.symmetric:
        slots += triton.cdiv(rows, forward.config.block_m) // 2
    forward_bytes = 3 * u + 8 * rows * slots
    backward_bytes = 16 * rows + 4 * rows * padded * gradient.splits + 2 * u
    # normalize, tiles, losses; weights, tiles, finish, the temperature's sum.
    return [
        size / GPUS[arch].bandwidth + launches * LAUNCH_SECONDS
        for size, launches in ((forward_bytes, 3), (backward_bytes, 4))
    ]


def _needed(arch: int, rows: tuple[int, ...], dims: tuple[int, ...]):
    for dim in dims:
        for kernel in ("forward", "symmetric", "gradient", *OTHERS):
            if table_config(kernel, divmod(arch, 10), torch.float16, padded_dim(dim)):
                yield kernel, arch, torch.float16, padded_dim(dim), "ieee"


def table(archs: tuple[int, ...], rows: tuple[int, ...], dims: tuple[int, ...]) -> str:
    keys = [key for arch in archs for key in _needed(arch, rows, dims)]
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
    kind = "symmetric" if plans["forward"].symmetric else "forward"

    def static(kernel):
        return statics[(kernel, arch, torch.float16, padded_dim(dim), "ieee")]

    forward = predict(arch, kind, static(kind), plans["forward"], rows, dim)
    backward = predict(arch, "gradient", static("gradient"), plans["gradient"], rows, dim)
    unit = rows * rows * dim / (gpu.processors * gpu.clock * gpu.flop_per_cycle)
    around = row_seconds(arch, rows, dim, plans["forward"], plans["gradient"])
    both = forward.overlapped + backward.overlapped + sum(around)
    code = static(kind)
    others = (
        predict(arch, k, static(k), launch_plan(arch, k, rows, dim), rows, dim) for k in OTHERS
    )
    cells = [
        gpu.name, rows, dim, "plain" if kind == "forward" else kind, code.registers,
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
