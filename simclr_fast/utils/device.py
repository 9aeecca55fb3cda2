"""Devices: what `--device` means, what a device computes in, what memory is left on it."""

import ctypes
import gc
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from simclr_fast.utils.launch import launched

# torch's variables for its CUDA allocator. The second one counts only without the first.
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_EXPANDABLE = "expandable_segments:True"
_ALLOWED = '"auto", "cpu", "cuda", "cuda:N" or "mps"'


# Parameters of glibc's mallopt, and the largest value that it takes.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Let glibc keep the CPU memory that is freed, for a loop whose steps allocate the same again.

    Otherwise it gives large blocks back to the system, and each step waits for the same pages anew:
    in virtual machines up to a fifth of its time. Other C libraries stay as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, _LARGEST)
        mallopt(_TOP_PAD, 64 << 20)


def resolve_device(text: str) -> torch.device:
    """The device that `text` names, with its index. A GPU also becomes the current device.

    "auto": a GPU if torch sees one, else the CPU. It never chooses "mps", because no kernel here
        is written for it.
    "cuda": under a launcher the GPU of this local rank, else GPU 0.

    Raises:
        ValueError: there is no such device, or several ranks would use one GPU.
    """
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise ValueError(f"device must be {_ALLOWED}, got {text!r}") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device must be {_ALLOWED}, got {text!r}")
    if device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError("device 'mps': torch finds no Apple GPU here")
        return torch.device("mps", 0)
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is CPU-only"
        raise ValueError(f"device {text!r}: torch sees no GPU here (this torch {built})")
    count, launch = torch.cuda.device_count(), launched()
    index = device.index
    if index is not None and launch.local_size > 1:
        raise ValueError(
            f"device {text!r} is one GPU for {launch.local_size} processes: pass --device cuda, "
            "which gives each its own"
        )
    if index is None:
        # A scheduler may let each process see only one GPU, which then has index 0.
        index = 0 if count == 1 and launch.url != "env://" else launch.local_rank
    if index >= count:
        raise ValueError(f"device 'cuda:{index}': there are {count} GPUs, numbered from 0")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of torch.autocast for `precision` on `device`; None for no autocast.

    "auto": bfloat16 on GPUs and CPUs whose hardware computes in it, float16 on other GPUs, and None
    elsewhere.
    """
    if precision == "auto":
        if device.type == "cpu":
            return torch.bfloat16 if cpu_computes_bfloat16() else None
        if device.type != "cuda":
            return None
        # Older GPUs only emulate bfloat16, more slowly than float32.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    return None if precision == "float32" else getattr(torch, precision)


def cpu_computes_bfloat16() -> bool:
    """Whether torch multiplies bfloat16 matrices in this CPU's hardware.

    It needs oneDNN and AVX512_BF16, AMX or Arm's BF16. Without them float32 is faster.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.cpu, "get_capabilities"):
        # An older torch, such as 2.10, cannot tell for Arm.
        return torch.cpu._is_avx512_bf16_supported()
    has = torch.cpu.get_capabilities()
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def free_memory(device: torch.device) -> float:
    """Bytes that this process may still use: on the GPU, or its share of the host's memory."""
    if device.type == "cuda":
        # Blocks that torch's allocator keeps unused: CUDA counts them as used, but we may use them.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    share = launched().local_size
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        return kib * 1024 / share
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / share


def release_memory() -> None:
    """Return unused memory that the allocators of torch and DALI keep to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()
    # If DALI was never imported, it keeps no memory.
    if dali := sys.modules.get("nvidia.dali"):
        dali.backend.ReleaseUnusedMemory()


def expand_segments() -> None:
    """Let torch's CUDA allocator enlarge its segments, so that memory is not lost between blocks.

    Only on Linux with an NVIDIA GPU, and only if the user has set neither of torch's variables. It
    counts for the whole process, so commands call it, before anything is allocated on a GPU.
    """
    if sys.platform != "linux" or torch.version.cuda is None or not torch.cuda.is_available():
        return
    if not any(name in os.environ for name in _ALLOCATOR) and not torch.cuda.is_initialized():
        os.environ[_ALLOCATOR[1]] = _EXPANDABLE


def allocator_setting() -> str:
    """The variable that sets torch's CUDA allocator, as NAME=VALUE; "torch's default" without."""
    # torch takes the first that is set.
    set_now = (f"{name}={os.environ[name]}" for name in _ALLOCATOR if name in os.environ)
    return next(set_now, "torch's default")


def allocator_advice() -> str:
    """What to set against memory that is lost between blocks; "" if it is set."""
    if _EXPANDABLE in allocator_setting():
        return ""
    return f"; {_ALLOCATOR[1]}={_EXPANDABLE} in the environment loses less memory between blocks"


def seed_step(seed: int, step: int, device: torch.device, rank: int = 0) -> None:
    """Seed the model's random numbers, such as dropout's, differently for each rank and step.

    A resumed run then draws the same numbers as an uninterrupted one, without saved generators.
    """
    mixed = seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB
    mixed ^= mixed >> 31
    mixed = mixed * 0xD6E8FEB86659FD93 % (1 << 63)
    # Only the generators in use: torch.manual_seed would seed those of all GPUs.
    torch.default_generator.manual_seed(mixed ^ mixed >> 32)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(mixed)


def processor_name() -> str:
    """The model of the CPU, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def usable_cores() -> int:
    """This process's share of the cores that the system lets it use."""
    if not hasattr(os, "sched_getaffinity"):
        cores, shared = os.cpu_count() or 1, True
    else:
        cores, shared = len(os.sched_getaffinity(0)), not _bound
    # torchrun's processes may all use the same cores; srun gives each its own, and so do we.
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if shared else cores)


# Whether `bound_to_cores` gave this process cores of its own.
_bound = False


@contextmanager
def bound_to_cores(local_rank: int, local_size: int) -> Iterator[None]:
    """Within the block, this process and the threads that it starts run on cores of their own.

    Each of the local_size processes of a machine gets an equal share of the cores, neighbours
    (threads of a core, cores of a socket) together: on machines with several sockets, memory is
    near then. Does nothing where the launcher has bound the process already, as srun does, where
    there are fewer cores than processes, without `os.sched_setaffinity`, or with the variable
    SIMCLR_FAST_BIND=0.
    """
    global _bound
    before = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set()
    launcher_did = len(before) < (os.cpu_count() or 1)
    wanted = os.environ.get("SIMCLR_FAST_BIND", "1") != "0" and local_size > 1
    if not wanted or launcher_did or len(before) < local_size:
        yield
        return
    cores = sorted(before, key=_place)
    first, end = (rank * len(cores) // local_size for rank in (local_rank, local_rank + 1))
    os.sched_setaffinity(0, cores[first:end])
    _bound = True
    try:
        yield
    finally:
        _bound = False
        os.sched_setaffinity(0, before)


def _place(cpu: int) -> tuple[int, int, int]:
    """Socket, core and number of a logical CPU, as Linux tells them."""
    folder = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        socket, core = (
            int((folder / name).read_text()) for name in ("physical_package_id", "core_id")
        )
    except (OSError, ValueError):
        return 0, 0, cpu
    return socket, core, cpu
