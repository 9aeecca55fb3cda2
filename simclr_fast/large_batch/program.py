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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn
from torch.fx import Node

from simclr_fast.large_batch.graph import Block, Graph, Key, Spec
from simclr_fast.large_batch.norm_acts import NormAct, norm_acts
from simclr_fast.large_batch.schedule import Schedule, Stage

Kind = Literal["make", "see", "bits", "sum", "pull", "pull_norm"]
Phase = Literal["forward", "outputs", "backward"]


@dataclass(eq=False)
class Op:
    """One operation on a micro-batch.

    kind:
        "make": the value of the node, of what `norm_act` reads if it is one. Batch norms normalise
            with the known statistics.
        "see": add the input of a batch norm to its statistics.
        "bits": pack where the value is positive.
        "sum": add the gradient of a batch norm's output to its sums.
        "pull": turn the gradient of the node into those of its inputs and parameters.
        "pull_norm": the same for a batch norm, given its sums of the whole batch.
    gram: the batch norm never sees the convolution's output; see `gram`.
    linear: "sum" also adds up what the weight gradient of the convolution before the norm is made
        of, and "pull" does not compute it.
    norm_act: the batch norms that "make" normalises with, and what follows them.
    last: keys that no later operation of the pass needs.
    overwrites: the key whose memory gets the result of a ReLU, a sum or a `norm_act`.
    spare: nothing else needs the gradient that is read, or shares its memory.
    """

    kind: Kind
    node: Node
    reads: Sequence[Key]
    writes: Sequence[Key] = ()
    gram: bool = False
    linear: bool = False
    norm_act: NormAct | None = None
    last: Sequence[Key] = ()
    overwrites: Key | None = None
    spare: bool = False


@dataclass(eq=False)
class Pass:
    """One sweep over the micro-batches.

    loads: kept keys in the order of first use. keeps: keys that are kept for later passes. drops:
    kept keys that are used for the last time. Each with the piece of memory that holds it: a
    gradient that a sum hands to both inputs is one piece. A piece is named by one of its keys.
    reads, makes, frees: the pieces of one micro-batch that the pass reads, makes and gives up.
    pieces_after: all pieces that are kept after the pass.
    """

    phase: Phase
    level: int
    ops: list[Op] = field(default_factory=list)
    loads: dict[Key, Key] = field(default_factory=dict)
    keeps: dict[Key, Key] = field(default_factory=dict)
    drops: dict[Key, Key] = field(default_factory=dict)
    reads: list[Key] = field(default_factory=list)
    makes: list[Key] = field(default_factory=list)
    frees: list[Key] = field(default_factory=list)
    pieces_after: set[Key] = field(default_factory=set)

    @property
    def name(self) -> str:
        return f"{self.phase} {self.level}"


@dataclass(eq=False)
class _Kept:
    """A key that is kept since a pass, its piece, and the last pass that read it."""

    key: Key
    piece: Key
    since: int
    last: int = -1


