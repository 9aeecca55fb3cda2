"""The torch.library ops: schema, choice of the kernel, shape function, gradient, plain torch."""

from importlib import import_module
from typing import Any, NoReturn

import torch
from torch import Tensor

from simclr_fast.ops import nt_xent_plain, sup_con_plain
from simclr_fast.ops.library import EXTENSION as _EXTENSION
from simclr_fast.ops.library import (
    EXTENSION_ERROR,
    LIBRARY,
    Implementation,
    has_extension,
    implementation_for,
    why_plain,
)

__all__ = [
    "EXTENSION_ERROR",
    "Implementation",
    "has_extension",
    "implementation_for",
    "why_plain",
]


def augment_views(*arguments: object) -> None:
    """Write views of images into the last argument; see csrc/augment_cpu.cpp for the schema."""
    torch.ops.simclr_fast.augment_views(*arguments)


if has_extension():
    torch.library.register_fake("simclr_fast::augment_views", lambda *arguments: None)


# NT-Xent. Rows are interleaved: 2k and 2k+1 are the two views of pair k. R: rows of this rank,
# M: rows of all ranks (R = M in one process), Dp: features, zero-padded on CUDA. The CPU kernels
# are in csrc/nt_xent_cpu.cpp and csrc/sup_con_cpu.cpp, the CUDA ones in kernels/, the meaning of
# each value there and in nt_xent_plain.py and sup_con_plain.py, which serve every other device, and
# float64 on CUDA.
# loss: the rows' losses, view 1 first (reduction 0), their mean (1) or sum (2), as torch numbers
# its own losses' reductions. grad: the upstream gradient of every row's loss, [M], or one for all,
# []; mean divides it by M. kept: what the CPU's forward pass keeps for the backward pass of a small
# batch, else empty.
LIBRARY.define(
    "nt_xent(Tensor z1, Tensor? z2, Tensor temperature, int reduction, bool decoupled,"
    " bool statistics, bool keep=False) -> (Tensor loss, Tensor rows, Tensor lse, Tensor stats,"
    " Tensor u, Tensor inv_norm, Tensor kept)"
)
LIBRARY.define(
    "nt_xent_normalize(Tensor z1, Tensor? z2, Tensor temperature) -> (Tensor u, Tensor inv_norm)"
)
LIBRARY.define(
    "nt_xent_rows(Tensor u_all, Tensor temperature, SymInt row_offset, SymInt count,"
    " bool decoupled, bool statistics) -> (Tensor rows, Tensor lse, Tensor stats)"
)
LIBRARY.define(
    "nt_xent_backward(Tensor grad, bool mean, Tensor u_all, Tensor lse_all, Tensor rows,"
    " Tensor inv_norm, Tensor z1, Tensor? z2, Tensor temperature, SymInt row_offset,"
    " bool decoupled, Tensor? kept=None) -> (Tensor grad_z, Tensor grad_temperature)"
)
NONE, MEAN, SUM = 0, 1, 2
# The supervised contrastive loss: rows in any order and number, their classes by ids [M].
LIBRARY.define("sup_con_normalize(Tensor z, Tensor temperature) -> (Tensor u, Tensor inv_norm)")
LIBRARY.define(
    "sup_con_rows(Tensor u_all, Tensor ids, Tensor inverse_count, Tensor temperature,"
    " SymInt row_offset, SymInt count) -> (Tensor rows, Tensor lse)"
)
LIBRARY.define(
    "sup_con_backward(Tensor grad, Tensor u_all, Tensor lse_all, Tensor ids,"
    " Tensor inverse_count, Tensor inv_norm, Tensor z, Tensor temperature, SymInt row_offset)"
    " -> (Tensor grad_z, Tensor grad_temperature)"
)


def _nt_xent_normalize(z1: Tensor, z2: Tensor | None, temperature: Tensor) -> tuple[Tensor, ...]:
    if _on_triton(z1):
        return import_module("simclr_fast.kernels.normalize").normalize(z1, z2, temperature)
    return nt_xent_plain.normalize(z1, z2, temperature)


