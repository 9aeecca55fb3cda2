"""Watch training steps through torch's hooks, without changing what they compute.

Seen are: calls of modules (hooks on all modules, also those outside of the model, such as the
loss), backward passes (torch.autograd.backward is replaced, and `Tensor.backward` calls it), and
optimizer steps (hooks on all optimizers). Embeddings are the outputs of modules that are nearest
to the loss in its graph.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as optim

from simclr_fast.doctor.image_calls import ImageCalls, Opened
from simclr_fast.doctor.lars_trial import Trial, try_lars
from simclr_fast.doctor.loss_graph import (
    Edge,
    LossGraph,
    edge_of,
    parameters_below,
    read_graph,
)
from simclr_fast.doctor.snapshot import Snapshot
from simclr_fast.doctor.views import Pictures, describe, prints
from simclr_fast.large_batch import LargeBatch

# Steps whose backward passes are recorded in full.
_FULL = 2
# Parameters whose gradients are compared between ranks.
_SAMPLES = 3
# Calls whose features h are kept.
_FEATURES = 7
# Outputs without a gradient, such as those of an evaluation, are dropped beyond this number.
_OUTPUTS = 512
_BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass
class Output:
    """A matrix [rows, features] that a module returned.

    name: of the module, or "" for a leaf of the graph that no module returned. reached: whether it
    is in the graph of the loss. grad: dL/d(value) then. used: whether a loss had reached it before.
    """

    name: str
    value: Tensor
    reached: bool = False
    grad: Tensor | None = None
    used: bool = False


@dataclass
class Head:
    """The outputs of one module since the last backward pass, in the order of its calls.

    parameters: ids of those that the loss can train through it.
    """

    outputs: list[Output]
    parameters: set[int] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.outputs[0].name


@dataclass
class Backward:
    """One backward pass from a scalar.

    calls: the number of images in each call of the model. prints: of the images, int64. h: the
    features before the head, one tensor per call. stale: the norm of gradients left over from
    before an optimizer step.
    """

    step: int
    value: float
    heads: list[Head]
    graph: LossGraph
    calls: list[int]
    prints: Tensor | None
    pictures: Pictures | None
    h: list[Tensor]
    stale: float


@dataclass
class NormCalls:
    """Calls of one batch norm in steps with a gradient."""

    training: int = 0
    evaluated: int = 0
    repeated: int = 0
    # Whether its statistics are those of its own input; None if that is unknown.
    local: bool | None = None


@dataclass
class Stepped:
    """An optimizer. fresh: it had no state before its first step here. lr: of group 0, per step."""

    optimizer: Optimizer
    fresh: bool
    trials: list[Trial]
    lr: list[float] = field(default_factory=list)


@dataclass
class Sample:
    """A parameter's gradient in the first step, for comparison over ranks.

    own: the sum of what this rank computed. after_backward, at_end: .grad after the last backward
    pass and at the end of the step.
    """

    parameter: Tensor
    clean: bool
    own: Tensor | None = None
    after_backward: Tensor | None = None
    at_end: Tensor | None = None


class Observer:
    """What was seen of the steps."""

    def __init__(self, model: nn.Module, snapshot: Snapshot | None = None) -> None:
        self.model, self.snapshot = model, snapshot
        self.backwards: list[Backward] = []
        self.last: Backward | None = None
        self.values: list[float] = []
        self.passes = 0
        self.steps = 0
        self.norms: dict[nn.Module, NormCalls] = {}
        self.optimizers: dict[Optimizer, Stepped] = {}
        self.without_grad: set[str] = set()
        self.with_grad: set[str] = set()
        self.not_finite: list[str] = []
        self.samples: list[Sample] = []
        self.temperatures: list[float] = []
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self._names = {module: name for name, module in model.named_modules()}
        self._own = {id(p) for p in model.parameters()}
        self._running: list[Opened] = []
        self._outputs: list[Output] = []
        self._edges: dict[Edge, Output] = {}
        self._images = ImageCalls()
        # What LargeBatch.backward was given. In some modes it runs the model in parts and gives the
        # loss new tensors, so that no call of a module shows whose images its rows are of.
        self._batch: list[Tensor] = []
        self._h: list[Tensor] = []
        self._consumed = False
        self._deep = False
        self._before: dict[nn.Module, Tensor] = {}
        self._stepped: set[int] = set()
        self._busy = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The context in which steps are seen."""
        modules = nn.modules.module
        with ExitStack() as stack:
            for handle in (
                modules.register_module_forward_pre_hook(self._before_module),
                modules.register_module_forward_hook(self._after_module),
                optim.register_optimizer_step_pre_hook(self._before_step),
                optim.register_optimizer_step_post_hook(self._after_step),
            ):
                stack.callback(handle.remove)
            original = torch.autograd.backward

            def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
                root = _scalar(tensors, grad_tensors)
                if root is None or self._in_backward():
                    original(tensors, grad_tensors, *args, **kwargs)
                    return
                seen, handles = self._before_backward(root)
                try:
                    original(tensors, grad_tensors, *args, **kwargs)
                finally:
                    for handle in handles:
                        handle.remove()
                self._after_backward(seen)

            torch.autograd.backward = backward
            stack.callback(setattr, torch.autograd, "backward", original)
            of_large_batch = LargeBatch.backward

            def backward_of(step: LargeBatch, views: Any, *args: Any, **kwargs: Any) -> Any:
                self._batch = [part.detach() for part in tensors_in(views)]
                try:
                    return of_large_batch(step, views, *args, **kwargs)
                finally:
                    self._batch = []

            LargeBatch.backward = backward_of  # type: ignore[method-assign, assignment]
            stack.callback(setattr, LargeBatch, "backward", of_large_batch)
            yield
        self.end_step()

    # Modules

    @staticmethod
    def _in_backward() -> bool:
        return torch._C._current_graph_task_id() != -1

    def _before_module(self, module: nn.Module, inputs: Any) -> None:
        # While torch.compile traces, a hook would become a part of the graph.
        if torch.compiler.is_compiling() or self._busy:
            return
        if self.snapshot is not None:
            self.snapshot.add_module(module)
        given = [t for t in tensors_in(inputs) if t.is_floating_point()]
        opened = Opened(module, len(self._outputs))
        if given and not self._in_backward():
            if self._consumed:
                self._images.clear()
                self._h, self._consumed = [], False
            self._images.see(self._running, opened, given)
            self._see_features(given[0])
        self._running.append(opened)
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            self._before[module] = module.running_mean.clone()

    def _see_features(self, x: Tensor) -> None:
        """Keep x as h if it is the first matrix that a module gets after deeper tensors."""
        if x.dim() > 2:
            self._deep = True
        elif x.dim() == 2 and self._deep:
            self._deep = False
            # Without a gradient, these would be the flattened images.
            if x.requires_grad or not torch.is_grad_enabled():
                self._h = [*self._h[-_FEATURES:], x]

    def _after_module(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or self._busy:
            return
        start = 0
        while self._running:
            opened = self._running.pop()
            start = opened.outputs
            if opened.module is module:
                break
        if isinstance(module, _BatchNorm):
            self._see_norm(module, tensors_in(inputs)[0])
        if self._in_backward():
            return
        returned = tensors_in(output)
        if returned and returned[0].dim() == 0 and any(t.requires_grad for t in tensors_in(inputs)):
            # A loss. What its parts returned are no embeddings.
            del self._outputs[start:]
            temperature = getattr(module, "temperature", None)
            if isinstance(temperature, float) and temperature not in self.temperatures:
                self.temperatures.append(temperature)
            return
        if next(module.parameters(), None) is None:
            return
        for value in returned:
            if value.dim() == 2 and value.is_floating_point():
                self._add_output(module, value)

    def _add_output(self, module: nn.Module, value: Tensor) -> None:
        edge = edge_of(value)
        if edge in self._edges:
            return
        output = Output(self._name(module), value)
        self._outputs.append(output)
        if len(self._outputs) > _OUTPUTS and self._outputs[0].value.grad_fn is None:
            del self._outputs[0]
        if value.grad_fn is not None:
            self._edges[edge] = output

    def _see_norm(self, norm: Any, x: Tensor) -> None:
        calls = self.norms.setdefault(norm, NormCalls())
        mean, before = norm.running_mean, self._before.pop(norm, None)
        updated = before is not None and not before.equal(mean)
        if self._in_backward():
            calls.repeated += int(updated)
        elif norm.training or mean is None:
            calls.training += 1
            if calls.local is None and before is not None and updated and norm.momentum:
                calls.local = _is_local(x, before, mean, norm.momentum)
        elif torch.is_grad_enabled():
            calls.evaluated += 1

    def _name(self, module: nn.Module) -> str:
        return self._names.get(module) or type(module).__name__

    # Backward passes

    def _before_backward(self, root: Tensor) -> tuple[Backward | None, list[Any]]:
        full = self.steps < _FULL
        self.passes += 1
        graph = read_graph(root, self._edges, self._own)
        value = float(root.detach())
        stale = self._stale(root) if full else 0.0
        if not math.isfinite(value):
            self._bad(f"the loss is {value} in step {self.steps + 1}")
        if not graph.outputs and not graph.leaves:
            return None, []
        self.values.append(value)
        heads = self._heads(graph)
        handles: list[Any] = []
        for head in heads:
            for output in head.outputs:
                if output.reached and full:
                    handles.append(output.value.register_hook(_keeper(output)))
                if not bool(output.value.detach().isfinite().all()):
                    self._bad(f"outputs of {head.name or 'the model'} are NaN or infinite")
            if full:
                for output in head.outputs:
                    head.parameters |= parameters_below(output.value.grad_fn)
        if full and self.ranks > 1 and self.steps == 0:
            handles += self._sample()
        pictures = None
        called = self._images_of(heads)
        images = called or self._batch
        if full and images and images[0].dim() == 4:
            pictures = describe(images)
        seen = Backward(
            self.steps,
            value,
            heads,
            graph,
            [len(part) for part in called],
            torch.cat([prints(part) for part in images]) if full and images else None,
            pictures,
            [h for h in self._h if not any(h is output.value for output in graph.outputs)],
            stale,
        )
        return seen, handles

    def _images_of(self, heads: list[Head]) -> list[Tensor]:
        """The images whose embeddings are in the loss, one tensor per call of the model."""
        for reached in (True, False):
            for head in heads:
                rows = sum(len(o.value) for o in head.outputs if o.reached or not reached)
                if images := self._images.of(rows):
                    return images
        return []

    def _heads(self, graph: LossGraph) -> list[Head]:
        """The embeddings of a backward pass, by the module that returned them."""
        found: dict[tuple[str, int], Head] = {}
        for output in graph.outputs:
            found.setdefault((output.name, output.value.size(1)), Head([]))
        reached = set(map(id, graph.outputs))
        for output in self._outputs:
            key = (output.name, output.value.size(1))
            here = id(output) in reached
            if key in found and (here or not output.used):
                found[key].outputs.append(Output(output.name, output.value, here))
            output.used |= here
        for leaf in graph.leaves:
            key = ("", leaf.size(1))
            found.setdefault(key, Head([])).outputs.append(Output("", leaf, True))
        return list(found.values())

    def _after_backward(self, seen: Backward | None) -> None:
        if seen is None:
            return
        for head in seen.heads:
            for output in head.outputs:
                output.value = output.value.detach()
        seen.h = [h.detach() for h in seen.h]
        for sample in self.samples:
            if self.steps == 0 and sample.parameter.grad is not None:
                sample.after_backward = sample.parameter.grad.detach().clone()
        if seen.step < _FULL:
            self.backwards.append(seen)
        self.last = seen
        self._consumed = True

    def _sample(self) -> list[Any]:
        if not self.samples:
            trained = [p for p in self.model.parameters() if p.requires_grad and p.numel() > 1]
            for p in sorted(trained, key=Tensor.numel)[:_SAMPLES]:
                self.samples.append(Sample(p, p.grad is None or not bool(p.grad.any())))

        def adder(sample: Sample) -> Any:
            def add(grad: Tensor) -> None:
                grad = grad.detach().clone()
                sample.own = grad if sample.own is None else sample.own + grad

            return add

        return [sample.parameter.register_hook(adder(sample)) for sample in self.samples]

    def _stale(self, root: Tensor) -> float:
        """The norm of gradients that an optimizer used already and that are still there."""
        if not self._stepped:
            return 0.0
        below = parameters_below(root.grad_fn)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        used = [p for g in groups for p in g["params"] if id(p) in below & self._stepped]
        self._stepped -= below
        return math.hypot(*(float(p.grad.norm()) for p in used if p.grad is not None))

    def _bad(self, text: str) -> None:
        if text not in self.not_finite and len(self.not_finite) < 5:
            self.not_finite.append(text)

    # Optimizer steps

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._busy or optimizer in self.optimizers:
            return
        if self.snapshot is not None:
            self.snapshot.add_optimizer(optimizer)
        self._busy = True
        try:
            trials = try_lars(optimizer, self.model)
        finally:
            self._busy = False
        self.optimizers[optimizer] = Stepped(optimizer, not optimizer.state, trials)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._busy:
            return
        self.optimizers[optimizer].lr.append(float(optimizer.param_groups[0]["lr"]))
        self._end_step()
        for group in optimizer.param_groups:
            self._stepped |= {id(p) for p in group["params"]}

    def end_step(self) -> None:
        """End a step that had a backward pass and no optimizer."""
        if self.last is not None and self.last.step == self.steps:
            self._end_step()

    def _end_step(self) -> None:
        for name, p in self.model.named_parameters():
            if not p.requires_grad:
                continue
            (self.with_grad if p.grad is not None else self.without_grad).add(name)
            if p.grad is not None and not bool(p.grad.isfinite().all()):
                self._bad(f"the gradient of {name} is NaN or infinite in step {self.steps + 1}")
        for sample in self.samples:
            if self.steps == 0 and sample.parameter.grad is not None:
                sample.at_end = sample.parameter.grad.detach().clone()
        self._outputs, self._edges, self._consumed = [], {}, True
        self.steps += 1


# LargeBatch's modes do not call hooks for all modules as often as plain autograd does, and refuse
# them. These change nothing.
_HOOKS: tuple[Any, ...] = (Observer._before_module, Observer._after_module)
for _hook in _HOOKS:
    _hook.only_looks = True


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in tensors_in(part)]
    return []


def _scalar(tensors: Any, grads: Any) -> Tensor | None:
    """The root of a backward pass from one scalar, else None."""
    roots = tensors_in(tensors)
    if len(roots) != 1 or roots[0].numel() != 1 or tensors_in(grads):
        return None
    return roots[0]


def _keeper(output: Output) -> Any:
    def keep(grad: Tensor | None) -> None:
        # None for an output of a compiled model that the loss does not use.
        output.grad = None if grad is None else grad.detach().clone()

    return keep


def _is_local(x: Tensor, before: Tensor, after: Tensor, momentum: float) -> bool:
    """Whether a batch norm moved its running mean by the mean of its own input x."""
    used = before.double() + (after.double() - before.double()) / momentum
    wide = x.detach().double().transpose(0, 1).flatten(1)  # [C, values]
    spread = wide.std(1).clamp_min(1e-6)
    return bool(((used - wide.mean(1)).abs() / spread).max() < 1e-4)
