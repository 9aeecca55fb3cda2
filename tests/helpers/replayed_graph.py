"""Stand-ins for CUDA graphs, streams and captures, on the CPU.

    with replayed_graphs() as graphs:
        ...  # code that captures with torch.cuda.graph and replays
    graphs[0].replays

Within a capture every operation that torch dispatches is kept with its tensors. A replay runs the
same operations on the same tensors and writes the results where they were in the capture, as a GPU
does. What Python did in the capture is not repeated: a number that should have changed, a tensor
that was not filled anew, or a gradient that is no longer in its place shows as a wrong result.

The operations of a capture are executed here, which a GPU does not do. So afterwards all tensors
from before have their old values again, and so has the random generator; new ones hold NaN.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _tensors(*values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


class ReplayedGraph(TorchDispatchMode):
    """What torch.cuda.CUDAGraph is replaced by."""

    def __init__(self) -> None:
        super().__init__()
        self.replays = 0
        self._calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        # By storage: the tensors of before with their values, and the tensors that were made.
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for t in _tensors(args, kwargs):
            place = t.untyped_storage().data_ptr()
            if place not in self._made and place not in self._before:
                whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
                self._before[place] = whole, whole.clone()
        out = func(*args, **kwargs)
        made = _tensors(out)
        for t in made:
            place = t.untyped_storage().data_ptr()
            if place not in self._before:
                self._made[place] = t
        self._calls.append((func, args, kwargs, made))
        return out

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        random = torch.get_rng_state()
        with self:
            yield
        torch.set_rng_state(random)
        with torch.no_grad():
            for tensor, value in self._before.values():
                tensor.copy_(value)
            for tensor in self._made.values():
                if tensor.is_floating_point():
                    tensor.detach().fill_(torch.nan)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, made in self._calls:
            for old, new in zip(made, _tensors(func(*args, **kwargs)), strict=True):
                if new.data_ptr() != old.data_ptr():
                    old.detach().copy_(new)


class _Stream:
    def __init__(self, device: Any = None) -> None:
        self.waited = 0

    def wait_stream(self, other: Any) -> None:
        assert isinstance(other, _Stream)
        self.waited += 1


@contextlib.contextmanager
def replayed_graphs() -> Iterator[list[ReplayedGraph]]:
    """A context in which torch.cuda's graphs are stand-ins; all that were captured."""
    graphs: list[ReplayedGraph] = []

    def graph(captured: ReplayedGraph, **options: Any) -> Any:
        graphs.append(captured)
        return captured.capture()

    with contextlib.ExitStack() as stack:
        for name, value in {
            "CUDAGraph": ReplayedGraph,
            "graph": graph,
            "Stream": _Stream,
            "current_stream": lambda device=None: _Stream(),
            "stream": lambda stream: contextlib.nullcontext(),
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        yield graphs
