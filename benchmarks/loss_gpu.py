"""NT-Xent, forward and backward, on a GPU: the time of its kernels, and that of a call.

    python -m benchmarks.loss_gpu [--out benchmarks/results]

The kernels are timed as a CUDA graph that is replayed, so the host does not count. A call from
Python also waits for the host, which takes longer than the kernels up to some thousand pairs.
"Textbook" builds the 2N × 2N matrix.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from simclr_fast import nt_xent_loss
from simclr_fast.benchmarks import harness
from simclr_fast.benchmarks.peers import textbook

SIZES = ((256, 128), (1024, 128), (4096, 128), (4096, 512), (16384, 128))
TEMPERATURE = 0.1
# The textbook's matrices of more pairs do not fit.
LARGEST_TEXTBOOK = 4096
REPEATS, WARM_UP = 60, 8


@dataclass(frozen=True)
class CommandLine:
    out: Path | None = None
    """Folder for the JSON file of this GPU."""


def microseconds(call: Callable[[], object]) -> float:
    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(REPEATS):
        call()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - began) / REPEATS


def kernels(call: Callable[[], object]) -> float:
    """Microseconds of the kernels of `call`."""
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return microseconds(graph.replay)


def row(pairs: int, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    z = [torch.randn(pairs, dim, device="cuda").to(dtype).requires_grad_() for _ in range(2)]

    def both(loss: Callable[..., torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(*z, TEMPERATURE), z)

    found: dict[str, Any] = {"pairs": pairs, "dim": dim, "dtype": str(dtype)[6:]}
    found["kernels"] = kernels(both(nt_xent_loss))
    found["call"] = microseconds(both(nt_xent_loss))
    if pairs <= LARGEST_TEXTBOOK:
        found["textbook"] = microseconds(both(textbook))
    return found


def main() -> None:
    given = harness.parse(CommandLine, "loss_gpu", __doc__)
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA GPU")
    rows = []
    for pairs, dim in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            rows.append(row(pairs, dim, dtype))
            print(rows[-1], flush=True)
    if given.out is not None:
        where = harness.environment(torch.device("cuda"), "python -m benchmarks.loss_gpu")
        harness.save("kernels", {"rows": rows}, where, given.out)


if __name__ == "__main__":
    main()
