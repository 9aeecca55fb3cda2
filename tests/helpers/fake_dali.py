"""A stand-in for DALI's pipeline on a GPU, stricter than the real one, under `FakeCuda`.

It reads ahead as DALI does, checks the stream, device and DLPack stream that it is given, and
overwrites its outputs with NaN at the next run, on a stream of its own that has waited only for the
stream of the run.
"""

from collections import deque

import torch
from fake_cuda import FakeCuda

KDL_CUDA = 2


class FakePipeline:
    """make(feed) gives the output tensors, on the CPU, for what the external source was fed."""

    def __init__(self, cuda: FakeCuda, runner, make, device: torch.device, read_ahead: int = 2):
        self.cuda, self.runner, self.make, self.device = cuda, runner, make, device
        self.read_ahead = read_ahead
        self.stream = torch.cuda.Stream(device)
        self.feeds: deque = deque()
        self.ended = False
        self.outputs: list[torch.Tensor] = []
        self.runs = 0

    def run(self, stream):
        assert stream.device == self.device, "a stream of another device"
        assert stream is torch.cuda.current_stream(self.device), "another stream than the current"
        assert torch.cuda.current_device() == self.device.index, "another device is current"
        # What the stream has in its queue by now may read the outputs; nothing else may.
        self.stream.wait_event(stream.record_event())
        with torch.cuda.stream(self.stream):
            for output in self.outputs:
                output.fill_(float("nan") if output.is_floating_point() else 77)
        self.outputs = []
        while not self.ended and len(self.feeds) < self.read_ahead:
            try:
                self.feeds.append(self.runner.next_feed())
            except StopIteration:
                self.ended = True
        if not self.feeds:
            raise StopIteration
        feed = self.feeds.popleft()
        with torch.cuda.stream(self.stream):
            for made in self.make(feed):
                output = self.cuda.allocate(torch.empty_like(made), foreign=True)
                self.outputs.append(output.copy_(made))
        stream.wait_event(self.stream.record_event())
        self.runs += 1
        return [_Output(self, output, stream, self.runs) for output in self.outputs]

    def reset(self):
        assert self.ended
        assert not self.feeds
        self.ended = False


class _Output:
    def __init__(self, pipeline: FakePipeline, tensor: torch.Tensor, stream, run: int):
        self.pipeline, self.tensor, self.stream, self.run = pipeline, tensor, stream, run

    def as_tensor(self):
        return self

    def __dlpack_device__(self):
        return KDL_CUDA, self.pipeline.device.index

    def __dlpack__(self, *, stream, **_):
        assert stream == self.stream.cuda_stream, "a DLPack consumer on another stream"
        assert self.run == self.pipeline.runs, "an output of an earlier run"
        # Memory on the CPU, which torch takes without asking for a stream.
        return self.tensor.__dlpack__()
