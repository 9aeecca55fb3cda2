"""Launch configurations of the NT-Xent tile kernels: a table per architecture, and the splits."""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor


# Features per program of the gradient, where one tile does not hold them all.
VALUE_BLOCK = 128


class Config(NamedTuple):
    """A tile of block_m rows × block_n keys × block_d features, and how it is compiled.

    block_d below the padded features: the dot runs over blocks of them.
    """

    block_m: int
    block_n: int
    block_d: int
    warps: int
    stages: int
    resident: int = 1  # programs per multiprocessor, by registers and shared memory

    def options(self, padded: int, precision: str) -> dict[str, int | bool | str]:
        """The tile kernels' keyword arguments."""
        whole = self.block_d >= padded
        return {
            "BLOCK_D": self.block_d,
            "WHOLE": whole,
            "EVEN": padded % self.block_d == 0,
            "PRECISION": precision,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


class Plan(NamedTuple):
    config: Config
    splits: int
    precision: str
    symmetric: bool = False


def device_of(tensor: Tensor) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors; (0, 0), 4 for the interpreter's CPU tensors."""
    if not tensor.is_cuda:
        return (0, 0), 4
    properties = torch.cuda.get_device_properties(tensor.device)
    return (properties.major, properties.minor), properties.multi_processor_count


def dot_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: as torch.matmul would, tf32 only where the user allowed it."""
    if dtype != torch.float32:
        return "ieee"
    allowed = torch.backends.cuda.matmul.fp32_precision
    if allowed == "none":
        allowed = torch.backends.fp32_precision
    return "tf32" if allowed == "tf32" else "tf32x3"


def best_splits(row_tiles: int, key_tiles: int, slots: int, limit: int) -> int:
    """The split of the keys whose programs fill whole waves of `slots` best, small ones first."""
    limit = max(1, min(limit, key_tiles))
    return min(
        range(1, limit + 1),
        key=lambda s: (triton.cdiv(row_tiles * s, slots) / s * (1 + s / 64), s),
    )


def _config(kernel: str, capability: tuple[int, int], dtype: torch.dtype, padded: int) -> Config:
    if padded <= 256:
        return Config(32, 32, triton.next_power_of_2(padded), 4, 2)
    return Config(32, 32, 64, 4, 2)


def _plan(kernel: str, u_all: Tensor, rows: int, limit: int) -> Plan:
    total, padded = u_all.shape
    capability, processors = device_of(u_all)
    config = _config(kernel, capability, u_all.dtype, padded)
    splits = best_splits(
        triton.cdiv(rows, config.block_m),
        triton.cdiv(total, config.block_n),
        processors * config.resident,
        limit,
    )
    return Plan(config, splits, dot_precision(u_all.dtype))


def plan_forward(u_all: Tensor, rows: int) -> Plan:
    return _plan("forward", u_all, rows, 16)


def plan_moments(u_all: Tensor, rows: int) -> Plan:
    return _plan("moments", u_all, rows, 16)


def plan_gradient(u_all: Tensor, rows: int) -> Plan:
    return _plan("gradient", u_all, rows, 8)
