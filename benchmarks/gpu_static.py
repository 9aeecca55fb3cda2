"""Compile the project's Triton kernels for any GPU, without one, and read the machine code."""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# Bytes a program may use; each also reserves 1 KB of its multiprocessor.
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
WARP_LIMIT = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
MMA = re.compile(r"\b(HGMMA|UTC\w*MMA|HMMA|QGMMA)\b")


@dataclass(frozen=True)
class Loop:
    """An innermost loop of the machine code."""

    instructions: int
    mma: int
    exp2: int


@dataclass(frozen=True)
class Static:
    """What the compiler made of one kernel."""

    arch: int
    warps: int
    registers: int
    stack: int
    local_accesses: int
    shared: int
    mma: frozenset[str]
    wide_copies: int
    narrow_copies: int
    narrow_loads: int
    loops: tuple[Loop, ...]
    sass: str

    @property
    def resident(self) -> int:
        """Programs that fit one multiprocessor at a time."""
        allocated = -(-self.registers // 8) * 8 * 32 * self.warps
        by_shared = (SHARED_LIMIT[self.arch] + 1024) // (self.shared + 1024)
        return min(65536 // allocated, by_shared, WARP_LIMIT[self.arch] // self.warps)

    @property
    def main_loop(self) -> Loop:
        """The unmasked loop: the shortest that has tensor-core instructions."""
        return min((x for x in self.loops if x.mma), key=lambda x: x.instructions)


def compile_kernel(kernel, signature: dict, constants: dict, arch: int, aligned=(), **options):
    """signature: the run-time arguments' types; aligned: those that are multiples of 16."""
    names = kernel.arg_names
    types = {n: signature.get(n, "constexpr") for n in names}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    values = {(names.index(n),): v for n, v in constants.items()}
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
    loads = [line for line in code if re.search(r"\bLDG\b|\bLDG\.E", line)]
    return Static(
        arch=arch,
        warps=compiled.metadata.num_warps,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        local_accesses=sum(bool(re.search(r"\b(STL|LDL)\b", line)) for line in code),
        shared=compiled.metadata.shared,
        mma=frozenset(m[1] for line in code if (m := MMA.search(line))),
        wide_copies=sum("LDGSTS" in line and ".128" in line for line in code),
        narrow_copies=sum("LDGSTS" in line and ".128" not in line for line in code),
        narrow_loads=sum(".128" not in line for line in loads),
        loops=tuple(_loops(sass)),
        sass=sass,
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run(
        [str(TOOLS / name), *arguments], capture_output=True, text=True, check=True
    ).stdout


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
    inner = [s for s in spans if not any(s[0] <= a and b <= s[1] for a, b in spans if (a, b) != s)]
    return [
        Loop(
            instructions=b - a,
            mma=sum(bool(MMA.search(line)) for line in code[a:b]),
            exp2=sum("MUFU.EX2" in line for line in code[a:b]),
        )
        for a, b in inner
    ]