class Program:
    """The passes of a step with `schedule`. specs: see `Graph.measure`.

    gram, linear: the batch norms with such operations, and the convolutions before them.

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
        self.sums = {n for n in graph.nodes if graph.is_sum(n, specs)}
        self.gram: dict[Node, Node] = {}
        self.linear: dict[Node, Node] = {}
        self._read_stages()
        self.norm_acts = norm_acts(graph, specs, self.sums, {*self._held, *self._keep_from})
        self._hands_on = self.sums | graph.identities
        self._gram_convolutions = set(self.gram.values())
        self._linear_convolutions = set(self.linear.values())
        self.passes: list[Pass] = []
        self._write()

    def finished(self, number: int) -> list[int]:
        """The blocks whose parameter gradients are complete after pass `number`."""
        return self._finished.get(number, [])

    # What the schedule says about every node.

    def _read_stages(self) -> None:
        """Which values are held in the forward, and from which pass of the backward on."""
        blocks = iter(self.graph.blocks)
        self._ends = {self.graph.inputs[n][0] for n in self.graph.norms}
        self._held: set[Node] = set()
        self._kept: set[Node] = set()
        self._keep_from: dict[Node, int] = {}
        self._masked: dict[int, list[Node]] = {}
        for stage in self.schedule.stages:
            own = [next(blocks) for _ in range(stage.blocks)]
            start = min(map(self._first_backward, own))
            for block in own:
                held = self._in_block(block, stage)
                if block.input is not self.graph.input:
                    held[block.input] = stage.input if block is own[0] else stage.output
                for node, choice in held.items():
                    self._held.add(node)
                    if choice == "kept":
                        self._kept.add(node)
                    if choice != "again":
                        self._keep(node, start)
                self._read_turn(block, stage, held)
                self._read_norms(block, stage)

    def _first_backward(self, block: Block) -> int:
        complete = self.graph.complete
        return self._backward(max((complete[n] for n in block.nodes if n in complete), default=1))

    def _backward(self, level: int) -> int:
        """The place in `passes` of the backward pass of a level."""
        return 2 * self.graph.top - level

    def _keep(self, node: Node, time: int) -> None:
        self._keep_from[node] = min(time, self._keep_from.get(node, time))

    def _in_block(self, block: Block, stage: Stage) -> dict[Node, str]:
        """The choices for the values within a block that cost more than reading their inputs."""
        graph, found = self.graph, dict[Node, str]()
        # Nodes which the input of a batch norm depends on that is not wide.
        before: set[Node] = set()
        outputs = [] if block is graph.blocks[-1] else block.outputs
        for node in reversed(block.nodes):
            inner = any(user in before for user in node.users)
            if inner:
                before.add(node)
            if node in graph.norms or not (node in self._ends or node in graph.costly):
                continue
            if node in graph.expanding:
                if stage.wide == "kept" and node not in outputs:
                    found[node] = "kept"
                continue
            if node in self._ends:
                before.add(node)
            if node not in outputs and self.specs[node] is not None:
                found[node] = stage.inner if inner else stage.last
        return found

    def _read_turn(self, block: Block, stage: Stage, held: Iterable[Node]) -> None:
        levels = sorted({self.graph.levels[n] for n in block.nodes if n in self.graph.norms})
        if len(levels) < 2 or stage.turn == "again":
            return
        time = self._backward(levels[1])
        for node in held:
            if node is not block.input or stage.turn == "kept":
                self._keep(node, time)
            elif node in self.graph.relus:
                self._masked.setdefault(time, []).append(node)

    def _read_norms(self, block: Block, stage: Stage) -> None:
        for norm in (n for n in block.nodes if n in self.graph.norms):
            conv = self.graph.convolution(norm)
            if conv is None:
                continue
            if self.schedule.gram and conv in self.graph.expanding and stage.wide == "again":
                self.gram[norm] = conv
            elif (
                stage.turn == "mask"
                and self.graph.inputs[conv][0] is block.input
                and self.graph.module(conv).weight.requires_grad
            ):
                self.linear[norm] = conv

    # Writing the passes.

    def _write(self) -> None:
        graph = self.graph
        self._alive: dict[Key, _Kept] = {}
        self._everything: list[_Kept] = []
        # Gradients that were written last into memory of their own, and operations that read one.
        self._own: set[Key] = set()
        self._reads_own: set[Op] = set()
        by_level: dict[int, list[Node]] = {}
        for norm, level in graph.levels.items():
            by_level.setdefault(level, []).append(norm)
        for level in range(1, graph.top):
            self._begin("forward", level)
            for norm in by_level[level]:
                self._emit("see", norm, [self._statistic(norm)], gram=norm in self.gram)
            self._end()
        self._begin("outputs", graph.top)
        for node in graph.outputs:
            self._demand(node)
            self._touch(graph.values[node])
        self._end()
        for key in [k for k in self._alive if k.node not in self._kept]:
            del self._alive[key]
        for key in (graph.gradients[n] for n in graph.outputs if n in graph.needs_gradient):
            self._alive[key] = _Kept(key, key, graph.top - 1)
            self._everything.append(self._alive[key])
        self._write_backward()
        for kept in self._everything:
            if kept.last > kept.since:
                self.passes[kept.since].keeps[kept.key] = kept.piece
                self.passes[kept.last].drops[kept.key] = kept.piece
        self._note_pieces()
        self.passes = [p for p in self.passes if p.ops or p.phase == "outputs"]
        self._note_last_uses()
        self._note_finished()

    def _write_backward(self) -> None:
        graph = self.graph
        todo: dict[int, list[Node]] = {}
        for node in reversed(graph.nodes):
            if node in graph.complete:
                todo.setdefault(graph.complete[node], []).append(node)
                if node in graph.norms:
                    todo.setdefault(graph.levels[node], []).append(node)
        for level in range(graph.top, 0, -1):
            self._begin("backward", level)
            for node in todo.get(level, ()):
                if node not in graph.norms:
                    if node not in self._gram_convolutions:
                        self._pull(node)
                elif graph.levels[node] == level:
                    self._pull_norm(node)
                else:
                    self._sum(node)
            for node in self._masked.get(self._now, ()):
                if graph.values[node] in self._made:
                    self._emit("bits", node, [node], [graph.bits[node]])
            self._end()

    def _statistic(self, norm: Node) -> Node:
        """The value that statistics and sums of a norm are taken from."""
        return self.graph.inputs[self.gram.get(norm, norm)][0]

    def _sum(self, norm: Node) -> None:
        values = [self._statistic(norm)]
        if norm in self.linear:
            values += self.graph.inputs[self.linear[norm]]
        gram, linear = norm in self.gram, norm in self.linear
        self._emit("sum", norm, values, gradient=True, gram=gram, linear=linear)

    def _pull_norm(self, norm: Node) -> None:
        graph, source = self.graph, self._statistic(norm)
        # With its weight's gradient known, a convolution is there for its input's alone.
        below = graph.inputs[self.linear[norm]][0] if norm in self.linear else source
        if below in graph.needs_gradient:
            writes = [graph.gradients[source]]
            self._emit("pull_norm", norm, [source], writes, gradient=True, gram=norm in self.gram)
        self._forget(graph.gradients[norm])

    def _pull(self, node: Node) -> None:
        graph, gradient = self.graph, self.graph.gradients[node]
        writes = [graph.gradients[n] for n in graph.inputs[node] if n in graph.needs_gradient]
        linear = node in self._linear_convolutions
        if self._available(gradient) and (writes or (graph.parameters[node] and not linear)):
            values, bits = graph.inputs[node], list[Key]()
            if node in graph.relus:
                values = [node]
                if graph.bits[node] in self._alive and not self._available(graph.values[node]):
                    values, bits = [], [graph.bits[node]]
            elif (
                node in self._hands_on
                or node in graph.drop_paths
                or (
                    node in graph.convolutions
                    and (linear or not graph.module(node).weight.requires_grad)
                )
            ):
                values = []
            self._emit("pull", node, values, writes, gradient=True, more=bits, linear=linear)
        self._forget(gradient)

    def _begin(self, phase: Phase, level: int) -> None:
        self._pass = Pass(phase, level)
        self._now = len(self.passes)
        # The keys that were made in this pass, and their pieces.
        self._made: dict[Key, Key] = {}
        self._made[self.graph.values[self.graph.input]] = self.graph.values[self.graph.input]

    def _end(self) -> None:
        self.passes.append(self._pass)
        for key, piece in self._made.items():
            if self._keeps(key):
                self._alive[key] = _Kept(key, piece, self._now)
                self._everything.append(self._alive[key])

    def _keeps(self, key: Key) -> bool:
        """Whether a key that was made in this pass is kept after it, if it is needed."""
        if key.kind != "value":
            return True
        if self._pass.phase == "backward":
            return self._now >= self._keep_from.get(key.node, self._now + 1)
        return key.node in self._held

    def _available(self, key: Key) -> bool:
        return key in self._made or key in self._alive

    def _touch(self, key: Key) -> None:
        """Read a key that is available."""
        if key not in self._made:
            kept = self._alive[key]
            kept.last = self._now
            self._pass.loads.setdefault(key, kept.piece)

    def _forget(self, key: Key) -> None:
        self._made.pop(key, None)
        self._alive.pop(key, None)

    def _demand(self, node: Node) -> None:
        """Make the value of a node, unless it is available, and what it is made of."""
        values = self.graph.values
        stack = [node]
        while stack:
            node = stack[-1]
            if not self._available(values[node]):
                found = self.norm_acts.get(node)
                reads = self.graph.inputs[node] if found is None else found.reads
                missing = [n for n in reads if not self._available(values[n])]
                if missing:
                    stack += reversed(missing)
                    continue
                self._emit("make", node, reads, [values[node]], norm_act=found)
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
        norm_act: NormAct | None = None,
    ) -> None:
        if kind != "make":
            for value in values:
                self._demand(value)
        reads = [self.graph.gradients[node]] if gradient else []
        reads += [self.graph.values[n] for n in values]
        reads += more
        # A gradient is added to what came from other users of the node.
        reads += [key for key in writes if key.kind == "gradient" and self._available(key)]
        for key in reads:
            self._touch(key)
        given = reads[0] if kind == "pull" and node in self._hands_on else None
        for key in writes:
            piece = key
            if given is not None and key not in reads:
                piece = self._made[given] if given in self._made else self._alive[given].piece
            self._alive.pop(key, None)
            self._made[key] = piece
        op = Op(kind, node, reads, writes, gram, linear, norm_act)
        if gradient and reads[0] in self._own:
            self._reads_own.add(op)
        fresh = kind == "pull_norm" or node in self.graph.relus or node in self.graph.convolutions
        (self._own.update if fresh else self._own.difference_update)(writes)
        self._pass.ops.append(op)

    # What follows from the passes.

    def _note_pieces(self) -> None:
        views = self.graph.values[self.graph.input]
        alive: dict[Key, Key] = {}
        for current in self.passes:
            for key in current.drops:
                del alive[key]
            rest = set(alive.values())
            alive |= current.keeps
            current.pieces_after = set(alive.values())
            current.reads = list(dict.fromkeys(current.loads.values()))
            if any(views in op.reads for op in current.ops):
                current.reads.append(views)
            current.makes = list(dict.fromkeys(p for p in current.keeps.values() if p not in rest))
            current.frees = [p for p in dict.fromkeys(current.drops.values()) if p not in rest]

    def _note_last_uses(self) -> None:
        outputs = [self.graph.values[n] for n in self.graph.outputs]
        for current in self.passes:
            later = set(outputs) if current.phase == "outputs" else set[Key]()
            for op in reversed(current.ops):
                last = []
                for keys in (op.writes, op.reads):
                    for key in keys:
                        if key not in later:
                            later.add(key)
                            last.append(key)
                op.last = last
            for op in current.ops:
                if op.kind == "make":
                    op.overwrites = self._free(current, op)
                elif op in self._reads_own:
                    (key, *_) = op.reads
                    kept = key in current.keeps or (
                        key in current.loads and key not in current.drops
                    )
                    op.spare = key in op.last and not kept

    def _free(self, current: Pass, op: Op) -> Key | None:
        """A value whose memory the operation may use for its own."""
        users: Sequence[Node] = ()
        if op.norm_act is not None:
            users = op.norm_act.users
        elif op.node in self.sums or op.node in self.graph.relus:
            users = [op.node] * len(op.reads)
        pairs = zip(op.reads, users, strict=False)
        return next((k for k, user in pairs if self._may_overwrite(current, op, k, user)), None)

    def _may_overwrite(self, current: Pass, op: Op, key: Key, user: Node) -> bool:
        """Whether a value was made in this pass for this operation alone, in memory of its own.

        user: the node that reads it for this operation.
        """
        graph, node = self.graph, key.node
        own = node in self.norm_acts or node in graph.convolutions or node in self.sums
        return (
            own
            and list(node.users) == [user]
            and key in op.last
            and key not in current.loads
            and key not in current.keeps
        )

    def _note_finished(self) -> None:
        last: dict[nn.Parameter, int] = {}
        # Without a gradient, a block is finished in the first pass of the backward.
        first = next(i for i, p in enumerate(self.passes) if p.phase == "outputs") + 1
        for number, current in enumerate(self.passes[first:], first):
            for op in current.ops:
                for node in (op.node, *self.graph.inputs[op.node]):
                    for parameter in self.graph.parameters[node]:
                        last[parameter] = number
        self._finished: dict[int, list[int]] = {}
        for i, block in reversed(list(enumerate(self.graph.blocks))):
            number = max((last.get(p, first) for p in block.parameters), default=first)
            self._finished.setdefault(number, []).append(i)
