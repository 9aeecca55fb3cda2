"""What a schedule of lockstep needs and costs, counted from its program before it runs.

Lockstep itself runs every operation of the program once, on tensors without data, for one
micro-batch. That gives the operation's FLOPs, the bytes that it reads and writes, and its temporary
memory. A step is the sum over operations and micro-batches. What is in memory at any time follows
from what the program keeps and drops.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node

from simclr_fast.large_batch.compiled_regions import Region, runs
from simclr_fast.large_batch.global_batch_norm import WholeBatch
from simclr_fast.large_batch.graph import Key
from simclr_fast.large_batch.lockstep import Env, Lockstep
from simclr_fast.large_batch.program import Op, Pass, Program
from simclr_fast.large_batch.schedule import Schedule
from simclr_fast.large_batch.simulate import Meter, Phase, norms_of_cuda

# Gives the seconds of one operation from its FLOPs and the bytes that it reads and writes.
Clock = Callable[[float, float], float]
_BETWEEN = ("between operations", 0)


class Cost(NamedTuple):
    """One operation on one micro-batch. temporary: bytes beside its inputs and outputs."""

    flops: float
    moved: float
    seconds: float
    temporary: float


@dataclass
class PassPrice:
    """One pass, for one micro-batch.

    name: such as "backward 12". before, after: bytes kept before and after the pass. local: the
    most bytes of the micro-batch in work, with what is kept of it. fixed: bytes of gradients of
    parameters and of statistics, for any number of micro-batches.
    """

    name: str
    flops: float = 0
    moved: float = 0
    seconds: float = 0
    before: float = 0
    after: float = 0
    local: float = 0
    fixed: float = 0

    @property
    def kept(self) -> float:
        return max(self.before, self.after)


@dataclass
class Price:
    """A schedule, for one micro-batch: the same for every number of micro-batches.

    flops_once: FLOPs between the passes, for any number of micro-batches.
    """

    schedule: Schedule
    passes: list[PassPrice] = field(default_factory=list)
    flops_once: float = 0

    @property
    def flops(self) -> float:
        return sum(p.flops for p in self.passes)

    @property
    def seconds(self) -> float:
        return sum(p.seconds for p in self.passes)

    @property
    def kept(self) -> float:
        """The most bytes kept between two passes."""
        return max(p.kept for p in self.passes)

    @property
    def transient(self) -> float:
        """The most bytes that are not kept: of a micro-batch in work, and fixed ones."""
        return max(max(p.local - p.kept, 0) + p.fixed for p in self.passes)


class Prices:
    """Prices of all schedules of one model.

    make: builds the model. shape: of one view. dtype: that of autocast. cuda: count the operations
    that run on a GPU, on views in channels_last. compile: regions of cheap operations are compiled;
    each reads its inputs and writes its outputs once. `at` chooses the rows of a micro-batch.

    Raises:
        ValueError: lockstep cannot run the model.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        shape: tuple[int, ...],
        dtype: torch.dtype | None,
        cuda: bool,
        clock: Clock,
        compile: bool = False,
    ) -> None:
        self.shape, self.dtype, self.cuda, self.micro_batch = shape, dtype, cuda, 1
        self.clock, self.compile = clock, compile
        self._mode = FakeTensorMode()
        self._meter = Meter(clock)
        self._costs: dict[Any, Cost] = {}
        self._nbytes: dict[Key, int] = {}
        self._detailed: dict[Schedule, Price] = {}
        with self._mode:
            self._engine = _Engine(make().train(), self._meter)
            self.graph = self._engine.graph
            with self._autocast():
                self.specs = self._engine._specs = self.graph.measure(self._views(1))

    def at(self, micro_batch: int) -> "Prices":
        """The prices for micro-batches of that many rows."""
        found = copy.copy(self)
        found.micro_batch, found._costs, found._nbytes = micro_batch, {}, {}
        found._detailed = {}
        return found

    @property
    def largest(self) -> int:
        """The bytes of the largest value of a micro-batch."""
        return max(map(self.nbytes, self.graph.values.values()))

    def loss_bytes(self, rows: int, loss: Callable[[Any], Any]) -> float:
        """The bytes that outputs of all rows, their gradients and the loss need."""
        meter = Meter()
        with self._mode, meter:
            made = {}
            for node in self.graph.outputs:
                spec = self.specs[node]
                assert spec is not None
                floating = spec.dtype.is_floating_point
                made[node] = torch.empty(rows, *spec.shape, dtype=spec.dtype).requires_grad_(
                    floating
                )
            result = loss(self.graph.rebuild({n: t.clone() for n, t in made.items()}))
            (result[0] if isinstance(result, tuple) else result).backward()
        return meter.phases["step", 0].peak

    def price(self, schedule: Schedule) -> Price:
        """Count one schedule. Operations that no schedule had before are run first."""
        result = Price(schedule)
        before = 0
        for current, costs, after in self.walk(schedule):
            flops, moved, seconds, _ = map(sum, zip(*costs, strict=True)) if costs else (0,) * 4
            name = f"{current.phase} {current.level}"
            result.passes.append(PassPrice(name, flops, moved, seconds, before, after))
            before = after
        return result

    def walk(self, schedule: Schedule) -> Iterator[tuple[Pass, list[Cost], int]]:
        """Every pass, the costs of its operations, and the bytes that are kept after it."""
        program = Program(self.graph, schedule, self.specs)
        for current in program.passes:
            costs = [self._cost(op, schedule) for op in current.ops]
            if self.compile:
                costs = list(self._fused(program, current, costs))
            yield current, costs, sum(map(self.nbytes, current.pieces_after))

    def _fused(self, program: Program, current: Pass, costs: Sequence[Cost]) -> Iterator[Cost]:
        """The costs of operations, those of compiled regions divided equally among theirs."""
        rest = iter(costs)
        for run in runs(program, current.ops):
            own = [next(rest) for _ in run]
            if len(run) > 1:
                region = Region(program.graph, current, run)
                moved = sum(map(self.nbytes, (*region.reads, *region.writes)))
                seconds = self.clock(0, moved)
                own = [
                    cost._replace(moved=moved / len(run), seconds=seconds / len(run))
                    for cost in own
                ]
            yield from own

    def in_detail(self, schedule: Schedule) -> Price:
        """`price` with `flops_once`, `PassPrice.local` and `PassPrice.fixed`."""
        if schedule in self._detailed:
            return self._detailed[schedule]
        price = self.price(schedule)
        self._run(schedule)
        price.flops_once = self._meter.phases[_BETWEEN].flops
        program = self._engine.program
        assert program is not None
        before: set[Key] = set()
        fixed = self._engine.fixed
        for current, found, beside in zip(program.passes, price.passes, fixed, strict=True):
            alive = _Alive(self, program, current, before)
            for op in current.ops:
                alive.run(op, self._cost(op, schedule).temporary)
            found.local, found.fixed = alive.most, beside - found.after
            before = current.pieces_after
        self._detailed[schedule] = price
        return price

    def nbytes(self, key: Key) -> int:
        """The bytes of a key of one micro-batch."""
        found = self._nbytes.get(key)
        if found is None:
            spec = self.specs[key.node]
            found = 0
            if spec is not None:
                numel = math.prod(spec.shape) * self.micro_batch
                found = -(-numel // 8) if key.kind == "bits" else numel * spec.dtype.itemsize
            self._nbytes[key] = found
        return found

    def _views(self, rows: int) -> Tensor:
        views = torch.empty(rows, *self.shape, dtype=self.dtype)
        four = self.cuda and views.dim() == 4
        return views.contiguous(memory_format=torch.channels_last) if four else views

    def _autocast(self) -> Any:
        return torch.autocast("cpu", self.dtype, self.dtype is not None, False)

    def _cost(self, op: Op, schedule: Schedule) -> Cost:
        key = (op.kind, op.node, op.gram, op.linear, op.overwrites, *op.reads, *op.writes)
        found = self._costs.get(key)
        if found is None:
            self._engine._rows = self.micro_batch
            found = self._engine.costs.get(self._engine.alike(op))
            if found is None:
                self._run(schedule)
                found = self._engine.costs[self._engine.alike(op)]
            self._costs[key] = found
        return found

    def _run(self, schedule: Schedule) -> None:
        """Run a step of one micro-batch with `schedule`."""
        self._meter.phase = _BETWEEN
        self._meter.phases.clear()
        with self._mode, norms_of_cuda(self.cuda):
            self._engine.begin(schedule, self.specs, self.micro_batch)
            with self._meter:
                self._engine.backward([self._views(self.micro_batch)], _sum, self._autocast)


def _sum(outputs: Any) -> None:
    """Stands for the loss: every output gets a gradient."""
    tensors = [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, Tensor)]
    torch.stack([t.float().sum() for t in tensors if t.requires_grad]).sum().backward()


