"""Pinned host memory, which GPUs copy from and to while the host does other things."""

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# From this size on the operating system gives an allocation pages of its own.
_LARGE = 1 << 25
# cudaHostRegisterPortable: pinned for every GPU of the process.
_PORTABLE = 1


def pinned_empty(
    shape: Sequence[int],
    *,
    dtype: torch.dtype,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """An uninitialised CPU tensor in pinned memory.

    torch rounds each pinned allocation up to a power of two, up to twice of what is asked for. So
    large tensors are allocated as ordinary memory, and then pinned.

    Raises:
        MemoryError, RuntimeError: the memory cannot be allocated or pinned.
    """
    like = torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
    nbytes = like.numel() * like.element_size()
    if nbytes < _LARGE:
        return torch.empty(shape, dtype=dtype, memory_format=memory_format, pin_memory=True)
    pages = np.empty(nbytes, np.uint8)
    address = pages.ctypes.data
    pin(address, nbytes)
    # Called when no tensor uses the memory any more, before it is freed. At the end of the process
    # the driver may be gone, and the system frees everything.
    weakref.finalize(pages, unpin, address).atexit = False
    return torch.from_numpy(pages).view(dtype).as_strided(like.shape, like.stride())


def pin(address: int, nbytes: int) -> None:
    """Pin memory that exists."""
    cudart = torch.cuda.cudart()
    torch.cuda.check_error(cudart.cudaHostRegister(address, nbytes, _PORTABLE))


def unpin(address: int) -> None:
    # Copies may still be running.
    torch.cuda.synchronize()
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))
