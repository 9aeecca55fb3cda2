"""A schedule as a list of passes: which operations run on every micro-batch, in which order.

Given the statistics of the batch norms, every value of a micro-batch is a function of the values
that are kept. So an operation that needs a value takes it if it is kept or was made before in the
same pass, and otherwise makes it from the values that it is made of. All micro-batches do the same.
So the list of operations is written once, by this module, without a tensor. It also says when a
value is kept for a later pass, and when it is used for the last time. The planner counts the same
lists that `lockstep` executes.

Level of a batch norm: one more than the highest level of the batch norms before it. Levels 1 to L
take a forward pass each; one more makes the outputs. The backward has one pass for the operations
after the last batch norms, and then one per level, from L down to 1.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from simclr_fast.large_batch.schedule import Schedule, Stage
from simclr_fast.large_batch.trace import Block, Graph, Spec

_ADD = (operator.add, torch.add)
_RELU = (F.relu, torch.relu, "relu")
_PRODUCTS = (F.linear, F.conv1d, F.conv2d, F.conv3d, torch.matmul, torch.bmm, operator.matmul)


class Key(NamedTuple):
    """A value of a micro-batch: a node's value, its gradient, or where its value is positive."""

    kind: Literal["value", "gradient", "bits"]
    node: Node


Kind = Literal["make", "see", "bits", "sum", "pull", "pull_norm"]


@dataclass(eq=False)
class Op:
    """One operation on a micro-batch.

    kind:
        "make": the value of the node. A batch norm normalises with the known statistics.
        "see": add the input of a batch norm to its statistics.
        "bits": pack where the value is positive.
        "sum": add the gradient of a batch norm's output to its sums.
        "pull": turn the gradient of the node into those of its inputs and parameters.
        "pull_norm": the same for a batch norm, given its sums of the whole batch.
    gram: the batch norm never sees the convolution's output; see `gram`.
    linear: "sum" also adds up what the weight gradient of the convolution before the norm is made
        of, and "pull" does not compute it.
    last: keys that no later operation of the pass needs.
    """

    kind: Kind
    node: Node
    reads: tuple[Key, ...]
    writes: tuple[Key, ...] = ()
    gram: bool = False
    linear: bool = False
    last: tuple[Key, ...] = ()


@dataclass(eq=False)
class Pass:
    """One sweep over the micro-batches.

    keeps: keys that are kept for later passes. drops: kept keys that are used for the last time.
    kept_after: all keys that are kept after the pass. loads: kept keys in the order of first use.
    """

    phase: Literal["forward", "outputs", "backward"]
    level: int
    ops: list[Op] = field(default_factory=list)
    loads: list[Key] = field(default_factory=list)
    keeps: set[Key] = field(default_factory=set)
    drops: set[Key] = field(default_factory=set)
    kept_after: set[Key] = field(default_factory=set)

    def norms(self, kind: Kind) -> list[Op]:
        """The operations of a kind, such as "see", one per batch norm."""
        return [op for op in self.ops if op.kind == kind]


