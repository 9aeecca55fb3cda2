"""What a memory mode cannot run, or would silently change: refused by name, with the mode that can.

What shows only when the model runs is found in `second_run`. `flags` says when lockstep has to look
again.
"""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from simclr_fast.large_batch.batch_norms import batch_norms
from simclr_fast.large_batch.blocks import recomputed_blocks

_RANDOM = ("dropout", "bernoulli", "rand", "multinomial", "stochastic_depth", "normal_", "uniform_")


# Functions and methods whose second argument or `dim` says over which dimensions they go.
_REDUCTIONS = frozenset(
    [
        *("mean", "sum", "std", "var", "var_mean", "std_mean", "prod", "norm", "normalize"),
        *("amax", "amin", "max", "min", "median", "logsumexp", "softmax", "log_softmax"),
        *("cumsum", "cumprod"),
    ]
)
# By name, because importing them takes long.
_COPIES = ("DistributedDataParallel", "DataParallel")
_SHARDS = ("FullyShardedDataParallel", "FSDPModule")
# Of torch.nn.modules.module: hooks that are called for every module.
_GLOBAL_HOOKS = (
    *("_global_forward_hooks", "_global_forward_pre_hooks"),
    *("_global_backward_hooks", "_global_backward_pre_hooks"),
)


def refuse_model(model: nn.Module, memory: str, ranks: bool) -> None:
    """Raise ValueError for a model that `memory` cannot run exactly, and name the module.

    ranks: whether several ranks form one batch.
    """
    normed = ranks and bool(batch_norms(model))
    for name, module in model.named_modules():
        what = f"{name or 'the model'} ({type(module).__name__})"
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if kinds.intersection(_COPIES) or ((ranks or memory != "plain") and kinds & {*_SHARDS}):
            raise ValueError(
                f"model must be bare, but {what} spreads it over devices: LargeBatch averages "
                "gradients over group itself"
            )
        if memory in ("replay", "lockstep") or (memory == "plain" and normed):
            if module._compiled_call_impl is not None or "OptimizedModule" in kinds:
                raise ValueError(
                    f"memory={memory!r} cannot replace the blocks and batch norms of {what}, which "
                    "is compiled: pass the model from before torch.compile"
                    + (", or use memory='plain'" if not normed else "")
                )
            if isinstance(module, torch.jit.ScriptModule):
                raise ValueError(
                    f"memory={memory!r} cannot replace the blocks and batch norms of {what}, which "
                    "is scripted: pass the Python module"
                )
    for name, p in model.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(f"{name} is not initialised: run the lazy model once before")
        if (ranks or memory != "plain") and is_traceable_wrapper_subclass(p):
            raise ValueError(
                f"{name} is a {type(p).__name__}, and memory={memory!r} "
                f"{'over ranks ' if ranks else ''}takes plain parameters"
            )
        if ranks and _after_accumulation(p):
            raise ValueError(
                f"{name} has a hook of register_post_accumulate_grad_hook, which would see the "
                "gradient before it is averaged over ranks: do its work after LargeBatch.backward"
            )
    hooks = (hook for name in _GLOBAL_HOOKS for hook in getattr(nn_module, name).values())
    # Those of simclr_fast.doctor only look, and take what they get to see.
    if memory in ("lockstep", "grad-cache") and not all(
        getattr(hook, "only_looks", False) for hook in hooks
    ):
        raise ValueError(
            f"memory={memory!r} does not call hooks for all modules, such as those of "
            "torch.nn.modules.module.register_module_forward_hook, as often as plain autograd; "
            f"{_who_can(model)}"
        )
    if memory != "plain" and parametrize._cache_enabled:
        raise ValueError(
            f"memory={memory!r} computes weights twice, and torch.nn.utils.parametrize.cached() "
            "would give the first ones again: leave it around LargeBatch.backward"
        )


def compile_refusal(memory: str) -> str:
    """Why `memory` cannot compile a model; "" if it can."""
    if memory == "replay":
        return (
            "memory='replay' cannot compile: it replaces blocks and batch norms in every step. Use "
            "memory='plain', memory='lockstep' or memory='grad-cache', or leave compile"
        )
    return ""


