"""The peak of this CPU: fused multiply-adds per second with all operands in registers.

Compiles a few lines of C with the system's compiler, for the widest vectors of this machine.
"""

import ctypes
import os
import subprocess
import tempfile
import threading
import time
from functools import cache
from pathlib import Path

_BYTES = {"avx2": 32, "avx512": 64, "avx512_bf16": 64, "amx": 64}
_SOURCE = """
typedef float V __attribute__((vector_size(BYTES)));
#define STEP(v) v = v * x + y; __asm__ volatile("" : REGISTER(v));
float run(long rounds) {
  V a = {0}, b = a, c = a, d = a, e = a, f = a, g = a, h = a, i = a, j = a;
  const V x = a + 0.999f, y = a + 1e-3f;
  for (long k = 0; k < rounds; ++k) {
    STEP(a) STEP(b) STEP(c) STEP(d) STEP(e) STEP(f) STEP(g) STEP(h) STEP(i) STEP(j)
  }
  a += b + c + d + e + f + g + h + i + j;
  return a[0];
}
"""
_CHAINS, _ROUNDS = 10, 2_000_000


@cache
def _library(lanes_bytes: int) -> ctypes.CDLL:
    folder = tempfile.mkdtemp()
    source, library = Path(folder, "fma.c"), Path(folder, "fma.so")
    source.write_text(_SOURCE)
    register = '"+w"' if os.uname().machine == "aarch64" else '"+v"'
    flags = [f"-DBYTES={lanes_bytes}", f"-DREGISTER={register}", "-ffp-contract=fast"]
    command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", *flags]
    subprocess.run([*command, "-o", library, source], check=True)
    return ctypes.CDLL(str(library))


def fma_per_second(threads: int, instruction_set: str) -> float:
    """Float32 multiply-adds per second, summed over the threads."""
    count = threads * _ROUNDS * _CHAINS * _BYTES.get(instruction_set, 16) // 4
    start = time.perf_counter()
    multiply_add(count, threads, instruction_set)
    return count / (time.perf_counter() - start)


def multiply_add(count: int, threads: int, instruction_set: str) -> None:
    """Compute `count` float32 multiply-adds on registers, shared by the threads."""
    lanes_bytes = _BYTES.get(instruction_set, 16)
    run = _library(lanes_bytes).run
    run.restype = ctypes.c_float
    rounds = ctypes.c_long(count // (threads * _CHAINS * lanes_bytes // 4))
    others = [threading.Thread(target=run, args=(rounds,)) for _ in range(threads - 1)]
    for thread in others:
        thread.start()
    run(rounds)
    for thread in others:
        thread.join()
