"""Compile runs of cheap operations: normalisation, activation, residual sum, pooling.

Each of them reads and writes a whole micro-batch. `torch.compile` fuses a run of them into one pass
over memory. Sizes are symbolic, and runs with the same operations share their compiled function. So
a ResNet needs only a few, also if the last micro-batch has another size. Statistics, collectives,
layers with parameters and the kept values are the same as without compilation.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from simclr_fast.large_batch import global_batch_norm as gbn
from simclr_fast.large_batch.graph import Graph, Key
from simclr_fast.large_batch.program import Op, Pass, Program

# Operations whose results are no tensors.
_NO_TENSOR = ("size", "dim", "ndimension", "numel", "stride", "getattr")


class Region:
    """A run of operations that make values.

    reads, writes: the keys that it reads, and those that are needed after it. norms: the batch
    norms in it. last: see `Op`.
    """

    def __init__(self, graph: Graph, current: Pass, ops: Sequence[Op]) -> None:
        self.ops = ops
        made = {key for op in ops for key in op.writes}
        last = {key for op in ops for key in op.last}
        self.reads = list(dict.fromkeys(k for op in ops for k in op.reads if k not in made))
        self.writes = [k for op in ops for k in op.writes if k not in last or k in current.keeps]
        self.last = [k for k in (*self.reads, *self.writes) if k in last]
        found = [op.norm_act.users for op in ops if op.norm_act is not None]
        self.norms = [node for users in found for node in users if node in graph.norms]
        self.function: Any = None


class CompiledRegions:
    """Makes the compiled regions of a program. Equal regions share their function."""

    def __init__(self) -> None:
        self._functions: dict[str, Any] = {}
        self._input_gradient = torch.compile(
            gbn.input_gradient_composed, dynamic=True, fullgraph=True
        )

    def steps(self, program: Program, current: Pass) -> list[Op | Region]:
        """The operations of a pass, with regions in the place of runs of at least two."""
        found: list[Op | Region] = []
        for run in runs(program, current.ops):
            if len(run) == 1:
                found.append(run[0])
                continue
            region = Region(program.graph, current, run)
            region.function = self._function(program.graph, region)
            found.append(region)
        return found

    def run(self, region: Region, x: Sequence[Tensor], norms: Sequence[Any]) -> tuple[Tensor, ...]:
        """The values of the outputs. x: those of the inputs; norms: what `gbn.normalize` takes
        after x, per batch norm."""
        found: tuple[Tensor, ...] = _call(region.function, *x, *norms)
        return found

    def input_gradient(
        self,
        dy: Tensor,
        x: Tensor,
        s: gbn.Statistics,
        weight: Tensor | None,
        sums: Tensor,
        batch: gbn.WholeBatch,
        spare: bool,
    ) -> Tensor:
        """`gbn.input_gradient`, compiled, except on CUDA, where it is a single kernel already."""
        if gbn.on_cuda(x) or not takes(x):
            return gbn.input_gradient(dy, x, s, weight, sums, batch, spare)
        weight = weight if weight is None else weight.detach()
        found: Tensor = _call(self._input_gradient, dy, x, s, weight, sums)
        return found

    def _function(self, graph: Graph, region: Region) -> Any:
        body = _body(graph, region)
        key = f"{body.code} {[(repr(m), m.training) for m in body.children()]}"
        if key not in self._functions:
            self._functions[key] = torch.compile(body, dynamic=True, fullgraph=True)
        return self._functions[key]


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


def runs(program: Program, ops: Sequence[Op]) -> Iterator[list[Op]]:
    """The operations in lists: runs that can be compiled, and single others."""
    run: list[Op] = []
    for op in ops:
        if op.kind == "make" and _is_cheap(program, op):
            run.append(op)
            continue
        if run:
            yield run
        run = []
        yield [op]
    if run:
        yield run


def _is_cheap(program: Program, op: Op) -> bool:
    """Whether it makes a tensor of images, without parameters except those of batch norms."""
    graph, node = program.graph, op.node
    spec = program.specs[node]
    if spec is None or len(spec.shape) < 2 or graph.values[graph.input] in op.reads:
        return False
    if node in graph.drop_paths:
        return False
    if op.norm_act is not None:
        return True
    if node.op == "call_module":
        module = graph.module(node)
        return not any(True for _ in (*module.parameters(), *module.buffers()))
    name = getattr(node.target, "__name__", str(node.target))
    tensors = all(program.specs[n] is not None for n in graph.inputs[node])
    return tensors and name not in _NO_TENSOR and node.all_input_nodes == graph.inputs[node]


def _body(graph: Graph, region: Region) -> fx.GraphModule:
    """The region as a module. Its names do not depend on the position in the model."""
    copy = fx.Graph()
    made: dict[Key, Any] = {}
    modules: dict[str, nn.Module] = {}
    for i, key in enumerate(region.reads):
        made[key] = copy.placeholder(f"x{i}")
    norms = {node: copy.placeholder(f"norm{i}") for i, node in enumerate(region.norms)}
    for op in region.ops:
        node, target = op.node, op.node.target

        def value(n: Node) -> Any:
            return made[graph.values[n]]

        if op.norm_act is not None:
            x, own = map(value, op.norm_act.reads), [norms.get(n) for n in op.norm_act.users]
            arguments = (list(x), own, op.norm_act.relu)
            made[op.writes[0]] = copy.call_function(gbn.norm_act_composed, arguments)
            continue
        if node in graph.identities:
            made[op.writes[0]] = value(graph.inputs[node][0])
            continue
        if node.op == "call_module":
            modules[target := f"m{len(modules)}"] = graph.module(node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        made[op.writes[0]] = copy.create_node(node.op, target, args, kwargs)
    copy.output(tuple(made[key] for key in region.writes))
    return fx.GraphModule(modules, copy)


def _call(function: Any, *arguments: Any) -> Any:
    with compile_failures():
        return function(*arguments)


@contextmanager
def compile_failures() -> Iterator[None]:
    """A context in which a failure of torch.compile becomes an error that says what it needs."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        # Only the first paragraph is for users of torch.
        why = " ".join(str(error).split("\n\n")[0].split())
        raise RuntimeError(
            f"compile=True, but torch.compile failed: {why}. On CPUs it needs a C++ compiler "
            "(g++, clang++ or what CXX names), on GPUs Triton and a C compiler"
        ) from error