def refuse_grad_cache(model: nn.Module, allow_ghost_bn: bool) -> None:
    """Raise ValueError for batch norms, and for hooks that see a micro-batch for the whole batch.

    Gradient hooks would get the gradient of one micro-batch after the other. A forward hook may
    store what it sees, and would see every micro-batch twice.
    """
    norms = batch_norms(model)
    if norms and not allow_ghost_bn:
        raise ValueError(
            f"memory='grad-cache' normalises each micro-batch by its own statistics ({len(norms)} "
            f"batch norms, {next(iter(norms))!r} first), so the gradient is not that of the batch: "
            "its cosine to the true one was 0.94, 0.85, 0.75 and 0.61 at micro-batches of 256, "
            "128, 64 and 32 of 512 views on a small ResNet. Use memory='lockstep', which is exact, "
            "or allow_ghost_bn"
        )
    for name, module in model.named_modules():
        hooks: Iterable[object] = (
            *module._forward_hooks.values(),
            *module._forward_pre_hooks.values(),
            *module._backward_hooks.values(),
            *module._backward_pre_hooks.values(),
        )
        for hook in hooks:
            if not computed_attribute(hook):
                raise ValueError(
                    f"memory='grad-cache' would call the hooks of {name or 'the model'} "
                    f"({type(module).__name__}) several times, with parts of the batch; "
                    f"{_who_can(model)}"
                )
    for name, p in model.named_parameters():
        if _has_gradient_hooks(p):
            raise ValueError(
                f"memory='grad-cache' would call the gradient hooks of {name} once per "
                f"micro-batch; {_who_can(model)}"
            )


def refuse_views(memory: str, parts: Sequence[Tensor]) -> None:
    """Raise an error for modes and views for which there is no gradient."""
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        raise RuntimeError(
            "LargeBatch.backward computes gradients: leave torch.no_grad() and "
            "torch.inference_mode() around it"
        )
    if memory == "lockstep" and any(part.requires_grad for part in parts):
        raise ValueError(
            "memory='lockstep' computes no gradient of the views, which require one; "
            "memory='replay' can"
        )
    shapes = {tuple(part.shape[1:]) for part in parts}
    if len(shapes) == 1:
        return
    if memory == "lockstep":
        raise ValueError(
            f"memory='lockstep' needs views of one shape, got {sorted(shapes)}; memory='plain', "
            "memory='replay' and memory='grad-cache' can run several"
        )
    if len({len(part) for part in parts}) > 1:
        raise ValueError(
            "views of several shapes must have the same number of rows in every part, got shapes "
            f"{[list(part.shape) for part in parts]}"
        )


def computed_attribute(hook: object) -> str | None:
    """The attribute that a hook of torch's pruning or weight norm computes before each forward.

    None for other hooks.
    """
    kind = type(hook)
    if isinstance(hook, prune.BasePruningMethod):
        return str(hook._tensor_name)
    if kind.__module__.startswith("torch.nn.utils.") and hasattr(hook, "name"):
        return str(hook.name)
    return None


def flags(model: nn.Module) -> tuple[Any, ...]:
    """A value that changes when a `Graph` must be built again: modules, settings and hooks."""
    modules = (
        (id(m), id(vars(m).get("forward")), _has_hooks(m), _settings(m)) for m in model.modules()
    )
    parameters = ((id(p), p.requires_grad, _has_gradient_hooks(p)) for p in model.parameters())
    return (*modules, *parameters)


def _settings(m: nn.Module) -> list[tuple[str, Any]]:
    """The attributes that a forward may branch on, and the tensors that are no buffers."""
    found = []
    for name, value in vars(m).items():
        if isinstance(value, (bool, int, float, str, tuple, type(None))):
            found.append((name, value))
        elif isinstance(value, Tensor) or callable(value):
            found.append((name, id(value)))
    return found


def refuse_hooks(model: nn.Module) -> None:
    """Refuse hooks: lockstep calls functions instead of some modules, and adds gradients itself."""
    for name, module in model.named_modules():
        if _has_hooks(module):
            what = f"{name or type(module).__name__!r} has forward or backward hooks"
            # Spectral norm's changes the module in each forward, which replay refuses as well.
            spectral = any(isinstance(h, SpectralNorm) for h in module._forward_pre_hooks.values())
            mode = "plain" if spectral else "replay"
            raise refusal(f"{what}, which it would not always call", mode)
        if "forward" in vars(module):
            what = f"the forward of {name or type(module).__name__!r} was replaced"
            raise refusal(f"{what}, which it would not always call")
    for name, parameter in model.named_parameters():
        if _has_gradient_hooks(parameter):
            raise refusal(f"{name} has gradient hooks, which it would not call")


