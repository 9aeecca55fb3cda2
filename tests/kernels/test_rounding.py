"""Runs interpreted_rounding.py where Triton's interpreter, fixed at import, is on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import needs_interpreter

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


@needs_interpreter
def test_losses_under_the_rounding_of_tensor_cores():
    threads = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    file = ROOT / "tests" / "helpers" / "interpreted_rounding.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, **threads, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
