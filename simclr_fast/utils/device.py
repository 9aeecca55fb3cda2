"""Devices: what `--device` means, what a device computes in, what memory is left on it."""

import gc
import os
import sys
from pathlib import Path

import torch

from simclr_fast.utils.launch import launched

_ALLOWED = '"auto", "cpu", "cuda", "cuda:N" or "mps"'


def resolve_device(text: str) -> torch.device:
    """The device that `text` names, with its number; a GPU becomes the current one.

    "auto": a GPU if torch sees one, else the CPU. "cuda": under a launcher each local rank's own
    GPU, else GPU 0. "mps" is taken only when asked for: no kernel here is written for it.

    Raises:
        ValueError: no such device here, or several ranks on one GPU.
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
        # Schedulers may show each process its own GPU alone.
        index = 0 if count == 1 and launch.url != "env://" else launch.local_rank
    if index >= count:
        raise ValueError(f"device 'cuda:{index}': there are {count} GPUs, numbered from 0")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What `precision` is on `device`: the dtype of torch.autocast, None for the parameters' own.

    "auto": on GPUs bfloat16 where the hardware computes in it, else float16; float32 elsewhere.
    """
    if precision == "auto":
        if device.type != "cuda":
            return None
        # Older GPUs only emulate bfloat16, more slowly than float32.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    return None if precision == "float32" else getattr(torch, precision)


def free_memory(device: torch.device) -> float:
    """Bytes that this process may still use: of the GPU, or its share of the host's memory."""
    if device.type == "cuda":
        # What torch's allocator holds and nobody uses is not free for CUDA, but for us.
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
    """Give back what nobody uses any more and torch's and DALI's allocators keep for themselves."""
    gc.collect()
    torch.cuda.empty_cache()
    # Unless DALI is in use there is nothing to give back, and no need to import it.
    if dali := sys.modules.get("nvidia.dali"):
        dali.backend.ReleaseUnusedMemory()


def seed_step(seed: int, step: int, device: torch.device, rank: int = 0) -> None:
    """Seed what a model draws in a step, such as dropout: another on each rank and step.

    So a resumed run draws what the uninterrupted one would have, without saved generators.
    """
    mixed = seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB
    mixed ^= mixed >> 31
    mixed = mixed * 0xD6E8FEB86659FD93 % (1 << 63)
    # The generators themselves: torch.manual_seed would seed those of all GPUs.
    torch.default_generator.manual_seed(mixed ^ mixed >> 32)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(mixed)


def usable_cores() -> int:
    """This process's share of the cores that the system lets it use."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    # torchrun's processes may all use the same cores; srun gives each its own.
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