class _Engine(Lockstep):
    """Lockstep on tensors without data. It measures operations, each kind of them only once."""

    def __init__(self, model: nn.Module, meter: Meter) -> None:
        super().__init__(model, WholeBatch(), lambda graph: self._given)
        self.meter = meter
        self.costs: dict[Any, Cost] = {}
        self._descriptions: dict[Node, Any] = {}

    def begin(self, schedule: Schedule, specs: dict[Node, Any], rows: int) -> None:
        self._given, self._specs, self._rows = schedule, specs, rows
        self.program = None
        for parameter in self.model.parameters():
            parameter.grad = None
        self.buckets = None
        # The bytes after every pass, without the model and the views.
        self.fixed: list[float] = []
        self._at_rest = self.meter.alive

    def _run_pass(self, number: int, current: Pass, parts: Sequence[Tensor]) -> None:
        super()._run_pass(number, current, parts)
        views = sum(part.nbytes for part in parts)
        self.fixed.append(self.meter.alive - self._at_rest - views)

    def run(self, op: Op, env: Env) -> None:
        key = self.alike(op)
        # Those that add to sums are needed for what follows from the sums.
        if key in self.costs and op.kind not in ("see", "sum") and self._stand_in(op, env):
            return
        meter, before = self.meter, self.meter.alive
        meter.phase = ("operation", 0)
        phase = meter.phases[meter.phase] = Phase(peak=before)
        super().run(op, env)
        temporary = max(phase.peak - max(before, meter.alive), 0)
        self.costs[key] = Cost(phase.flops, phase.moved, phase.seconds, temporary)
        meter.phase = _BETWEEN

    def _stand_in(self, op: Op, env: Env) -> bool:
        """Give the results of a known operation without running it."""
        specs = [self._specs[key.node] for key in op.writes]
        if any(
            spec is None or key.kind == "bits" for key, spec in zip(op.writes, specs, strict=True)
        ):
            return False
        for key, spec in zip(op.writes, specs, strict=True):
            made = torch.empty(self._rows, *spec.shape, dtype=spec.dtype)
            if spec.channels_last:
                layout = {3: torch.channels_last, 4: torch.channels_last_3d}[len(spec.shape)]
                made = made.contiguous(memory_format=layout)
            env[key] = made
        return True

    def alike(self, op: Op) -> Any:
        """A key that operations share which do the same on tensors of the same shapes."""
        specs = self._specs
        reads = tuple((key.kind, specs[key.node], key in op.writes) for key in op.reads)
        writes = tuple((key.kind, specs[key.node]) for key in op.writes)
        how = (op.kind, op.gram, op.linear, op.overwrites is None)
        nodes = (op.node, *(op.norm_act.users if op.norm_act is not None else ()))
        return self._rows, *how, *map(self._description, nodes), reads, writes

    def _description(self, node: Node) -> Any:
        found = self._descriptions.get(node)
        if found is None:
            inputs = [self._specs[n] for n in self.graph.inputs[node]]
            what: Any = (node.target, fx.node.map_arg((node.args, node.kwargs), lambda n: None))
            trained: tuple[Any, ...] = ()
            if node.op == "call_module":
                module = self.graph.module(node)
                what = (type(module), repr(module))
                trained = tuple(p.requires_grad for p in module.parameters())
            if node in self.graph.norms and (conv := self.graph.convolution(node)):
                inputs += [self._specs[n] for n in self.graph.inputs[conv]]
                trained += (repr(self.graph.module(conv)),)
            found = self._descriptions[node] = repr((node.op, what, trained, inputs))
        return found


