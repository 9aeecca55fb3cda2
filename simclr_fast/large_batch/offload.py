"""Block inputs in host memory: one buffer, allocated once, and copies beside the computation."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Arena:
    """Host memory (pinned, for CUDA) that takes tensors until it is full.

    Copies run on a stream of their own, in the order of the calls. On the CPU the same code copies
    without streams.
    """

    def __init__(self, gigabytes: float, device: torch.device) -> None:
        cuda = device.type == "cuda"
        try:
            self.buffer = torch.empty(int(gigabytes * 1e9), dtype=torch.uint8, pin_memory=cuda)
        except RuntimeError as error:
            raise ValueError(
                f"offload_gb must fit the host's memory, got {gigabytes:g}: {error}"
            ) from error
        self.stream = torch.cuda.Stream(device) if cuda else None
        self.used = 0

    def clear(self) -> None:
        """Forget what is stored; its `Stored.take` must have been called."""
        self.used = 0

    def store(self, tensors: Sequence[Tensor]) -> "Stored":
        """Copy `tensors` into the arena, or keep them where they are if they do not fit."""
        needed = sum(_padded(t) for t in tensors)
        if self.used + needed > self.buffer.numel():
            return Stored(list(tensors))
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        hosts = []
        with torch.cuda.stream(self.stream):
            for t in tensors:
                part = self.buffer[self.used : self.used + t.numel() * t.element_size()]
                host = part.view(t.dtype).as_strided(t.shape, _dense_strides(t))
                host.copy_(t, non_blocking=True)
                if self.stream is not None:
                    # The allocator must not hand the memory on before the copy is done.
                    t.record_stream(self.stream)
                hosts.append(host)
                self.used += _padded(t)
        return Stored(hosts, tensors[0].device, self.stream)


class Stored:
    """Tensors that are at hand (device None), or in the arena and on request copied back."""

    def __init__(
        self,
        tensors: list[Tensor],
        device: torch.device | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.tensors, self.device, self.stream = tensors, device, stream

    def fetch(self) -> None:
        """Start copying back."""
        if self.device is None:
            return
        # Allocated on the computing stream, so the copy waits for the memory's previous use.
        back = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=self.device)
            for t in self.tensors
        ]
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            for t, host in zip(back, self.tensors, strict=True):
                t.copy_(host, non_blocking=True)
        self.tensors, self.device = back, None
        if self.stream is not None:
            self.copied = self.stream.record_event()

    def take(self) -> list[Tensor]:
        """The tensors, on their device; the computing stream waits for the copies."""
        self.fetch()
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(self.copied)
        tensors, self.tensors = self.tensors, []
        return tensors


def _padded(t: Tensor) -> int:
    return -(-t.numel() * t.element_size() // 256) * 256


def _dense_strides(t: Tensor) -> tuple[int, ...]:
    return torch.empty_like(t, device="meta").stride()
