"""The exact gradient of a whole batch, batch normalisation included, from micro-batches.

Forward. Micro-batches meet only in the statistics of batch norms: y = γ x̂ + β with x̂ = (x - μ) r
and r = (σ² + eps)^-½, where μ and σ² are those of all micro-batches and ranks. So the model is run
in passes over the micro-batches. A pass makes the inputs x of the next batch norms, and adds up
their moments. At its end μ and σ² are known, and the next pass can go further.

Once the statistics are known, every value of a micro-batch is a function of its views, of the
parameters and of the statistics. It does not matter which values are kept and which are made again.
A schedule chooses: values that are small, or that cost much to make, are kept, and each operation
asks for the values it needs. `program` writes down what follows from a schedule.

Backward. Let g = ∂L/∂y, and let n be the number of values per channel in the whole batch. The loss
depends on x directly and through μ and σ². With ∂σ²/∂x_i = 2 (x_i - μ) / n and ∂μ/∂x_i = 1 / n,

    ∂L/∂x_i = γ r (g_i - Σg / n - x̂_i Σ(g x̂) / n),    ∂L/∂β = Σg,    ∂L/∂γ = Σ(g x̂).

Both sums run over the whole batch. A pass turns the gradients of the outputs of some batch norms
into those of earlier batch norms, and adds up the sums of the latter. So there is a pass per batch
norm in each direction, and between two passes one gradient per open branch is kept.

The gradient of a convolution's weight W is linear in that of its output: ∂L/∂W = D(∂L/∂x) with some
linear D. So a pass can add up D(g), D(1) and D(x - μ) before the sums are known:

    ∂L/∂W = γ r (D(g) - Σg / n D(1) - r Σ(g x̂) / n D(x - μ)).

For the first convolution, whose input needs no gradient, this saves a pass.
"""

import math
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map

from simclr_fast.large_batch import global_batch_norm as gbn
from simclr_fast.large_batch import pointwise
from simclr_fast.large_batch.bits import pack, unpack
from simclr_fast.large_batch.buckets import Buckets
from simclr_fast.large_batch.compiled_regions import CompiledRegions, Region, takes
from simclr_fast.large_batch.gram import Gram
from simclr_fast.large_batch.graph import TRIED_ROWS, Graph, Key
from simclr_fast.large_batch.norm_acts import NormAct
from simclr_fast.large_batch.outputs import refuse_other_rows
from simclr_fast.large_batch.program import Op, Pass, Program
from simclr_fast.large_batch.refusals import flags, refusal
from simclr_fast.large_batch.schedule import Schedule, Stage
from simclr_fast.large_batch.store import HostMemory, Store, accesses, piece_bytes, sweep
from simclr_fast.large_batch.transfers import transfers

aten = torch.ops.aten
Env = dict[Key, Any]