class _Alive:
    """What is in memory of one micro-batch while it goes through a pass.

    most: the most bytes, with all pieces that are kept of it.
    """

    def __init__(
        self, prices: Prices, program: Program, current: Pass, before: Iterable[Key]
    ) -> None:
        self._nbytes, self._pass, self._compile = prices.nbytes, current, prices.compile
        self._hands_on = program.sums | program.graph.identities
        self._piece = dict(current.loads)
        # Of every piece, the number of keys that still need it.
        self._users = Counter(dict.fromkeys(before, 1))
        self._users.update(current.drops.values())
        self._users.subtract(dict.fromkeys(current.drops.values(), 1))
        self._bytes = self.most = float(sum(map(prices.nbytes, self._users)))

    def run(self, op: Op, temporary: float) -> None:
        given = op.kind == "pull" and op.node in self._hands_on
        for key in op.writes:
            piece = key
            # A compiled region overwrites nothing.
            if op.overwrites is not None and not self._compile:
                piece = self._piece[op.overwrites]
            elif given and key not in op.reads:
                piece = self._piece[op.reads[0]]
            if key in self._piece and self._piece[key] != piece:
                self._release(key)
            if not self._users[piece]:
                self._bytes += self._nbytes(piece)
            self._users[piece] += 1
            self._piece[key] = piece
        self.most = max(self.most, self._bytes + temporary)
        for key in op.last:
            made = key not in self._pass.loads
            if key in self._piece and (
                key not in self._pass.keeps if made else key in self._pass.drops
            ):
                self._release(key)

    def _release(self, key: Key) -> None:
        piece = self._piece.pop(key)
        self._users[piece] -= 1
        if not self._users[piece]:
            self._bytes -= self._nbytes(piece)
