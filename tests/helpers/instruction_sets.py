"""Which of the CPU kernels' instruction sets this machine runs."""

from pathlib import Path

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
