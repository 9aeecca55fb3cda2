"""torch's settings of cuBLAS and cuDNN during one run. They are the user's again afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def cudnn_benchmark(on: bool) -> Iterator[None]:
    """Within the block, cuDNN times its algorithms at each new shape of a convolution, or not."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Within the block, NVIDIA GPUs compute float32 products and convolutions in TF32, or not.

    torch has two interfaces for this. The older one (`allow_tf32`) also sets the newer one
    (`fp32_precision`); after a change by the newer one alone, reading the older one raises, and
    torch.compile of torch 2.10 reads it. So the older one is set, unless the caller's settings are
    by the newer one.
    """
    # Any: torch does not declare the newer interface.
    cuda: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    cpu: Any = torch.backends.mkldnn
    parts = [cuda, cudnn.conv, cudnn.rnn, cpu.matmul]
    before = [part.fp32_precision for part in parts]
    try:
        products, convolutions = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:
        products = None
    if products is None:
        for part in parts[:3]:
            part.fp32_precision = "tf32" if allowed else "ieee"
    else:
        cuda.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        if products is not None:
            torch.set_float32_matmul_precision(products)
            cudnn.allow_tf32 = convolutions
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision
