"""NT-Xent's ops: schemas, choice of the kernel, shapes of the outputs, gradient.

Rows are interleaved: rows 2k and 2k+1 are the two views of pair k. R is the number of rows of this
rank, M that of all ranks (R = M in one process), Dp the number of features, which the Triton
kernels pad with zeros. The CPU's kernels are in csrc/nt_xent_cpu.cpp and the GPU's in
kernels/nt_xent.py. nt_xent_plain.py serves everything else and says what each value means.
"""

from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simclr_fast.ops import nt_xent_plain
from simclr_fast.ops.library import (
    Implementation,
    define_op,
    goes_straight_to_cuda,
    has_ambient_state,
    has_extension,
    implementation_for,
    refuse_gradient_of,
    widest_float,
)
from simclr_fast.ops.nt_xent_plain import statistics_dtype

# Reductions, numbered as torch's own losses and csrc/nt_xent_cpu.cpp number them.
NONE, MEAN, SUM = 0, 1, 2


class LossOutput(NamedTuple):
    """The results of the op `loss`."""

    loss: Tensor  # [R], view 1's rows first, or [] reduced
    row_loss: Tensor  # [R]
    lse: Tensor  # [R]
    stats: Tensor  # [R, 4], or [0, 4] without statistics
    u: Tensor  # [R, Dp]
    inv_norm: Tensor  # [R]
    kept: Tensor  # intermediate values that save work in the backward pass, or [0]


class _Saved(NamedTuple):
    """Tensors that the backward pass needs."""

    u: Tensor
    lse: Tensor
    row_loss: Tensor
    inv_norm: Tensor
    z1: Tensor
    z2: Tensor | None
    temperature: Tensor
    kept: Tensor


def on_triton(tensor: Tensor) -> bool:
    return implementation_for(tensor.device, tensor.dtype) is Implementation.TRITON


def _kernels(tensor: Tensor) -> Any:
    """The module with the normalize, forward and backward for this tensor."""
    return _triton_kernels() if on_triton(tensor) else nt_xent_plain


@cache
def _triton_kernels() -> Any:
    return import_module("simclr_fast.kernels.nt_xent")


def _normalize(z1: Tensor, z2: Tensor | None, temperature: Tensor) -> tuple[Tensor, Tensor]:
    if not z1.size(0):
        return normalize_shapes(z1, z2, temperature)
    return _kernels(z1).normalize(z1, z2, temperature)


def normalize_shapes(z1: Tensor, z2: Tensor | None, temperature: Tensor) -> tuple[Tensor, Tensor]:
    num_rows = z1.size(0) if z2 is None else 2 * z1.size(0)
    dim, dtype = z1.size(1), statistics_dtype(z1.dtype)
    u_dtype = dtype
    if on_triton(z1):
        dim = padded_dim(dim)
        u_dtype = torch.float32 if z1.dtype == torch.float32 else torch.float16
    u = z1.new_empty(num_rows, dim, dtype=u_dtype)
    return u, z1.new_empty(num_rows, dtype=dtype)