def _nt_xent_rows(u_all: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return _nt_xent_implementation(u_all).forward(u_all, *args)


def _nt_xent(
    z1: Tensor,
    z2: Tensor | None,
    temperature: Tensor,
    reduction: int,
    decoupled: bool,
    statistics: bool,
    keep: bool = False,
) -> tuple[Tensor, ...]:
    u, inv_norm = _nt_xent_normalize(z1, z2, temperature)
    rows, lse, stats = _nt_xent_rows(u, temperature, 0, u.size(0), decoupled, statistics)
    if reduction == NONE:
        loss = rows.unflatten(0, (-1, 2)).T.flatten()
    else:
        loss = rows.mean() if reduction == MEAN else rows.sum()
    return loss, rows, lse, stats, u, inv_norm, inv_norm.new_empty(0)


def _nt_xent_backward(grad: Tensor, mean: bool, u_all: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    # Without kept, which is empty here.
    return _nt_xent_implementation(u_all).backward(grad, mean, u_all, *args[:8])


def _nt_xent_implementation(u: Tensor) -> Any:
    return import_module("simclr_fast.kernels.nt_xent") if _on_triton(u) else nt_xent_plain


def _sup_con_normalize(z: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    return _sup_con_implementation(z).normalize(z, temperature)


def _sup_con_rows(u_all: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _sup_con_implementation(u_all).forward(u_all, *args)


def _sup_con_backward(grad: Tensor, u_all: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _sup_con_implementation(u_all).backward(grad, u_all, *args)


def _sup_con_implementation(tensor: Tensor) -> Any:
    return import_module("simclr_fast.kernels.sup_con") if _on_triton(tensor) else sup_con_plain


def _on_triton(tensor: Tensor) -> bool:
    return implementation_for(tensor.device, tensor.dtype) is Implementation.TRITON


def _fake_nt_xent_normalize(
    z1: Tensor, z2: Tensor | None, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    rows = z1.size(0) if z2 is None else 2 * z1.size(0)
    statistics_dtype = nt_xent_plain.statistics_dtype(z1.dtype)
    dim, dtype = z1.size(1), statistics_dtype
    if _on_triton(z1):
        dim = nt_xent_padded_dim(dim)
        dtype = torch.float32 if z1.dtype == torch.float32 else torch.float16
    return z1.new_empty(rows, dim, dtype=dtype), z1.new_empty(rows, dtype=statistics_dtype)


def _fake_nt_xent_rows(
    u_all: Tensor,
    temperature: Tensor,
    row_offset: int,
    count: int,
    decoupled: bool,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = nt_xent_plain.statistics_dtype(u_all.dtype)
    rows = u_all.new_empty(count, dtype=dtype)
    # Double precision costs the CPU nothing here and keeps exp(s - lse) exact.
    lse = u_all.new_empty(count, dtype=dtype if _on_triton(u_all) else torch.float64)
    return rows, lse, u_all.new_empty(count if statistics else 0, 4, dtype=dtype)


def _fake_nt_xent(
    z1: Tensor,
    z2: Tensor | None,
    temperature: Tensor,
    reduction: int,
    decoupled: bool,
    statistics: bool,
    keep: bool = False,
) -> tuple[Tensor, ...]:
    u, inv_norm = _fake_nt_xent_normalize(z1, z2, temperature)
    rows, *rest = _fake_nt_xent_rows(u, temperature, 0, u.size(0), decoupled, statistics)
    loss = rows.new_empty(rows.shape if reduction == NONE else ())
    native = z1.device.type == "cpu" and has_extension()
    kept = rows.new_empty(_kept_size(*u.shape) if keep and native else 0)
    return loss, rows, *rest, u, inv_norm, kept


def _kept_size(rows: int, dim: int) -> int:
    """As in csrc/nt_xent.h."""
    if rows > 4 * dim:
        return 0
    block = min(rows // 10 + 49, 192)
    return (rows + block) * (rows + 2 * block) // 2


def _fake_nt_xent_backward(
    grad: Tensor,
    mean: bool,
    u_all: Tensor,
    lse_all: Tensor,
    rows: Tensor,
    inv_norm: Tensor,
    z1: Tensor,
    z2: Tensor | None,
    temperature: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    return z1.new_empty(inv_norm.size(0), z1.size(1)), torch.empty_like(temperature)


def _fake_sup_con_normalize(z: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    u, _ = _fake_nt_xent_normalize(z, None, temperature)
    return u, u.new_empty(z.size(0), dtype=nt_xent_plain.statistics_dtype(z.dtype))


def _fake_sup_con_rows(
    u_all: Tensor,
    ids: Tensor,
    inverse_count: Tensor,
    temperature: Tensor,
    row_offset: int,
    count: int,
) -> tuple[Tensor, Tensor]:
    return _fake_nt_xent_rows(u_all, temperature, row_offset, count, False, False)[:2]


def _fake_sup_con_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    *_, z, temperature, _ = arguments
    return z.new_empty(z.shape), torch.empty_like(temperature)


def nt_xent_padded_dim(dim: int) -> int:
    """Columns of the normalised embeddings on CUDA: what 16-byte copies and whole tiles need."""
    if dim > 64:
        return (dim + 63) // 64 * 64
    return next(padded for padded in (16, 32, 64) if dim <= padded)


class _NTXent(torch.autograd.Function):
    """What torch.library.register_autograd would make of the op, at half the cost of a call."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            loss, rows, lse, stats, u, inv_norm, kept = nt_xent(*arguments, True)
        z1, z2, temperature, ctx.reduction, ctx.decoupled, _ = arguments
        others = rows, lse, stats, u, inv_norm, kept.new_empty(0)
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(u, lse, rows, inv_norm, z1, z2, temperature, kept)
        return loss, *others

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 6
        if ctx.reduction == NONE:
            grad = grad.unflatten(0, (2, -1)).T.flatten()
        *saved, kept = ctx.saved_tensors
        arguments = grad, ctx.reduction == MEAN, *saved, 0, ctx.decoupled, kept
        if torch.is_grad_enabled():
            # create_graph: through what refuses a double backward.
            grad_z, grad_temperature = nt_xent_backward(*arguments)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                grad_z, grad_temperature = nt_xent_backward(*arguments)
        grads = (grad_z, None) if saved[5] is None else grad_z.chunk(2)
        return *grads, grad_temperature, None, None, None


def _nt_xent_autograd(
    z1: Tensor, z2: Tensor | None, temperature: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(z1, z2, temperature):
        return _NTXent.apply(z1, z2, temperature, *options[:3])
    with torch._C._AutoDispatchBelowAutograd():
        return nt_xent(z1, z2, temperature, *options)


def _no_double_backward(ctx: Any, *_: Any) -> NoReturn:
    raise NotImplementedError(
        "the contrastive losses have no double backward (create_graph=True); those of "
        "simclr_fast.reference are plain torch and have one"
    )


for _name, _kernel, _fake in (
    ("nt_xent", _nt_xent, _fake_nt_xent),
    ("nt_xent_normalize", _nt_xent_normalize, _fake_nt_xent_normalize),
    ("nt_xent_rows", _nt_xent_rows, _fake_nt_xent_rows),
    ("nt_xent_backward", _nt_xent_backward, _fake_nt_xent_backward),
    ("sup_con_normalize", _sup_con_normalize, _fake_sup_con_normalize),
    ("sup_con_rows", _sup_con_rows, _fake_sup_con_rows),
    ("sup_con_backward", _sup_con_backward, _fake_sup_con_backward),
):
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"simclr_fast::{_name}", _fake, lib=LIBRARY)
LIBRARY.impl("nt_xent", _nt_xent_autograd, "Autograd")
for _name in ("nt_xent_backward", "sup_con_backward"):
    torch.library.register_autograd(
        f"simclr_fast::{_name}",
        _no_double_backward,
        setup_context=lambda ctx, inputs, output: None,
        lib=LIBRARY,
    )
nt_xent = torch.ops.simclr_fast.nt_xent.default
nt_xent_normalize = torch.ops.simclr_fast.nt_xent_normalize.default
nt_xent_rows = torch.ops.simclr_fast.nt_xent_rows.default
nt_xent_backward = torch.ops.simclr_fast.nt_xent_backward.default
sup_con_normalize = torch.ops.simclr_fast.sup_con_normalize.default
sup_con_rows = torch.ops.simclr_fast.sup_con_rows.default
sup_con_backward = torch.ops.simclr_fast.sup_con_backward.default


# LarsFlag of csrc/lars.h.
LARS_NESTEROV, LARS_MAXIMIZE, LARS_ADAPT, LARS_CLIP = 1, 2, 4, 8
LARS_TF_ORDER, LARS_JOINT_NORM, LARS_DECAY_WHEN_ZERO = 16, 32, 64

if has_extension():
    torch.library.register_fake("simclr_fast::lars_", lambda *arguments: None)


def lars_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    group_sizes: list[int],
    flags: list[int],
    hyper: list[float],
    lrs: list[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One LARS step in place for all parameters of one device.

    Group i owns the next group_sizes[i] parameters and gradients, and as many momentum buffers
    unless its momentum is 0. hyper: lr, momentum, dampening, weight_decay, trust_coefficient, eps
    of each group in turn. lrs: empty, or a one-element tensor per group used in place of its lr.
    Tensors of equal shape, dtype (float16, bfloat16, float32 or float64) and device; any strides.
    """
    torch.ops.simclr_fast.lars_.default(
        params, grads, momentum_buffers, group_sizes, flags, hyper, lrs, grad_scale, found_inf
    )


def lars_hold(params: list[Tensor], momentum_buffers: list[Tensor]) -> int:
    """Keeps both lists in the extension, for ``lars_held_``, until ``lars_release``."""
    return torch.ops.simclr_fast.lars_hold.default(params, momentum_buffers)


def lars_gradients(*arguments: Any) -> list[Tensor] | None:
    """The gradients of held parameters, None if anything else changed: csrc/lars_python.h."""
    return _EXTENSION.lars_gradients(*arguments)


def lars_release(held: int) -> None:
    torch.ops.simclr_fast.lars_release.default(held)


def lars_held_(held: int, grads: list[Tensor], *rules: Any) -> bool:
    """``lars_`` for the tensors of ``lars_hold``; False, having changed nothing, where these are no
    longer on the gradients' device. rules: the arguments of ``lars_`` after its tensors."""
    return torch.ops.simclr_fast.lars_held_.default(held, grads, *rules)
