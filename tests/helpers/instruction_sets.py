"""Which of the CPU kernels' instruction sets this machine runs, and checks under each."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rank_runs import on_ranks

from simclr_fast import ops

_FLAGS = {
    "base": "",
    "avx2": "avx2",
    "avx512": "avx512dq",
    "avx512_bf16": "avx512_bf16",
    "amx": "amx_bf16",
}


def has_isa(isa):
    try:
        return _FLAGS[isa] in Path("/proc/cpuinfo").read_text()
    except OSError:
        return isa == "base"


def under_isa(isa: str, check: Callable[[], None], threads: int = 1) -> None:
    """Call `check` in a process of its own, as the first call of a kernel chooses for the rest."""
    if not has_isa(isa):
        pytest.skip(f"this CPU has no {isa}")
    on_ranks(_check, (isa, check, threads), 1)


def _check(rank: int, isa: str, check: Callable[[], None], threads: int) -> None:
    os.environ["SIMCLR_FAST_ISA"] = isa
    torch.set_num_threads(threads)
    assert ops.library.EXTENSION.instruction_set() == isa
    check()
