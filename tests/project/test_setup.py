"""setup.py's choice whether to compile the CUDA kernels, with stand-ins for nvcc."""

import importlib.util
import os
from pathlib import Path

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[2]
CODES_13 = "sm_75 sm_80 sm_86 sm_87 sm_89 sm_90 sm_100 sm_103 sm_110 sm_120 sm_121"
CODES_12_4 = "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_87 sm_89 sm_90"


@pytest.fixture
def setup_py(monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.setenv("SIMCLR_FAST_BUILD_EXT", "0")
    monkeypatch.delenv("SIMCLR_FAST_CUDA", raising=False)
    # Restored at the end, as check_cuda sets it.
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("simclr_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pretend(monkeypatch, folder, release="13.0", codes=CODES_13, compiles=True, torch_cuda="13.0"):
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    lines = "\n".join(codes.split())
    nvcc.write_text(f"""#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {release}, V{release}.1" ;;
--list-gpu-code) echo "{lines}" ;;
-c) {"exit 0" if compiles else 'echo "unsupported GNU version!" >&2; exit 1'} ;;
esac
""")
    nvcc.chmod(0o755)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(folder))
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)


def test_cuda_is_compiled_for_all_that_nvcc_knows(setup_py, monkeypatch, tmp_path, capsys):
    pretend(monkeypatch, tmp_path)
    assert setup_py.find_cuda()
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
    assert "compute_120, sm_100, sm_120, sm_75, sm_80" in capsys.readouterr().err


def test_an_older_nvcc_compiles_for_what_it_knows(setup_py, monkeypatch, tmp_path):
    pretend(monkeypatch, tmp_path, "12.4", CODES_12_4, torch_cuda="12.8")
    assert setup_py.find_cuda()
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "7.5;8.0;8.6;8.9;9.0+PTX"


def test_the_users_architectures_are_kept(setup_py, monkeypatch, tmp_path):
    pretend(monkeypatch, tmp_path)
    for asked in ("8.6", "Ampere;9.0a", "7.5 12.0+PTX"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
        assert setup_py.find_cuda()
        assert os.environ["TORCH_CUDA_ARCH_LIST"] == asked


@pytest.mark.parametrize(
    ("options", "asked", "words"),
    [
        ({"release": "nothing"}, "", "is from an unknown CUDA"),
        ({"codes": "sm_35 sm_50"}, "", "knows none of 7.5, 8.0"),
        (
            {"codes": CODES_12_4},
            "9.0;12.0",
            "does not know sm_120 of TORCH_CUDA_ARCH_LIST=9.0;12.0",
        ),
        ({"codes": CODES_12_4}, "10.0+PTX", "does not know"),
        ({}, "eleven", "torch does not read TORCH_CUDA_ARCH_LIST=eleven"),
        ({"compiles": False}, "", "failed: unsupported GNU version!"),
    ],
)
def test_without_a_usable_nvcc_the_reason_is_printed(
    setup_py, monkeypatch, tmp_path, capsys, options, asked, words
):
    pretend(monkeypatch, tmp_path, **options)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert not setup_py.find_cuda()
    said = capsys.readouterr().err
    assert said.startswith("simclr_fast: no CUDA kernels are compiled, as ")
    assert words in said
    monkeypatch.setenv("SIMCLR_FAST_CUDA", "1")
    with pytest.raises(SystemExit, match="SIMCLR_FAST_CUDA=1, but"):
        setup_py.find_cuda()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"torch_cuda": "12.8"}, "is from CUDA 13, but torch is built for CUDA 12.8"),
        ({"torch_cuda": None}, "this torch has no CUDA"),
    ],
)
def test_torchs_cuda_matters_only_when_not_asked(
    setup_py, monkeypatch, tmp_path, capsys, options, words
):
    """The binary depends on no torch's CUDA, but its code may need a newer driver."""
    pretend(monkeypatch, tmp_path, **options)
    assert not setup_py.find_cuda()
    assert words in capsys.readouterr().err
    monkeypatch.setenv("SIMCLR_FAST_CUDA", "1")
    assert setup_py.find_cuda()


def test_an_nvcc_older_than_torch_is_taken(setup_py, monkeypatch, tmp_path):
    pretend(monkeypatch, tmp_path, "12.8", CODES_13, torch_cuda="13.0")
    assert setup_py.find_cuda()


def test_without_a_compiler_the_message_names_the_way_out(setup_py, monkeypatch):
    monkeypatch.setattr(setup_py.sys, "platform", "linux")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("SIMCLR_FAST_BUILD_EXT", "1")
    with pytest.raises(SystemExit, match=r"compiler .* is missing.*SIMCLR_FAST_BUILD_EXT=0"):
        setup_py.extension_options()


def test_windows_gets_plain_torch_by_default(setup_py, monkeypatch):
    monkeypatch.setattr(setup_py.sys, "platform", "win32")
    monkeypatch.delenv("SIMCLR_FAST_BUILD_EXT")
    assert "ext_modules" not in setup_py.extension_options()


def test_a_source_tree_without_links_gets_them(setup_py, monkeypatch, tmp_path):
    """As of a source distribution, and as git writes a link on Windows."""
    monkeypatch.setattr(setup_py, "ROOT", tmp_path)
    for name in ("kernels", "benchmarks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("x = 1")
    (tmp_path / "simclr_fast").mkdir()
    (tmp_path / "simclr_fast" / "kernels").write_text("../kernels")
    setup_py.link_packages()
    for name in ("kernels", "benchmarks"):
        assert (tmp_path / "simclr_fast" / name).is_symlink()
        assert (tmp_path / "simclr_fast" / name / "a.py").read_text() == "x = 1"


def test_the_addresses_are_those_of_the_repository_that_builds(setup_py, monkeypatch):
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    assert set(setup_py.project_urls()) == {"Method"}
    monkeypatch.setenv("GITHUB_REPOSITORY", "someone/simclr_fast")
    monkeypatch.delenv("GITHUB_SERVER_URL", raising=False)
    assert setup_py.project_urls()["Source"] == "https://github.com/someone/simclr_fast"


def test_without_nvcc(setup_py, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for home in (None, str(tmp_path)):
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", home)
        assert not setup_py.find_cuda()
        assert "there is no nvcc" in capsys.readouterr().err
