"""A model as a list of blocks, each a list of segments.

`torch.fx` gives the operations in order. A block ends where the rest of the model needs only a
single value, for example after a residual sum. Lockstep stores only these values. A block is cut
into segments at every batch norm. So the operations of a segment treat every row separately.
"""

import copy
import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from simclr_fast.large_batch.batch_norms import after_norm, uses_batch_statistics
from simclr_fast.large_batch.refusals import (
    RefusedModel,
    arguments,
    refusal,
    refuse_hooks,
    refuse_mixing,
    refuse_outputs,
    refuse_random,
)
from simclr_fast.large_batch.second_run import traced_once
from simclr_fast.large_batch.tracer import Tracer

_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_IN_PLACE: dict[Any, Callable[..., Any]] = {
    getattr(operator, f"i{name}"): getattr(operator, name) for name in _OPERATORS
}


@dataclass(eq=False)
class Segment:
    """Operations between two batch norms."""

    nodes: list[Node]
    norm: Node | None
    """The batch norm after the operations. The last segment of a block may have none."""
    reads: list[Node]
    """The values from earlier segments that it reads, results of batch norms included."""
    writes: list[Node] = field(default_factory=list)
    """The values made here that the batch norm or later segments need."""
    last_use: list[Node] = field(default_factory=list)
    """Stored values that no later segment needs."""
    parameters: list[nn.Parameter] = field(default_factory=list)
    conv: Node | None = None
    """The convolution whose result only `norm` reads, if there is one."""


@dataclass
class Block:
    segments: list[Segment]
    input: Node
    outputs: list[Node]
    parameters: list[nn.Parameter]


