"""The supervised contrastive loss's ops. Rows come in any order and number, else as in nt_xent.py.

ids [M] are equal for rows of one class. inverse_count [M] is 1 / (the number of a row's positives),
or 0 without positives. The kernels are in csrc/sup_con_cpu.cpp and kernels/sup_con.py.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from simclr_fast.ops import nt_xent, sup_con_plain
from simclr_fast.ops.library import define_op, refuse_gradient_of


def _kernels(tensor: Tensor) -> Any:
    """The module whose normalize, forward and backward compute on this tensor."""
    if nt_xent.on_triton(tensor):
        return import_module("simclr_fast.kernels.sup_con")
    return sup_con_plain


def _normalize(z: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    if not z.size(0):
        return _normalize_shapes(z, temperature)
    return _kernels(z).normalize(z, temperature)


def _normalize_shapes(z: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    return nt_xent.normalize_shapes(z, None, temperature)


def _row_loss(
    u_all: Tensor,
    ids: Tensor,
    inverse_count: Tensor,
    temperature: Tensor,
    row_offset: int,
    num_rows: int,
) -> tuple[Tensor, Tensor]:
    if not num_rows:
        return _row_loss_shapes(u_all, ids, inverse_count, temperature, row_offset, num_rows)
    return _kernels(u_all).forward(u_all, ids, inverse_count, temperature, row_offset, num_rows)


def _row_loss_shapes(*arguments: Any) -> tuple[Tensor, Tensor]:
    u_all, _, _, temperature, row_offset, num_rows = arguments
    row_loss, lse, _ = nt_xent.row_loss_shapes(
        u_all, temperature, row_offset, num_rows, decoupled=False, statistics=False
    )
    return row_loss, lse


def _backward(
    grad: Tensor,
    u_all: Tensor,
    lse_all: Tensor,
    ids: Tensor,
    inverse_count: Tensor,
    inv_norm: Tensor,
    z: Tensor,
    temperature: Tensor,
    row_offset: int,
) -> tuple[Tensor, Tensor]:
    if not z.size(0):
        return torch.empty_like(z), torch.zeros_like(temperature)
    return _kernels(u_all).backward(
        grad, u_all, lse_all, ids, inverse_count, inv_norm, z, temperature, row_offset
    )


def _backward_shapes(*arguments: Any) -> tuple[Tensor, Tensor]:
    z, temperature = arguments[6:8]
    return z.new_empty(z.shape), torch.empty_like(temperature)


normalize = define_op(
    "sup_con_normalize(Tensor z, Tensor temperature) -> (Tensor u, Tensor inv_norm)",
    kernel=_normalize,
    shapes=_normalize_shapes,
)
row_loss = define_op(
    "sup_con_row_loss(Tensor u_all, Tensor ids, Tensor inverse_count, Tensor temperature,"
    " SymInt row_offset, SymInt num_rows) -> (Tensor row_loss, Tensor lse)",
    kernel=_row_loss,
    shapes=_row_loss_shapes,
)
# grad: the upstream gradient of every row's loss, [M].
backward = define_op(
    "sup_con_backward(Tensor grad, Tensor u_all, Tensor lse_all, Tensor ids,"
    " Tensor inverse_count, Tensor inv_norm, Tensor z, Tensor temperature, SymInt row_offset)"
    " -> (Tensor grad_z, Tensor grad_temperature)",
    kernel=_backward,
    shapes=_backward_shapes,
)
refuse_gradient_of("sup_con_backward")
