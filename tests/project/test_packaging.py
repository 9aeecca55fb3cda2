"""What a user installs: the wheel holds everything and works away from the source tree."""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from functools import partial
from pathlib import Path

import pytest
from made_once import made_once

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)


def build(folder, compiled):
    """An sdist, and a wheel built from it, by the hooks that every installer calls.

    compiled: with the extension, but without CUDA and optimisation, which take minutes. The sdist
    needs neither torch nor a compiler.
    """
    folder.mkdir()
    call_hook("build_sdist", ROOT, folder, SIMCLR_FAST_BUILD_EXT="0")
    (sdist,) = folder.glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as unpacked:
        with tarfile.open(sdist) as archive:
            archive.extractall(unpacked, filter="data")
        (tree,) = Path(unpacked).iterdir()
        options = {"SIMCLR_FAST_CUDA": "0", "CXXFLAGS": "-O0"}
        call_hook("build_wheel", tree, folder, SIMCLR_FAST_BUILD_EXT=str(int(compiled)), **options)


def call_hook(name, tree, folder, **environment):
    assert 'build-backend = "setuptools.build_meta"' in (tree / "pyproject.toml").read_text()
    program = f"from setuptools.build_meta import {name}; {name}({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def built(tmp_path_factory, compiled):
    # Two builds at once in one tree would disturb each other.
    folder = made_once(tmp_path_factory, f"dist-{compiled}", partial(build, compiled=compiled))
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    return built(tmp_path_factory, False)


# `make install` compiles the extension too, in the clone.
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_wheel_imports_in_an_empty_folder(compiled, tmp_path_factory, tmp_path):
    wheel, _ = built(tmp_path_factory, compiled)
    assert ("cp310-abi3" in wheel.name) is compiled
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
        names = archive.namelist()
    assert ("simclr_fast/_C.abi3.so" in names) is compiled
    assert "simclr_fast/kernels/nt_xent.py" in names
    assert "simclr_fast/py.typed" in names
    assert not [n for n in names if n.startswith(("kernels/", "tests/", "csrc/", "benchmarks/"))]
    if compiled:
        library = (target / "simclr_fast" / "_C.abi3.so").read_bytes()
        assert library.startswith(b"\x7fELF")
        assert b".debug_info" not in library
    program = f"""
import torch, simclr_fast
from simclr_fast import ops
from simclr_fast.data import demo
assert simclr_fast.__file__.startswith(__import__('os').environ['SITE'])
assert ops.has_extension() or not {compiled}, ops.EXTENSION_ERROR
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


def test_the_wheel_holds_each_file_once(dist):
    with zipfile.ZipFile(dist[0]) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
    licences = [name for name in names if "LICENSE" in name]
    assert sorted(Path(name).name for name in licences) == ["LICENSE", "LICENSE.fashion-mnist"]
    assert len(names) == len(set(names))
    for field in ("Author:", "License:", "Project-URL:", "Classifier: Typing :: Typed"):
        assert f"\n{field}" in metadata


def tracked():
    """The files of the source tree, as git has them; None outside a clone."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    return set(done.stdout.split()) if done.returncode == 0 else None


def test_the_sdist_holds_all_that_a_clone_holds(dist):
    with tarfile.open(dist[1]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
        links = [member.name for member in archive.getmembers() if member.issym()]
    files = tracked()
    if files is None:
        pytest.skip("not a clone")
    # Links to folders, which setup.py makes again.
    made = {"simclr_fast/kernels", "simclr_fast/benchmarks"}
    there = {file for file in files - made if (ROOT / file).exists()}
    assert there - names == set()
    assert not [name for name in names if name.startswith(tuple(f"{link}/" for link in made))]
    assert {Path(link).name for link in links} >= {"changelog.md", "contributing.md"}


def test_an_editable_install_of_the_sdist_is_whole_and_seen_by_type_checkers(dist, tmp_path):
    with tarfile.open(dist[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.glob("simclr_fast-*")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    # torch and setuptools from this environment.
    own = [path for path in sys.path if path.endswith("-packages")]
    (site / "own.pth").write_text("\n".join(own))
    command = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python"), "install"]
    command += ["-q", "--no-deps", "--no-build-isolation", "--ignore-installed", "-e", str(tree)]
    environment = {**os.environ, "SIMCLR_FAST_BUILD_EXT": "0", "PYTHONPATH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    # A plain path, which type checkers follow, and not a hook of the import system.
    paths = [path.read_text().strip() for path in site.glob("__editable__*.pth")]
    assert [Path(path) for path in paths] == [tree]
    assert (tree / "simclr_fast" / "kernels" / "nt_xent.py").is_file()
    assert (tree / "simclr_fast" / "benchmarks" / "harness.py").is_file()


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


def test_the_readme_of_a_release_links_to_its_repository(tmp_path):
    """An index shows it without the files beside it."""
    environment = {**os.environ, "GITHUB_REPOSITORY": "a/b", "SIMCLR_FAST_BUILD_EXT": "0"}
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    text = (tmp_path / "simclr_fast.egg-info" / "PKG-INFO").read_text()
    assert "\nProject-URL: Source, https://github.com/a/b\n" in text
    assert "](https://github.com/a/b/raw/HEAD/docs/speed.png)" in text
    assert "](https://github.com/a/b/blob/HEAD/docs/install.md)" in text
    assert not re.findall(r"\]\((?!https?://)[^)]*\)", text)


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
