"""Compile the project's Triton kernels for any GPU, without one, and read the machine code."""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from simclr_fast.benchmarks.sass import stray_addresses
from simclr_fast.kernels.normalize import (
    NORMALIZE_PARTS,
    finish_parts,
    normalize_kernel,
    padded_dim,
    row_blocks,
)
from simclr_fast.kernels.nt_xent import WEIGHTS_BLOCK, slot_block
from simclr_fast.kernels.nt_xent_backward import (
    finish_class_gradient_kernel,
    finish_gradient_kernel,
    gradient_kernel,
    weight_tiles_kernel,
    weights_kernel,
)
from simclr_fast.kernels.nt_xent_configs import table_config
from simclr_fast.kernels.nt_xent_forward import losses_kernel, negatives_kernel, symmetric_kernel
from simclr_fast.kernels.sup_con import class_losses_kernel, class_sums_kernel

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# Bytes a program may use; each also reserves 1 KB of its multiprocessor. 87 (Orin), 103 (B300) and
# 121 (GB10) are not in the launch table, which serves them by their family's row.
SHARED_LIMIT = {
    **{80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448},
    **{100: 232448, 103: 232448, 120: 101376, 121: 101376},
}
# (kernel, architecture, type of û, padded features) → bytes that may be spilled, because a GPU was
# faster with it than with what does not spill.
TIMED_SPILLS = {("gradient_kernel", 90, "*fp32", 128): 128}
WARP_LIMIT = {80: 64, 86: 48, 87: 48, 89: 48, 90: 64, 100: 64, 103: 64, 120: 48, 121: 48}
# Columns of tensor memory per multiprocessor, on the architectures that have it.
TENSOR_MEMORY = 512
MMA = re.compile(r"\b(HGMMA|UTC\w*MMA|HMMA|QGMMA)\b")


@dataclass(frozen=True)
class Loop:
    """An innermost loop of the machine code, and the loop around it if there is one."""

    instructions: int
    mma: int
    exp2: int
    outer_instructions: int
    outer_exp2: int


