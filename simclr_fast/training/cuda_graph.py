"""Replay the forward, loss and backward of a step as one CUDA graph, which the host launches once.

Small models on a GPU wait for the host, which launches hundreds of kernels per step. A capture
records the kernels of a step without running them. A replay runs them again on the same memory with
the same arguments, and no line of Python. So what differs between steps must be in tensors that are
changed in place: weights, buffers, the scale of a loss, and views that are copied to a fixed place.
All else stays outside: the optimizer with its learning rate, averages, checks, lines of metrics.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from simclr_fast.utils.distributed import World

# Steps before the capture. The first ones compile kernels, choose algorithms and make workspaces,
# which a capture cannot do. torch's notes on CUDA graphs take three.
WARM_UP = 3


def refuse_cuda_graph(world: World, memory: str) -> None:
    """Raise ValueError where no step can be captured. memory: the mode of the run."""
    if world.device.type != "cuda":
        raise ValueError(f"cuda_graph is for device cuda, got {str(world.device)!r}")
    if world.size > 1:
        raise ValueError(f"cuda_graph is for one rank, got {world.size} ranks")
    if memory != "plain":
        raise ValueError(
            f"cuda_graph is for memory plain, but memory 'auto' chose {memory!r}: leave cuda_graph "
            "out, or use a smaller batch"
        )


class StepGraph:
    """Runs the steps of `model`: logged ones eagerly, all others by replay.

    Logged steps differ from the others in their statistics and in what they keep for the next
    line. Their activations lie beside those of the graph, so a run needs the memory of activations
    twice.

    stream: that of the whole run, since the default stream cannot be captured.
    """

    def __init__(self, model: nn.Module, stream: torch.cuda.Stream) -> None:
        self.model, self.stream = model, stream
        self.graph: torch.cuda.CUDAGraph | None = None
        # The memory that a replay reads and writes.
        self._views: list[Tensor] = []
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        self._result: Any = None

    def capture(self, step: Callable[[Sequence[Tensor]], Any], views: Sequence[Tensor]) -> None:
        """Capture `step`, which does forward, loss and backward and the same in every call.

        Weights, buffers and gradients stay as they are. All gradients must be None.

        Call it before a thread of the loader uses the GPU: a thread that frees memory or waits for
        the whole GPU ends every capture.

        views: of a step's shapes, dtypes and formats. They are overwritten.
        """
        kept = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with torch.no_grad():
            for view in views:
                view.normal_()
        for _ in range(WARM_UP):
            step(views)
            self.model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        try:
            # LargeBatch enters and leaves autocast within the step, so the weights that autocast
            # casts and keeps are cast anew in each replay. Other threads, of loggers for example,
            # may allocate and query events, which "global" forbids.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self._result = step(views)
        except Exception as error:
            # The end of a capture that failed raises an error of its own.
            cause = error.__context__ or error
            raise RuntimeError(
                "cuda_graph: this step cannot be captured "
                f"({type(cause).__name__}: {cause}). Run without it: --no-cuda-graph"
            ) from error
        parameters = self.model.parameters()
        self._gradients = [(p, p.grad) for p in parameters if p.grad is not None]
        self.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
        self._views, self.graph = list(views), graph

    def run(
        self, step: Callable[[Sequence[Tensor]], Any], logged: bool, views: Sequence[Tensor]
    ) -> Any:
        """Make the gradients of a step; return what step(views) returns.

        The tensors of the result are overwritten in the next step. All gradients must be None.
        """
        if logged or self.graph is None:
            return step(views)
        for own, view in zip(self._views, views, strict=True):
            own.copy_(view)
        self.graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._result


@contextmanager
def step_graph(model: nn.Module, device: torch.device) -> Iterator[StepGraph]:
    """A context whose work is queued on a stream of its own, and in which steps are captured."""
    outer, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(outer)
    try:
        with torch.cuda.stream(stream):
            yield StepGraph(model, stream)
    finally:
        outer.wait_stream(stream)