def _row_loss(
    u_all: Tensor,
    temperature: Tensor,
    row_offset: int,
    num_rows: int,
    decoupled: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not num_rows:
        return row_loss_shapes(u_all, temperature, row_offset, num_rows, decoupled, statistics)
    return _kernels(u_all).forward(u_all, temperature, row_offset, num_rows, decoupled, statistics)


def row_loss_shapes(
    u_all: Tensor,
    temperature: Tensor,
    row_offset: int,
    num_rows: int,
    decoupled: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(u_all.dtype)
    # Double precision costs little in plain torch and on the CPU, and keeps exp(s - lse) exact.
    lse_dtype = dtype if on_triton(u_all) else widest_float(u_all.device)
    return (
        u_all.new_empty(num_rows, dtype=dtype),
        u_all.new_empty(num_rows, dtype=lse_dtype),
        u_all.new_empty(num_rows if statistics else 0, 4, dtype=dtype),
    )


def _loss(
    z1: Tensor,
    z2: Tensor | None,
    temperature: Tensor,
    reduction: int,
    decoupled: bool,
    statistics: bool,
    keep: bool = False,
    kernels: Any = None,
) -> LossOutput:
    if kernels is None:
        kernels = _kernels(z1)
    if z1.size(0):
        u, inv_norm = kernels.normalize(z1, z2, temperature)
    else:
        u, inv_norm = normalize_shapes(z1, z2, temperature)
    if kernels is not nt_xent_plain:
        # The kernel reduces the losses too.
        made = kernels.losses(
            u, temperature, 0, u.size(0), decoupled, statistics, mean=reduction == MEAN
        )
        row_loss, lse, stats, loss = made.loss, made.lse, made.stats, made.reduced
        kept = made.factor if keep else made.factor.new_empty(0)
    else:
        row_loss, lse, stats = _row_loss(u, temperature, 0, u.size(0), decoupled, statistics)
        loss = row_loss.mean() if reduction == MEAN else row_loss.sum()
        kept = inv_norm.new_empty(0)
    if reduction == NONE:
        # A new tensor: for a single pair, a transposed view would be row_loss itself.
        loss = torch.cat((row_loss[0::2], row_loss[1::2]))
    return LossOutput(loss, row_loss, lse, stats, u, inv_norm, kept)


def _loss_shapes(
    z1: Tensor,
    z2: Tensor | None,
    temperature: Tensor,
    reduction: int,
    decoupled: bool,
    statistics: bool,
    keep: bool = False,
) -> LossOutput:
    u, inv_norm = normalize_shapes(z1, z2, temperature)
    row_loss, lse, stats = row_loss_shapes(u, temperature, 0, u.size(0), decoupled, statistics)
    loss = row_loss.new_empty(row_loss.shape if reduction == NONE else ())
    num_kept = 0
    if keep and on_triton(z1):
        num_kept = u.size(0)
    elif keep and z1.device.type == "cpu" and has_extension():
        num_kept = kept_size(*u.shape)
    kept = row_loss.new_empty(num_kept)
    return LossOutput(loss, row_loss, lse, stats, u, inv_norm, kept)


def _backward(
    grad: Tensor,
    mean: bool,
    u_all: Tensor,
    lse_all: Tensor,
    row_loss: Tensor,
    inv_norm: Tensor,
    z1: Tensor,
    z2: Tensor | None,
    temperature: Tensor,
    row_offset: int,
    decoupled: bool,
    kept: Tensor | None = None,
    kernels: Any = None,
) -> tuple[Tensor, Tensor]:
    if not inv_norm.size(0):
        return z1.new_empty(0, z1.size(1)), torch.zeros_like(temperature)
    if kernels is None:
        kernels = _kernels(u_all)
    # Plain torch keeps nothing.
    rest = {} if kernels is nt_xent_plain else {"factor": kept}
    return kernels.backward(
        grad,
        mean,
        u_all,
        lse_all,
        row_loss,
        inv_norm,
        z1,
        z2,
        temperature,
        row_offset,
        decoupled,
        **rest,
    )


def _backward_shapes(*arguments: Any) -> tuple[Tensor, Tensor]:
    inv_norm, z1, _, temperature = arguments[5:9]
    return z1.new_empty(inv_norm.size(0), z1.size(1)), torch.empty_like(temperature)


def _mean_stats(
    row_loss: Tensor, lse: Tensor, stats: Tensor, u: Tensor, temperature: Tensor
) -> Tensor:
    return _kernels(u).mean_statistics(row_loss, lse, stats, u, temperature)


def kept_size(num_rows: int, dim: int) -> int:
    """The number of values that the CPU keeps for the backward pass, as in csrc/nt_xent.h."""
    if num_rows > 4 * dim:
        return 0
    block = min(num_rows // 10 + 49, 192)
    return (num_rows + block) * (num_rows + 2 * block) // 2


def padded_dim(dim: int) -> int:
    """Columns of u for the Triton kernels, padded for 16-byte copies and whole tiles."""
    if dim > 64:
        return (dim + 63) // 64 * 64
    return next(padded for padded in (16, 32, 64) if dim <= padded)


class _NTXent(torch.autograd.Function):
    """The op with its gradient. torch.library.register_autograd would double the cost of a call.

    kernels: None, or the module to call instead of the ops. With it the results are the loss and,
    with statistics, those of the op `mean_stats`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z1: Tensor,
        z2: Tensor | None,
        temperature: Tensor,
        reduction: int,
        decoupled: bool,
        statistics: bool,
        kernels: Any,
    ) -> tuple[Tensor, ...]:
        options = reduction, decoupled, statistics
        results: tuple[Tensor, ...]
        if kernels is None:
            with torch._C._AutoDispatchBelowAutograd():
                out = LossOutput(*loss(z1, z2, temperature, *options, keep=True))
            results = out._replace(kept=out.kept.new_empty(0))
        else:
            out = _loss(z1, z2, temperature, *options, keep=True, kernels=kernels)
            results = _loss_and_stats(out, temperature, statistics, kernels)
        ctx.reduction, ctx.decoupled, ctx.kernels = reduction, decoupled, kernels
        saved = _Saved(
            out.u, out.lse, out.row_loss, out.inv_norm, z1, z2, temperature, kept=out.kept
        )
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        if ctx.reduction == NONE:
            grad = grad.unflatten(0, (2, -1)).T.flatten()
        saved = _Saved(*ctx.saved_tensors)
        arguments = (
            grad,
            ctx.reduction == MEAN,
            saved.u,
            saved.lse,
            saved.row_loss,
            saved.inv_norm,
            saved.z1,
            saved.z2,
            saved.temperature,
            0,
            ctx.decoupled,
            saved.kept,
        )
        if torch.is_grad_enabled():
            # create_graph=True: autograd sees the op, which refuses a double backward.
            grad_z, grad_temperature = backward(*arguments)
        elif ctx.kernels is not None and not has_ambient_state():
            grad_z, grad_temperature = _backward(*arguments, kernels=ctx.kernels)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                grad_z, grad_temperature = backward(*arguments)
        if saved.z2 is None:
            return grad_z, None, grad_temperature, None, None, None, None
        n = saved.z2.size(0)
        # chunk(2) would take the host twice as long.
        grad_z1, grad_z2 = grad_z.narrow(0, 0, n), grad_z.narrow(0, n, n)
        return grad_z1, grad_z2, grad_temperature, None, None, None, None


def _loss_autograd(*arguments: Any) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments[:3]):
        # Without `keep`, which the function decides.
        return _NTXent.apply(*arguments[:6], None)
    with torch._C._AutoDispatchBelowAutograd():
        return loss(*arguments)


def _loss_and_stats(
    out: LossOutput, temperature: Tensor, statistics: bool, kernels: Any
) -> tuple[Tensor, ...]:
    if not statistics:
        return (out.loss,)
    return out.loss, kernels.mean_statistics(out.row_loss, out.lse, out.stats, out.u, temperature)


def loss_and_stats(
    z1: Tensor,
    z2: Tensor | None,
    temperature: Tensor,
    reduction: int,
    decoupled: bool,
    statistics: bool,
) -> tuple[Tensor, ...]:
    """The loss of the op `loss` and, with statistics, the result of the op `mean_stats`.

    Their kernels are called without the dispatcher where it would only pass the calls on.
    """
    arguments = z1, z2, temperature, reduction, decoupled, statistics
    if goes_straight_to_cuda(z1, z2, temperature):
        kernels = _kernels(z1)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(z1, z2, temperature):
            return _NTXent.apply(*arguments, kernels)
        out = _loss(*arguments, kernels=kernels)
        return _loss_and_stats(out, temperature, statistics, kernels)
    out = LossOutput(*loss(*arguments))
    if not statistics:
        return (out.loss,)
    return out.loss, mean_stats(out.row_loss, out.lse, out.stats, out.u, temperature.detach())


# The loss of one process's rows, normalised here. keep: whether to fill LossOutput.kept.
loss = define_op(
    "nt_xent(Tensor z1, Tensor? z2, Tensor temperature, int reduction, bool decoupled,"
    " bool statistics, bool keep=False) -> (Tensor loss, Tensor row_loss, Tensor lse,"
    " Tensor stats, Tensor u, Tensor inv_norm, Tensor kept)",
    kernel=_loss,
    shapes=_loss_shapes,
    autograd=_loss_autograd,
)
normalize = define_op(
    "nt_xent_normalize(Tensor z1, Tensor? z2, Tensor temperature) -> (Tensor u, Tensor inv_norm)",
    kernel=_normalize,
    shapes=normalize_shapes,
)
# The losses of num_rows rows from row_offset on, against the rows of all ranks.
row_loss = define_op(
    "nt_xent_row_loss(Tensor u_all, Tensor temperature, SymInt row_offset, SymInt num_rows,"
    " bool decoupled, bool statistics) -> (Tensor row_loss, Tensor lse, Tensor stats)",
    kernel=_row_loss,
    shapes=row_loss_shapes,
)
# The means over all ranks' rows that NTXentStats names.
mean_stats = define_op(
    "nt_xent_mean_stats(Tensor row_loss, Tensor lse, Tensor stats, Tensor u, Tensor temperature)"
    " -> Tensor",
    kernel=_mean_stats,
    shapes=lambda row_loss, *_: row_loss.new_empty(6),
)
# grad: the upstream gradient of every row's loss, [M], or one for all, []; mean divides it by M.
backward = define_op(
    "nt_xent_backward(Tensor grad, bool mean, Tensor u_all, Tensor lse_all, Tensor row_loss,"
    " Tensor inv_norm, Tensor z1, Tensor? z2, Tensor temperature, SymInt row_offset,"
    " bool decoupled, Tensor? kept=None) -> (Tensor grad_z, Tensor grad_temperature)",
    kernel=_backward,
    shapes=_backward_shapes,
)
refuse_gradient_of("nt_xent_backward")
