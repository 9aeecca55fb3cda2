"""The C++ CPU kernels under ASan, UBSan and TSan, with planted faults that they must find."""

import shutil
import subprocess
from pathlib import Path

import pytest
from instruction_sets import has_isa

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
# Pairs of the largest batch: several blocks on three threads, or few because TSan is slow.
PAIRS = {"address": "130", "thread": "40"}
FLAGS = {
    "base": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [*(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")), "-mfma", "-mf16c"],
}
# The sanitizer, the file, a piece of its source, the fault that replaces it, and what the sanitizer
# must report. The first two go beyond an array, the third adds bits of floats as signed numbers,
# the fourth reads sums that another thread may be adding to, and the last begins a phase before the
# one before it has ended.
FAULTS = {
    "overflow": (
        *("address", "nt_xent_backward_kernel.cpp"),
        "const int64_t padded = p.total + kPanel<T>;",
        "const int64_t padded = p.total;",
        "heap-buffer-overflow",
    ),
    "tail": (
        *("address", "lars_kernel.cpp"),
        "for (; i + kBlock <= n; i += kBlock) block(i);",
        "for (; i < n; i += kBlock) block(i);",
        "heap-buffer-overflow",
    ),
    "sign": (
        *("address", "nt_xent_vector.h"),
        "using Bits = typename L::UintVec;",
        "using Bits = typename L::IntVec;",
        "signed integer overflow",
    ),
    "race": (
        *("thread", "nt_xent_schedule.h", "    wait_for(pairs.rounds + J, order.round);\n", ""),
        "data race",
    ),
    "phase": (
        *("thread", "nt_xent_schedule.h", "  wait_for(&phase.done, count);\n", ""),
        "data race",
    ),
}


pytestmark = [
    pytest.mark.sanitize,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]


def build_and_run(folder, sanitizer, isa="base", fault=None):
    """Compile and run the kernels for one instruction set, with a fault planted in the source."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(ROOT / "tests" / "csrc", folder / "tests" / "csrc")
    driver = folder / "tests" / "csrc" / "cpu_kernels.cpp"
    if fault:
        name, before, after = fault
        source = (folder / "csrc" / name).read_text()
        assert source.count(before) == 1, f"{name} no longer holds {before!r} once"
        (folder / "csrc" / name).write_text(source.replace(before, after))
    program = folder / "cpu_kernels"
    command = ["g++", "-std=c++17", "-O1", "-g", "-pthread", f"-DSIMCLR_ISA={isa}", *FLAGS[isa]]
    command += [*SANITIZERS[sanitizer], *sorted((folder / "csrc").glob("*_kernel.cpp")), driver]
    subprocess.run([*command, "-o", program], check=True, capture_output=True, text=True)
    return subprocess.run(
        [program, PAIRS[sanitizer]],
        capture_output=True,
        text=True,
        timeout=250,
        env={"TSAN_OPTIONS": "halt_on_error=1"},
    )


@pytest.mark.parametrize(
    ("sanitizer", "isa"),
    [("address", "base"), ("address", "avx2"), ("address", "avx512"), ("thread", "base")],
)
def test_sanitizers_find_nothing_in_the_kernels(tmp_path, sanitizer, isa):
    if not has_isa(isa):
        pytest.skip(f"this CPU has no {isa}")
    result = build_and_run(tmp_path, sanitizer, isa)
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stdout + result.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(tmp_path, fault):
    sanitizer, *exchange, words = FAULTS[fault]
    result = build_and_run(tmp_path, sanitizer, fault=exchange)
    assert result.returncode != 0
    assert words in result.stderr
