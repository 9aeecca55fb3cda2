"""NT-Xent (Chen et al. 2020, "A Simple Framework for Contrastive Learning", equation 1)."""

import math
from functools import lru_cache
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from simclr_fast import ops
from simclr_fast.ops.nt_xent_plain import LOG2E, statistics_dtype
from simclr_fast.utils.distributed import all_gather_rows, gather_row_counts

_REDUCTIONS = {"none": ops.NONE, "mean": ops.MEAN, "sum": ops.SUM}
_NO_NEGATIVES = "decoupled=True needs at least two pairs: a single one has no negatives"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class NTXentStats(NamedTuple):
    """Detached 0-dim tensors, means over the batch (over every rank's, with a group).

    contrastive_accuracy, contrastive_entropy: view 1's rows against view 2 alone, as
        google-research/simclr reports them (a tie for the first place counts as wrong; nats).
    accuracy, entropy: every row against everything but itself, the softmax of the loss.
    positive_similarity, negative_similarity: cosines; negatives exclude self and positive, and
        are NaN for a single pair, which has none.
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
) -> Tensor | tuple[Tensor, NTXentStats]:
    """NT-Xent loss of N pairs of views: each of 2N rows picks its other view out of 2N - 1.

    Memory is O(N·D). Embeddings are normalised here; zero rows and NaN behave as in
    `torch.nn.functional.normalize` in float32. Deterministic. No double backward.

    z1, z2: [N, D], any strides; or z1 is [2N, D], view 1's rows first, and z2 is None.
        float64, float32, bfloat16 or float16; arithmetic and loss are float32 or wider. A zero
        row's gradient is about 1e12, infinite in float16, as with normalize there.
    temperature: a positive number, or a 0-dim tensor, which receives a gradient. The value of a
        CUDA tensor is not checked, as that would wait for the device.
    reduction: "mean" or "sum" over the 2N rows, or "none": [2N], view 1's rows first.
    decoupled: leave the positive out of the denominator (Yeh et al. 2022, "Decoupled Contrastive
        Learning", equation 5); needs at least two pairs.
    group: ranks whose batches form one; each may bring a different N, also 0. Every rank returns
        the loss of the whole batch, and gradients times the number of ranks, so that the averaging
        of DistributedDataParallel gives the whole batch's gradient exactly. Without DDP, average
        the gradients over ranks. The backward pass does not communicate.
    return_stats: also return `NTXentStats`, from the same pass.
    """
    _check_embeddings(z1, z2, group)
    code = _reduction_code(reduction, group)
    tau = _temperature_tensor(temperature, z1)
    if group is not None:
        loss, stats = _GroupNTXent.apply(z1, z2, tau, group, code, decoupled, return_stats)
        return (loss, NTXentStats(*stats.unbind())) if return_stats else loss
    if decoupled and z1.size(0) == (2 if z2 is None else 1):
        raise ValueError(_NO_NEGATIVES)
    loss, rows, lse, row_stats, u, *_ = ops.nt_xent(z1, z2, tau, code, decoupled, return_stats)
    if not return_stats:
        return loss
    return loss, NTXentStats(*_mean_stats(rows, lse, row_stats, u, tau.detach()).unbind())


class NTXentLoss(nn.Module):
    """`nt_xent_loss` as a module: `NTXentLoss(0.1)(z1, z2)`.

    learnable: the temperature becomes a parameter, through its logarithm, `log_temperature`.
    decoupled: as in `nt_xent_loss`.
    gather_distributed: the batch is that of all ranks of `group` (default: of all processes).
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
        _check_temperature(temperature)
        if group is not None and not gather_distributed:
            raise ValueError("group is given, so gather_distributed must be True, got False")
        self.temperature = float(temperature)
        self.log_temperature = (
            nn.Parameter(torch.tensor(math.log(temperature))) if learnable else None
        )
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
        learnable = self.log_temperature is not None
        return (
            f"temperature={self.temperature:g}, {learnable=}, reduction={self.reduction!r}, "
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


class _GroupNTXent(torch.autograd.Function):
    """The loss of every rank's rows together: two gathers forward, none backward."""

    @staticmethod
    def forward(
        ctx: Any,
        z1: Tensor,
        z2: Tensor | None,
        temperature: Tensor,
        group: dist.ProcessGroup,
        reduction: int,
        decoupled: bool,
        return_stats: bool,
    ) -> tuple[Tensor, Tensor | None]:
        # A rank without rows still takes part in the gathers.
        empty = not z1.size(0)
        given = (z1.new_ones(2, z1.size(1)), None) if empty else (z1, z2)
        u, inv_norm = ops.nt_xent_normalize(*given, temperature)
        u, inv_norm = (u[:0], inv_norm[:0]) if empty else (u, inv_norm)
        counts = gather_row_counts(u.size(0), u.device, group)
        row_offset = sum(counts[: dist.get_rank(group)])
        if decoupled and sum(counts) == 2:
            raise ValueError(_NO_NEGATIVES)
        u_all = all_gather_rows(u, group, counts)
        row_offset, rows = (0, 2) if empty else (row_offset, u.size(0))
        loss, lse, row_stats = (
            column[: u.size(0)]
            for column in ops.nt_xent_rows(
                u_all, temperature, row_offset, rows, decoupled, return_stats
            )
        )
        per_row = (
            torch.cat((torch.stack((loss, lse), 1), row_stats), 1)
            if return_stats
            else (torch.stack((loss, lse), 1))
        )
        loss_all, lse_all, *stats_all = all_gather_rows(per_row, group, counts).unbind(1)
        ctx.save_for_backward(u_all, lse_all.contiguous(), loss, inv_norm, z1, z2, temperature)
        ctx.row_offset, ctx.decoupled, ctx.ranks = row_offset, decoupled, len(counts)
        ctx.mean = reduction == ops.MEAN
        stats = None
        if return_stats:
            stats = _mean_stats(loss_all, lse_all, torch.stack(stats_all, 1), u_all, temperature)
            ctx.mark_non_differentiable(stats)
        total = loss_all.mean() if ctx.mean else loss_all.sum()
        return total.to(loss.dtype), stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if not saved[4].size(0):
            empty = tuple(None if z is None else torch.zeros_like(z) for z in saved[4:6])
            return *empty, torch.zeros_like(saved[6]), None, None, None, None
        grad_z, grad_temperature = ops.nt_xent_backward(
            grad_loss * ctx.ranks, ctx.mean, *saved, ctx.row_offset, ctx.decoupled
        )
        grads = (grad_z, None) if saved[5] is None else grad_z.chunk(2)
        return *grads, grad_temperature, None, None, None, None


def _mean_stats(loss: Tensor, lse: Tensor, stats: Tensor, u: Tensor, temperature: Tensor) -> Tensor:
    """The six values of `NTXentStats`, [6], from interleaved rows."""
    contrastive = stats[0::2, :2].mean(0)
    both_views = stats[:, 2:].mean(0)
    positive = (lse - loss).double().mean() * temperature
    u, rows = u.double(), u.size(0)
    total = (u.sum(0).square().sum() - u.square().sum()) * temperature / LOG2E
    negative = (total - rows * positive) / (rows * (rows - 2)) if rows > 2 else total * math.nan
    similarities = torch.stack((positive, negative))
    return torch.cat((contrastive, both_views, similarities)).to(loss.dtype)


def _reduction_code(reduction: str, group: dist.ProcessGroup | None) -> int:
    code = _REDUCTIONS.get(reduction)
    if code is None:
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if group is not None and code == ops.NONE:
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
                "z1 alone must hold both views, [2N, D], so an even number of rows, "
                f"got {list(z1.shape)}"
            )
        return
    _check_matrix("z2", z2, least)
    for what in ("shape", "dtype", "device"):
        first, second = getattr(z1, what), getattr(z2, what)
        if first != second:
            raise ValueError(f"z1 and z2 must have the same {what}, got {first} and {second}")


def _check_matrix(name: str, z: Tensor, least: int = 1) -> None:
    if not isinstance(z, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(z).__name__}")
    if z.dim() != 2 or z.size(0) < least or not z.size(1):
        raise ValueError(
            f"{name} must have shape [rows, features], both at least 1, got {list(z.shape)}"
        )
    if z.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {z.dtype}")


def _check_temperature(temperature: float) -> None:
    if not (isinstance(temperature, (int, float)) and 0 < temperature < math.inf):
        raise ValueError(f"temperature must be a positive finite number, got {temperature!r}")


def _temperature_tensor(temperature: float | Tensor, z: Tensor) -> Tensor:
    """On z's device, float32 or wider."""
    dtype = statistics_dtype(z.dtype)
    if not isinstance(temperature, Tensor):
        _check_temperature(temperature)
        if z.device.type == "cpu" and type(z) is Tensor and not torch.compiler.is_compiling():
            return _cpu_scalar(temperature, dtype)
        return torch.full((), temperature, dtype=dtype, device=z.device)
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
        return torch.tensor(value, dtype=dtype)
