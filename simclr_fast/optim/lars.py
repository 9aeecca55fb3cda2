"""LARS and its parameter groups."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from simclr_fast import ops
from simclr_fast.optim.lars_native import has_wrapped, native_step, use_native, wants_native
from simclr_fast.optim.lars_options import OptionNames
from simclr_fast.optim.lars_torch import Batch, foreach_step, one_dtype

_NORM_LAYERS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
_NONE = type(None)


class LARS(Optimizer):
    """SGD that scales the update of each tensor by a trust ratio (You et al. 2017,
    https://arxiv.org/abs/1708.03888). A step is one native call per device.

    With weight p, gradient g, trust coefficient η, weight decay λ and momentum μ::

        norm="split":  r = η‖p‖ / (‖g‖ + λ‖p‖ + eps)      norm="joint":  r = η‖p‖ / (‖g + λp‖ + eps)
        momentum_order="torch":  v = μv + (1 - dampening)·r(g + λp);     p = p - lr·v
        momentum_order="tf":     v = μv + (1 - dampening)·lr·r(g + λp);  p = p - v

    A group with ``adapt=False`` has r = 1 and keeps its weight decay. ``lars_param_groups`` makes
    such a group for biases and normalisation layers. Norms are computed in float32 or wider, so
    that the norm of half-precision parameters cannot overflow.

    Arguments that give the semantics of other implementations:

    | implementation         | momentum_order | norm    | eps  | when_zero | else                  |
    |------------------------|----------------|---------|------|-----------|-----------------------|
    | google-research/simclr | "tf"           | "joint" | 0    | either    | the paper's; optax's  |
    | moco-v3, VISSL         | "torch"        | "joint" | 0    | either    | adapt=False if 1-d    |
    | lightly                | "torch"        | "split" | 1e-8 | "skip"    | adapt=False if λ = 0  |
    | solo-learn             | "torch"        | "split" | 1e-8 | "skip"    | trust_clip=clip_lr    |
    | timm                   | "torch"        | "split" | 1e-8 | "decay"   | adapt=False if λ = 0  |
    | apex LARC over SGD     | "torch"        | "split" | 1e-8 | "skip"    | η = 0.02, trust_clip  |

    Args:
        params: parameters or groups. Any strided float16, bfloat16, float32 or float64 tensors, on
            any mixture of devices; complex and sparse ones raise ValueError.
        lr: learning rate, a float ≥ 0 or a one-element tensor (read on the device, never copied
            to the host).
        momentum, dampening, weight_decay, nesterov, maximize: as in ``torch.optim.SGD``.
        trust_coefficient: η.
        eps: added to the denominator of the trust ratio.
        trust_clip: r = min(r / lr, 1), the clipping of LARC.
        momentum_order: whether the learning rate is applied after ("torch") or inside ("tf") the
            momentum buffer. They differ while the learning rate changes.
        norm: how weight decay enters the trust ratio: the norms of g and p are taken separately
            ("split"), or the norm of g + λp is taken ("joint").
        when_zero: for norm="split", a tensor whose weight or gradient norm is zero has r = 1.
            "skip": it gets no weight decay and no clipping. "decay": it gets both.
        foreach: True: plain torch's multi-tensor operations. False: plain torch, one tensor at a
            time.
        fused: True: the native kernels, or an error if there are none. False: plain torch.
            None: the native kernels if there are any for the device, else plain torch.
        capturable: keep each lr in a tensor on the group's device, in float64 if the device has it.
            Then schedulers also change the lr of a captured CUDA graph.

    The state of a parameter is ``momentum_buffer``. It is interchangeable with that of
    ``torch.optim.SGD`` and, for momentum_order="torch", of the optimizers in the table. A
    ``GradScaler`` passes its scale and overflow flag to ``step``, which reads them on the device.
    The gradients stay scaled.

    Groups and loaded states may also give an option the name that it has in those optimizers
    (``eta``, ``trust_coeff``, ``clip_lr``, ``clip_lars_lr``); the group then has our name. A group
    keeps the options that a loaded state lacks.

    DTensors, those of ``fully_shard`` for example, get the steps of one process that has the whole
    tensors. Every rank must have gradients for the same ones. Their squared norms are summed over
    the ranks once per step.

    Raises:
        TypeError, ValueError: a hyperparameter has another type or is outside its range, or a group
            has an option that it cannot honour; the message has its name and value.
    """

    _step_supports_amp_scaling = True
    # For simclr_fast.compat: the values of options that another library's groups do not have.
    _fixed_options: ClassVar[dict[str, Any]] = {}
    _names: OptionNames

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor,
        *,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        trust_clip: bool = False,
        momentum_order: str = "torch",
        norm: str = "split",
        when_zero: str = "skip",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "trust_clip": trust_clip,
            "momentum_order": momentum_order,
            "norm": norm,
            "when_zero": when_zero,
            "adapt": True,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
        }
        self._start(params, defaults)

    def _start(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], defaults: dict[str, Any]
    ) -> None:
        self._names = OptionNames(defaults, self._fixed_options)
        self._names.check(defaults)
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by load_state_dict, copy and pickle."""
        # A loaded group keeps the options that the saved one lacks.
        kept = self.__dict__.get("param_groups")
        defaults = state["defaults"] if kept is None else self.defaults
        names = OptionNames(defaults, self._fixed_options)
        for i, group in enumerate(state["param_groups"]):
            names.translate(group)
            for name, value in (defaults if kept is None else kept[i]).items():
                group.setdefault(name, value)
            names.settle(group, self._rule)
            names.check(group)
            if kept is not None:
                _keep_lr_on_device(group, names)
        for values in state["state"].values():
            # What moco-v3 and VISSL call it.
            if isinstance(values, dict) and "mu" in values and "momentum_buffer" not in values:
                values["momentum_buffer"] = values.pop("mu")
        self._names = names
        super().__setstate__(state)
        # torch adds it for optimizers that have it. Groups added later would get it too.
        self.defaults.pop("differentiable", None)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Missing keys take the values given to the constructor."""
        if isinstance(param_group, dict):  # torch says what else it may not be
            self._names.translate(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._names.settle(group, self._rule)
            self._names.check(group)
            _check_params(group["params"])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        _keep_lr_on_device(group, self._names)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return the result of ``closure``."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if torch.compiler.is_compiling() and ops.has_extension() and self._wants_native():
            _untraced_update(self, grad_scale, found_inf)
        else:
            self._update(grad_scale, found_inf)
        return loss

    def _wants_native(self) -> bool:
        return any(wants_native(self._names.options(group)) for group in self.param_groups)

    def _update(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        native: dict[torch.device, list[Batch]] = {}
        plain: list[Batch] = []
        for batch in self._batches(found_inf):
            if use_native(batch.group, batch.params):
                native.setdefault(batch.params[0].device, []).append(batch)
            elif batch.group["foreach"] is False:
                for i in range(len(batch.params)):
                    plain += one_dtype(batch.select([i]))
            else:
                plain += one_dtype(batch)
        if any(has_wrapped(batch.params) for batch in plain):
            # Imported here: it takes long, and needs a torch with torch.distributed.
            from simclr_fast.optim.lars_sharded import localize

            plain = localize(plain, grad_scale)
        for batch in plain:
            foreach_step(batch, grad_scale, found_inf)
        for device, on_device in native.items():
            native_step(device, on_device, grad_scale, found_inf)

    def _apart(self, p: Tensor) -> bool:
        """Whether a subclass treats this tensor differently from the others of its group."""
        return False

    def _rule(self, options: dict[str, Any], apart: bool = False) -> tuple[float, bool]:
        """Weight decay of the group's tensors, and whether they are adapted."""
        return options["weight_decay"], options["adapt"]

    def _batches(self, found_inf: Tensor | None) -> list[Batch]:
        """Tensors that share a device and a rule, group by group."""
        batches = []
        for group in self.param_groups:
            if self._names.has_foreign(group):
                self._names.translate(group)
                self._names.settle(group, self._rule)
            options = self._names.options(group)
            self._names.check_choices(group, options)
            for part, apart in self._parts(group["params"], momentum=options["momentum"] != 0):
                batches += self._part_batches(part, options, apart, found_inf)
        return batches

    def _parts(self, params: list[Tensor], momentum: bool) -> list[tuple["_Part", bool]]:
        """The tensors with a gradient by device, and whether a subclass sets them apart."""
        # Comprehensions and sets over whole lists: with hundreds of small tensors, a loop over the
        # tensors would take longer than updating them.
        grads = [p.grad for p in params]
        if _contains_none(grads):
            params = [p for p, grad in zip(params, grads, strict=True) if grad is not None]
            grads = [grad for grad in grads if grad is not None]
        if not params:
            return []
        state = self.state
        buffers = [state[p].get("momentum_buffer") for p in params] if momentum else []
        whole = _Part(params, grads, buffers)
        sets_apart = type(self)._apart is not LARS._apart
        if not sets_apart and len({p.device for p in params}) == 1:
            return [(whole, False)]
        split: dict[tuple[torch.device, bool], list[int]] = {}
        for i, p in enumerate(params):
            split.setdefault((p.device, self._apart(p)), []).append(i)
        return [
            (_Part(*([values[i] for i in indices] if values else [] for values in whole)), apart)
            for (_, apart), indices in split.items()
        ]

    def _part_batches(
        self, part: "_Part", options: dict[str, Any], apart: bool, found_inf: Tensor | None
    ) -> list[Batch]:
        params, grads, buffers = part
        dampening = options["dampening"]
        weight_decay, adapt = self._rule(options, apart)
        if not buffers:
            return [Batch(params, grads, [], options, 0.0, weight_decay, adapt)]
        fresh: list[int] = []
        if _contains_none(buffers):
            fresh = [i for i, buffer in enumerate(buffers) if buffer is None]
        # The first step has no dampening, and a skipped step is not the first. So the overflow flag
        # must be read on the host, only in this case.
        if fresh and dampening != 0 and found_inf is not None and bool(found_inf):
            return []
        for i in fresh:
            buffers[i] = torch.zeros_like(params[i], memory_format=torch.preserve_format)
            self.state[params[i]]["momentum_buffer"] = buffers[i]
        batch = Batch(params, grads, buffers, options, dampening, weight_decay, adapt)
        if not fresh or dampening == 0:
            return [batch]
        older = sorted(set(range(len(params))) - set(fresh))
        first = batch.select(fresh)._replace(dampening=0.0)
        return [first, batch.select(older)] if older else [first]


class _Part(NamedTuple):
    """The tensors of a group that share a device and a rule. No buffers if momentum is 0."""

    params: list[Tensor]
    grads: list[Any]
    buffers: list[Any]


def _contains_none(values: list[Any]) -> bool:
    """Quicker than a loop, and `None in values` would call the tensors' ==."""
    return _NONE in set(map(type, values))


# Excluded from torch.compile: tracing would add a guard per parameter, and the native step is one
# operator already.
_untraced_update = torch.compiler.disable(LARS._update)


def lars_param_groups(model: nn.Module, weight_decay: float = 1e-6) -> list[dict[str, Any]]:
    """Two parameter groups, as in the SimCLR paper (https://arxiv.org/abs/2002.05709, section B).

    The first has the weights, which are decayed and adapted. The second has biases, the parameters
    of normalisation layers and all others of at most one dimension, which are neither decayed nor
    adapted. Parameters that need no gradient are left out.
    """
    norm_params = {
        p
        for module in model.modules()
        if isinstance(module, _NORM_LAYERS)
        for p in module.parameters(recurse=False)
    }
    weights: list[Tensor] = []
    rest: list[Tensor] = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        excluded = p.ndim <= 1 or name.split(".")[-1] == "bias" or p in norm_params
        (rest if excluded else weights).append(p)
    return [
        {"params": weights, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0, "adapt": False},
    ]


def _check_params(params: list[Tensor]) -> None:
    for p in params:
        if p.is_complex() or not p.is_floating_point():
            raise ValueError(f"LARS needs real floating-point parameters, got {p.dtype}")
        if p.layout is not torch.strided:
            raise ValueError(f"LARS needs strided parameters, got layout {p.layout}")
        if any(size > 1 and step == 0 for size, step in zip(p.shape, p.stride(), strict=True)):
            raise ValueError(
                f"LARS cannot update an expanded parameter (shape {list(p.shape)}), whose elements "
                "share memory; .clone() it"
            )
        if getattr(p, "_fsdp_flattened", False):
            raise ValueError(
                "LARS needs the norm of each weight, and a parameter of FullyShardedDataParallel "
                "holds pieces of several; shard the model with torch.distributed.fsdp.fully_shard"
            )


def _keep_lr_on_device(group: dict[str, Any], names: OptionNames) -> None:
    """For a capturable group, make lr a tensor of its own that a CUDA graph can read."""
    if names.options(group)["capturable"] and group["params"]:
        device = group["params"][0].device
        lr = torch.as_tensor(group["lr"], dtype=ops.widest_float(device), device=device)
        group["lr"] = lr.clone()
