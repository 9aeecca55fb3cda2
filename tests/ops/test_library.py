"""The rule for which implementation runs. Every reason for plain torch is given, once."""

import json
import sys
import types
import warnings
from unittest.mock import Mock

import pytest
import torch
from rank_runs import on_ranks
from torch._subclasses.fake_tensor import FakeTensorMode

from simclr_fast import nt_xent_loss, ops, sup_con_loss
from simclr_fast.ops import Implementation, library
from simclr_fast.optim.lars_native import use_native
from simclr_fast.utils import install

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(library, "_given_reasons", set())
    checks = library._triton_unusable, library._why_plain_on_gpu
    for check in checks:
        check.cache_clear()
    yield
    for check in checks:
        check.cache_clear()


def pretend_gpu(monkeypatch, capability, count=1):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
    monkeypatch.setattr(library, "_triton_unusable", lambda initialized: None)


def pretend_cuda_build(monkeypatch, architectures):
    monkeypatch.setattr(library, "EXTENSION_ERROR", None)
    monkeypatch.setattr(library, "_cuda_kernels", lambda: (architectures, ""))


def said(device, dtype=torch.float32, on_cuda=Implementation.TRITON):
    """The implementation that runs there, and the warnings of three calls."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answers = {ops.implementation_for(device, dtype, on_cuda=on_cuda) for _ in range(3)}
    (answer,) = answers
    return answer, [str(w.message) for w in caught]


def assert_plain(answer, *words):
    implementation, messages = answer
    assert implementation is Implementation.PLAIN
    assert len(messages) == 1
    for word in words:
        assert word in messages[0]


def test_the_cpu_runs_native_kernels_or_says_why_not(monkeypatch):
    monkeypatch.setattr(library, "EXTENSION_ERROR", None)
    for dtype in (torch.float64, torch.bfloat16):
        assert said(torch.device("cpu"), dtype) == (Implementation.NATIVE, [])
    monkeypatch.setattr(library, "EXTENSION_ERROR", ImportError("no such file"))
    assert_plain(said(torch.device("cpu")), "no such file", "pip install --no-build")


def test_the_installed_copy_that_a_source_tree_hides_is_found(monkeypatch, tmp_path):
    """In an unpacked source distribution, which has metadata of its own."""
    tree, site = tmp_path / "tree", tmp_path / "site"
    for folder, metadata in ((tree, "simclr_fast.egg-info"), (site, "simclr_fast-1.dist-info")):
        for part in ("simclr_fast", metadata):
            (folder / part).mkdir(parents=True)
        (folder / "simclr_fast" / "__init__.py").touch()
        name = "PKG-INFO" if folder == tree else "METADATA"
        (folder / metadata / name).write_text("Metadata-Version: 2.1\nName: simclr-fast\n")
    (tree / "setup.py").touch()
    (tree / "csrc").mkdir()
    monkeypatch.setattr(install, "_PACKAGE", tree / "simclr_fast")
    monkeypatch.setattr(sys, "path", [str(tree)])
    assert install.hidden_copy() is None
    monkeypatch.setattr(sys, "path", [str(tree), str(site)])
    assert install.hidden_copy() == site / "simclr_fast"


@pytest.mark.parametrize("there", [True, False])
def test_the_command_names_the_source_distribution_if_it_is_there(monkeypatch, tmp_path, there):
    archive = tmp_path / "simclr_fast-0.1.0.tar.gz"
    if there:
        archive.touch()
    origin = json.dumps({"url": archive.as_uri()})
    monkeypatch.setattr(install, "_PACKAGE", tmp_path / "site" / "simclr_fast")
    monkeypatch.setattr(install, "_distribution", lambda: Mock(read_text=lambda name: origin))
    last = str(archive) if there else "--no-binary simclr-fast simclr-fast"
    assert install.build_command().endswith(f"--force-reinstall {last}")


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (12, 1)])
def test_supported_gpus_run_triton_kernels(monkeypatch, capability):
    pretend_gpu(monkeypatch, capability)
    assert said(CUDA) == (Implementation.TRITON, [])
    assert said(CUDA, torch.bfloat16) == (Implementation.TRITON, [])


def test_float64_has_no_gpu_kernel(monkeypatch):
    pretend_gpu(monkeypatch, (9, 0))
    assert_plain(said(CUDA, torch.float64), "float64", "Use float32")


@pytest.mark.parametrize("capability", [(6, 1), (7, 0), (7, 5)])
def test_old_gpus_run_plain_torch_and_say_why(monkeypatch, capability):
    pretend_gpu(monkeypatch, capability)
    assert_plain(said(CUDA), "8.0", f"{capability[0]}.{capability[1]}")


@pytest.mark.parametrize("on_cuda", [Implementation.TRITON, Implementation.CUDA])
def test_rocm_runs_plain_torch_and_says_why(monkeypatch, on_cuda):
    pretend_gpu(monkeypatch, (9, 4))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert_plain(said(CUDA, on_cuda=on_cuda), "ROCm")


@pytest.mark.parametrize("name", ["mps", "xpu", "hpu"])
@pytest.mark.parametrize("on_cuda", [Implementation.TRITON, Implementation.CUDA])
def test_other_devices_run_plain_torch_and_say_why(name, on_cuda):
    assert_plain(said(torch.device(name), on_cuda=on_cuda), name, "NVIDIA GPUs")


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton.runtime", None)
    assert_plain(said(CUDA), "Triton cannot be used", "ModuleNotFoundError", "pip install triton")


def test_a_triton_that_cannot_reach_the_gpu(monkeypatch):
    """As without a C compiler, where Triton's driver fails."""
    initialized = library._triton_unusable
    pretend_gpu(monkeypatch, (8, 0))
    monkeypatch.setattr(library, "_triton_unusable", initialized)

    class Broken:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(pytest.importorskip("triton.runtime"), "driver", Broken())
    assert_plain(said(CUDA), "Failed to find C compiler", "C compiler")


