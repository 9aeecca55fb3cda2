"""The CUDA kernels of LARS without a GPU: run on the host, and compiled for every architecture."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
SANITIZERS = {
    "none": ["-O1"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}
# Elements of the largest tensor: enough for several chunks, or few because TSan is slow.
ELEMENTS = {"none": "24581", "address": "24581", "thread": "100"}

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def emulate(folder, sanitizer, fault=None):
    """Compile and run the emulated kernels, with a fault planted in the source."""
    source = (CSRC / "lars_cuda.cu").read_text()
    if fault:
        before, after = fault
        assert source.count(before) == 1, f"the source no longer holds {before!r} once"
        source = source.replace(before, after)
    (folder / "csrc").mkdir()
    (folder / "tests" / "csrc").mkdir(parents=True)
    (folder / "csrc" / "lars_cuda.cu").write_text(source)
    driver = ROOT / "tests" / "csrc" / "lars_emulation.cpp"
    driver = shutil.copy(driver, folder / "tests" / "csrc")
    program = folder / "emulation"
    command = ["g++", "-x", "c++", "-std=c++17", "-Wno-unknown-pragmas", f"-I{CSRC}"]
    command += [
        *SANITIZERS[sanitizer],
        driver,
        "-o",
        program,
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return subprocess.run(
        [program, ELEMENTS[sanitizer]],
        capture_output=True,
        text=True,
        timeout=250,
        env={"ASAN_OPTIONS": "detect_stack_use_after_return=0", "TSAN_OPTIONS": "halt_on_error=1"},
    )


@needs_gxx
def test_emulated_kernels_equal_the_formulas(tmp_path):
    result = emulate(tmp_path, "none")
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stdout + result.stderr


@needs_gxx
@pytest.mark.sanitize
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_find_nothing_in_the_emulated_kernels(tmp_path, sanitizer):
    result = emulate(tmp_path, sanitizer)
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stdout + result.stderr


FAULTS = {
    "no_barrier_before_the_block_sum": (
        "thread",
        "if (lane == 0) shared[warp] = x;\n  __syncthreads();",
        "if (lane == 0) shared[warp] = x;",
        "data race",
    ),
    "no_barrier_after_the_factors": (
        "thread",
        "  __syncthreads();\n  const Factors<A> f = factors[0];",
        "  const Factors<A> f = factors[0];",
        "data race",
    ),
    "blocks_share_a_slot": (
        "thread",
        "list.squares[2 * static_cast<int64_t>(chunk)] = p_sum;",
        "list.squares[0] = p_sum;",
        "data race",
    ),
    "divergent_barrier": (
        "none",
        "  if (warp == 0) {\n    x = lane",
        "  if (threadIdx.x < 5) __syncthreads();\n  if (warp == 0) {\n    x = lane",
        "different barriers",
    ),
    "half_a_mask": (
        "none",
        "constexpr unsigned kAllLanes = 0xffffffffu;",
        "constexpr unsigned kAllLanes = 0xffffu;",
        "mask does not name",
    ),
    "one_element_beyond": (
        "address",
        "for (int i = packs * kSize + threadIdx.x; i < n; i += kThreads)\n    update_one",
        "for (int i = packs * kSize + threadIdx.x; i <= n; i += kThreads)\n    update_one",
        "heap-buffer-overflow",
    ),
    "shared_memory_too_small": (
        "address",
        "SIMCLR_SHARED(double, shared, kWarps);\n  SIMCLR_SHARED(Factors<A>",
        "SIMCLR_SHARED(double, shared, 1);\n  SIMCLR_SHARED(Factors<A>",
        "use-after-poison",
    ),
    "unaligned_vectors": (
        "address",
        "return bits % 16 == 0;",
        "return bits % 4 == 0;",
        "misaligned",
    ),
    "tail_left_out": (
        "none",
        "const int packs = aligned(p, g, v) ? n / kSize : 0;",
        "const int packs = aligned(p, g, v) ? n / kSize : 0;\n  n = packs ? packs * kSize : n;",
        "expected",
    ),
    "sums_of_one_warp_only": (
        "none",
        "x = lane < kWarps ? shared[lane] : 0.0;",
        "x = lane < 1 ? shared[lane] : 0.0;",
        "expected",
    ),
}


@needs_gxx
@pytest.mark.sanitize
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(tmp_path, fault):
    sanitizer, before, after, words = FAULTS[fault]
    result = emulate(tmp_path, sanitizer, (before, after))
    assert result.returncode != 0
    assert words in result.stdout + result.stderr


@needs_nvcc
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, marks=() if a == 90 else pytest.mark.slow) for a in ARCHITECTURES],
)
def test_compiles_without_spills_into_wide_loads(tmp_path, architecture):
    """As ptxas reports; 64 registers leave room for two blocks of 512 threads on a processor."""
    arch = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = ["nvcc", "-std=c++17", "-O3", arch, f"-I{CSRC}", "-Xptxas=-v", "-c"]
    command += [CSRC / "lars_cuda.cu", "-o", tmp_path / "lars.o"]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    assert len(registers) == 8
    assert max(registers) <= 64
    assert re.findall(r"(\d+) bytes spill stores", log) == ["0"] * 8
    assert re.findall(r"(\d+) bytes stack frame", log) == ["0"] * 8
    if shutil.which("cuobjdump") is None:
        return
    listing = ["cuobjdump", "-sass", tmp_path / "lars.o"]
    sass = subprocess.run(listing, check=True, capture_output=True, text=True).stdout
    for kernel in sass.split("Function : ")[1:]:
        assert kernel.count("LDG.E.128") >= 2
        assert ("STG.E.128" in kernel) == ("lars_update" in kernel.splitlines()[0])
