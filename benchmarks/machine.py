"""The speed limits of this machine, measured in the same run as the tables that they bound."""

import contextlib
import subprocess
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import median

import torch

from simclr_fast import ops
from simclr_fast.benchmarks import harness
from simclr_fast.benchmarks.fma_peak import fma_per_second
from simclr_fast.benchmarks.harness import Options
from simclr_fast.utils.device import usable_cores

_ROUNDS = 5
# Float32 elements: more than any last-level cache holds, a small part of any GPU's memory.
_CPU_ELEMENTS, _GPU_ELEMENTS = 1 << 25, 1 << 28
_GPU_SIDE = 8192


def floors(options: Options) -> dict[str, float]:
    """Name with unit → rate. A copy counts the bytes read and the bytes written."""
    if options.device.type == "cuda":
        return _gpu(options.device)
    elements = _CPU_ELEMENTS // (4 if options.quick else 1)
    found = _copy_and_exp(elements, options.device)
    # Left out without a C compiler.
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found = {"multiply-adds on registers, 1e9/s": multiply_adds(options.threads)} | found
    return found


def multiply_adds(threads: int) -> float:
    """1e9 float32 multiply-adds per second with the instruction set that the extension uses."""
    isa = import_module("simclr_fast._C").instruction_set() if ops.has_extension() else "base"
    return max(fma_per_second(threads, isa) for _ in range(_ROUNDS)) / 1e9


def second_level_cache() -> int:
    """Bytes of one core's second-level cache; 0 where the operating system does not say (Linux)."""
    for cache in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if (cache / "level").read_text().strip() == "2":
            # As in "2048K".
            return int((cache / "size").read_text().strip().removesuffix("K")) * 1024
    return 0


def _gpu(device: torch.device) -> dict[str, float]:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(_GPU_SIDE, _GPU_SIDE, device=device, dtype=dtype)
        seconds = _seconds({"mm": lambda a=a: a @ a}, device)["mm"]
        found[f"matmul {str(dtype)[6:]}, TFLOP/s"] = 2 * _GPU_SIDE**3 / seconds / 1e12
    return found | _copy_and_exp(_GPU_ELEMENTS, device)


def _copy_and_exp(elements: int, device: torch.device) -> dict[str, float]:
    source = torch.rand(elements, device=device)
    target = torch.empty_like(source)
    # Small enough for the caches, so that exp is measured and not memory.
    few = source[: min(elements, 1 << 17 if device.type == "cpu" else 1 << 22)]
    repeats = 64

    def exponentials() -> None:
        for _ in range(repeats):
            torch.exp(few, out=target[: len(few)])

    steps: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "exp": exponentials,
    }
    seconds = _seconds(steps, device)
    return {
        "copy, GB/s": 2 * 4 * elements / seconds["copy"] / 1e9,
        "exp, 1e9/s": repeats * len(few) / seconds["exp"] / 1e9,
    }


def _seconds(steps: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    times = harness.measure(steps, _ROUNDS, device)
    return {name: median(values) / 1e3 for name, values in times.items()}


def text(found: dict[str, float]) -> str:
    """The rates in one line."""
    rates = "; ".join(f"{name} {rate:.3g}" for name, rate in found.items())
    return f"floor of the machine ({usable_cores()} cores): {rates}"