class Lockstep:
    """Runs one model. `backward` does forward, loss and backward of a step.

    batch: the ranks whose rows form one batch. schedule: gives what is kept in a step, for the
    model's `Graph`. compile: see `compiled_regions`.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: gbn.WholeBatch,
        schedule: Callable[[Graph], Schedule],
        compile: bool = False,
    ) -> None:
        self._begin(model, batch, schedule, compile)
        self.look()

    def _begin(
        self,
        model: nn.Module,
        batch: gbn.WholeBatch,
        schedule: Callable[[Graph], Schedule],
        compile: bool,
    ) -> None:
        self.model, self.batch, self.schedule = model, batch, schedule
        self.regions = CompiledRegions() if compile else None
        self.flags: Any = None
        self.program: Program | None = None
        self.store = Store(torch.device("cpu"))
        # What the program and the moves of the store were made for.
        self._kind: Any = None
        self._moved: Any = None
        # The graph that was found to keep the rows apart.
        self._tried: Graph | None = None

    def backward(
        self,
        parts: Sequence[Tensor],
        loss_of: Callable[[Any], Any],
        autocast: Callable[[], AbstractContextManager[Any]],
        sync: bool = True,
    ) -> Any:
        """See `LargeBatch.backward`. parts: the micro-batches. autocast: makes the context in which
        the model's operations run."""
        self.look()
        self.autocast, kind = autocast, self.device(parts[0]).type
        with autocast():
            enabled = torch.is_autocast_enabled(kind)
            self.low = torch.get_autocast_dtype(kind) if enabled else None
        if not enabled:
            # Cheaper, in front of every operation on every micro-batch.
            self.autocast = nullcontext
        program = self._program(parts[0])
        self._open_store(program, parts)
        self.statistics: dict[Node, gbn.Statistics] = {}
        self.norms: dict[Node, tuple[Any, ...]] = {}
        self.grams: dict[Node, Gram] = {}
        self.whole_sums: dict[Node, Tensor] = {}
        self.casts: dict[tuple[nn.Parameter, torch.dtype], Tensor] = {}
        self.factors: dict[Node, Sequence[Tensor]] = {}
        self._draw(program, parts)
        if self.low is not None:
            for conv in map(self.graph.module, self.graph.convolutions):
                self._cast(conv.weight, self.low)
        self.outputs: dict[Node, list[Any]] = {n: [None] * len(parts) for n in self.graph.outputs}
        self.buckets: Buckets | None = None
        try:
            for number, current in enumerate(program.passes):
                if current.phase == "backward" and self.buckets is None:
                    result = self._loss(parts, loss_of)
                    lists = [b.parameters for b in self.graph.blocks]
                    self.buckets = Buckets(lists, self.batch.group if sync else None)
                self._run_pass(number, current, parts)
                if self.buckets is not None:
                    for index in program.finished(number):
                        self.buckets.reduce(index)
            assert self.buckets is not None
            self.buckets.finish()
        finally:
            # Also after an error: what a step holds is most of the memory.
            self.grams, self.statistics, self.outputs, self.casts = {}, {}, {}, {}
            self.whole_sums, self.norms, self.factors, self.buckets = {}, {}, {}, None
            self.store.end()
        return result

    def _draw(self, program: Program, parts: Sequence[Tensor]) -> None:
        """The factors of every drop path, in micro-batches."""
        sizes = [len(part) for part in parts]
        for node, found in self.graph.drop_paths.items():
            spec = program.specs[node]
            assert spec is not None
            dims = 1 + len(spec.shape)
            factors = found.draw(sum(sizes), dims, spec.dtype, self.device(parts[0]))
            self.factors[node] = factors.split(sizes)

    def _open_store(self, program: Program, parts: Sequence[Tensor]) -> None:
        """Decide which pieces move to host memory and back, and prepare the store for it."""
        device = self.device(parts[0])
        views = parts[0].device != device
        schedule, rows = program.schedule, tuple(map(len, parts))
        key = (program, rows, views)
        if self._moved != key:
            limit = math.inf if schedule.device_bytes is None else schedule.device_bytes
            given = [
                ((program.graph.values[program.graph.input], m), part.nbytes)
                for m, part in enumerate(parts if views else ())
            ]
            found = transfers(accesses(program, rows, views), limit, schedule.host_bytes, given)
            if found is None:
                raise ValueError(
                    f"device_bytes {schedule.device_bytes} and host_bytes {schedule.host_bytes} "
                    "do not suffice for the schedule"
                )
            self._moved, self._moves = key, found
        if self.store.device != device:
            self.store = Store(device)
        host = self.store.host
        if self._moves.host_peak > (0 if host is None else host.capacity):
            self.store.host = None
            self.store.host = HostMemory(self._moves.host_peak, device.type == "cuda")
        view = program.graph.values[program.graph.input]
        self.store.begin(self._moves, {(view, m): p for m, p in enumerate(parts) if views})

    def look(self) -> Any:
        """Look at the model, and trace it again if it has changed; return what it was seen as."""
        if self.flags != (found := flags(self.model)):
            self._trace(found)
        return self.flags

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: vars(self)[name] for name in ("model", "batch", "schedule")}
        return kept | {"compile": self.regions is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy traces its own model, in its first step.
        self._begin(**state)

    def _trace(self, found: Any) -> None:
        self.graph, self.flags = Graph(self.model), found
        self.program = None

    def device(self, x: Tensor) -> torch.device:
        """The device of the model. x: views, for a model without parameters."""
        return next(self.model.parameters(), x).device

    def generous(
        self,
        x: Tensor,
        rows: int,
        micro_batch: int,
        limit: float,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> Schedule | None:
        """The schedule that makes nothing costly twice, if it certainly fits into `limit` bytes.

        x: some views. rows: of the rank with the most. So small batches need no planner.
        """
        self.look()
        with autocast():
            specs = self.graph.measure(x[:2].to(self.device(x)))
        stage = Stage(len(self.graph.blocks), output="kept", inner="kept", wide="kept")
        schedule = Schedule(micro_batch, (stage,))
        per_row = sum(
            piece_bytes(self.graph.values[node], spec, 1) for node, spec in specs.items() if spec
        )
        # As if nothing were freed, with gradients as large as the values.
        return schedule if 2 * per_row * (rows + micro_batch) <= limit else None

    def refuse_mixed_rows(
        self, x: Tensor, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        """Refuse a model whose output for a view depends on other views. Tries each graph once.

        x: some views. autocast: as for `backward`.
        """
        if self._tried is not self.graph:
            with autocast():
                self.graph.refuse_mixed_rows(x[:TRIED_ROWS].to(self.device(x)))
            self._tried = self.graph

    def _program(self, x: Tensor) -> Program:
        schedule = self.schedule(self.graph)
        kind = (schedule, x.shape[1:], x.dtype, self.low)
        if self.program is None or self._kind != kind:
            with self.autocast():
                specs = self.graph.measure(x[:2].to(self.device(x)))
            for node in self.graph.outputs:
                if specs[node] is None:
                    raise refusal(f"{node.format_node()} is an output and no tensor")
            self.refuse_mixed_rows(x, self.autocast)
            self.program = Program(self.graph, schedule, specs)
            self._kind = kind
            self.steps: list[Sequence[Op | Region]] = [p.ops for p in self.program.passes]
            if self.regions is not None:
                self.steps = [
                    self.regions.steps(self.program, current) for current in self.program.passes
                ]
        return self.program

    def _loss(self, parts: Sequence[Tensor], loss_of: Callable[[Any], Any]) -> Any:
        """The result of the loss. The gradients of the outputs become kept values."""
        self.batch.finish_forward()
        for m, part in enumerate(parts):
            made = [outputs[m] for outputs in self.outputs.values()]
            refuse_other_rows(made, len(part), "lockstep")
        leaves = {n: torch.cat(made) for n, made in self.outputs.items()}
        self.outputs = {}
        for leaf in leaves.values():
            leaf.requires_grad_(leaf.is_floating_point() or leaf.is_complex())
        # Clones, because loss_fn may overwrite its argument, and no leaf may be overwritten.
        result = loss_of(self.graph.rebuild({n: leaf.clone() for n, leaf in leaves.items()}))
        sizes = [len(part) for part in parts]
        for node, leaf in leaves.items():
            of_parts = [None] * len(sizes) if leaf.grad is None else leaf.grad.split(sizes)
            for m, gradient in enumerate(of_parts):
                self.store.put((self.graph.gradients[node], m), gradient)
        return result

    @torch.no_grad()
    def _run_pass(self, number: int, current: Pass, parts: Sequence[Tensor]) -> None:
        self.moments: dict[Node, list[gbn.Moments]] = {}
        self.sums: dict[Node, list[gbn.Sums]] = {}
        self.linear: dict[Node, _Linear] = {}
        for i, m in enumerate(sweep(number, len(parts))):
            self.store.enter(number * len(parts) + i)
            env, self.current = _MicroBatch(self.store, current, m), m
            if parts[m].device == self.store.device:
                env.values[self.graph.values[self.graph.input]] = parts[m]
            for op in self.steps[number]:
                for key in op.reads:
                    env.load(key)
                if isinstance(op, Region):
                    self._run_region(op, env.values)
                else:
                    self.run(op, env.values)
                for key in op.last:
                    env.leave(key)
            if current.phase == "outputs":
                for node, made in self.outputs.items():
                    key = self.graph.values[node]
                    env.load(key)
                    made[m] = env.values[key]
                    env.leave(key)
        for op in current.ops:
            if op.kind == "see":
                self._finish_statistics(op)
            elif op.kind == "sum":
                self._finish_sums(op)
            elif op.kind == "pull_norm":
                self.grams.pop(op.node, None)

    def _run_region(self, region: Region, env: Env) -> None:
        assert self.regions is not None
        x = [env[key] for key in region.reads]
        if all(map(takes, x)):
            norms = [self._norm(node) for node in region.norms]
            with self.autocast():
                env.update(zip(region.writes, self.regions.run(region, x, norms), strict=True))
            return
        made = dict(env)
        for op in region.ops:
            self.run(op, made)
        env.update((key, made[key]) for key in region.writes)

    def _norm(self, node: Node) -> tuple[Any, ...]:
        """What `gbn.normalize` takes after x."""
        if node not in self.norms:
            norm = self.graph.module(node)
            # Detached, because torch.compile treats the sizes of parameters as constants.
            weight, bias = (p if p is None else p.detach() for p in (norm.weight, norm.bias))
            self.norms[node] = self.statistics[node], weight, bias
        return self.norms[node]

    def run(self, op: Op, env: Env) -> None:
        """Execute one operation on one micro-batch. It reads `env` and writes into it."""
        if op.norm_act is not None:
            env[op.writes[0]] = self._norm_act(op, op.norm_act, env)
        elif op.overwrites is not None:
            t = env[op.overwrites]
            others = [env[key] for key in op.reads if key != op.overwrites]
            env[op.writes[0]] = t.add_(*others) if others else t.relu_()
        elif op.kind == "make":
            env[op.writes[0]] = self._value(op.node, env)
        elif op.kind == "bits":
            env[op.writes[0]] = pack(env[op.reads[0]], self._layout(op.node))
        elif op.kind == "see":
            self._see(op, env)
        elif (gradient := env.get(op.reads[0])) is None:
            for key in op.writes:
                env.setdefault(key, None)
        elif op.kind == "sum":
            self._add_sums(op, gradient, env)
        elif op.kind == "pull_norm":
            self._pull_norm(op, gradient, env)
        else:
            self._pull(op, gradient, env)

    # The forward.

    def _norm_act(self, op: Op, found: NormAct, env: Env) -> Tensor:
        norms = [self._norm(n) if n in self.graph.norms else None for n in found.users]
        place = None if op.overwrites is None else op.reads.index(op.overwrites)
        return gbn.norm_act([env[key] for key in op.reads], norms, found.relu, place)

    def _value(self, node: Node, env: Env) -> Any:
        read = {n: env[self.graph.values[n]] for n in self.graph.inputs[node]}
        if node in self.factors:
            (x,) = read.values()
            return x * self.factors[node][self.current]
        if node in self.graph.convolutions:
            (x,), conv = read.values(), self.graph.module(node)
            dtype = self._conv_dtype(x)
            weight, bias = (self._cast(p, dtype) for p in (conv.weight, conv.bias))
            x = x.to(dtype)
            if pointwise.is_product(conv, x):
                return pointwise.forward(x, weight, bias)
            return conv._conv_forward(x, weight, bias)
        with self.autocast():
            return self.graph.execute(node, read)

    def _cast(self, parameter: Any, dtype: torch.dtype) -> Any:
        """A parameter in `dtype`, which is made once per step, not once per micro-batch."""
        if parameter is None or parameter.dtype is dtype:
            return parameter
        if (parameter, dtype) not in self.casts:
            self.casts[parameter, dtype] = parameter.detach().to(dtype)
        return self.casts[parameter, dtype]

    def _see(self, op: Op, env: Env) -> None:
        norm, x = self.graph.module(op.node), env[op.reads[0]]
        if not op.gram:
            self.moments.setdefault(op.node, []).extend(gbn.moments(x, norm.eps))
            self.example = x[:0]
            return
        if op.node not in self.grams:
            conv = self.graph.module(op.node.all_input_nodes[0])
            self.grams[op.node] = Gram(conv, norm, self._conv_dtype(x))
        self.grams[op.node].see(x)

    def _conv_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype in which a convolution of x computes."""
        lowers = x.is_floating_point() and x.dtype is not torch.float64
        return self.low if lowers and self.low is not None else x.dtype

    def _finish_statistics(self, op: Op) -> None:
        norm = self.graph.module(op.node)
        if op.gram:
            gram = self.grams[op.node]
            dtype = torch.promote_types(gram.dtype, torch.float32)
            found = gbn.statistics_of_row(gram.row(), gram.n, dtype, norm, self.batch)
        else:
            moments = self.moments.pop(op.node)
            found = gbn.global_statistics(self.example, moments, norm, self.batch)
        self.statistics[op.node] = found

    # The backward.

    def _add_sums(self, op: Op, gradient: Tensor, env: Env) -> None:
        """Add a micro-batch to the sums of a batch norm."""
        x, s = env[op.reads[1]], self.statistics[op.node]
        if op.gram:
            self.grams[op.node].add_gradient(gradient, x)
            self.sums.setdefault(op.node, [])
            return
        self.sums.setdefault(op.node, []).append(gbn.gradient_sums([(gradient, x)], s, None))
        if op.linear:
            if op.node not in self.linear:
                conv = self.graph.module(op.node.all_input_nodes[0])
                self.linear[op.node] = _Linear(conv)
            weight = self._cast(self.linear[op.node].conv.weight, x.dtype)
            self.linear[op.node].add(gradient, x, env[op.reads[2]], weight, s)

    def _finish_sums(self, op: Op) -> None:
        if op.node not in self.sums:
            return
        norm, s = self.graph.module(op.node), self.statistics[op.node]
        if op.gram:
            whole = self.grams[op.node].own_sums(s)
            sums = gbn.Sums(whole, whole[1], whole[0])
        else:
            sums = gbn.join_sums(self.sums[op.node], s, norm.weight)
            whole = sums.whole
        # The gradients of parameters are this rank's part, so they are taken before `whole` becomes
        # that of all ranks. The buckets are averaged later.
        self._add_parameters((norm.weight, norm.bias), (sums.weight, sums.bias))
        if self.batch.group is not None:
            dist.all_reduce(whole, group=self.batch.group)
        self.whole_sums[op.node] = whole
        if op.gram:
            gram = self.grams[op.node]
            self._add_parameters((gram.conv.weight, gram.conv.bias), gram.finish(s, whole))
        elif op.linear:
            linear = self.linear[op.node]
            found = linear.finish(s, whole, norm.weight)
            self._add_parameters((linear.conv.weight, linear.conv.bias), found)

    def _add_parameters(self, parameters: Sequence[Any], gradients: Sequence[Any]) -> None:
        assert self.buckets is not None
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if parameter is not None and gradient is not None and parameter.requires_grad:
                self.buckets.add(parameter, gradient)

    def _pull_norm(self, op: Op, gradient: Tensor, env: Env) -> None:
        x, norm = env[op.reads[1]], self.graph.module(op.node)
        if op.gram:
            dx = self.grams[op.node].input_gradient(gradient, x)
        else:
            s, sums = self.statistics[op.node], self.whole_sums[op.node]
            compute = gbn if self.regions is None else self.regions
            dx = compute.input_gradient(gradient, x, s, norm.weight, sums, self.batch, op.spare)
        _add(env, op.writes[0], dx, fresh=True)

    def _pull(self, op: Op, gradient: Any, env: Env) -> None:
        node, program = op.node, self.program
        assert program is not None
        if node in self.graph.relus:
            kind = op.reads[1].kind
            other = env[op.reads[1]]
            if kind == "bits":
                dx = gradient * unpack(other, gradient.shape, self._layout(node))
            elif op.spare:
                dx = aten.threshold_backward(gradient, other, 0, grad_input=gradient)
            else:
                dx = aten.threshold_backward(gradient, other, 0)
            _add(env, op.writes[0], dx, fresh=True)
        elif node in program.sums or node in self.graph.identities:
            for key in op.writes:
                _add(env, key, gradient)
        elif node in self.factors:
            _add(env, op.writes[0], gradient * self.factors[node][self.current], fresh=True)
        elif node in self.graph.convolutions:
            self._pull_convolution(op, gradient, env)
        else:
            self._pull_any(op, gradient, env)

    def _pull_convolution(self, op: Op, gradient: Tensor, env: Env) -> None:
        """The gradients of a convolution, without its forward."""
        conv, program = self.graph.module(op.node), self.program
        assert program is not None
        (source,) = self.graph.inputs[op.node]
        spec = program.specs[source]
        assert spec is not None
        x = env.get(Key("value", source))
        if x is None:
            # Only its shape and layout are read.
            x = gradient.new_empty(len(gradient), *spec.shape)
            x = x.contiguous(memory_format=self._layout(source))
        trains = [p is not None and p.requires_grad for p in (conv.weight, conv.bias)]
        wanted = [bool(op.writes), *(t and not op.linear for t in trains)]
        weight = self._cast(conv.weight, gradient.dtype)
        x = x.to(gradient.dtype)
        pull = pointwise.backward if pointwise.is_product(conv, x) else _convolution_backward
        dx, *found = pull(conv, gradient, x, weight, wanted)
        self._add_parameters((conv.weight, conv.bias), found)
        if op.writes:
            _add(env, op.writes[0], dx.to(spec.dtype), fresh=True)

    def _pull_any(self, op: Op, gradient: Any, env: Env) -> None:
        """The gradients of any operation, by torch's autograd."""
        node, program = op.node, self.program
        assert program is not None
        read = {n: env[Key("value", n)] for n in self.graph.inputs[node]}
        source = next(iter(read.values()), None)
        if node.target in (operator.getitem, getattr) and not isinstance(source, Tensor):
            (key,) = op.writes
            _add_parts(env, key, _parts_of(source, node.args[1], gradient))
            return
        wanted_nodes = {key.node for key in op.writes}
        leaves = {
            n: tree_map(partial(_leaf, needs_grad=n in wanted_nodes), value)
            for n, value in read.items()
        }
        parameters = self.graph.parameters[node]
        with torch.enable_grad(), self.autocast():
            made = self.graph.execute(node, leaves)
        if isinstance(gradient, dict):
            pairs = [(made[i], g) for i, g in gradient.items()]
        else:
            pairs = [(made, gradient)]
        pairs = [(value, g) for value, g in pairs if value.requires_grad]
        inputs = [leaves[key.node] for key in op.writes]
        if not pairs:
            for key in op.writes:
                _add(env, key, None)
            return
        # An operation may take a tuple of tensors, such as those of split.
        differentiable = [
            t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.requires_grad
        ]
        values, gradients = zip(*pairs, strict=True)
        given = torch.autograd.grad(
            values, [*differentiable, *parameters], gradients, allow_unused=True
        )
        of = dict(zip(map(id, differentiable), given, strict=False))
        for key, value in zip(op.writes, inputs, strict=True):
            if not isinstance(value, tuple | list):
                _add(env, key, of.get(id(value)))
            else:
                _add_parts(env, key, {i: of[id(t)] for i, t in enumerate(value) if id(t) in of})
        self._add_parameters(parameters, given[len(differentiable) :])

    def _layout(self, node: Node) -> torch.memory_format:
        """The layout of a node's value."""
        assert self.program is not None
        spec = self.program.specs[node]
        if spec is None or not spec.channels_last:
            return torch.contiguous_format
        return torch.channels_last if len(spec.shape) == 3 else torch.channels_last_3d


class _MicroBatch:
    """The values of one micro-batch in one pass."""

    def __init__(self, store: Store, current: Pass, m: int) -> None:
        self.store, self.current, self.m = store, current, m
        self.values: Env = {}
        self.to_drop = dict(current.drops)

    def load(self, key: Key) -> None:
        """Take a kept value from the store, unless it is there."""
        if key in self.values:
            return
        piece = self.current.loads.get(key, key)
        self.values[key] = self.store.get((piece, self.m))
        if self.to_drop.pop(key, None) is None:
            return
        if piece in self.current.frees and piece not in self.to_drop.values():
            self.store.drop((piece, self.m))

    def leave(self, key: Key) -> None:
        """No operation of this pass needs `key` any more: keep it for later passes, or not."""
        value = self.values.pop(key)
        piece = self.current.keeps.get(key)
        if piece is not None and not self.store.has((piece, self.m)):
            self.store.put((piece, self.m), value)


class _Linear:
    """The weight gradient of a convolution before a batch norm, added up before the sums of the
    norm are known."""

    def __init__(self, conv: Any) -> None:
        self.conv = conv
        self.parts: list[Tensor] | None = None
        self.n = 0

    def add(
        self, gradient: Tensor, x: Tensor, source: Tensor, weight: Tensor, s: gbn.Statistics
    ) -> None:
        centred = x - s.mean.view(-1, *[1] * (x.dim() - 2)).to(x.dtype)
        ones = x.new_ones(len(x), self.conv.groups, *x.shape[2:])
        made = [
            _convolution_backward(self.conv, g, source, weight, [False, True, False])[1]
            for g in (gradient, centred)
        ]
        # One channel per group, as all of a group are alike.
        first = weight[: self.conv.groups]
        made.append(_convolution_backward(self.conv, ones, source, first, [False, True, False])[1])
        wide = gbn.wide_dtype(x)
        if self.conv.bias is not None:
            axes = [0, *range(2, x.dim())]
            made += [t.sum(axes, dtype=wide) for t in (gradient, centred)]
        self.n += x.numel() // x.size(1)
        made = [t.to(wide) for t in made]
        if self.parts is None:
            self.parts = made
        else:
            torch._foreach_add_(self.parts, made)

    def finish(
        self, s: gbn.Statistics, whole: Tensor, gamma: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """This rank's gradients of weight and bias. whole: `Sums.whole` of all ranks."""
        assert self.parts is not None
        of_gradient, of_x, of_ones = self.parts[:3]
        n = max(s.n, 1)
        scale = s.inverse if gamma is None else s.inverse * gamma.detach()
        mean, slope = whole[0] / n, s.inverse * gbn.slope(whole, s) / n

        def along(t: Tensor) -> Tensor:
            return t.view(-1, *[1] * (of_gradient.dim() - 1))

        of_ones = of_ones.repeat_interleave(len(of_gradient) // len(of_ones), 0)
        weight = along(scale) * (of_gradient - along(mean) * of_ones - along(slope) * of_x)
        if len(self.parts) == 3:
            return weight, None
        gradient_sum, x_sum = self.parts[3:]
        return weight, scale * (gradient_sum - mean * self.n - slope * x_sum)


def _convolution_backward(
    conv: Any, gradient: Tensor, source: Tensor, weight: Tensor, wanted: list[bool]
) -> tuple[Any, ...]:
    """torch's gradients of input, weight and bias. weight: in the dtype of `gradient`."""
    found: tuple[Any, ...] = aten.convolution_backward(
        gradient,
        source,
        weight.detach(),
        None if conv.bias is None else [len(conv.bias)],
        conv.stride,
        conv.padding,
        conv.dilation,
        False,
        [0] * len(conv.padding),
        conv.groups,
        wanted,
    )
    return found


def _leaf(value: Any, needs_grad: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(needs_grad and value.is_floating_point())


def _parts_of(source: Any, place: Any, gradient: Any) -> dict[int, Any]:
    """The gradient of a tuple, as a dict of those of its parts, from that of what was taken of it.

    place: an index, a slice, or a name as in torch.sort(x).values. Of a slice, the gradient is such
    a dict as well.
    """
    if isinstance(place, slice):
        numbers = range(len(source))[place]
        return {numbers[i]: part for i, part in gradient.items()}
    if isinstance(place, str):
        taken = getattr(source, place)
        place = next(i for i, part in enumerate(source) if part is taken)
    return {place % len(source): gradient}


def _add_parts(env: Env, key: Key, parts: dict[int, Any]) -> None:
    """Add to the gradient of a tuple, which is a dict of those of its parts."""
    found = dict(env.get(key) or {})
    for i, part in parts.items():
        if part is not None:
            found[i] = found[i] + part if i in found else part
    env[key] = found or None


def _add(env: Env, key: Key, gradient: Any, *, fresh: bool = False) -> None:
    """Add to a gradient. fresh: nothing else uses the memory of `gradient`."""
    before = env.get(key)
    if before is None or gradient is None:
        env[key] = before if gradient is None else gradient
    elif fresh:
        env[key] = gradient.add_(before)
    else:
        # Out of place, because autograd may return the same tensor for two inputs.
        env[key] = before + gradient
