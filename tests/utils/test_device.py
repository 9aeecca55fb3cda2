"""What --device means, what a device computes in, and what memory is left; with a pretended GPU."""

import os

import pytest
import torch

from simclr_fast.utils.device import autocast_dtype, free_memory, resolve_device, usable_cores

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpus(monkeypatch):
    """Four GPUs; the list holds what became the current one."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(device.index))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    return current


@pytest.mark.parametrize(("text", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_has_a_number_and_becomes_the_current_one(gpus, text, index):
    assert resolve_device(text) == torch.device("cuda", index)
    assert gpus == [index]


def rank_of_four(monkeypatch, local_rank):
    for name, value in (("RANK", 2), ("WORLD_SIZE", 4), ("LOCAL_WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))


def test_each_local_rank_has_its_own(gpus, monkeypatch):
    rank_of_four(monkeypatch, 2)
    assert resolve_device("auto").index == 2
    with pytest.raises(ValueError, match="one GPU for 4 processes: pass --device cuda"):
        resolve_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="'cuda:2': there are 2 GPUs"):
        resolve_device("cuda")


def test_srun_may_show_each_task_its_own_gpu_alone(gpus, monkeypatch):
    for name, value in {"PROCID": 2, "LOCALID": 2, "STEP_ID": 0, "STEP_NUM_TASKS": 4}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert resolve_device("auto").index == 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("auto").index == 0


def test_missing_devices_are_refused(gpus, monkeypatch):
    with pytest.raises(ValueError, match="'cuda:7': there are 4 GPUs"):
        resolve_device("cuda:7")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="'cuda': torch sees no GPU"):
        resolve_device("cuda")
    for text in ("gpu", "xpu", "cuda:x", "meta"):
        with pytest.raises(ValueError, match=rf'"cuda:N" or "mps", got \'{text}\''):
            resolve_device(text)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'mps': torch finds no Apple GPU"):
        resolve_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("mps").type == "mps"
    assert gpus == []


@pytest.mark.parametrize(("major", "dtype"), [(7, torch.float16), (9, torch.bfloat16)])
def test_precision_auto_avoids_emulated_bfloat16(gpus, monkeypatch, major, dtype):
    """A T4 or V100 (7.x) can make bfloat16 tensors, but emulates their arithmetic."""
    properties = type("Properties", (), {"major": major})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert autocast_dtype("auto", GPU) is dtype


def test_every_precision_has_its_dtype():
    cpu = torch.device("cpu")
    assert autocast_dtype("auto", torch.device("mps")) is None
    assert autocast_dtype("float32", GPU) is None
    assert autocast_dtype("bfloat16", cpu) is torch.bfloat16
    assert autocast_dtype("float16", GPU) is torch.float16


@pytest.mark.parametrize(
    ("has", "onednn", "dtype"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, True, torch.bfloat16),
        ({"bf16": True}, True, torch.bfloat16),
        ({"avx512_bf16": False, "avx512_f": True}, True, None),
        ({"avx512_bf16": True}, False, None),
    ],
)
def test_bfloat16_is_taken_where_the_cpu_has_it(monkeypatch, has, onednn, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    assert autocast_dtype("auto", torch.device("cpu")) is dtype
    # torch 2.10 has one question for x86, and none for Arm.
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    old = has.get("avx512_bf16", False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: old)
    assert autocast_dtype("auto", torch.device("cpu")) is (
        torch.bfloat16 if old and onednn else None
    )


def test_cached_memory_is_free(monkeypatch):
    """torch's allocator keeps what it freed; CUDA counts it as used."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    assert free_memory(GPU) == 10 + 40


def test_the_hosts_memory_is_shared(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    whole = free_memory(torch.device("cpu"))
    rank_of_four(monkeypatch, 2)
    assert free_memory(torch.device("cpu")) == pytest.approx(whole / 4, rel=0.2)


def test_cores_are_those_of_this_process(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    assert usable_cores() == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert usable_cores() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert usable_cores() == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert usable_cores() == 8
