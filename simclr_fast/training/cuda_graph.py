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

# Unlogged steps before the capture. The first ones compile kernels, choose algorithms and make
# workspaces, which a capture cannot do. torch's notes on CUDA graphs take three.
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
    """Runs the steps of `model`: eagerly, and after `WARM_UP` unlogged steps by replay.

    Logged steps always run eagerly, since their statistics and what they keep for the next line
    differ from those of other steps. Their activations lie beside those of the graph, so a run
    needs the memory of activations twice.

    stream: that of the whole run, since the default stream cannot be captured.
    """

    def __init__(self, model: nn.Module, stream: torch.cuda.Stream) -> None:
        self.model, self.stream = model, stream
        self.graph: torch.cuda.CUDAGraph | None = None
        self._eager_steps = 0
        # The memory that a replay reads and writes.
        self._views: list[Tensor] = []
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []
        self._result: Any = None

    def run(
        self, step: Callable[[Sequence[Tensor]], Any], logged: bool, views: Sequence[Tensor]
    ) -> Any:
        """Make the gradients of a step; return what step(views) returns.

        The tensors of the result are overwritten in the next step. All gradients must be None.

        step: does forward, loss and backward. Without `logged` it must do the same in every step.
        """
        if logged:
            return step(views)
        if self._eager_steps < WARM_UP:
            self._eager_steps += 1
            return step(views)
        graph = self.graph or self._capture(step, views)
        for own, view in zip(self._views, views, strict=True):
            own.copy_(view)
        graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._result

    def _capture(
        self, step: Callable[[Sequence[Tensor]], Any], views: Sequence[Tensor]
    ) -> torch.cuda.CUDAGraph:
        self._views = [torch.empty_like(view) for view in views]
        graph = torch.cuda.CUDAGraph()
        try:
            # Meanwhile the loader's thread may allocate and query events, which "global" forbids.
            # LargeBatch enters and leaves autocast within the step, so the weights that autocast
            # casts and keeps are cast anew in each replay.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self._result = step(self._views)
        except Exception as error:
            # The end of a capture that failed raises an error of its own.
            cause = error.__context__ or error
            raise RuntimeError(
                "cuda_graph: this step cannot be captured "
                f"({type(cause).__name__}: {cause}). Run without it: --no-cuda-graph"
            ) from error
        parameters = self.model.parameters()
        self._gradients = [(p, p.grad) for p in parameters if p.grad is not None]
        self.graph = graph
        return graph


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
