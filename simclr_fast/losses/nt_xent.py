"""NT-Xent (Chen et al. 2020, "A Simple Framework for Contrastive Learning", equation 1)."""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad

from simclr_fast.losses.ranks import RankRows
from simclr_fast.ops import nt_xent
from simclr_fast.ops.library import has_ambient_state
from simclr_fast.ops.nt_xent_plain import statistics_dtype
from simclr_fast.utils.numbers import as_float

_REDUCTIONS = {"none": nt_xent.NONE, "mean": nt_xent.MEAN, "sum": nt_xent.SUM}
# Outside this range float32 cannot represent differences of logits accurately enough.
_TEMPERATURES = (1e-6, 1e6)
_NO_NEGATIVES = "decoupled=True needs at least two pairs: a single one has no negatives"
_Transform = torch._C._functorch.TransformType
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class NTXentStats(NamedTuple):
    """Detached 0-dim tensors: means over the batch, with a group over the batches of all ranks.

    contrastive_accuracy, contrastive_entropy: rows of view 1 against only those of view 2, as
        google-research/simclr reports them. A tie for the first place counts as wrong. Entropies
        are in nats.
    accuracy, entropy: every row against all other rows, that is, the softmax of the loss.
    positive_similarity, negative_similarity: mean cosines of rows with their positive, and with all
        other rows. negative_similarity is NaN for a single pair, which has no negatives.
    """

    contrastive_accuracy: Tensor
    contrastive_entropy: Tensor
    accuracy: Tensor
    entropy: Tensor
    positive_similarity: Tensor
    negative_similarity: Tensor


@overload
def nt_xent_loss(
    z1: Tensor,
    z2: Tensor | None = None,
    temperature: float | Tensor = 0.5,
    *,
    reduction: str = "mean",
    decoupled: bool = False,
    group: dist.ProcessGroup | None = None,
    return_stats: Literal[False] = False,
    row_counts: Sequence[int] | None = None,
) -> Tensor: ...
@overload
def nt_xent_loss(
    z1: Tensor,
    z2: Tensor | None = None,
    temperature: float | Tensor = 0.5,
    *,
    reduction: str = "mean",
    decoupled: bool = False,
    group: dist.ProcessGroup | None = None,
    return_stats: Literal[True],
    row_counts: Sequence[int] | None = None,
) -> tuple[Tensor, NTXentStats]: ...
@overload
def nt_xent_loss(
    z1: Tensor,
    z2: Tensor | None = None,
    temperature: float | Tensor = 0.5,
    *,
    reduction: str = "mean",
    decoupled: bool = False,
    group: dist.ProcessGroup | None = None,
    return_stats: bool,
    row_counts: Sequence[int] | None = None,
) -> Tensor | tuple[Tensor, NTXentStats]: ...
def nt_xent_loss(
    z1: Tensor,
    z2: Tensor | None = None,
    temperature: float | Tensor = 0.5,
    *,
    reduction: str = "mean",
    decoupled: bool = False,
    group: dist.ProcessGroup | None = None,
    return_stats: bool = False,
    row_counts: Sequence[int] | None = None,
) -> Tensor | tuple[Tensor, NTXentStats]:
    """NT-Xent loss of N pairs of views: each of 2N rows must find its other view among 2N - 1.

    Memory is O(N·D). The embeddings are normalised here; zero rows and NaN behave as in
    `torch.nn.functional.normalize` in float32. The result is deterministic. There is no double
    backward.

    z1, z2: [N, D], any strides; or z1 is [2N, D], view 1's rows first, and z2 is None.
        float64, float32, bfloat16 or float16; sums and loss are float32 or wider. As with
        normalize, the gradient of a zero row is about 1e12, and infinite in float16.
    temperature: a number from 1e-6 to 1e6, or a 0-dim tensor, which receives a gradient. The value
        of a CUDA tensor is not checked, because that would wait for the device.
    reduction: "mean" or "sum" over the 2N rows, or "none": [2N], view 1's rows first.
    decoupled: leave the positive out of the denominator (Yeh et al. 2022, "Decoupled Contrastive
        Learning", equation 5); needs at least two pairs.
    group: ranks whose batches form one batch. N may differ between ranks and may be 0. Every rank
        returns the loss of the whole batch. Its gradients are multiplied by the number of ranks, so
        that the averaging of DistributedDataParallel gives exactly the gradient of the whole batch.
        Without DDP, average the gradients over ranks. The backward pass does not communicate.
    return_stats: also return `NTXentStats`, computed in the same pass.
    row_counts: the number of rows (2N) of every rank of the group, in rank order, if known. Without
        it the ranks exchange these numbers, and on a GPU the host waits for that.
    """
    refuse_transforms(z1, z2, temperature)
    _check_embeddings(z1, z2, group)
    code = _reduction_code(reduction, group)
    tau = _temperature_tensor(temperature, z1)
    if group is not None:
        num_rows = z1.size(0) * (1 if z2 is None else 2)
        ranks = RankRows.exchange(num_rows, z1.device, group, row_counts)
        if decoupled and ranks.total == 2:
            raise ValueError(_NO_NEGATIVES)
        loss, stats = _GroupNTXent.apply(z1, z2, tau, ranks, code, decoupled, return_stats)
        return (loss, NTXentStats(*stats.unbind())) if return_stats else loss
    if decoupled and z1.size(0) == (2 if z2 is None else 1):
        raise ValueError(_NO_NEGATIVES)
    made = nt_xent.loss_and_stats(z1, z2, tau, code, decoupled, return_stats)
    return (made[0], NTXentStats(*made[1].unbind())) if return_stats else made[0]