class Graph:
    """The blocks of `model`, for the current training flags of its modules.

    Raises:
        ValueError: the model cannot be traced, draws random numbers, has hooks, or overwrites
            values that are read later.
    """

    def __init__(self, model: nn.Module) -> None:
        refuse_hooks(model)
        self.root = _Call(model)
        self.modules = dict(self.root.named_modules())
        try:
            with traced_once(model):
                graph = _Tracer().trace(self.root)
                again = _Call(model)
                same = _equal(graph, self.root, _Tracer().trace(again), again)
        except RefusedModel:
            raise
        except Exception as error:
            raise refusal(f"its forward cannot be traced: {error}") from error
        if not same:
            raise refusal("its forward is another each time it is called, and it is traced once")
        self.norms = {n for n in graph.nodes if self._normalizes(n)}
        self._split_activations(graph)
        (self.input,) = (n for n in graph.nodes if n.op == "placeholder")
        (self.result,) = (n.args[0] for n in graph.nodes if n.op == "output")
        nodes = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
        for node in nodes:
            refuse_random(node, self.module(node) if node.op == "call_module" else None)
            refuse_mixing(node)
        self._make_out_of_place(nodes)
        found: dict[Node, None] = {}
        fx.map_arg(self.result, lambda n: found.setdefault(n))
        self.outputs = list(found)
        refuse_outputs(self.outputs)
        self.blocks = list(self._blocks(nodes))

    def module(self, node: Node) -> Any:
        return self.modules[str(node.target)]

    def stored(self, node: Node) -> Node:
        """The value that is stored for `node`. For a batch norm its input; the output is cheap."""
        while node in self.norms:
            node = node.all_input_nodes[0]
        return node

    def execute(self, node: Node, env: dict[Node, Any]) -> Any:
        """The value of a node that is not a batch norm."""

        def value(n: Node) -> Any:
            return self._attribute(n) if n.op == "get_attr" else env[n]

        args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
        if node.op == "call_module":
            return self.module(node)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def rebuild(self, values: dict[Node, Any]) -> Any:
        """The model's result, with `values` for its nodes."""
        return fx.map_arg(self.result, values.__getitem__)

    def _normalizes(self, node: Node) -> bool:
        return node.op == "call_module" and uses_batch_statistics(self.module(node))

    def _attribute(self, node: Node) -> Any:
        return operator.attrgetter(str(node.target))(self.root)

    def _blocks(self, nodes: list[Node]) -> Iterator[Block]:
        place = {n: i for i, n in enumerate(nodes)}

        def last_use(node: Node) -> int:
            return max((place.get(user, len(nodes)) for user in node.users), default=-1)

        alive = {self.input}
        source, start, cut, norms = self.input, 0, 0, 0
        for i, node in enumerate(nodes):
            if node in self.norms:
                # A block has at least one batch norm, and ends as late as possible before the next.
                if cut > start:
                    yield self._block(nodes[start:cut], source, [nodes[cut - 1]])
                    source, start, norms = nodes[cut - 1], cut, 0
                norms += 1
            alive = {n for n in alive | {node} if last_use(n) > i}
            # Do not cut next to a batch norm. Its input is stored anyway, only while the block
            # runs, and its output is computed from it.
            beside_norm = node in self.norms or self.norms.intersection(node.users)
            if norms and alive == {node} and not beside_norm:
                cut = i + 1
        yield self._block(nodes[start:], source, self.outputs)

    def _block(self, nodes: list[Node], source: Node, outputs: list[Node]) -> Block:
        segments: list[Segment] = []
        run: list[Node] = []
        for node in [*nodes, None]:
            if node is None or node in self.norms:
                if node or run:
                    segments.append(self._segment(run, node))
                run = []
            else:
                run.append(node)
        until: dict[Node, int] = {}
        for i, segment in enumerate(segments):
            ends = [] if segment.norm is None else segment.norm.all_input_nodes
            until.update({self.stored(n): i for n in [*segment.reads, *ends]})
        until.update({self.stored(n): len(segments) for n in outputs})
        made_in = {n: segment for segment in segments for n in segment.nodes}
        for node, last in until.items():
            if node in made_in:
                made_in[node].writes.append(node)
            if last < len(segments):
                segments[last].last_use.append(node)
        return Block(segments, source, outputs, self._parameters(nodes))

    def _segment(self, nodes: list[Node], norm: Node | None) -> Segment:
        reads = {n: None for node in nodes for n in node.all_input_nodes if n.op != "get_attr"}
        segment = Segment(nodes, norm, [n for n in reads if n not in nodes])
        segment.parameters = self._parameters(nodes)
        if norm is not None:
            (last,) = norm.all_input_nodes
            module: Any = self.module(last) if last.op == "call_module" else None
            if (
                last in nodes
                and list(last.users) == [norm]
                and type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
                and module.padding_mode == "zeros"
                and not isinstance(module.padding, str)
            ):
                segment.conv = last
        return segment

    def _parameters(self, nodes: list[Node]) -> list[nn.Parameter]:
        found: dict[nn.Parameter, None] = {}
        for node in nodes:
            if node.op == "call_module":
                found.update(dict.fromkeys(self.module(node).parameters()))
            for source in node.all_input_nodes:
                if source.op == "get_attr" and isinstance(self._attribute(source), nn.Parameter):
                    found[self._attribute(source)] = None
        return [p for p in found if p.requires_grad]

    def _split_activations(self, graph: fx.Graph) -> None:
        """Split timm's batch norms with activation into separate nodes."""
        for node in list(graph.nodes):
            end = node
            for name in after_norm(self.module(node)) if node in self.norms else ():
                with graph.inserting_after(end):
                    new = graph.call_module(f"{node.target}.{name}", (end,))
                end.replace_all_uses_with(new, lambda user, new=new: user is not new)
                end = new

    def _make_out_of_place(self, nodes: list[Node]) -> None:
        """Replace operations that write into their input, because stored values must not change.

        Raises:
            ValueError: an operation overwrites a value that a later one reads.
        """
        # Copies, because the modules of the model must not change.
        copies: dict[str, nn.Module] = {}
        for i, node in enumerate(nodes):
            if self._replace_in_place(node, copies):
                overwritten = node.all_input_nodes[0]
                if any(user in nodes[i + 1 :] for user in overwritten.users):
                    raise refusal(f"{node.format_node()} overwrites a value that is read later")
        self.modules.update(copies)

    def _replace_in_place(self, node: Node, copies: dict[str, nn.Module]) -> bool:
        """Make the operation out of place; return whether it wrote into its first input."""
        name = getattr(node.target, "__name__", str(node.target))
        if node.op == "call_module" and getattr(self.module(node), "inplace", False) is True:
            module = copy.copy(self.module(node))
            module.inplace = False
            copies[str(node.target)] = module
        elif node.target in _IN_PLACE:
            node.target = _IN_PLACE[node.target]
        elif node.op == "call_method" and name.endswith("_") and not name.endswith("__"):
            node.target = name[:-1]
        elif arguments(node).get("inplace") is True:
            function: Any = node.target
            bound = inspect.signature(function).bind(*node.args, **node.kwargs)
            bound.arguments["inplace"] = False
            node.args, node.kwargs = bound.args, bound.kwargs
        elif "out" in node.kwargs or name in ("setitem", "relu_", "dropout_"):
            raise refusal(f"{node.format_node()} writes into a tensor")
        else:
            return False
        return True


def _equal(one: fx.Graph, one_root: nn.Module, other: fx.Graph, other_root: nn.Module) -> bool:
    """Whether two graphs have the same operations and constants."""
    if str(one) != str(other):
        return False
    for node in one.nodes:
        if node.op == "get_attr":
            get = operator.attrgetter(str(node.target))
            a, b = get(one_root), get(other_root)
            if a is not b and not (isinstance(a, Tensor) and torch.equal(a, b)):
                return False
    return True


class _Call(nn.Module):
    """Calls `model` with one argument, so that the others keep their defaults when traced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Any) -> Any:
        return self.model(x)


class _Proxy(fx.Proxy):
    """Records y += x as such. fx records it as y = y + x, which hides that y is overwritten."""


def _recorded(function: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda y, x: y.tracer.create_proxy("call_function", function, (y, x), {})


for _name in _OPERATORS:
    setattr(_Proxy, f"__i{_name}__", _recorded(getattr(operator, f"i{_name}")))


class _Tracer(Tracer):
    def proxy(self, node: Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.modules.batchnorm._BatchNorm) or super().is_leaf_module(
            m, module_qualified_name
        )
