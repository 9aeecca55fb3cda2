"""Missing optional packages: one message that names them all and a command that works."""

import platform
import sys

import pytest
import torch

from simclr_fast.utils import extras


def hide(monkeypatch, *modules):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    hide(monkeypatch, "tqdm")
    with pytest.raises(ImportError) as caught:
        extras.need("tqdm")
    assert str(caught.value) == "tqdm (shows progress) is missing: pip install tqdm"


def test_a_part_of_a_missing_package_names_the_package(monkeypatch):
    hide(monkeypatch, "PIL", "PIL.Image")
    with pytest.raises(ImportError, match=r"pip install pillow$"):
        extras.need("PIL.Image")


def test_packages_needed_together_are_named_together(monkeypatch):
    hide(monkeypatch, "onnx", "onnxruntime", "onnxscript")
    with pytest.raises(ImportError, match=r"pip install onnxscript onnx onnxruntime$"):
        extras.need("onnxscript")


def test_all_missing_packages_of_a_command_are_named_at_once(monkeypatch):
    hide(monkeypatch, "tyro", "sklearn", "matplotlib")
    with pytest.raises(ImportError, match=r"are missing: pip install tyro scikit-learn matplotlib"):
        extras.require(["tyro", "tqdm", "sklearn"], also=["matplotlib"])
    # A package that is only useful does not stop the command.
    extras.require(["tqdm"], also=["matplotlib"])


@pytest.mark.parametrize(
    ("cuda", "name"),
    [
        ("13.0", "nvidia-dali-cuda130"),
        ("12.8", "nvidia-dali-cuda120"),
        (None, "nvidia-dali-cuda130"),
    ],
)
def test_dali_is_the_one_for_this_torch(monkeypatch, cuda, name):
    hide(monkeypatch, "nvidia.dali")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    with pytest.raises(ImportError, match=f"pip install {name}$"):
        extras.need("nvidia.dali")


def test_dali_is_suggested_on_linux_only(monkeypatch):
    hide(monkeypatch, "nvidia.dali", "tyro")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    with pytest.raises(ImportError, match=r"pip install tyro; DALI is for Linux only"):
        extras.require(["tyro", "nvidia.dali"])


def test_a_package_that_does_not_import_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "umap.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "umap", raising=False)
    with pytest.raises(ImportError, match=r"umap-learn is installed .*no_such_module_at_all"):
        extras.need("umap")
