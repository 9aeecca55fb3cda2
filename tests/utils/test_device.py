"""What --device means, what a device computes in, and what memory is left; with a pretended GPU."""

import importlib
import os
import platform
import resource

import pytest
import torch
from forks import context

from simclr_fast.utils import device
from simclr_fast.utils.device import (
    allocator_advice,
    allocator_setting,
    autocast_dtype,
    bound_to_cores,
    expand_segments,
    free_memory,
    keep_freed_memory,
    resolve_device,
    usable_cores,
)

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


@pytest.fixture
def sixteen_cpus(monkeypatch):
    """Two sockets of four cores with two threads each; numbered as Linux does. Returns what was
    bound."""
    bound = [set(range(16))]
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: bound[-1], raising=False)
    monkeypatch.setattr(
        os, "sched_setaffinity", lambda pid, cpus: bound.append(set(cpus)), raising=False
    )
    monkeypatch.setattr(device, "_place", lambda cpu: (cpu % 8 // 4, cpu % 4, cpu))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.delenv("SIMCLR_FAST_BIND", raising=False)
    return bound


def test_the_processes_of_a_machine_get_neighbouring_cores(sixteen_cpus):
    everything = sixteen_cpus[0]
    shares = []
    for rank in range(4):
        assert usable_cores() == 4
        with bound_to_cores(rank, 4):
            shares.append(sixteen_cpus[-1])
            # Its own share, and not a fourth of it.
            assert usable_cores() == 4
        assert sixteen_cpus[-1] == everything
    assert shares == [{0, 8, 1, 9}, {2, 10, 3, 11}, {4, 12, 5, 13}, {6, 14, 7, 15}]


def test_uneven_shares_leave_no_core_out(sixteen_cpus):
    shares = []
    for rank in range(3):
        with bound_to_cores(rank, 3):
            shares.append(sixteen_cpus[-1])
    assert sorted(cpu for share in shares for cpu in share) == list(range(16))


def test_what_is_bound_or_alone_or_told_not_to_is_left(sixteen_cpus, monkeypatch):
    with bound_to_cores(0, 1):
        pass
    with bound_to_cores(0, 17):
        pass
    monkeypatch.setenv("SIMCLR_FAST_BIND", "0")
    with bound_to_cores(0, 4):
        pass
    monkeypatch.delenv("SIMCLR_FAST_BIND")
    # As srun did.
    sixteen_cpus.append({0, 8, 1, 9})
    with bound_to_cores(0, 4):
        pass
    assert len(sixteen_cpus) == 2


def test_a_real_process_is_bound_and_set_free(monkeypatch):
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) != os.cpu_count():
        pytest.skip("cores cannot be bound here, or are already")
    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("one core")
    with bound_to_cores(1, 2):
        assert len(os.sched_getaffinity(0)) == len(before) - len(before) // 2
    assert os.sched_getaffinity(0) == before


@pytest.fixture
def allocator(gpus, monkeypatch):
    """A machine on which segments can grow, before the first allocation."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        # Set first, so that the variable is removed again at the end.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(device.sys, "platform", "linux")


def test_commands_let_segments_grow(allocator):
    assert allocator_setting() == "torch's default"
    assert "; PYTORCH_ALLOC_CONF=expandable_segments:True in the env" in allocator_advice()
    expand_segments()
    assert allocator_setting() == "PYTORCH_ALLOC_CONF=expandable_segments:True"
    assert allocator_advice() == ""


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_users_allocator_stays(allocator, monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:512")
    before = dict(os.environ)
    expand_segments()
    assert os.environ == before
    assert allocator_setting() == f"{name}=max_split_size_mb:512"


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        (device.sys, "platform", "win32"),
        (torch.version, "cuda", None),
        (torch.cuda, "is_available", lambda: False),
        (torch.cuda, "is_initialized", lambda: True),
    ],
)
def test_segments_that_cannot_grow(allocator, monkeypatch, where, name, value):
    monkeypatch.setattr(where, name, value)
    expand_segments()
    assert allocator_setting() == "torch's default"


@pytest.mark.parametrize("command", ["pretrain", "supervised", "ablate", "eval"])
def test_each_command_does_it_before_the_work(monkeypatch, command):
    """The first thing after the options are read."""

    def stop():
        raise KeyError("segments")

    module = importlib.import_module(f"simclr_fast.commands.{command}")
    monkeypatch.setattr(module, "expand_segments", stop)
    arguments = {"ablate": ["--seeds", "0"], "eval": ["knn", "--encoder", "none"]}
    with pytest.raises(KeyError, match="segments"):
        module.run(arguments.get(command, []))


def _page_faults(keep, sender):
    if keep:
        keep_freed_memory()
    for _ in range(3):
        torch.ones(10, 1 << 20).add(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(10, 1 << 20).add(1)
    sender.send(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept():
    """Tensors of 40 MB, which glibc gives back to the system otherwise."""
    found = []
    for keep in (False, True):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_page_faults, args=(keep, sender))
        process.start()
        found.append(receiver.recv())
        process.join()
    assert found[1] < found[0] / 4
