"""A model as a list of operations in blocks.

`torch.fx` gives the operations in order. A block ends where the rest of the model needs only a
single value, for example after a residual sum.
"""

import copy
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from simclr_fast.large_batch.batch_norms import after_norm, uses_batch_statistics
from simclr_fast.large_batch.drop_path import DropPath, drop_path
from simclr_fast.large_batch.refusals import (
    RefusedModel,
    arguments,
    refusal,
    refuse_hooks,
    refuse_mixing,
    refuse_outputs,
    refuse_random,
)
from simclr_fast.large_batch.second_run import differ, half_of, traced_once
from simclr_fast.large_batch.tracer import Tracer

_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_IN_PLACE: dict[Any, Callable[..., Any]] = {
    getattr(operator, f"i{name}"): getattr(operator, name) for name in _OPERATORS
}
_ADD = (operator.add, torch.add)
_RELU = (F.relu, torch.relu, "relu")
_PRODUCTS = (F.linear, F.conv1d, F.conv2d, F.conv3d, torch.matmul, torch.bmm, operator.matmul)


class Spec(NamedTuple):
    """What the tensor of a node is like. shape: without the rows. channels_last: its layout."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool


class Key(NamedTuple):
    """A value of a micro-batch: a node's value, its gradient, or where its value is positive."""

    kind: Literal["value", "gradient", "bits"]
    node: Node


# Views that are run to see whether they depend on one another.
TRIED_ROWS = 16


