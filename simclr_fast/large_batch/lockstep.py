"""The exact gradient of a whole batch, batch normalisation included, from micro-batches.

Forward. All micro-batches (of all ranks) go through a segment of the model before any goes further.
So at each batch norm the moments of the whole batch are known: y = γ x̂ + β with x̂ = (x - μ) r and
r = (σ² + eps)^-½, where μ and σ² are merged over micro-batches and ranks. Each block's input is
stored. While a block runs, the inputs x of its batch norms are stored too. y and the values after
it are recomputed.

Backward, for the blocks in reverse order. Given μ and σ² of the forward, micro-batches do not
depend on each other. So the x of a block are recomputed one micro-batch at a time. Let g = ∂L/∂y,
and let n be the number of values per channel in the whole batch. The loss depends on x directly and
through μ and σ². With ∂σ²/∂x_i = 2 (x_i - μ) / n and ∂μ/∂x_i = 1 / n,

    ∂L/∂x_i = γ r (g_i - Σg / n - x̂_i Σ(g x̂) / n),    ∂L/∂β = Σg,    ∂L/∂γ = Σ(g x̂).

Both sums run over the whole batch. They take one pass over the micro-batches and one all-reduce.
Then the g of each micro-batch goes backward through the segment, and the gradients of parameters
add up.

Cost: every convolution runs forward twice and backward once, 4/3 of the plain work. If only every
k-th block's input is stored, the backward runs the other blocks forward once more, micro-batch by
micro-batch, and the cost is (4 + (k - 1) / k) / 3.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import Node

from simclr_fast.large_batch import global_batch_norm as gbn
from simclr_fast.large_batch.buckets import Buckets
from simclr_fast.large_batch.compiled_regions import CompiledRegions, Norm, Region, takes
from simclr_fast.large_batch.graph import Block, Graph, Segment
from simclr_fast.large_batch.malloc_trim import Heap
from simclr_fast.large_batch.offload import Arena, Stored
from simclr_fast.large_batch.outputs import refuse_other_rows
from simclr_fast.large_batch.refusals import flags

Values = dict[Node, Any]


class Lockstep:
    """Runs one model. `backward` does forward, loss and backward of a step.

    batch: the ranks whose rows form one batch. offload_gb: host memory for the inputs of the first
    blocks. keep_every: store every k-th block's input. compile: see `compiled_regions`.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: gbn.WholeBatch,
        offload_gb: float = 0,
        keep_every: int = 1,
        compile: bool = False,
    ) -> None:
        self.model, self.batch = model, batch
        self.offload_gb, self.keep_every = offload_gb, keep_every
        self.arena: Arena | None = None
        self.heap = Heap()
        self.regions = CompiledRegions() if compile else None
        self._trace()
        self.statistics: dict[Node, gbn.Statistics] = {}

    def backward(
        self,
        parts: Sequence[Tensor],
        loss_of: Callable[[Any], Any],
        autocast: Callable[[], AbstractContextManager[Any]],
        sync: bool = True,
    ) -> Any:
        """See `LargeBatch.backward`. parts: the micro-batches. autocast: makes the context in which
        the model's operations run."""
        if self.flags != flags(self.model):
            self._trace()
        self.autocast = autocast
        self.statistics = {}
        blocks = self.graph.blocks
        values, saved = self._forward(parts)
        for part, v in zip(parts, values, strict=True):
            refuse_other_rows(list(v.values()), len(part), "lockstep")
        leaves = {n: torch.cat([v[n] for v in values]) for n in self.graph.outputs}
        for leaf in leaves.values():
            leaf.requires_grad_(leaf.is_floating_point() or leaf.is_complex())
        # Clones, because loss_fn may overwrite its argument, and no leaf may be overwritten.
        result = loss_of(self.graph.rebuild({n: leaf.clone() for n, leaf in leaves.items()}))
        sizes = [len(part) for part in parts]
        gradients: list[Values] = [{} for _ in sizes]
        for node, leaf in leaves.items():
            if leaf.grad is not None:
                for g, part in zip(gradients, leaf.grad.split(sizes), strict=True):
                    g[node] = part
        del values, leaves
        buckets = Buckets([b.parameters for b in blocks], self.batch.group if sync else None)
        for i in reversed(range(len(blocks))):
            if not self.keeps(i):
                self._recompute_inputs(saved, i)
            inputs = saved.pop().take()
            if saved and self.keeps(i - 1):
                saved[-1].fetch()
            gradients = self._backward_block(blocks[i], inputs, gradients, buckets)
            buckets.reduce(i)
        buckets.finish()
        return result

    def _trace(self) -> None:
        self.graph, self.flags = Graph(self.model), flags(self.model)
        self.compiled: dict[Segment, Region] = {}
        if self.regions is not None:
            for segment in (s for block in self.graph.blocks for s in block.segments):
                if region := self.regions.of(self.graph, segment):
                    self.compiled[segment] = region

    def keeps(self, index: int) -> bool:
        """Whether the input of block `index` is stored."""
        return index % self.keep_every == 0

    @torch.no_grad()
    def _recompute_inputs(self, saved: list[Stored], index: int) -> None:
        """Recompute the input of block `index` and the missing ones before it from the last stored
        one."""
        if saved[index].tensors:
            return
        first = index - index % self.keep_every
        inputs = saved[first].take()
        saved[first] = Stored(inputs)
        made: list[list[Tensor]] = [[] for _ in range(first, index)]
        for x in inputs:
            for block, outputs in zip(self.graph.blocks[first:index], made, strict=True):
                v: Values = {block.input: x}
                for segment in block.segments:
                    self._run(segment, v)
                    for node in segment.last_use:
                        v.pop(node, None)
                (output,) = block.outputs
                x = self._value(output, v)
                outputs.append(x)
        saved[first + 1 : index + 1] = map(Stored, made)

    @torch.no_grad()
    def _forward(self, parts: Sequence[Tensor]) -> tuple[list[Values], list[Stored]]:
        """The outputs of every micro-batch, and the inputs of the blocks."""
        if self.offload_gb and self.arena is None:
            self.arena = Arena(self.offload_gb, parts[0].device)
        if self.arena is not None:
            self.arena.clear()
        values: list[Values] = [{self.graph.input: p} for p in parts]
        saved = []
        for i, block in enumerate(self.graph.blocks):
            inputs = [v[block.input] for v in values] if self.keeps(i) else []
            # The views stay in memory anyway, because the caller holds them.
            if self.arena is None or block.input is self.graph.input or not inputs:
                saved.append(Stored(inputs))
            else:
                saved.append(self.arena.store(inputs))
            del inputs
            values = self._forward_block(block, values)
        self.batch.finish_forward()
        return values, saved

    def _forward_block(self, block: Block, values: list[Values]) -> list[Values]:
        for segment in block.segments:
            moments: list[gbn.Moments] = []
            for v in values:
                self._run(segment, v)
                if segment.norm is not None:
                    x = self._value(segment.norm.all_input_nodes[0], v)
                    moments += gbn.moments(x, self.graph.module(segment.norm).eps)
                for node in segment.last_use:
                    v.pop(node, None)
            if segment.norm is not None:
                norm = self.graph.module(segment.norm)
                self.statistics[segment.norm] = gbn.global_statistics(x, moments, norm, self.batch)
        return [{n: self._value(n, v) for n in block.outputs} for v in values]

    @torch.no_grad()
    def _backward_block(
        self, block: Block, inputs: list[Tensor], gradients: list[Values], buckets: Buckets
    ) -> list[Values]:
        """Gradients of the block's input from those of its outputs."""
        values: list[Values] = [{block.input: x} for x in inputs]
        inputs.clear()
        segments = block.segments
        for v in values:
            for segment in segments if segments[-1].norm is not None else segments[:-1]:
                self._run(segment, v)
        for segment in reversed(segments):
            sums = self._norm_sums(segment, values, gradients, buckets)
            for v, g in zip(values, gradients, strict=True):
                self._backward_segment(segment, v, g, sums, buckets)
                for node in segment.writes:
                    v.pop(node, None)
        return gradients

    def _norm_sums(
        self, segment: Segment, values: list[Values], gradients: list[Values], buckets: Buckets
    ) -> Tensor | None:
        """`gbn.Sums.whole` over the whole batch, for the segment's batch norm: [2, C]."""
        if segment.norm is None or segment.norm not in gradients[0]:
            return None
        source, norm = segment.norm.all_input_nodes[0], self.graph.module(segment.norm)
        statistics = self.statistics[segment.norm]
        pairs = [
            (g[segment.norm], self._value(source, v))
            for v, g in zip(values, gradients, strict=True)
        ]
        sums = gbn.gradient_sums(pairs, statistics, norm.weight)
        # The gradients of γ and β are this rank's part. The buckets are averaged over ranks later.
        for parameter, gradient in ((norm.bias, sums.bias), (norm.weight, sums.weight)):
            if gradient is not None and parameter.requires_grad:
                buckets.add(parameter, gradient)
        if self.batch.group is not None:
            dist.all_reduce(sums.whole, group=self.batch.group)
        return sums.whole

    def _backward_segment(
        self, segment: Segment, v: Values, g: Values, sums: Tensor | None, buckets: Buckets
    ) -> None:
        """For one micro-batch, turn the gradients of the segment's outputs in `g` into those of its
        inputs."""
        region, start = self._start(segment, v)
        env = {n: _leaf(value, n is not self.graph.input) for n, value in start.items()}
        read = [n for n, leaf in env.items() if isinstance(leaf, Tensor) and leaf.requires_grad]
        wanted = [*(env[n] for n in read), *segment.parameters]
        with torch.enable_grad(), self.autocast():
            for node in segment.nodes if region is None else region.rest:
                if node is not segment.conv:
                    env[node] = self.graph.execute(node, env)
        known = self._known_gradients(segment, env, v, g, sums, buckets)
        known = [(value, gradient) for value, gradient in known if value.requires_grad]
        if not known or not wanted:
            return
        values, gradients = zip(*known, strict=True)
        found = torch.autograd.grad(values, wanted, gradients, allow_unused=True)
        for node, gradient in zip(read, found, strict=False):
            if gradient is not None:
                _add(g, node, gradient)
                self.heap.note(gradient)
        if region is not None:
            self._vjp(region, start, v, g)
        for parameter, gradient in zip(segment.parameters, found[len(read) :], strict=True):
            if gradient is not None:
                buckets.add(parameter, gradient)

    def _known_gradients(
        self,
        segment: Segment,
        env: Values,
        v: Values,
        g: Values,
        sums: Tensor | None,
        buckets: Buckets,
    ) -> list[tuple[Tensor, Tensor]]:
        """Pairs of a value that the segment made and its gradient, which is removed from `g`."""
        known = []
        if segment.norm is not None and sums is not None:
            dx = self._input_gradient(segment.norm, g.pop(segment.norm), v, sums)
            if segment.conv is None:
                _add(g, segment.norm.all_input_nodes[0], dx)
            else:
                source = env[segment.conv.all_input_nodes[0]]
                known.append((source, self._backward_conv(segment.conv, source, dx, buckets)))
        for node in segment.writes:
            if node is not segment.conv and (gradient := g.pop(node, None)) is not None:
                known.append((env[node], gradient))
        return known

    def _input_gradient(self, node: Node, dy: Tensor, v: Values, sums: Tensor) -> Tensor:
        norm, x = self.graph.module(node), self._value(node.all_input_nodes[0], v)
        compute = gbn.input_gradient if self.regions is None else self.regions.input_gradient
        return compute(dy, x, self.statistics[node], norm.weight, sums, self.batch)

    def _backward_conv(self, node: Node, source: Tensor, dx: Tensor, buckets: Buckets) -> Tensor:
        """The gradient of a convolution's input. Does not run the convolution forward again."""
        conv = self.graph.module(node)
        wanted = [p is not None and p.requires_grad for p in (source, conv.weight, conv.bias)]
        grads = torch.ops.aten.convolution_backward(
            dx,
            source.detach().to(dx.dtype),
            conv.weight.detach().to(dx.dtype),
            None if conv.bias is None else [len(conv.bias)],
            conv.stride,
            conv.padding,
            conv.dilation,
            False,
            [0] * len(conv.padding),
            conv.groups,
            wanted,
        )
        for parameter, gradient in zip((conv.weight, conv.bias), grads[1:], strict=True):
            if gradient is not None and parameter.requires_grad:
                buckets.add(parameter, gradient)
        return source if grads[0] is None else grads[0].to(source.dtype)

    def _run(self, segment: Segment, v: Values) -> None:
        """Run the segment on one micro-batch. Values that are needed later are stored in `v`."""
        region, env = self._start(segment, v)
        with self.autocast():
            for node in segment.nodes if region is None else region.rest:
                env[node] = self.graph.execute(node, env)
        for node in segment.writes:
            if not isinstance(env[node], (Tensor, int, float)):
                raise ValueError(
                    f"memory='lockstep' cannot run this model: {node} is a "
                    f"{type(env[node]).__name__} used across a batch norm; memory='replay' can"
                )
            v[node] = env[node]
            if isinstance(env[node], Tensor):
                self.heap.note(env[node])

    def _start(self, segment: Segment, v: Values) -> tuple[Region | None, Values]:
        """Run the segment's compiled region, if it has one.

        Returns:
            The region and the values that the remaining operations read. Without a region, None and
            the values that all operations read.
        """
        region = self.compiled.get(segment)
        if region is not None:
            x, norms = self._read(region, v)
            if all(map(takes, x)):
                with self.autocast():
                    made = region.forward(x, norms)
                start = dict(zip(region.outputs, made, strict=True))
                return region, start | {n: self._value(n, v) for n in region.others}
        return None, {n: self._value(n, v) for n in segment.reads}

    def _read(self, region: Region, v: Values) -> tuple[list[Any], list[Norm]]:
        """The arguments of the region for one micro-batch."""
        x, norms = [], []
        for node in region.inputs:
            if node in self.graph.norms:
                norm = self.graph.module(node)
                # Detached, because torch.compile treats the sizes of parameters as constants.
                weight, bias = (p if p is None else p.detach() for p in (norm.weight, norm.bias))
                norms.append((self.statistics[node], weight, bias))
                node = node.all_input_nodes[0]
            x.append(self._value(node, v))
        return x, norms

    def _vjp(self, region: Region, made: Values, v: Values, g: Values) -> None:
        """For one micro-batch, turn gradients of the region's outputs into those of its inputs."""
        gradients = [g.pop(n, None) for n in region.outputs]
        if all(gradient is None for gradient in gradients):
            return
        upstream = [
            torch.zeros_like(made[n]) if gradient is None else gradient
            for n, gradient in zip(region.outputs, gradients, strict=True)
        ]
        with self.autocast():
            found = region.backward(*self._read(region, v), upstream)
        for node, gradient in zip(region.inputs, found, strict=True):
            _add(g, node, gradient)

    def _value(self, node: Node, v: Values) -> Any:
        if node not in self.graph.norms:
            return v[node]
        norm, x = self.graph.module(node), self._value(node.all_input_nodes[0], v)
        return gbn.normalize(x, self.statistics[node], norm.weight, norm.bias)


def _leaf(value: Any, needs_grad: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(needs_grad and value.is_floating_point())


def _add(g: Values, node: Node, gradient: Tensor) -> None:
    # Out of place, because autograd may return the same tensor for two inputs.
    g[node] = g[node] + gradient if node in g else gradient