class Program:
    """The passes of a step with `schedule`. specs: see `Graph.measure`.

    Raises:
        ValueError: the stages do not cover the blocks of the model.
    """

    def __init__(self, graph: Graph, schedule: Schedule, specs: dict[Node, Spec | None]) -> None:
        if schedule.blocks != len(graph.blocks):
            raise ValueError(
                f"stages must cover the {len(graph.blocks)} blocks of the model, got "
                f"{schedule.blocks} blocks"
            )
        self.graph, self.schedule, self.specs = graph, schedule, specs
        self.levels = _levels(graph)
        self.top = 1 + max(self.levels.values(), default=0)
        self.stage_of: dict[Block, Stage] = {}
        self.block_of = {n: block for block in graph.blocks for n in block.nodes}
        self.needs_gradient = self._needs_gradient()
        self.complete = self._complete()
        self._read_stages()
        self.gram = {n: conv for n in graph.norms if (conv := self._gram(n)) is not None}
        self.linear = {n: conv for n in graph.norms if (conv := self._linear(n)) is not None}
        self.passes: list[Pass] = []
        self._write()

    def finished(self, number: int) -> list[int]:
        """The blocks whose parameter gradients are complete after pass `number`."""
        return self._finished.get(number, [])

    # What the schedule says about every node.

    def _read_stages(self) -> None:
        """Which values are held in the forward, and from which pass of the backward on."""
        blocks = iter(self.graph.blocks)
        self.held: set[Node] = set()
        self.kept: set[Node] = set()
        self.keep_from: dict[Node, int] = {}
        self.masked: dict[Node, int] = {}
        for stage in self.schedule.stages:
            own = [next(blocks) for _ in range(stage.blocks)]
            self.stage_of.update(dict.fromkeys(own, stage))
            start = min((self._first_backward(block) for block in own), default=0)
            for block in own:
                held = self._held(block, stage)
                source = stage.input if block is own[0] else stage.output
                if block.input is not self.graph.input:
                    held[block.input] = source
                for node, choice in held.items():
                    self.held.add(node)
                    if choice == "kept":
                        self.kept.add(node)
                    if choice != "again":
                        self._keep(node, start)
                self._read_turn(block, stage, held)

    def _read_turn(self, block: Block, stage: Stage, held: Iterable[Node]) -> None:
        levels = sorted({self.levels[n] for n in block.nodes if n in self.levels})
        if len(levels) < 2 or stage.turn == "again":
            return
        time = self._time("backward", levels[1])
        for node in held:
            if node is not block.input or stage.turn == "kept":
                self._keep(node, time)
            elif self.is_relu(node):
                self.masked[node] = time

    def _keep(self, node: Node, time: int) -> None:
        self.keep_from[node] = min(time, self.keep_from.get(node, time))

    def _held(self, block: Block, stage: Stage) -> dict[Node, str]:
        """The values within a block that cost more than reading their inputs."""
        ends = {n.all_input_nodes[0] for n in self.graph.norms}
        costly = [n for n in block.nodes if n in ends or self.is_costly(n)]
        costly = [n for n in costly if n not in self.graph.norms]
        found: dict[Node, str] = {}
        later: set[Node] = set()
        for node in reversed(block.nodes):
            # Whether the input of another batch norm, except a wide one, depends on the node.
            inner = any(user in later for user in node.users)
            if inner:
                later.add(node)
            if node not in costly or (node in block.outputs and block is not self.graph.blocks[-1]):
                continue
            if self.graph.is_expanding(node):
                found[node] = stage.wide
                continue
            found[node] = stage.inner if inner else stage.last
            if node in ends:
                later.add(node)
        return {n: c for n, c in found.items() if not self.graph.is_expanding(n) or c == "kept"}

    def is_costly(self, node: Node) -> bool:
        """Whether a node multiplies matrices, as far as one can see."""
        if node.op == "call_module":
            return any(p.dim() > 1 for p in self.graph.module(node).parameters())
        return node.target in _PRODUCTS

    def is_relu(self, node: Node) -> bool:
        if node.op == "call_module":
            return type(self.graph.module(node)) is nn.ReLU
        return node.target in _RELU

    def is_sum(self, node: Node) -> bool:
        """Whether a node adds two different tensors of the same shape and dtype."""
        inputs = self.inputs(node)
        if node.target not in _ADD or node.kwargs or tuple(node.args) != tuple(inputs):
            return False
        specs = [self.specs[n] for n in (node, *inputs)]
        return len(inputs) == 2 and all(s is not None and s[:2] == specs[0][:2] for s in specs)  # type: ignore[index]

    def is_identity(self, node: Node) -> bool:
        return node.op == "call_module" and type(self.graph.module(node)) is nn.Identity

    def inputs(self, node: Node) -> list[Node]:
        """The nodes that a node reads, without parameters and buffers."""
        return [n for n in node.all_input_nodes if n.op != "get_attr"]

    def _gram(self, norm: Node) -> Node | None:
        conv = self.graph.convolution(norm)
        if conv is None or not self.schedule.gram or not self.graph.is_expanding(conv):
            return None
        return conv if self.stage_of[self.block_of[conv]].wide == "again" else None

    def _linear(self, norm: Node) -> Node | None:
        """The convolution before a norm, if its weight gradient is taken early."""
        conv = self.graph.convolution(norm)
        if conv is None or norm in self.gram or norm not in self.complete:
            return None
        if not self.graph.module(conv).weight.requires_grad:
            return None
        (source,) = self.inputs(conv)
        block = self.block_of[norm]
        early = source is block.input and self.stage_of[block].turn == "mask"
        return conv if early or source not in self.needs_gradient else None

    # Gradients.

    def _needs_gradient(self) -> set[Node]:
        found: set[Node] = set()
        for node in self.graph.nodes:
            if any(n in found for n in self.inputs(node)) or self.graph.parameters([node]):
                found.add(node)
        return found

    def _complete(self) -> dict[Node, int]:
        """The level of the backward pass in which the gradient of a node's value is complete."""
        complete: dict[Node, int] = {}
        for node in reversed(self.graph.nodes):
            levels = [self.top] if node in self.graph.outputs else []
            for user in node.users:
                # Without a way to an output, an operation gets no gradient.
                if user in complete:
                    levels.append(self.levels.get(user, complete[user]))
            if levels and node in self.needs_gradient:
                complete[node] = min(levels)
        return complete

    def _first_backward(self, block: Block) -> int:
        levels = [self.complete[n] for n in block.nodes if n in self.complete]
        return self._time("backward", max(levels, default=1))

    def _time(self, phase: str, level: int) -> int:
        """The place of a pass in `passes`."""
        if phase == "backward":
            return 2 * self.top - level
        return level - 1

    # Writing the passes.

    def _write(self) -> None:
        self._alive: dict[Key, _Kept] = {}
        everything: list[_Kept] = []
        self._everything = everything
        for level in range(1, self.top):
            self._begin("forward", level)
            for norm in (n for n in self.graph.nodes if self.levels.get(n) == level):
                source = self._statistic(norm)
                self._emit("see", norm, [source], gram=norm in self.gram)
            self._end()
        self._begin("outputs", self.top)
        for node in self.graph.outputs:
            self._demand(node)
            self._touch(Key("value", node))
        self._end()
        for key in [k for k in self._alive if k.node not in self.kept]:
            del self._alive[key]
        for node in self.graph.outputs:
            if node in self.needs_gradient:
                self._alive[Key("gradient", node)] = _Kept(Key("gradient", node), self.top - 1)
                everything.append(self._alive[Key("gradient", node)])
        for level in range(self.top, 0, -1):
            self._write_backward(level)
        for kept in everything:
            if kept.last > kept.since:
                self.passes[kept.since].keeps.add(kept.key)
                self.passes[kept.last].drops.add(kept.key)
        self._finish()

    def _write_backward(self, level: int) -> None:
        self._begin("backward", level)
        for node in reversed(self.graph.nodes):
            if node not in self.complete:
                continue
            if node in self.graph.norms:
                if self.levels[node] == level:
                    self._pull_norm(node)
                elif self.complete[node] == level:
                    self._sum(node)
            elif self.complete[node] == level and node not in self._gram_convs:
                self._pull(node)
        for node, time in self.masked.items():
            if time == self._now and Key("value", node) in self._made:
                self._emit("bits", node, [node], [Key("bits", node)])
        self._end()

    @property
    def _gram_convs(self) -> set[Node]:
        return set(self.gram.values())

    def _statistic(self, norm: Node) -> Node:
        """The value that statistics and sums of a norm are taken from."""
        (source,) = self.inputs(self.gram.get(norm, norm))
        return source

    def _sum(self, norm: Node) -> None:
        values = [self._statistic(norm)]
        if norm in self.linear:
            values += self.inputs(self.linear[norm])
        self._emit(
            "sum", norm, values, gradient=True, gram=norm in self.gram, linear=norm in self.linear
        )

    def _pull_norm(self, norm: Node) -> None:
        source, gradient = self._statistic(norm), Key("gradient", norm)
        below = self.inputs(self.linear[norm])[0] if norm in self.linear else source
        if below in self.needs_gradient:
            wanted = [Key("gradient", source)]
            self._emit("pull_norm", norm, [source], wanted, gradient=True, gram=norm in self.gram)
        self._forget(gradient)

    def _pull(self, node: Node) -> None:
        gradient = Key("gradient", node)
        wanted = [Key("gradient", n) for n in self.inputs(node) if n in self.needs_gradient]
        linear = node in self.linear.values()
        if not self._available(gradient) or (
            not wanted and (linear or not self.graph.parameters([node]))
        ):
            self._forget(gradient)
            return
        bits: list[Key] = []
        values = self.inputs(node)
        if self.is_relu(node):
            values = [node]
            if Key("bits", node) in self._alive and not self._available(Key("value", node)):
                values, bits = [], [Key("bits", node)]
        elif (
            self.is_sum(node)
            or self.is_identity(node)
            or (
                self.graph.is_convolution(node)
                and (linear or not self.graph.module(node).weight.requires_grad)
            )
        ):
            values = []
        self._emit("pull", node, values, wanted, gradient=True, more=bits, linear=linear)
        self._forget(gradient)

    def _begin(self, phase: Any, level: int) -> None:
        self._pass = Pass(phase, level)
        self._now = len(self.passes)
        self._made: set[Key] = set()

    def _end(self) -> None:
        self.passes.append(self._pass)
        for key in self._made:
            if self._keeps(key):
                self._alive[key] = _Kept(key, self._now)
                self._everything.append(self._alive[key])

    def _keeps(self, key: Key) -> bool:
        """Whether a key that was made in this pass shall be kept after it, if it is needed."""
        if key.kind != "value":
            return True
        if self._pass.phase == "backward":
            return self._now >= self.keep_from.get(key.node, self._now + 1)
        return key.node in self.held

    def _available(self, key: Key) -> bool:
        return key in self._made or key in self._alive or key == Key("value", self.graph.input)

    def _touch(self, key: Key) -> None:
        """Read a key that is available."""
        if key not in self._made and key in self._alive:
            self._alive[key].last = self._now
            if key not in self._pass.loads:
                self._pass.loads.append(key)

    def _forget(self, key: Key) -> None:
        self._made.discard(key)
        self._alive.pop(key, None)

    def _demand(self, node: Node) -> None:
        """Make the value of a node, unless it is available, and what it is made of."""
        stack = [node]
        while stack:
            node = stack[-1]
            if not self._available(Key("value", node)):
                missing = [n for n in self.inputs(node) if not self._available(Key("value", n))]
                if missing:
                    stack += reversed(missing)
                    continue
                self._emit("make", node, self.inputs(node), [Key("value", node)])
            stack.pop()

    def _emit(
        self,
        kind: Kind,
        node: Node,
        values: Sequence[Node],
        writes: Sequence[Key] = (),
        *,
        gradient: bool = False,
        more: Sequence[Key] = (),
        gram: bool = False,
        linear: bool = False,
    ) -> None:
        reads = [Key("gradient", node)] if gradient else []
        for value in values:
            if kind != "make":
                self._demand(value)
            reads.append(Key("value", value))
        reads += more
        for key in writes:
            # A gradient is added to what came from other users of the node.
            if key.kind == "gradient" and self._available(key):
                reads.append(key)
        for key in reads:
            self._touch(key)
        for key in writes:
            self._alive.pop(key, None)
            self._made.add(key)
        self._pass.ops.append(Op(kind, node, tuple(reads), tuple(writes), gram, linear))

    def _finish(self) -> None:
        """Note what is kept after every pass, and the last use of every key within one."""
        alive: set[Key] = set()
        outputs = [Key("value", n) for n in self.graph.outputs]
        for current in self.passes:
            alive = (alive - current.drops) | current.keeps
            current.kept_after = set(alive)
            seen: set[Key] = set(outputs) if current.phase == "outputs" else set()
            for op in reversed(current.ops):
                keys = dict.fromkeys((*op.reads, *op.writes))
                op.last = tuple(k for k in keys if k not in seen)
                seen.update(keys)
        self.passes = [p for p in self.passes if p.ops or p.phase == "outputs"]
        self._first = next(i for i, p in enumerate(self.passes) if p.phase == "outputs") + 1
        last: dict[nn.Parameter, int] = {}
        for number, current in enumerate(self.passes):
            for op in current.ops if current.phase == "backward" else ():
                for node in (op.node, *op.node.all_input_nodes):
                    for parameter in self.graph.parameters([node]):
                        last[parameter] = number
        self._finished: dict[int, list[int]] = {}
        for i, block in reversed(list(enumerate(self.graph.blocks))):
            number = max((last.get(p, 0) for p in block.parameters), default=0)
            # Without a gradient, a block is finished in the first pass of the backward.
            number = max(number, self._first)
            self._finished.setdefault(number, []).append(i)


@dataclass(eq=False)
class _Kept:
    """A key that is kept since a pass, and the last pass that read it."""

    key: Key
    since: int
    last: int = -1


def _levels(graph: Graph) -> dict[Node, int]:
    depth: dict[Node, int] = {}
    for node in graph.nodes:
        depth[node] = max((depth.get(n, 0) for n in node.all_input_nodes), default=0)
        depth[node] += node in graph.norms
    return {n: depth[n] for n in graph.nodes if n in graph.norms}