@dataclass(eq=False)
class Block:
    """Consecutive operations. `input` is the only earlier value that they read."""

    nodes: list[Node]
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
            graph = traced_once(model, lambda: _Tracer().trace(self.root))
            again = _Call(model)
            same = _equal(
                graph, self.root, traced_once(model, lambda: _Tracer().trace(again)), again
            )
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
        self.nodes = nodes
        self.blocks = list(self._blocks())
        self._analyse()

    def _analyse(self) -> None:
        """What programs of all schedules need to know about the nodes.

        inputs: the nodes that a node reads, without parameters and buffers. parameters: the
        trainable parameters that it uses itself. values, gradients, bits: its keys.
        needs_gradient: nodes that depend on a trainable parameter.
        levels: one more than the highest level of the batch norms before a batch norm.
        complete: the level of the backward pass in which the gradient of a node's value is
        complete; for nodes with a gradient.
        """
        every = [self.input, *self.nodes]
        self.inputs = {n: [i for i in n.all_input_nodes if i.op != "get_attr"] for n in every}
        self.parameters = {n: self.parameters_of([n]) for n in every}
        self.values = {n: Key("value", n) for n in every}
        self.gradients = {n: Key("gradient", n) for n in every}
        self.bits = {n: Key("bits", n) for n in every}
        self.levels: dict[Node, int] = {}
        self.needs_gradient: set[Node] = set()
        depth = {self.input: 0}
        for node in self.nodes:
            depth[node] = max((depth[i] for i in self.inputs[node]), default=0)
            if node in self.norms:
                depth[node] += 1
                self.levels[node] = depth[node]
            if self.parameters[node] or any(i in self.needs_gradient for i in self.inputs[node]):
                self.needs_gradient.add(node)
        self.top = 1 + max(self.levels.values(), default=0)
        self.complete: dict[Node, int] = {}
        for node in reversed(self.nodes):
            levels = [self.top] if node in self.outputs else []
            # Without a way to an output, a user gets no gradient.
            for user in (u for u in node.users if u in self.complete):
                levels.append(self.levels.get(user, self.complete[user]))
            if levels and node in self.needs_gradient:
                self.complete[node] = min(levels)
        self.convolutions = {n for n in self.nodes if self._is_convolution(n)}
        self.expanding = {n for n in self.convolutions if self._is_expanding(n)}
        self.costly = {n for n in self.nodes if self._is_costly(n)}
        self.relus = {n for n in self.nodes if self._is_relu(n)}
        self.identities = {n for n in self.nodes if self._is_identity(n)}
        self.drop_paths = {
            n: found
            for n in self.nodes
            if n not in self.identities and (found := self._drop_path(n)) is not None
        }

    def module(self, node: Node) -> Any:
        return self.modules[str(node.target)]

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

    def convolution(self, norm: Node) -> Node | None:
        """The convolution that makes a norm's input for this norm alone, padded with zeros."""
        (source,) = norm.all_input_nodes
        alone = list(source.users) == [norm] and source in self.convolutions
        return source if alone else None

    def _is_convolution(self, node: Node) -> bool:
        """Whether the gradients of a node are those of torch's convolution, padded with zeros."""
        if node.op != "call_module" or len(node.all_input_nodes) != 1:
            return False
        module = self.module(node)
        return (
            type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        )

    def _is_expanding(self, node: Node) -> bool:
        """Whether a convolution is 1×1 and to at least twice the channels: cheap to repeat."""
        conv = self.module(node)
        return (
            set(conv.kernel_size) == {1}
            and set(conv.padding) == {0}
            and conv.groups == 1
            and 2 * conv.in_channels <= conv.out_channels
        )

    def _is_costly(self, node: Node) -> bool:
        """Whether a node multiplies matrices, as far as one can see."""
        if node.op == "call_module":
            return any(p.dim() > 1 for p in self.module(node).parameters())
        return node.target in _PRODUCTS

    def _is_relu(self, node: Node) -> bool:
        if node.op == "call_module":
            return type(self.module(node)) is nn.ReLU
        return node.target in _RELU

    def _is_identity(self, node: Node) -> bool:
        if node.op != "call_module":
            return False
        found = self._drop_path(node)
        return type(self.module(node)) is nn.Identity or (found is not None and not found.active)

    def _drop_path(self, node: Node) -> DropPath | None:
        return drop_path(self.module(node)) if node.op == "call_module" else None

    def is_sum(self, node: Node, specs: dict[Node, Spec | None]) -> bool:
        """Whether a node adds two different tensors of the same shape and dtype."""
        inputs = self.inputs[node]
        if node.target not in _ADD or node.kwargs or list(node.args) != inputs:
            return False
        kinds = {None if (s := specs[n]) is None else s[:2] for n in (node, *inputs)}
        return len(inputs) == 2 and len(kinds) == 1 and None not in kinds

    def parameters_of(self, nodes: Iterable[Node]) -> list[nn.Parameter]:
        """The trainable parameters that the operations use."""
        found: dict[nn.Parameter, None] = {}
        for node in nodes:
            if node.op == "call_module":
                found.update(dict.fromkeys(self.module(node).parameters()))
            for source in node.all_input_nodes:
                if source.op == "get_attr" and isinstance(self._attribute(source), nn.Parameter):
                    found[self._attribute(source)] = None
        return [p for p in found if p.requires_grad]

    @torch.no_grad()
    def measure(self, x: Tensor) -> dict[Node, Spec | None]:
        """What the values of all nodes are like, found by running two rows. None: not a tensor.

        Batch norms and drop paths let their input pass: they change neither shape nor dtype.
        """
        example = x[:2] if len(x) > 1 else x.new_zeros(2, *x.shape[1:])
        return {node: _spec(value) for node, value in self._run(example).items()}

    def _run(self, x: Tensor) -> dict[Node, Any]:
        """The values of all nodes. Batch norms let their input pass."""
        env: dict[Node, Any] = {self.input: x}
        for node in self.nodes:
            passes = node in self.norms or node in self.drop_paths
            env[node] = env[node.all_input_nodes[0]] if passes else self.execute(node, env)
        return env

    @torch.no_grad()
    def refuse_mixed_rows(self, x: Tensor) -> None:
        """Run a few views, and half of them from their middle, and refuse other outputs.

        x: views, of which some are used. Batch norms let their input pass.
        """
        rows = min(len(x), TRIED_ROWS)
        if rows < 2 or isinstance(x, FakeTensor) or x.is_meta:
            return
        whole, kept = self._run(x[:rows]), half_of(rows)
        try:
            part = self._run(x[kept])
        except Exception as error:
            raise refusal(f"it fails for fewer views: {error}") from error
        other = [n for n in whole if _other_rows(whole[n], part[n], rows, kept)]
        if any(node in other for node in self.outputs):
            raise refusal(
                f"{other[0].format_node()} mixes the rows of the batch: the output of a view "
                "depends on the other views"
            )

    def _blocks(self) -> Iterator[Block]:
        nodes = self.nodes
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
            # Not after a batch norm, because its output is cheap to make from its input.
            if norms and alive == {node} and node not in self.norms:
                cut = i + 1
        yield self._block(nodes[start:], source, self.outputs)

    def _block(self, nodes: list[Node], source: Node, outputs: list[Node]) -> Block:
        return Block(nodes, source, outputs, self.parameters_of(nodes))

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
        return (
            isinstance(m, nn.modules.batchnorm._BatchNorm)
            or drop_path(m) is not None
            or super().is_leaf_module(m, module_qualified_name)
        )


def _other_rows(whole: Any, part: Any, rows: int, kept: slice) -> bool:
    """Whether the rows `kept` of a value changed because the others are missing."""
    if not (isinstance(whole, Tensor) and isinstance(part, Tensor)):
        return False
    by_row = whole.dim() and part.dim() and (len(whole), len(part)) == (rows, rows // 2)
    if not by_row:
        return False
    if whole.shape[1:] != part.shape[1:]:
        return True
    # Without batch norms float16 may overflow, in one of two equal rows by a rounding.
    finite = whole[kept].isfinite() & part.isfinite()
    return differ([whole[kept].where(finite, 0)], [part.where(finite, 0)])


def _spec(value: Any) -> Spec | None:
    if not isinstance(value, Tensor):
        return None
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(value.dim())
    # One row of a single pixel or channel has both layouts.
    dense = layout is not None and value.is_contiguous(memory_format=layout)
    return Spec(tuple(value.shape[1:]), value.dtype, dense and not value.is_contiguous())
