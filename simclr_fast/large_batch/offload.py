"""Block inputs in host memory, which is allocated once. Copies overlap with the computation."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Tensors begin at multiples of this, so that every copy is aligned.
_ALIGNMENT = 256


class Arena:
    """Host memory (pinned for CUDA) that stores tensors until it is full.

    torch rounds each pinned allocation up to a power of two: one allocation of 90 GB would pin
    137 GB. So the memory consists of chunks that are powers of two. A tensor may extend over
    several chunks.

    Copies run on a separate stream, in the order of the calls. On the CPU the same code copies
    without streams.
    """

    def __init__(self, gigabytes: float, device: torch.device) -> None:
        cuda = device.type == "cuda"
        sizes = powers_of_two(int(gigabytes * 1e9))
        try:
            self.chunks = [torch.empty(n, dtype=torch.uint8, pin_memory=cuda) for n in sizes]
        except RuntimeError as error:
            raise ValueError(
                f"offload_gb must fit the host's memory, got {gigabytes:g}: {error}"
            ) from error
        self.stream = torch.cuda.Stream(device) if cuda else None
        self.capacity, self.used = sum(sizes), 0

    def clear(self) -> None:
        """Make the memory free again. `Stored.take` must have been called for all its content."""
        self.used = 0

    def store(self, tensors: Sequence[Tensor]) -> "Stored":
        """Copy `tensors` into the arena. If they do not fit, keep them on their device."""
        if self.used + sum(map(_padded, tensors)) > self.capacity:
            return Stored(list(tensors))
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        places = []
        with torch.cuda.stream(self.stream):
            for t in tensors:
                dense = t if t.stride() == _dense_strides(t) else t.clone()
                places.append(self._place(dense.numel() * dense.element_size()))
                if self.stream is not None:
                    # The allocator must not reuse the memory before the copy has ended.
                    dense.record_stream(self.stream)
                for host, part in zip(places[-1], _bytes(dense, places[-1]), strict=True):
                    host.copy_(part, non_blocking=True)
                self.used += _padded(t)
        shapes = [torch.empty_like(t, device="meta") for t in tensors]
        return Stored(shapes, places, tensors[0].device, self.stream)

    def _place(self, size: int) -> list[Tensor]:
        """The next `size` bytes, as parts of chunks."""
        parts, start = [], self.used
        for chunk in self.chunks:
            if size and start < len(chunk):
                parts.append(chunk[start : start + size])
                size -= len(parts[-1])
            start = max(start - len(chunk), 0)
        return parts


class Stored:
    """Tensors that are at hand, or lie in the arena and are copied back on request.

    tensors: themselves, or their shapes while `places` says where they lie.
    """

    def __init__(
        self,
        tensors: list[Tensor],
        places: list[list[Tensor]] | None = None,
        device: torch.device | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.tensors, self.places = tensors, places
        self.device, self.stream = device, stream

    def fetch(self) -> None:
        """Start copying back."""
        if self.places is None:
            return
        # Allocated on the computing stream, so the copy waits for the memory's previous use.
        back = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=self.device)
            for t in self.tensors
        ]
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            for t, hosts in zip(back, self.places, strict=True):
                if self.stream is not None:
                    # After an error nobody may take them, and the copy goes on.
                    t.record_stream(self.stream)
                for part, host in zip(_bytes(t, hosts), hosts, strict=True):
                    part.copy_(host, non_blocking=True)
        self.tensors, self.places = back, None
        if self.stream is not None:
            self.copied = self.stream.record_event()

    def take(self) -> list[Tensor]:
        """The tensors, on their device; the computing stream waits for the copies."""
        self.fetch()
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(self.copied)
        tensors, self.tensors = self.tensors, []
        return tensors


def powers_of_two(size: int) -> list[int]:
    """Descending powers of two that add up to `size`, but for less than the alignment."""
    powers = [1 << i for i in reversed(range(size.bit_length())) if size >> i & 1]
    return [power for power in powers if power >= _ALIGNMENT]


def _bytes(t: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The memory of a dense tensor, cut into the sizes of `like`."""
    flat = t.as_strided((t.numel(),), (1,)).view(torch.uint8)
    return list(flat.split([len(part) for part in like]))


def _padded(t: Tensor) -> int:
    return -(-t.numel() * t.element_size() // _ALIGNMENT) * _ALIGNMENT


def _dense_strides(t: Tensor) -> tuple[int, ...]:
    return torch.empty_like(t, device="meta").stride()