def refuse_context(expected: tuple[bool, ...]) -> None:
    """Refuse an operation that is traced under another `context` than the forward began in."""
    if context() != expected:
        raise refusal(
            "its forward switches gradients or autocast on or off, which a trace does not record"
        )


def context() -> tuple[bool, ...]:
    """Whether gradients are enabled, and autocast on the CPU and on accelerators."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = ("cpu", "cuda" if accelerator is None else accelerator.type)
    return torch.is_grad_enabled(), *map(torch.is_autocast_enabled, kinds)


def refuse_random(node: Node, module: Any) -> None:
    """Refuse an operation that draws random numbers. module: what it calls, if it is a module."""
    if module is not None:
        active = any(map(_is_random, module.modules()))
    else:
        name = getattr(node.target, "__name__", str(node.target))
        options = arguments(node)
        active = options.get("dropout_p", 0) != 0 or (
            any(word in name for word in _RANDOM)
            and options.get("training", True)
            and options.get("p", 1) != 0
        )
        if name == "batch_norm" and options.get("training"):
            raise refusal("it calls torch.nn.functional.batch_norm without a module")
    if active:
        raise refusal(
            f"{node.format_node()} is random, and a recomputation would draw other numbers"
        )


def _is_random(m: nn.Module) -> bool:
    probability = getattr(m, "p", getattr(m, "dropout", 0))
    kinds = nn.modules.dropout._DropoutNd, nn.MultiheadAttention, nn.RNNBase
    return m.training and (
        (isinstance(m, kinds) and probability > 0)
        or isinstance(m, (nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d))
    )


def refuse_mixing(node: Node) -> None:
    """Refuse an operation that reduces over the rows of the batch."""
    name = getattr(node.target, "__name__", str(node.target))
    if node.op not in ("call_method", "call_function") or name not in _REDUCTIONS:
        return
    options = arguments(node)
    dim = options.get("dim", node.args[1] if len(node.args) > 1 else None)
    over_rows = dim is None or dim == 0 or (isinstance(dim, (tuple, list)) and 0 in dim)
    if over_rows and _from_views(node):
        raise refusal(
            f"{node.format_node()} mixes the rows of the batch, and it would see a micro-batch"
        )


def _from_views(node: Node) -> bool:
    """Whether the value of a node is computed from the views, and not from parameters alone."""
    seen, left = set(), [node]
    while left:
        one = left.pop()
        if one.op == "placeholder":
            return True
        if one not in seen:
            seen.add(one)
            left += one.all_input_nodes
    return False


def refuse_outputs(outputs: Iterable[Node]) -> None:
    """Refuse outputs that are no values of the views."""
    for node in outputs:
        if node.op == "get_attr":
            raise refusal(f"it returns {node.target}, which is not computed from the views")


def _has_hooks(m: nn.Module) -> bool:
    kinds = m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks
    return any(kinds)


def _has_gradient_hooks(p: nn.Parameter) -> bool:
    return bool(p._backward_hooks) or _after_accumulation(p)


def _after_accumulation(p: nn.Parameter) -> bool:
    return bool(getattr(p, "_post_accumulate_grad_hooks", None))


def arguments(node: Node) -> dict[str, Any]:
    """The arguments by name for functions written in Python; else the keyword arguments."""
    if isinstance(node.target, FunctionType):
        try:
            bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
        except (TypeError, ValueError):
            return dict(node.kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)
    return dict(node.kwargs)


class RefusedModel(ValueError):
    """A model that lockstep cannot run. mode: the memory mode that can."""

    def __init__(self, why: str, mode: str) -> None:
        super().__init__(f"memory='lockstep' cannot run this model: {why}; memory={mode!r} can")
        self.why, self.mode = why, mode


def refusal(why: str, mode: str = "replay") -> RefusedModel:
    """mode: the memory mode that can run the model, "replay" if it has blocks."""
    return RefusedModel(why, mode)


@contextmanager
def naming_a_mode_for(model: nn.Module) -> Iterator[None]:
    """Where replay finds no blocks in the model, refusals inside name plain."""
    try:
        yield
    except RefusedModel as error:
        if error.mode == "replay" and not _has_blocks(model):
            raise refusal(error.why, "plain") from error
        raise


def _has_blocks(model: nn.Module) -> bool:
    try:
        return bool(recomputed_blocks(model))
    except ValueError:
        return False


def _who_can(model: nn.Module) -> str:
    replay = "memory='replay' and " if _has_blocks(model) else ""
    return f"{replay}memory='plain' can run this model"
