"""Where a tensor is positive, in one bit per element."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(t: Tensor, layout: torch.memory_format) -> Tensor:
    """The bits of t > 0, in the order of memory that `layout` gives: [⌈numel / 8⌉] bytes."""
    positive = (t > 0).contiguous(memory_format=layout)
    flat = positive.as_strided((t.numel(),), (1,)).view(torch.uint8)
    flat = F.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (flat * _powers(flat)).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: torch.Size, layout: torch.memory_format) -> Tensor:
    """The booleans whose bits `pack` made from a tensor of `shape`."""
    strides = torch.empty(shape, device="meta").contiguous(memory_format=layout).stride()
    flat = (bits[:, None] & _powers(bits)).ne(0).flatten()
    return flat.as_strided(shape, strides)


def _powers(like: Tensor) -> Tensor:
    return 1 << torch.arange(8, dtype=torch.uint8, device=like.device)