@dataclass(frozen=True)
class Static:
    """What the compiler made of one kernel."""

    arch: int
    warps: int
    registers: int
    stack: int
    local_accesses: int
    shared: int
    tensor_memory: int
    mma: frozenset[str]
    wide_copies: int
    narrow_copies: int
    wide_loads: int
    loops: tuple[Loop, ...]
    # See stray_addresses: each is a read or write of shared memory at a wrong place.
    strays: tuple[str, ...]
    sass: str

    @property
    def resident(self) -> int:
        """Programs that fit one multiprocessor at a time."""
        allocated = -(-self.registers // 8) * 8 * 32 * self.warps
        by_shared = (SHARED_LIMIT[self.arch] + 1024) // (self.shared + 1024)
        by_tensor_memory = TENSOR_MEMORY // max(self.tensor_memory, 1)
        by_warps = WARP_LIMIT[self.arch] // self.warps
        return min(65536 // allocated, by_shared, by_tensor_memory, by_warps)

    @property
    def main_loop(self) -> Loop:
        """The unmasked loop: the shortest that has tensor-core instructions."""
        return min((x for x in self.loops if x.mma), key=lambda x: x.instructions)


def compile_kernel(kernel, signature: dict, constants: dict, arch: int, aligned=(), **options):
    """signature: the run-time arguments' types; aligned: those that are multiples of 16.

    As at a launch, an argument that the kernel does not specialise on is never known to be one.
    """
    names = kernel.arg_names
    types = {n: signature.get(n, "constexpr") for n in names}
    attributes: dict[tuple[int, ...], list] = {}
    for i, (n, parameter) in enumerate(zip(names, kernel.params, strict=True)):
        if types[n] == "constexpr":
            attributes[i,] = []
        elif types[n] != "fp32" and not parameter.do_not_specialize:
            attributes[i,] = [["tt.divisibility", 16]] if n in aligned else []
    # As a launch orders and writes all this, so that Triton's cache sees the same kernel.
    values = {(i,): constants[n] for i, n in enumerate(names) if n in constants}
    source = ASTSource(kernel, types, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def inspect(compiled, arch: int) -> Static:
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(compiled.asm["cubin"])
    try:
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    finally:
        os.unlink(file.name)
    code = [line for line in sass.splitlines() if re.search(r"/\*[0-9a-f]{4,}\*/", line)]
    return Static(
        arch=arch,
        warps=compiled.metadata.num_warps,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        local_accesses=sum(bool(re.search(r"\b(STL|LDL)\b", line)) for line in code),
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        mma=frozenset(m[1] for line in code if (m := MMA.search(line))),
        wide_copies=sum("LDGSTS" in line and ".128" in line for line in code),
        narrow_copies=sum("LDGSTS" in line and ".128" not in line for line in code),
        wide_loads=sum("LDG" in line and ".128" in line for line in code),
        loops=tuple(_loops(sass)),
        strays=tuple(stray_addresses(sass)),
        sass=sass,
    )


def _tool(name: str, *arguments: str) -> str:
    """What one of Triton's tools prints. An older nvdisasm does not know newer GPUs, of which ptxas
    may know: TRITON_NVDISASM_PATH and TRITON_CUOBJDUMP_PATH name others."""
    path = getattr(triton.knobs.nvidia, name).path
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{path}: {done.stderr.strip()}")
    return done.stdout


def _loops(sass: str) -> list[Loop]:
    """Innermost spans between a label and a later branch back to it."""
    position: dict[str, int] = {}
    code: list[str] = []
    spans: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\S+):", line):
            position[label[1]] = len(code)
        elif re.search(r"/\*[0-9a-f]{4,}\*/", line):
            code.append(line)
            branch = re.search(r"\bBRA\b.*`\((\.L_\S+)\)", line)
            if branch and branch[1] in position:
                spans.append((position[branch[1]], len(code)))
    spans = [(a, b) for a, b in spans if b - a > 1]

    def around(span):
        a, b = span
        return [s for s in spans if s != span and s[0] <= a and b <= s[1]]

    def exp2(span):
        return sum("MUFU.EX2" in line for line in code[slice(*span)])

    loops = []
    for span in spans:
        if any(span in around(other) for other in spans):
            continue
        outer = min(around(span), key=lambda s: s[1] - s[0], default=span)
        mma = sum(bool(MMA.search(line)) for line in code[slice(*span)])
        loops.append(Loop(span[1] - span[0], mma, exp2(span), outer[1] - outer[0], exp2(outer)))
    return loops


def argument_types(kernel, u: str, z: str) -> dict[str, str]:
    """Types of a kernel's run-time arguments by this project's names; û of type u, z of type z."""
    constants = {p.name for p in kernel.params if p.is_constexpr}
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        if name in ("u_ptr", "tiles_ptr"):
            types[name] = f"*{u}"
        elif name in ("z_ptr", "z1_ptr", "z2_ptr", "grad_z_ptr"):
            types[name] = f"*{z}"
        elif name in ("ids_ptr", "counter_ptr"):
            types[name] = "*i32"
        else:
            scalar = "fp32" if name in ("grad_scale", "loss_scale") else "i32"
            types[name] = "*fp32" if name.endswith("_ptr") else scalar
    return types


# Arguments that are None without classes. So is weight_ptr if all rows have the weight 1.
CLASS_ARGUMENTS = ("ids_ptr", "share_ptr", "inverse_count_ptr")


def nt_xent_static(
    kernel: str, arch: int, dtype: torch.dtype, padded: int, precision: str, **overrides: int
) -> Static | None:
    """One row of the launch table, compiled; None if the table has no symmetric forward.

    kernel: as in `table_config`. overrides: other compile options.
    """
    config = table_config(kernel, divmod(arch, 10), dtype, padded)
    if config is None:
        return None
    fused = config.holds_gradient(padded)
    function = {
        "forward": negatives_kernel,
        "moments": negatives_kernel,
        "symmetric": symmetric_kernel,
        "symmetric_moments": symmetric_kernel,
        "gradient": gradient_kernel if fused else weight_tiles_kernel,
        "class_gradient": gradient_kernel if fused else weight_tiles_kernel,
        "class_sums": class_sums_kernel,
    }[kernel]
    options = config.options(padded, precision)
    launch = {k: v for k, v in options.items() if k.islower()}
    constants = {k: v for k, v in options.items() if k.isupper()}
    constants["BLOCK_N"] = config.block_n
    constants["BLOCK_V"] = triton.next_power_of_2(padded)
    constants["STATISTICS"] = "moments" in kernel
    if kernel == "gradient":
        constants.update(dict.fromkeys(("weight_ptr", *CLASS_ARGUMENTS)))
    constants = {n: v for n, v in constants.items() if n in function.arg_names}
    types = argument_types(function, "fp32" if dtype == torch.float32 else "fp16", "fp32")
    types = {n: t for n, t in types.items() if n not in constants}
    return inspect(
        compile_kernel(function, types, constants, arch, [*types], **launch | overrides), arch
    )


def row_kernel_static(kernel: str, arch: int, dtype: torch.dtype, dim: int) -> Static:
    """A row-wise kernel for contiguous z [N, dim] of a dtype."""
    function = {
        "normalize": normalize_kernel,
        "losses": losses_kernel,
        "statistics": losses_kernel,
        "weights": weights_kernel,
        "finish_gradient": finish_gradient_kernel,
        "class_losses": class_losses_kernel,
        "class_weights": weights_kernel,
        "finish_class_gradient": finish_class_gradient_kernel,
    }[kernel]
    z = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    types = argument_types(function, "fp32" if dtype == torch.float32 else "fp16", z)
    padded = padded_dim(dim)
    parts = NORMALIZE_PARTS if kernel == "normalize" else 1
    blocks = row_blocks(padded, finish_parts(dtype) if kernel.startswith("finish") else parts)
    constants = {
        "PADDED": padded,
        "BLOCK_P": blocks.rows,
        "BLOCK_R": blocks.rows,
        "BLOCK_D": blocks.columns,
        "BLOCK_S": slot_block(blocks.rows),
        "DECOUPLED": False,
        "STATISTICS": kernel == "statistics",
        # A launch turns integers that equal 1 into constants.
        **dict.fromkeys(("stride_d", "stride_1d", "stride_2d"), 1),
    }
    warps = blocks.warps
    limit = {"maxnreg": blocks.registers} if kernel.startswith("finish") else {}
    if kernel in ("weights", "class_weights", "class_losses"):
        constants["BLOCK_R"], warps = WEIGHTS_BLOCK, 4
    if kernel == "weights":
        constants.update(dict.fromkeys(CLASS_ARGUMENTS))
    constants = {n: v for n, v in constants.items() if n in function.arg_names}
    types = {n: t for n, t in types.items() if n not in constants}
    ragged = ("dim", "stride_n", "stride_1n", "stride_2n") if dim % 16 else ()
    multiples = [n for n, t in types.items() if t != "fp32" and n not in ragged]
    compiled = compile_kernel(function, types, constants, arch, multiples, num_warps=warps, **limit)
    return inspect(compiled, arch)
