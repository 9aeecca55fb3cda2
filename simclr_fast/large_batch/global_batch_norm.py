"""Batch normalisation over micro-batches and ranks, on any device and backend.

Moments of parts are merged by the exact formula of Chan, Golub and LeVeque (1979). If part i has
n_i values, mean_i and M2_i = Σ (x - mean_i)², then mean = Σ n_i·mean_i / Σ n_i and
M2 = Σ (M2_i + n_i (mean_i - mean)²). There is one collective in each direction: the forward gathers
the moments, the backward sums Σdy and Σdy·x̂. Parts may have different numbers of rows, also none.

On the GPU the passes over x are those operations that CUDA has for torch's SyncBatchNorm. With
ranks a layer launches four kernels in the forward and three in the backward, and one less of each
if there is a single part. SyncBatchNorm itself refuses CPU tensors, waits for the GPU in every
layer, and indexes the whole channels_last input of a layer with 32 bits.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from simclr_fast.ops import widest_float
from simclr_fast.ops.norm_act import norm_act as one_pass

_INT32_MAX = 2**31 - 1
_KEPT_COUNTS = 256


class Moments(NamedTuple):
    """The moments of some rows.

    mean: [C]. spread: [C], (variance + eps)^-½ on CUDA, else M2 = Σ (x - mean)². n: values per
    channel. On CUDA they are float32 or wider, elsewhere in the widest dtype of the device.
    """

    mean: Tensor
    spread: Tensor
    n: int


class Statistics(NamedTuple):
    """The statistics of the whole batch.

    mean, inverse = (variance + eps)^-½: [C], float32 or wider. n: values per channel; a rank
    without rows does not know it. known: the biased variance; None where CUDA's operations gave
    only the inverse.
    """

    mean: Tensor
    inverse: Tensor
    n: int
    eps: float
    known: Tensor | None = None

    @property
    def variance(self) -> Tensor:
        """The biased variance."""
        return self.inverse.pow(-2) - self.eps if self.known is None else self.known


# What `normalize` takes after x: the statistics, γ and β.
Norm = tuple[Statistics, Tensor | None, Tensor | None]


class WholeBatch:
    """The ranks whose rows form one batch. `rows`: the rows of every rank, in rank order.

    The host knows the numbers of values, so no layer waits for the GPU. The GPU gets them in small
    tensors, which are cached.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.ranks = 1 if group is None else dist.get_world_size(group)
        self.rows: list[int] = []
        self._counts: dict[Any, Tensor] = {}
        self._seen: Counter[Tensor] = Counter()

    def total(self, own: int) -> int:
        """Values per channel of all ranks, given those of this rank; 0 for a rank without rows.

        Raises:
            ValueError: rows cannot all have the same number of values.
        """
        if self.group is None or not own:
            return own
        rows = self.rows[self.rank]
        if any(own * other % rows for other in self.rows):
            raise ValueError(
                f"every row must give a batch norm the same number of values, got {own} values of "
                f"{rows} rows; the ranks have {self.rows} rows"
            )
        return own * sum(self.rows) // rows

    def counts(self, values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """`values` as a tensor on the device, cached."""
        # A fake tensor must not be found again after its mode.
        mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        key = (tuple(values), dtype, device, mode)
        if key not in self._counts:
            if len(self._counts) >= _KEPT_COUNTS:
                self._counts.clear()
            if len(set(values)) == 1:
                made = torch.full((len(values),), values[0], dtype=dtype, device=device)
            else:
                made = torch.tensor(values, dtype=dtype, device="cpu")
                # From pinned memory the copy does not block the host.
                made = made.pin_memory() if device.type == "cuda" else made
                made = made.to(device, non_blocking=True)
            self._counts[key] = made
        return self._counts[key]

    def begin(self, rows: list[int]) -> None:
        """Begin a step. After one that failed in its forward, nothing of it is counted."""
        self.rows = rows
        self._seen.clear()

    def saw(self, norm: Any) -> None:
        """Count a batch for `norm`; `finish_forward` updates its counter."""
        self._seen[norm.num_batches_tracked] += 1

    @torch.no_grad()
    def finish_forward(self) -> None:
        """Add the counted batches to num_batches_tracked of the batch norms."""
        by_device: dict[torch.device, dict[Tensor, int]] = {}
        for counter, times in self._seen.items():
            by_device.setdefault(counter.device, {})[counter] = times
        for seen in by_device.values():
            torch._foreach_add_(list(seen), list(seen.values()))
        self._seen.clear()


def on_cuda(x: Tensor) -> bool:
    """Whether `x` is processed by CUDA's batch norm operations."""
    return x.is_cuda


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which x is summed: float32 or wider."""
    return torch.promote_types(x.dtype, torch.float32)


def moments(x: Tensor, eps: float) -> list[Moments]:
    """The moments of x [N, C, ...]; several if CUDA's kernels need x in several parts."""
    n = x.numel() // x.size(1)
    if on_cuda(x):
        if not n:
            zeros = x.new_zeros(2, x.size(1), dtype=wide_dtype(x))
            return [Moments(zeros[0], zeros[1] + 1, 0)]
        parts = _parts(x)
        return [Moments(*torch.batch_norm_stats(p, eps), p.numel() // p.size(1)) for p in parts]
    widest = widest_float(x.device)
    if not n:
        zeros = x.new_zeros(2, x.size(1), dtype=widest)
        return [Moments(zeros[0], zeros[1], 0)]
    if widest is not torch.float64:
        # Devices without float64 also lack batch_norm_update_stats.
        own_axes = [0, *range(2, x.dim())]
        variance, mean = torch.var_mean(x.to(widest), own_axes, correction=0)
        return [Moments(mean, variance * n, n)]
    # With momentum 0 these stay zero. Their dtype determines that of the result.
    unused = x.new_zeros(2, x.size(1), dtype=wide_dtype(x))
    mean, variance = torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0)
    return [Moments(mean.double(), variance.double() * n, n)]


@torch.no_grad()
def global_statistics(
    x: Tensor, parts: Sequence[Moments], norm: Any, batch: WholeBatch
) -> Statistics:
    """Merge the moments of all parts and ranks, and update the norm's running statistics.

    One gather if there are several ranks. x: any of the inputs, for its dtype and device.
    """
    n, dtype = sum(part.n for part in parts), wide_dtype(x)
    if not on_cuda(x):
        row = merge([torch.cat([*p[:2], p.mean.new_full((1,), p.n)]) for p in parts])
        return statistics_of_row(row, n, dtype, norm, batch)
    means, inverses, counts = _table(parts, batch, dtype, x.device)
    if batch.group is not None:
        mean, inverse = means[0], inverses[0]
        if len(parts) > 1:
            mean, inverse = _merged(means, inverses, counts, norm.eps)
            counts = batch.counts([n], dtype, x.device)
        table = _gathered(torch.cat([mean, inverse, counts]), batch.group)
        # Leave out ranks without rows.
        if 0 in batch.rows and any(batch.rows):
            table = torch.cat([table[r : r + 1] for r, rows in enumerate(batch.rows) if rows])
        means, inverses = table[:, :-1].unflatten(1, (2, -1)).unbind(1)
        counts, n = table[:, -1], batch.total(n)
    if not 2 <= n <= _INT32_MAX:
        # CUDA's kernel counts in 32 bits and divides by n - 1. A rank without rows does not know n.
        squares = (inverses.double() ** -2 - norm.eps).clamp_min(0) * counts.double()[:, None]
        rows = torch.cat([means.double(), squares, counts.double()[:, None]], 1)
        return _from_row(merge(rows.unbind()), n, dtype, norm, batch)
    if _has_buffers(norm) and norm.momentum is not None and norm.running_mean.dtype == dtype:
        batch.saw(norm)
        found = _merged(means, inverses, counts, norm.eps, norm)
        return Statistics(*found, n, norm.eps)
    found = (means[0], inverses[0])
    if len(means) > 1:
        found = _merged(means, inverses, counts, norm.eps)
    statistics = Statistics(*found, n, norm.eps)
    update_running(norm, statistics.mean, statistics.variance, n, batch)
    return statistics


@torch.no_grad()
def statistics_of_row(
    row: Tensor, n: int, dtype: torch.dtype, norm: Any, batch: WholeBatch
) -> Statistics:
    """`global_statistics` from (mean, M2, n) of this rank: [2C + 1]. n: on the host."""
    if batch.group is not None:
        row = merge(_gathered(row, batch.group).unbind())
        n = batch.total(n) if row.is_cuda else int(row[-1])
    return _from_row(row, n, dtype, norm, batch)


def merge(rows: Sequence[Tensor]) -> Tensor:
    """Merge (mean, M2, n) of parts, [2C + 1] each, into those of all values."""
    if len(rows) == 1:
        return rows[0]
    table = torch.stack(list(rows))  # [parts, 2C + 1]
    counts = table[:, -1:]
    means, squares = table[:, :-1].unflatten(1, (2, -1)).unbind(1)
    mean = (counts * means).sum(0) / counts.sum().clamp_min(1)
    squares = (squares + counts * (means - mean) ** 2).sum(0)
    return torch.cat([mean, squares, counts.sum(0)])


def normalize(x: Tensor, s: Statistics, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """γ (x - mean)·inverse + β in x's dtype, in one pass."""
    return norm_act([x], [(s, weight, bias)], relu=False)


def norm_act(
    x: Sequence[Tensor], norms: Sequence[Norm | None], relu: bool, overwrites: int | None = None
) -> Tensor:
    """The sum of one or two tensors, with ReLU or without, in one pass and rounded once.

    x: of one shape and dtype. norms: per tensor what `normalize` takes after x, or None where the
    tensor is added as it is. overwrites: the place of the tensor whose memory the result gets.
    """
    layout = _layout(x[0])
    tensors = [t.contiguous(memory_format=layout) for t in x]
    channels = [_channels(norm) for norm in norms]
    if overwrites == 1:
        tensors.reverse()
        channels.reverse()
    in_place = overwrites is not None
    if len(tensors) == 1:
        return one_pass(tensors[0], *channels[0], relu=relu, in_place=in_place)
    return one_pass(tensors[0], *channels[0], tensors[1], *channels[1], relu, in_place)


_Channels = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _channels(norm: Norm | None) -> _Channels:
    """What the op takes of a norm."""
    if norm is None:
        return None, None, None, None
    s, weight, bias = norm
    return s.mean, s.inverse, _as(weight, s), _as(bias, s)


def norm_act_composed(x: Sequence[Tensor], norms: Sequence[Norm | None], relu: bool) -> Tensor:
    """`norm_act`, written with operations that torch.compile can fuse with others."""
    made = list(x)
    for i, norm in enumerate(norms):
        if norm is None:
            continue
        s, weight, bias = norm
        weight, bias = _as(weight, s), _as(bias, s)
        made[i] = F.batch_norm(x[i], s.mean, s.variance, weight, bias, False, 0.0, s.eps)
    y = made[0] if len(made) == 1 else made[0] + made[1]
    return y.relu() if relu else y


class Sums(NamedTuple):
    """Sums over some rows.

    whole: [2, C], to be summed over the ranks: Σdy, and Σdy·(x - mean) on CUDA, else Σdy·x̂.
    weight, bias: the gradients of γ and β, None without γ. Those of `gradient_sums` share no memory
    with `whole`.
    """

    whole: Tensor
    weight: Tensor | None
    bias: Tensor | None


def gradient_sums(
    pairs: Sequence[tuple[Tensor, Tensor]], s: Statistics, weight: Tensor | None
) -> Sums:
    """The sums over all pairs (dy, x), in one pass over each."""
    pairs = [(dy, x) for dy, x in pairs if x.numel()]
    if pairs and on_cuda(pairs[0][1]):
        return _cuda_sums(pairs, s, weight)
    whole = s.mean.new_zeros(2, len(s.mean)) if len(pairs) != 1 else None
    for dy, x in pairs:
        # The sums are the gradients of weight and bias; the gradient of the input is not computed.
        _, slope, center = torch.ops.aten.native_batch_norm_backward(
            dy, x, None, None, None, s.mean, s.inverse, True, s.eps, [False, True, True]
        )
        found = torch.stack([center, slope])
        whole = found if whole is None else whole + found
    assert whole is not None
    if weight is None:
        return Sums(whole, None, None)
    return Sums(whole, whole[1].clone(), whole[0].clone())


def join_sums(parts: Sequence[Sums], s: Statistics, weight: Tensor | None) -> Sums:
    """The sums over the rows of several calls of `gradient_sums`.

    weight and bias may share memory with `whole`: use them before it is summed over the ranks.
    """
    wholes = [part.whole for part in parts]
    whole = wholes[0] if len(wholes) == 1 else torch.stack(wholes).sum(0)
    if weight is None:
        return Sums(whole, None, None)
    return Sums(whole, slope(whole, s), whole[0])


def slope(whole: Tensor, s: Statistics) -> Tensor:
    """Σdy·x̂ from `Sums.whole`."""
    return whole[1] * s.inverse if on_cuda(whole) else whole[1]


def input_gradient(
    dy: Tensor,
    x: Tensor,
    s: Statistics,
    weight: Tensor | None,
    sums: Tensor,
    batch: WholeBatch,
    spare: bool = False,
) -> Tensor:
    """dx = γ·inverse (dy - Σdy / n - x̂·Σdy·x̂ / n).

    sums: `Sums.whole` of the whole batch. spare: dx may get the memory of dy.
    """
    if x.device.type == "cpu" and not on_cuda(x) and dy.dtype is x.dtype:
        return _input_gradient_in_one_pass(dy, x, s, weight, sums, spare)
    if not on_cuda(x) or not x.numel():
        return input_gradient_composed(dy, x, s, weight, sums)
    counts = batch.counts(_in_32_bits(s.n), torch.int32, x.device)
    weight, (sum_dy, sum_dy_xmu) = _as(weight, s), sums.unbind()
    parts = [
        torch.batch_norm_backward_elemt(
            grad, part, s.mean, s.inverse, weight, sum_dy, sum_dy_xmu, counts
        )
        for grad, part in _dense_parts(dy, x)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def input_gradient_composed(
    dy: Tensor, x: Tensor, s: Statistics, weight: Tensor | None, sums: Tensor
) -> Tensor:
    """`input_gradient` from sums with Σdy·x̂, by operations that every device has."""
    weight, wide = _as(weight, s), wide_dtype(x)
    scale = s.inverse if weight is None else s.inverse * weight
    center, slope = -scale * sums / s.n
    correction = F.batch_norm(x.to(wide), s.mean, s.variance, slope, center, False, 0.0, s.eps)
    channels = scale.view(-1, *[1] * (x.dim() - 2))
    return correction.addcmul_(dy.to(wide), channels).to(dy.dtype)


def _input_gradient_in_one_pass(
    dy: Tensor, x: Tensor, s: Statistics, weight: Tensor | None, sums: Tensor, spare: bool
) -> Tensor:
    """`input_gradient` as the sum of two batch norms: of x, and of dy with mean 0."""
    weight, layout = _as(weight, s), _layout(x)
    scale = s.inverse if weight is None else s.inverse * weight
    center, slope = (-scale * sums / s.n).unbind()
    of_x = (x.contiguous(memory_format=layout), s.mean, s.inverse, slope, center)
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    dense = dy.contiguous(memory_format=layout)
    in_place = spare or dense is not dy
    return one_pass(dense, zero, one, scale, None, *of_x, in_place=in_place)


@torch.no_grad()
def update_running(
    norm: Any, mean: Tensor, variance: Tensor, n: Tensor | int, batch: WholeBatch | None
) -> None:
    """Update a batch norm's running statistics as its forward would. variance: biased.

    batch: counts the batch, for all norms at once; None: it is counted here.
    """
    if not _has_buffers(norm):
        return
    momentum = norm.momentum
    if momentum is None or batch is None:
        norm.num_batches_tracked.add_(1)
    else:
        batch.saw(norm)
    if momentum is None:
        momentum = norm.num_batches_tracked.to(norm.running_mean.dtype).reciprocal()
    factor = n / max(n - 1, 1) if isinstance(n, int) else n / (n - 1).clamp_min(1)
    norm.running_mean.lerp_(mean.to(norm.running_mean), momentum)
    norm.running_var.lerp_((variance * factor).to(norm.running_var), momentum)


class NormalizeFunction(torch.autograd.Function):
    """`normalize`, with a gradient that includes the dependence of the statistics on x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Statistics,
        batch: WholeBatch,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.statistics, ctx.batch = statistics, batch
        return normalize(x, statistics, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        batch: WholeBatch = ctx.batch
        sums = gradient_sums([(dy, x)], ctx.statistics, weight)
        if batch.group is not None:
            dist.all_reduce(sums.whole, group=batch.group)
        dx = input_gradient(dy, x, ctx.statistics, weight, sums.whole, batch)
        # The gradients of γ and β are this rank's part; DistributedDataParallel averages them.
        if weight is None or sums.weight is None or sums.bias is None:
            return dx, None, None, None, None
        return dx, sums.weight.to(weight.dtype), sums.bias.to(weight.dtype), None, None


def _as(parameter: Tensor | None, s: Statistics) -> Tensor | None:
    return None if parameter is None else parameter.to(s.mean.dtype)


def _has_buffers(norm: Any) -> bool:
    return norm.running_mean is not None and bool(norm.track_running_stats)


def _gathered(row: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`row` [k] of every rank: [ranks, k]."""
    ranks = dist.get_world_size(group)
    # torch 2.14 renames all_gather_into_tensor.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    table = row.new_empty(ranks * len(row))
    gather(table, row, group=group)
    return table.view(ranks, -1)


def _from_row(row: Tensor, n: int, dtype: torch.dtype, norm: Any, batch: WholeBatch) -> Statistics:
    mean, squares = row[:-1].unflatten(0, (2, -1)).unbind()
    variance = squares / row[-1].clamp_min(1)
    update_running(norm, mean, variance, row[-1], batch)
    inverse = (variance + norm.eps).rsqrt()
    return Statistics(mean.to(dtype), inverse.to(dtype), n, norm.eps, variance.to(dtype))


def _table(
    parts: Sequence[Moments], batch: WholeBatch, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """CUDA's means [parts, C], inverses [parts, C] and counts [parts]."""
    counts = batch.counts([part.n for part in parts], dtype, device)
    if len(parts) == 1:
        return parts[0].mean[None], parts[0].spread[None], counts
    table = torch.stack([t for part in parts for t in (part.mean, part.spread)])
    means, inverses = table.unflatten(0, (-1, 2)).unbind(1)
    return means, inverses, counts


def _merged(
    means: Tensor, inverses: Tensor, counts: Tensor, eps: float, norm: Any = None
) -> tuple[Tensor, Tensor]:
    """(mean, inverse) of all parts by CUDA's kernel, which also updates the buffers of `norm`."""
    running_mean, running_var, momentum = None, None, 0.0
    if norm is not None:
        running_mean, running_var, momentum = norm.running_mean, norm.running_var, norm.momentum
    # The first argument only determines the dtype.
    mean, inverse = torch.batch_norm_gather_stats_with_counts(
        means, means, inverses, running_mean, running_var, momentum, eps, counts
    )
    return mean, inverse


def _cuda_sums(
    pairs: Sequence[tuple[Tensor, Tensor]], s: Statistics, weight: Tensor | None
) -> Sums:
    parts = [part for dy, x in pairs for part in _dense_parts(dy, x)]
    # For a single part the kernel also makes the gradients of γ and β.
    both = weight is not None and len(parts) == 1
    found = [
        torch.batch_norm_backward_reduce(dy, x, s.mean, s.inverse, weight, True, both, both)
        for dy, x in parts
    ]
    whole = torch.stack([t for sums in found for t in sums[:2]])
    if both:
        return Sums(whole, *found[0][2:])
    if len(parts) > 1:
        whole = whole.unflatten(0, (-1, 2)).sum(0)
    if weight is None:
        return Sums(whole, None, None)
    return Sums(whole, whole[1] * s.inverse, whole[0].clone())


def _in_32_bits(n: int) -> list[int]:
    """Split n into 32-bit numbers. The kernel adds them in 64 bits."""
    parts = -(-n // _INT32_MAX)
    return [n // parts + (i < n % parts) for i in range(parts)]


def _parts(x: Tensor) -> Sequence[Tensor]:
    """Split x by rows into dense parts that 32-bit indices can address."""
    rows = max(1, _INT32_MAX // max(1, x[0].numel()))
    if not x.is_contiguous(memory_format=_layout(x)):
        x = x.contiguous()
    return x.split(rows) if len(x) > rows else (x,)


def _dense_parts(dy: Tensor, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """`_parts` of dy and x, both in the layout of x."""
    dy = dy.contiguous(memory_format=_layout(x))
    return list(zip(_parts(dy), _parts(x), strict=True))


def _layout(x: Tensor) -> torch.memory_format:
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if channels_last is not None and x.is_contiguous(memory_format=channels_last):
        return channels_last
    return torch.contiguous_format
