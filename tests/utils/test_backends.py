"""torch's settings during a run, and that they are the user's again afterwards."""

import contextlib
from dataclasses import replace

import pytest
import torch
from tiny_runs import TINY

from simclr_fast.kernels.nt_xent_configs import dot_precision
from simclr_fast.training.setup import backend_settings
from simclr_fast.utils.backends import tf32
from simclr_fast.utils.distributed import World

CUDA, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn


def legacy(read):
    """A setting of the older interface; "mixed" where torch refuses to say it."""
    try:
        return read()
    except RuntimeError:
        return "mixed"


def everything():
    return {
        "products": CUDA.fp32_precision,
        "convolutions": CUDNN.conv.fp32_precision,
        "rnn": CUDNN.rnn.fp32_precision,
        "cpu": torch.backends.mkldnn.matmul.fp32_precision,
        "all": torch.backends.fp32_precision,
        "old products": legacy(lambda: CUDA.allow_tf32),
        "old convolutions": legacy(lambda: CUDNN.allow_tf32),
        "old precision": legacy(torch.get_float32_matmul_precision),
        "benchmark": CUDNN.benchmark,
    }


@pytest.fixture(autouse=True)
def as_before():
    """A test that fails must not change the settings of the next."""
    products, convolutions = CUDA.fp32_precision, CUDNN.conv.fp32_precision
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    CUDNN.allow_tf32, CUDNN.benchmark = True, False
    torch.backends.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
    CUDA.fp32_precision, CUDNN.conv.fp32_precision = products, convolutions
    CUDNN.rnn.fp32_precision = convolutions


def medium():
    torch.set_float32_matmul_precision("medium")


def no_convolutions():
    CUDNN.allow_tf32 = False


def newer():
    CUDA.fp32_precision, CUDNN.conv.fp32_precision = "tf32", "ieee"


def newer_for_all():
    torch.backends.fp32_precision = "tf32"


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("users", [lambda: None, medium, no_convolutions, newer, newer_for_all])
def test_tf32_for_the_time_of_a_block(users, allowed):
    users()
    before = everything()
    with contextlib.suppress(KeyError), tf32(allowed):
        # The kernels of the loss go by torch's setting for products.
        assert dot_precision(torch.float32) == ("tf32" if allowed else "tf32x3")
        assert (CUDNN.conv.fp32_precision == "tf32") is allowed
        if "mixed" not in before.values():
            # torch.compile of torch 2.10 reads the older interface.
            assert CUDA.allow_tf32 is CUDNN.allow_tf32 is allowed
        raise KeyError
    assert everything() == before


def settings_of(device="cuda", memory="plain", **options):
    """(TF32 allowed, cuDNN's benchmark) in a run."""
    world = World(0, 1, torch.device(device))
    before = everything()
    with contextlib.ExitStack() as stack:
        for context in backend_settings(replace(TINY, **options), world, memory):
            stack.enter_context(context)
        found = CUDA.allow_tf32 and CUDNN.allow_tf32, CUDNN.benchmark
    assert everything() == before
    return found


@pytest.mark.parametrize("memory", ["plain", "replay", "lockstep", "grad-cache"])
def test_benchmark_where_shapes_stay_the_same(memory):
    constant = memory in ("plain", "replay")
    assert settings_of(memory=memory) == (False, constant)
    assert settings_of(memory=memory, cudnn_benchmark="on") == (False, True)
    assert settings_of(memory=memory, cudnn_benchmark="off") == (False, False)
    assert settings_of("cpu", memory) == (False, False)


def test_deterministic_runs_have_no_benchmark(caplog):
    torch.use_deterministic_algorithms(True)
    assert settings_of() == (False, False)
    assert not caplog.records
    assert settings_of(cudnn_benchmark="on") == (False, False)
    assert "cudnn_benchmark has no effect: the algorithms must be deterministic" in caplog.text


def test_tf32_where_it_has_no_effect_is_said(caplog):
    assert settings_of(tf32=True) == (True, True)
    assert not caplog.records
    for case in ({"device": "cpu"}, {"precision": "bfloat16"}):
        caplog.clear()
        settings_of(tf32=True, **case)
        assert "tf32 has no effect: it is for precision float32 on NVIDIA GPUs" in caplog.text
