"""Runs interpreted_*.py where Triton's interpreter, fixed at import, is on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
HELPERS = ROOT / "tests" / "helpers"


def test_kernels_in_the_interpreter():
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
         *(str(HELPERS / f"interpreted_{name}.py") for name in ("nt_xent", "sup_con", "memory"))],
        env={**os.environ, **threads, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