class NTXentLoss(nn.Module):
    """`nt_xent_loss` as a module: `NTXentLoss(0.1)(z1, z2)`.

    learnable: the logarithm of the temperature becomes a parameter, `log_temperature`.
    decoupled: as in `nt_xent_loss`.
    gather_distributed: the batches of all ranks of `group` form one batch. By default `group` has
        all processes.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        *,
        learnable: bool = False,
        gather_distributed: bool = False,
        group: dist.ProcessGroup | None = None,
        reduction: str = "mean",
        decoupled: bool = False,
    ):
        super().__init__()
        if isinstance(temperature, Tensor):
            if temperature.requires_grad:
                raise ValueError(
                    "temperature requires a gradient, and the module would not give it one: pass "
                    "learnable=True and a number"
                )
            temperature = temperature.item()
        value = _check_temperature(temperature)
        if group is not None and not gather_distributed:
            raise ValueError("group is given, so gather_distributed must be True, got False")
        self.temperature = value
        self.log_temperature = None
        if learnable:
            # A half-precision default dtype would round the temperature.
            dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
            self.log_temperature = nn.Parameter(torch.tensor(math.log(value), dtype=dtype))
        self.gather_distributed, self.group = gather_distributed, group
        self.reduction, self.decoupled = reduction, decoupled

    def forward(
        self, z1: Tensor, z2: Tensor | None = None, *, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, NTXentStats]:
        temperature = (
            self.temperature if self.log_temperature is None else self.log_temperature.exp()
        )
        return nt_xent_loss(
            z1,
            z2,
            temperature,
            reduction=self.reduction,
            decoupled=self.decoupled,
            group=self._group(),
            return_stats=return_stats,
        )

    def extra_repr(self) -> str:
        learnable, temperature = self.log_temperature is not None, self.temperature
        if self.log_temperature is not None and not self.log_temperature.is_meta:
            temperature = self.log_temperature.detach().exp().item()
        return (
            f"{temperature=:g}, {learnable=}, reduction={self.reduction!r}, "
            f"decoupled={self.decoupled}, gather_distributed={self.gather_distributed}"
        )

    def _group(self) -> dist.ProcessGroup | None:
        if not self.gather_distributed:
            return None
        if not dist.is_initialized():
            raise RuntimeError(
                "gather_distributed=True needs torch.distributed.init_process_group first"
            )
        return self.group or dist.group.WORLD


class _Saved(NamedTuple):
    """Tensors that the backward pass needs. Those named "all" have the rows of all ranks."""

    u_all: Tensor
    lse_all: Tensor
    row_loss: Tensor
    inv_norm: Tensor
    z1: Tensor
    z2: Tensor | None
    temperature: Tensor


class _GroupNTXent(torch.autograd.Function):
    """The loss over the rows of all ranks. Gathers twice in the forward, never in the backward.

    A rank's rows are negatives in the loss of other ranks' rows. Each rank computes that part of
    the gradient itself, from the gathered rows and the denominators of their losses.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z1: Tensor,
        z2: Tensor | None,
        temperature: Tensor,
        ranks: RankRows,
        reduction: int,
        decoupled: bool,
        return_stats: bool,
    ) -> tuple[Tensor, Tensor | None]:
        u, inv_norm = nt_xent.normalize(z1, z2, temperature)
        u_all = ranks.gather(u)
        row_loss, lse, row_stats = nt_xent.row_loss(
            u_all, temperature, ranks.offset, u.size(0), decoupled, return_stats
        )
        # One gather for all values of a row: [M, 2], or [M, 6] with statistics.
        values = torch.stack((row_loss, lse), 1)
        if return_stats:
            values = torch.cat((values, row_stats), 1)
        values_all = ranks.gather(values)
        row_loss_all, lse_all = values_all[:, 0], values_all[:, 1].contiguous()

        ctx.save_for_backward(*_Saved(u_all, lse_all, row_loss, inv_norm, z1, z2, temperature))
        ctx.ranks, ctx.decoupled, ctx.mean = ranks, decoupled, reduction == nt_xent.MEAN
        stats = None
        if return_stats:
            stats = nt_xent.mean_stats(row_loss_all, lse_all, values_all[:, 2:], u_all, temperature)
            ctx.mark_non_differentiable(stats)
        loss = row_loss_all.mean() if ctx.mean else row_loss_all.sum()
        return loss.to(row_loss.dtype), stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = _Saved(*ctx.saved_tensors)
        # Every rank has the loss of the whole batch, and DDP divides by the number of ranks.
        grad_z, grad_temperature = nt_xent.backward(
            grad_loss * len(ctx.ranks.counts),
            ctx.mean,
            saved.u_all,
            saved.lse_all,
            saved.row_loss,
            saved.inv_norm,
            saved.z1,
            saved.z2,
            saved.temperature,
            ctx.ranks.offset,
            ctx.decoupled,
        )
        grad_z1, grad_z2 = (grad_z, None) if saved.z2 is None else grad_z.tensor_split(2)
        return grad_z1, grad_z2, grad_temperature, None, None, None, None


