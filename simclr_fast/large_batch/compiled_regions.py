"""Compile the operations between batch norms and layers with parameters.

Normalisation, activation, residual sum and pooling each read and write a whole micro-batch.
`torch.compile` fuses them into one pass. The backward is one pass too: it recomputes the region
from the inputs of the batch norms together with its derivative, and stores nothing.

Sizes are symbolic, and segments with the same operations share their compiled functions. So a
ResNet needs only a few, also if the last micro-batch has another size. Statistics, collectives,
layers with parameters and the stored values are the same as without compilation.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from simclr_fast.large_batch import global_batch_norm as gbn
from simclr_fast.large_batch.graph import Graph, Segment

# What `gbn.normalize` takes after x.
Norm = tuple[gbn.Statistics, Tensor | None, Tensor | None]
# Operations whose results are no tensors.
_NO_TENSOR = ("size", "dim", "ndimension", "numel", "stride", "getattr")


class Region(NamedTuple):
    """The operations of a segment before its first layer with parameters.

    inputs: the values that they read; some are results of batch norms. outputs: the values of the
    region and of these batch norms that are needed afterwards. rest: the other operations of the
    segment. others: the values from before the segment that `rest` reads, except `outputs`.
    functions: the compiled forward and backward.
    """

    inputs: list[Node]
    outputs: list[Node]
    rest: list[Node]
    others: list[Node]
    functions: tuple[Any, Any]

    def forward(self, x: Sequence[Tensor], norms: Sequence[Norm]) -> tuple[Tensor, ...]:
        """The `outputs` of one micro-batch. x: the `inputs`; for a batch norm, its input."""
        return _call(self.functions[0], *x, *norms)

    def backward(
        self, x: Sequence[Tensor], norms: Sequence[Norm], gradients: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Gradients of `inputs` (for a batch norm, of its output) from those of `outputs`."""
        return _call(self.functions[1], *x, *norms, *gradients)


class CompiledRegions:
    """Makes the compiled regions of a model's segments. Equal regions share their functions."""

    def __init__(self) -> None:
        self._functions: dict[str, tuple[Any, Any]] = {}
        self._input_gradient = torch.compile(
            gbn.input_gradient_composed, dynamic=True, fullgraph=True
        )

    def input_gradient(
        self,
        dy: Tensor,
        x: Tensor,
        s: gbn.Statistics,
        weight: Tensor | None,
        sums: Tensor,
        batch: gbn.WholeBatch,
    ) -> Tensor:
        """`gbn.input_gradient`, compiled, except on CUDA, where it is a single kernel already."""
        if gbn.on_cuda(x) or not takes(x):
            return gbn.input_gradient(dy, x, s, weight, sums, batch)
        weight = weight if weight is None else weight.detach()
        return _call(self._input_gradient, dy, x, s, weight, sums)

    def of(self, graph: Graph, segment: Segment) -> Region | None:
        """The region of a segment; None if there is nothing to compile or it reads the images."""
        nodes = list(takewhile(lambda n: _is_free(graph, n), segment.nodes))
        read = {n for node in nodes for n in node.all_input_nodes}
        inputs = [n for n in segment.reads if n in read]
        rest = segment.nodes[len(nodes) :]
        later = {n for node in rest for n in node.all_input_nodes}
        needed = later.union(segment.writes)
        outputs = [n for n in [*inputs, *nodes] if n in needed and (n in graph.norms or n in nodes)]
        if not inputs or not outputs or graph.input in inputs or any(map(_is_tuple, outputs)):
            return None
        others = [n for n in segment.reads if n in later.difference(outputs)]
        body = _body(graph, nodes, inputs, outputs)
        which = [n in graph.norms for n in inputs]
        key = f"{body.code} {which} {[(repr(m), m.training) for m in body.children()]}"
        if key not in self._functions:
            self._functions[key] = _compiled(body, which, len(outputs))
        return Region(inputs, outputs, rest, others, self._functions[key])


def takes(value: Any) -> bool:
    """Whether compiled functions are used for `value`: for images, not for vectors of the head.

    A size of 0 or 1 would be compiled as a constant, into another function.
    """
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() > 2
        and min(value.shape) > 1
    )


def _is_free(graph: Graph, node: Node) -> bool:
    """Whether `node` makes a tensor, without parameters or buffers."""
    if node.op == "call_module":
        module = graph.module(node)
        return not any(True for _ in (*module.parameters(), *module.buffers()))
    name = getattr(node.target, "__name__", str(node.target))
    return name not in _NO_TENSOR and all(n.op != "get_attr" for n in node.all_input_nodes)


def _is_tuple(node: Node) -> bool:
    return any(getattr(user.target, "__name__", "") == "getitem" for user in node.users)


def _body(
    graph: Graph, nodes: list[Node], inputs: list[Node], outputs: list[Node]
) -> fx.GraphModule:
    """`nodes` as a separate module. Its names do not depend on the position in the model."""
    copy, made = fx.Graph(), dict[Node, Any]()
    modules: dict[str, nn.Module] = {}
    for i, node in enumerate(inputs):
        made[node] = copy.placeholder(f"x{i}")
    for node in nodes:
        target = node.target
        if node.op == "call_module" and isinstance(graph.module(node), nn.Identity):
            made[node] = made[node.all_input_nodes[0]]
            continue
        if node.op == "call_module":
            modules[target := f"m{len(modules)}"] = graph.module(node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), made.__getitem__)
        made[node] = copy.create_node(node.op, target, args, kwargs)
    copy.output(tuple(made[n] for n in outputs))
    return fx.GraphModule(modules, copy)


class _Vjp(nn.Module):
    """Gradients with respect to the inputs of `body`."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, read: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> Any:
        return torch.func.vjp(self.body, *read)[1](gradients)


def _normalized(x: Tensor, norm: Norm) -> Tensor:
    return gbn.normalize_composed(x, *norm)


def _compiled(body: fx.GraphModule, norms: list[bool], outputs: int) -> tuple[Any, Any]:
    """Compile forward and backward of `body`. norms: which inputs come out of batch norms."""

    def function(backward: bool) -> Any:
        # A new graph for each, because torch.compile limits the recompilations per code object.
        graph = fx.Graph()
        x = [graph.placeholder(f"x{i}") for i in range(len(norms))]
        given = {i: graph.placeholder(f"norm{i}") for i, is_norm in enumerate(norms) if is_norm}
        read = tuple(
            graph.call_function(_normalized, (x[i], given[i])) if i in given else x[i]
            for i in range(len(norms))
        )
        if backward:
            gradients = tuple(graph.placeholder(f"gradient{i}") for i in range(outputs))
            graph.output(graph.call_module("module", (read, gradients)))
        else:
            graph.output(graph.call_module("module", read))
        module = fx.GraphModule({"module": _Vjp(body) if backward else body}, graph)
        return torch.compile(module, dynamic=True, fullgraph=True)

    return function(False), function(True)


def _call(function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except torch._dynamo.exc.TorchDynamoException as error:
        # Only the first paragraph is for users of torch.
        why = " ".join(str(error).split("\n\n")[0].split())
        raise RuntimeError(
            f"compile=True, but torch.compile failed: {why}. On CPUs it needs a C++ compiler "
            "(g++, clang++ or what CXX names), on GPUs Triton and a C compiler"
        ) from error
