"""What a user installs: the wheel holds everything and works away from the source tree."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from made_once import made_once

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)


def build(folder):
    """An sdist, and a wheel built from it, without CUDA and optimisation, which take minutes."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(
        command,
        env={**os.environ, "SIMCLR_FAST_CUDA": "0", "CXXFLAGS": "-O0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    # Two builds at once in one tree would disturb each other.
    folder = made_once(tmp_path_factory, "dist", build)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def test_wheel_imports_in_an_empty_folder(dist, tmp_path):
    wheel, _ = dist
    assert "cp310-abi3" in wheel.name
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
        names = archive.namelist()
    assert "simclr_fast/_C.abi3.so" in names
    assert "simclr_fast/kernels/nt_xent.py" in names
    assert "simclr_fast/py.typed" in names
    assert not [n for n in names if n.startswith(("kernels/", "tests/", "csrc/", "benchmarks/"))]
    program = """
import torch, simclr_fast
from simclr_fast import ops
from simclr_fast.data import demo
assert simclr_fast.__file__.startswith(__import__('os').environ['SITE'])
assert ops.has_extension(), ops.EXTENSION_ERROR
assert len(demo.demo_garments('test')[0]) == 1000
import simclr_fast.kernels.nt_xent
assert torch.isfinite(simclr_fast.nt_xent_loss(torch.randn(8, 16), torch.randn(8, 16)))
"""
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(target), "SITE": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_sdist_holds_the_native_sources(dist):
    with tarfile.open(dist[1]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for path in ("csrc/isa.h", "csrc/nt_xent_kernel.cpp", "kernels/nt_xent.py", "LICENSE"):
        assert path in names
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h")} <= names


def test_without_the_extension_everything_still_works():
    """As after SIMCLR_FAST_BUILD_EXT=0: plain torch, said once, with the cause."""
    program = """
import sys, warnings, numpy as np, torch
sys.modules['simclr_fast._C'] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    import simclr_fast
    from simclr_fast.data.loader import TwoViewLoader
    from simclr_fast.optim.lars import LARS
    weight = torch.nn.Parameter(torch.randn(12, 8))
    optimizer = LARS([weight], lr=.1)
    images = np.random.default_rng(0).integers(0, 255, (6, 9, 9, 3), dtype=np.uint8)
    for view1, view2, _ in TwoViewLoader(images, 3, 2):
        z = [v.flatten(1) @ weight for v in (view1, view2)]
        simclr_fast.nt_xent_loss(*z).backward()
        optimizer.step()
messages = [str(w.message) for w in caught if 'extension' in str(w.message)]
assert len(messages) == 1 and '_C' in messages[0], messages
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_cuda_must_be_there_when_asked_for(tmp_path):
    environment = {**os.environ, "SIMCLR_FAST_CUDA": "yes"}
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "SIMCLR_FAST_CUDA must be auto, 0 or 1, got 'yes'" in done.stderr