@pytest.mark.parametrize(
    ("module", "cause"),
    [
        (None, "simclr_fast._C_cuda"),
        (ImportError("libfoo.so.1: cannot open"), "libfoo.so.1"),
        (types.SimpleNamespace(architectures=lambda: "sm_80"), "another version's sources"),
    ],
)
def test_cuda_kernels_that_cannot_be_loaded_are_named_and_the_cpu_keeps_its_own(
    monkeypatch, module, cause
):
    pretend_gpu(monkeypatch, (8, 0))
    library._cuda_kernels.cache_clear()
    real = library.import_module
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key

    def load(name):
        if name != "simclr_fast._C_cuda":
            return real(name)
        if isinstance(module, Exception):
            raise module
        return module or real("simclr_fast._C_cuda_that_is_missing")

    monkeypatch.setattr(library, "import_module", load)
    monkeypatch.setattr(
        torch._C,
        "_dispatch_has_kernel_for_dispatch_key",
        lambda op, key: key != "CUDA" and has_kernel(op, key),
    )
    answer = said(CUDA, on_cuda=Implementation.CUDA)
    assert_plain(answer, "CUDA kernels are not loaded", cause, "SIMCLR_FAST_CUDA=1 pip install")
    library._cuda_kernels.cache_clear()
    if ops.has_extension():
        assert said(torch.device("cpu")) == (Implementation.NATIVE, [])


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("sm_80,sm_90", (8, 0), True),
        ("sm_80,sm_90", (8, 9), True),
        ("sm_80,sm_90", (7, 5), False),
        ("sm_80,sm_90", (10, 0), False),
        ("sm_86", (8, 0), False),
        ("sm_75,sm_80,compute_120", (12, 1), True),
        ("sm_120", (12, 1), True),
        ("sm_80,compute_80", (7, 5), False),
        ("compute_80", (12, 0), True),
        ("sm_90a", (9, 0), True),
        ("compute_90a", (10, 0), False),
        ("sm_100f", (10, 3), True),
        ("sm_100f", (12, 0), False),
        ("", (8, 0), False),
    ],
)
def test_cuda_code_runs_on_the_gpus_it_is_for(monkeypatch, architectures, capability, runs):
    pretend_gpu(monkeypatch, capability)
    pretend_cuda_build(monkeypatch, architectures)
    answer = said(CUDA, on_cuda=Implementation.CUDA)
    if runs:
        assert answer == (Implementation.CUDA, [])
    else:
        dotted = f"{capability[0]}.{capability[1]}"
        assert_plain(answer, architectures, f"TORCH_CUDA_ARCH_LIST={dotted} pip install")
        with FakeTensorMode():
            p = torch.empty(2, device="cuda")
        with pytest.raises(RuntimeError, match=r"fused=True needs .*TORCH_CUDA_ARCH_LIST"):
            use_native({"fused": True, "foreach": None}, [p])


def walk_of_fakes(rank):
    torch.cuda._lazy_init = None
    with warnings.catch_warnings(), FakeTensorMode():
        warnings.simplefilter("error")
        z = torch.randn(6, 20, device="cuda")
        loss, _ = nt_xent_loss(z, temperature=0.1, return_stats=True)
        sup_con = sup_con_loss(z, torch.arange(6, device="cuda") // 2)
        u, _ = ops.nt_xent.normalize(z, None, torch.ones((), device="cuda"))
        assert (u.shape, u.dtype) == ((6, 32), torch.float32), (u.shape, u.dtype)
    assert sup_con.device.type == loss.device.type == "cuda"
    assert not torch.cuda.is_initialized()


def test_fake_cuda_tensors_take_the_kernels_shapes_and_leave_cuda_alone():
    on_ranks(walk_of_fakes, (), 1)


def test_an_unsupported_gpu_gives_plain_shapes(monkeypatch):
    pretend_gpu(monkeypatch, (7, 5))
    with FakeTensorMode():
        z, temperature = torch.randn(6, 20, device="cuda"), torch.ones((), device="cuda")
        with pytest.warns(RuntimeWarning, match="compute capability"):
            u, _ = ops.nt_xent.normalize(z, None, temperature)
    assert u.shape == (6, 20)


def test_an_extension_of_other_sources_is_refused(monkeypatch):
    assert library._load_extension() is not None
    monkeypatch.setattr(library, "NATIVE_OPS", (*library.NATIVE_OPS, "an_op_of_tomorrow"))
    with pytest.raises(ImportError, match=r"another version's sources.*an_op_of_tomorrow"):
        library._load_extension()


def test_native_ops_lists_every_op_of_the_extension():
    names = {n.removeprefix("simclr_fast::") for n in torch._C._dispatch_get_all_op_names()
             if n.startswith("simclr_fast::")}  # fmt: skip
    native = {
        name
        for name in names
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"simclr_fast::{name}", "CPU")
    }
    assert native == set(library.NATIVE_OPS)
