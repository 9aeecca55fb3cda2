"""NT-Xent's kernels of bfloat16 inputs on any CPU: portable code stands for their instructions.

tests/losses/test_nt_xent_cpu.py runs the instructions themselves where the CPU has them.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ("nt_xent_kernel.cpp", "nt_xent_backward_kernel.cpp")
# The file, a piece of its source, and the fault that replaces it.
FAULTS = {
    "scale": (
        "nt_xent_tiles.h",
        "store_rounded(halves, even * scale);",
        "store_rounded(halves, even);",
    ),
    "zeros": (
        "nt_xent_backward_kernel.cpp",
        "row + 2 < padded ? row + 2 : blocks * block",
        "row + 2",
    ),
}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def build_and_run(folder, *flags, fault=None):
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(ROOT / "tests" / "csrc", folder / "tests" / "csrc")
    driver = folder / "tests" / "csrc" / "bf16_kernels.cpp"
    if fault:
        name, before, after = fault
        source = (folder / "csrc" / name).read_text()
        assert source.count(before) == 1, f"{name} no longer holds {before!r} once"
        (folder / "csrc" / name).write_text(source.replace(before, after))
    program = folder / "bf16_kernels"
    command = ["g++", "-std=c++17", "-O1", "-pthread", "-DSIMCLR_ISA=base", "-DSIMCLR_BF16", *flags]
    command += [*(folder / "csrc" / name for name in KERNELS), driver, "-o", program]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return subprocess.run([program], capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx"])
def test_the_formulas_hold_with_emulated_instructions(tmp_path, instructions):
    flags = ["-DSIMCLR_AMX"] if instructions == "amx" else []
    result = build_and_run(tmp_path, *flags)
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stdout + result.stderr


@pytest.mark.sanitize
@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx"])
def test_sanitizers_find_nothing(tmp_path, instructions):
    flags = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    if instructions == "amx":
        flags.append("-DSIMCLR_AMX")
    result = build_and_run(tmp_path, *flags)
    assert (result.returncode, result.stdout) == (0, "ok\n"), result.stdout + result.stderr


@pytest.mark.sanitize
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(tmp_path, fault):
    result = build_and_run(tmp_path, "-DSIMCLR_AMX", fault=FAULTS[fault])
    assert result.returncode == 1
    assert "gradient" in result.stdout or "threads" in result.stdout