def _reduction_code(reduction: str, group: dist.ProcessGroup | None) -> int:
    code = _REDUCTIONS.get(reduction)
    if code is None:
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if group is not None and code == nt_xent.NONE:
        raise ValueError(
            "reduction='none' cannot be used with a group: the gradient of a row needs the other "
            "ranks' upstream gradients; use 'mean' or 'sum'"
        )
    return code


def _check_embeddings(z1: Tensor, z2: Tensor | None, group: dist.ProcessGroup | None) -> None:
    least = 1 if group is None else 0
    _check_matrix("z1", z1, least)
    if z2 is None:
        if z1.size(0) % 2:
            raise ValueError(
                "z1 without z2 must hold both views, [2N, D], so an even number of rows, "
                f"got {list(z1.shape)}"
            )
        return
    if not isinstance(z2, Tensor):
        raise TypeError(f"z2 must be a tensor, got {type(z2).__name__}")
    if z1.shape != z2.shape or z1.dtype != z2.dtype or z1.device != z2.device:
        _check_matrix("z2", z2, least)
        for what in ("shape", "dtype", "device"):
            first, second = getattr(z1, what), getattr(z2, what)
            if first != second:
                raise ValueError(f"z1 and z2 must have the same {what}, got {first} and {second}")


def _check_matrix(name: str, z: Tensor, least: int = 1) -> None:
    if not isinstance(z, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(z).__name__}")
    shape = z.shape
    if len(shape) != 2 or shape[0] < least or not shape[1]:
        raise ValueError(
            f"{name} must have shape [rows, features], both at least 1, got {list(shape)}"
        )
    if z.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {z.dtype}")


def refuse_transforms(*inputs: object) -> None:
    """Raise an error where torch.func would differentiate a loss: its derivative would be zero."""
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        kinds = {level.key() for level in torch._C._functorch.get_interpreter_stack()}
        refused = bool(kinds & {_Transform.Grad, _Transform.Jvp})
    else:
        refused = forward_ad._current_level >= 0 and any(
            isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in inputs
        )
    if refused:
        raise RuntimeError(
            "torch.func.grad and its kin, and forward-mode derivatives, cannot differentiate this "
            "loss: use .backward() or torch.autograd.grad, or the plain-torch losses of "
            "simclr_fast.reference"
        )


def _check_temperature(temperature: Any) -> float:
    """Check a temperature and return it as a float."""
    try:
        value = as_float("temperature", temperature)
    except TypeError as error:
        raise ValueError(str(error)) from None
    if not 0 < value < math.inf:
        raise ValueError(f"temperature must be a positive finite number, got {temperature!r}")
    smallest, largest = _TEMPERATURES
    # A limit that was rounded to float32 or bfloat16 must pass.
    if not 0.99 * smallest <= value <= 1.01 * largest:
        raise ValueError(
            f"temperature must be from {smallest:g} to {largest:g}, got {temperature!r}"
        )
    return value


def _temperature_tensor(temperature: float | Tensor, z: Tensor) -> Tensor:
    """Check the temperature and make it a tensor on z's device, float32 or wider."""
    dtype = statistics_dtype(z.dtype)
    if not isinstance(temperature, Tensor):
        value = _check_temperature(temperature)
        if z.device.type == "cpu" and type(z) is Tensor and not has_ambient_state():
            return _cpu_scalar(value, dtype)
        return torch.full((), value, dtype=dtype, device=z.device)
    if temperature.dim() != 0 or not temperature.dtype.is_floating_point:
        raise ValueError(
            "a temperature tensor must be 0-dim and of a floating dtype, got shape "
            f"{list(temperature.shape)}, {temperature.dtype}"
        )
    if temperature.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_temperature(temperature.item())
    return temperature.to(z.device, dtype)


@lru_cache(maxsize=64)
def _cpu_scalar(value: float, dtype: torch.dtype) -> Tensor:
    # A tensor of inference mode could not be saved for a later backward pass.
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")
