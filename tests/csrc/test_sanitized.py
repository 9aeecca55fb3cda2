"""The whole extension, bindings and kernels, under AddressSanitizer and UBSan in its own tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_once import made_once

from simclr_fast import ops

ROOT = Path(__file__).resolve().parents[2]
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so")

pytestmark = [
    pytest.mark.sanitize,
    pytest.mark.skipif(sys.platform != "linux", reason="needs LD_PRELOAD"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(not ops.has_extension(), reason="the extension is not built"),
]

# The file, a piece of its source, the fault that replaces it, the tests that run into it, and what
# the sanitizer reports.
FAULTS = [
    (
        "half.h",
        "  for (int64_t i = 0; i < n; ++i) out[i] = widen(x[i]);",
        "  for (int64_t i = 0; i <= n; ++i) out[i] = widen(x[i]);",
        ("optim/test_lars.py", "bfloat16 and native"),
        "heap-buffer-overflow",
    ),
    (
        "nt_xent_backward_kernel.cpp",
        "d + k < dim ? u[d + k] : T(0)",
        "u[d + k]",
        ("losses/test_nt_xent_cpu.py", "native_and_plain"),
        "heap-buffer-overflow",
    ),
    (
        "augment_kernel.cpp",
        "    if (columns - column >= L) {",
        "    if (columns > 0) {",
        ("augment/test_augment.py", "every_small_size"),
        "heap-buffer-overflow",
    ),
    (
        "norm_act_kernel.cpp",
        "rest < p.period ? rest : p.period",
        "p.period",
        ("ops/test_norm_act.py", "equals_float64"),
        "heap-buffer-overflow",
    ),
    (
        "norm_train_kernel.cpp",
        "const int64_t whole = end < p.units ? end : p.units;\n  for (int64_t first",
        "const int64_t whole = end;\n  for (int64_t first",
        ("ops/test_norm_train.py", "as_exact_as_plain"),
        "heap-buffer-overflow",
    ),
    (
        "lars_cpu.cpp",
        "    const size_t offset = begin * bytes(t.type);",
        "    const size_t offset = (begin + 1) * bytes(t.type);",
        ("optim/test_lars_native.py", "large_tensors"),
        "heap-buffer-overflow",
    ),
]
# Without tests that compile for minutes or measure memory, of which the sanitizers take much.
CLEAN = [
    ("losses/test_nt_xent_cpu.py", "not memory"),
    ("losses/test_nt_xent.py", "not opcheck and not compile"),
    ("losses/test_sup_con.py", "not opcheck and not compile"),
    ("optim/test_lars_native.py", "not costs"),
    ("optim/test_lars_changes.py", ""),
    ("augment/test_augment.py", "not opcheck"),
    ("ops/test_norm_act.py", ""),
    ("ops/test_norm_train.py", ""),
]


def build(folder, faults=()):
    """A copy of the sources in `folder`, its extension compiled with the sanitizers."""
    left_out = (".*", "build", "dist", "site", "*.so", "*.egg-info", "__pycache__", "runs")
    shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(*left_out))
    for file, before, after, *_ in faults:
        path = folder / "csrc" / file
        source = path.read_text()
        assert source.count(before) == 1, f"{file} no longer holds {before!r} once"
        path.write_text(source.replace(before, after))
    sanitizers = "-fsanitize=address,undefined -fno-sanitize=vptr"
    environment = os.environ | {
        # -O1 builds in a third of the time.
        "CXXFLAGS": f"{sanitizers} -fno-sanitize-recover=all -g1 -O1",
        "LDFLAGS": sanitizers,
        "SIMCLR_FAST_CUDA": "0",
    }
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return folder


def run(folder, file, which):
    def runtime(name):
        command = ["g++", f"-print-file-name={name}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    environment = os.environ | {
        "LD_PRELOAD": " ".join(map(runtime, RUNTIMES)),
        # Python and torch free little at exit.
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "2",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", f"tests/{file}"]
    command += ["-k", which, "-p", "no:cacheprovider", "--timeout=600"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    return made_once(tmp_path_factory, "clean", build)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    return made_once(tmp_path_factory, "faulty", lambda folder: build(folder, FAULTS))


@pytest.mark.parametrize(("file", "which"), CLEAN)
def test_sanitizers_find_nothing_in_the_extension(clean, file, which):
    result = run(clean, file, which)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " passed" in result.stdout


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[0])
def test_planted_faults_are_found(faulty, fault):
    *_, (file, which), words = fault
    result = run(faulty, file, which)
    assert result.returncode != 0
    assert words in result.stderr + result.stdout, (result.stdout + result.stderr)[-3000:]
