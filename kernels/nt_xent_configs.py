"""Launch configurations of the NT-Xent tile kernels: a table per architecture, and the splits."""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

# Features per program of the gradient, where one tile does not hold them all.
VALUE_BLOCK = 128
# Floats per row that the symmetric forward may keep, as a multiple of the features.
SYMMETRIC_SLOTS = 3
LOSS_SPLITS = 16
GRADIENT_SPLITS = 8
WAVES = 4


class Config(NamedTuple):
    """A tile of block_m rows × block_n keys × block_d features, and how it is compiled.

    block_d below the padded features: the dot runs over blocks of them.
    """

    block_m: int
    block_n: int
    block_d: int
    warps: int
    stages: int
    # Programs per multiprocessor: it sets the registers that the compiler may use.
    resident: int = 1

    def options(self, padded: int, precision: str) -> dict[str, int | bool | str]:
        """The tile kernels' keyword arguments."""
        options: dict[str, int | bool | str] = {
            "BLOCK_D": self.block_d,
            "WHOLE": self.block_d >= padded,
            "EVEN": padded % self.block_d == 0,
            "PRECISION": precision,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }
        if self.resident > 1:
            options["maxnreg"] = 65536 // (32 * self.warps * self.resident) // 8 * 8
        return options


class Plan(NamedTuple):
    config: Config
    splits: int
    symmetric: bool = False


Configs = dict[str, tuple[Config | None, ...]]
# Of the statistics and the classes in float32, asked for rarely: one for all features.
_FLOAT32_SUMS = (Config(64, 32, 32, 8, 2),) * 5
# Padded features up to 64, 128, 256, 512, and more.
LIMITS = (64, 128, 256, 512)
_HMMA: Configs = {
    "forward": (
        Config(128, 64, 64, 4, 3, 2),
        Config(128, 64, 128, 8, 2, 2),
        Config(64, 64, 256, 8, 2),
        Config(128, 64, 64, 8, 3),
        Config(128, 64, 64, 8, 3),
    ),
    "symmetric": (
        Config(64, 64, 64, 4, 2, 3),
        Config(64, 64, 128, 4, 2, 2),
        Config(64, 64, 256, 8, 2),
        None,
        None,
    ),
    "gradient": (
        Config(64, 64, 64, 4, 3, 3),
        Config(64, 64, 128, 8, 2, 2),
        Config(64, 32, 256, 8, 2),
        Config(32, 32, 512, 8, 2),
        Config(64, 64, 64, 8, 2),
    ),
    "sums": (
        Config(64, 64, 64, 4, 3, 2),
        Config(128, 32, 128, 4, 2),
        Config(64, 64, 256, 8, 2),
        Config(128, 64, 64, 8, 2),
        Config(128, 64, 64, 8, 2),
    ),
    "class_gradient": (
        Config(64, 32, 64, 4, 2),
        Config(64, 64, 128, 8, 2),
        Config(64, 32, 256, 8, 2),
        Config(32, 32, 512, 8, 2),
        Config(64, 32, 64, 8, 2),
    ),
    "float32 forward": (Config(64, 64, 32, 8, 2),) * 5,
    "float32 gradient": (Config(64, 32, 32, 8, 2),) * 5,
    "float32 sums": _FLOAT32_SUMS,
    "float32 class_gradient": _FLOAT32_SUMS,
}
_HOPPER: Configs = {
    "forward": (
        Config(128, 128, 64, 8, 3, 2),
        Config(256, 64, 128, 8, 2, 2),
        Config(128, 64, 256, 8, 2),
        Config(128, 32, 512, 8, 2),
        Config(128, 128, 64, 8, 3),
    ),
    "symmetric": (
        Config(128, 128, 64, 4, 2, 2),
        Config(128, 128, 128, 4, 2, 2),
        Config(128, 128, 256, 8, 2),
        None,
        None,
    ),
    "gradient": (
        Config(128, 64, 64, 8, 3, 2),
        Config(128, 128, 128, 8, 2),
        Config(128, 64, 256, 8, 2),
        Config(64, 16, 512, 8, 2),
        Config(128, 64, 64, 8, 2),
    ),
    "sums": (
        Config(128, 64, 64, 8, 3, 2),
        Config(128, 64, 128, 8, 2, 2),
        Config(128, 64, 256, 8, 2),
        Config(128, 32, 512, 8, 2),
        Config(128, 64, 64, 8, 3),
    ),
    "class_gradient": (
        Config(128, 64, 64, 8, 2),
        Config(128, 64, 128, 8, 2),
        Config(64, 64, 256, 8, 2),
        Config(128, 64, 64, 8, 2),
        Config(128, 64, 64, 8, 2),
    ),
    "float32 forward": (Config(64, 64, 64, 4, 2, 2), *(Config(128, 64, 32, 8, 3),) * 4),
    "float32 gradient": (Config(64, 32, 32, 8, 2),) * 5,
    "float32 sums": _FLOAT32_SUMS,
    "float32 class_gradient": _FLOAT32_SUMS,
}
_BLACKWELL: Configs = {
    "forward": (
        Config(128, 128, 64, 8, 3),
        Config(128, 128, 128, 8, 2),
        Config(128, 64, 256, 8, 2),
        Config(128, 32, 512, 8, 2),
        Config(128, 128, 64, 8, 3),
    ),
    "symmetric": (
        Config(128, 128, 64, 8, 2),
        Config(128, 128, 128, 8, 2),
        None,
        None,
        None,
    ),
    "gradient": (
        Config(128, 64, 64, 8, 3, 2),
        Config(128, 64, 128, 8, 2),
        Config(128, 64, 256, 8, 2),
        Config(64, 32, 512, 8, 2),
        Config(128, 64, 64, 8, 2),
    ),
    "sums": (
        Config(128, 64, 64, 8, 3),
        Config(128, 64, 128, 8, 2),
        Config(128, 64, 256, 8, 2),
        Config(128, 32, 512, 8, 2),
        Config(128, 64, 64, 8, 3),
    ),
    "class_gradient": (
        Config(128, 64, 64, 8, 2),
        Config(128, 64, 128, 8, 2),
        Config(128, 64, 256, 8, 2),
        Config(64, 32, 512, 8, 2),
        Config(64, 64, 64, 8, 2),
    ),
    "float32 forward": (Config(64, 64, 32, 8, 2, 2),) * 5,
    "float32 gradient": (Config(64, 32, 32, 8, 2, 2),) * 5,
    "float32 sums": _FLOAT32_SUMS,
    "float32 class_gradient": _FLOAT32_SUMS,
}
# ptxas spills the rows above there.
_BLACKWELL_HMMA: Configs = _HMMA | {
    "float32 sums": (Config(64, 32, 32, 8, 3),) * 5,
    "float32 class_gradient": (Config(64, 16, 32, 8, 2),) * 5,
}
TABLE = {
    (8, 0): _HMMA,
    (8, 6): _HMMA,
    (8, 9): _HMMA,
    (9, 0): _HOPPER,
    (10, 0): _BLACKWELL,
    (12, 0): _BLACKWELL_HMMA,
}
# For a GPU that the table does not list.
SMALLEST = Config(32, 32, 32, 4, 2)


def table_config(
    kernel: str, capability: tuple[int, int], dtype: torch.dtype, padded: int
) -> Config | None:
    """The configuration of a kernel for û of a dtype.

    kernel: "forward", "symmetric", "gradient", "moments", "class_sums" or "class_gradient".

    A GPU that the table does not list takes the row of its family (the same major version), or
    the smallest configuration. None only for "symmetric": not worth it, or not possible, here.
    """
    family = [key for key in TABLE if key[0] == capability[0] and key <= capability]
    if not family:
        return None if kernel == "symmetric" else _fit(SMALLEST, padded)
    if kernel in ("moments", "class_sums"):
        kernel = "sums"
    if dtype == torch.float32:
        kernel = f"float32 {kernel}"
    configs = TABLE[max(family)].get(kernel, (None,) * 5)
    config = configs[sum(padded > limit for limit in LIMITS)]
    return None if config is None else _fit(config, padded)


def _fit(config: Config, padded: int) -> Config:
    """Fewer features than the block holds: a smaller block."""
    return config._replace(block_d=min(config.block_d, triton.next_power_of_2(padded)))


def dot_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: tf32 for float32 only where the user allowed torch.matmul the same."""
    if dtype != torch.float32:
        return "ieee"
    allowed = torch.backends.cuda.matmul.fp32_precision
    if allowed == "none":
        allowed = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if allowed == "tf32" else "tf32x3"


def best_splits(row_tiles: int, key_tiles: int, slots: int, limit: int) -> int:
    """The split of the keys that takes the fewest steps: waves of `slots` programs × key tiles.

    Partial sums are kept for at most WAVES · slots tiles of rows, or once per row.
    """

    def steps(splits: int) -> int:
        # Two more: a program's first loads and its results.
        return triton.cdiv(row_tiles * splits, slots) * (triton.cdiv(key_tiles, splits) + 2)

    limit = max(1, min(limit, key_tiles, WAVES * slots // row_tiles))
    return min(range(1, limit + 1), key=steps)


@lru_cache(maxsize=256)
def plan(
    kernel: str,
    capability: tuple[int, int],
    processors: int,
    dtype: torch.dtype,
    padded: int,
    rows: int,
    total: int,
) -> Plan:
    """Configuration and splits of a kernel of `table_config`; "forward" may become symmetric."""
    if kernel == "forward" and rows == total:
        config = table_config("symmetric", capability, dtype, padded)
        if config is not None and total % config.block_m == 0:
            tiles = total // config.block_m
            slots = processors * config.resident
            splits = best_splits(tiles, tiles // 2 + 1, slots, LOSS_SPLITS)
            if splits + tiles // 2 <= SYMMETRIC_SLOTS * padded:
                return Plan(config, splits, symmetric=True)
    config = table_config(kernel, capability, dtype, padded)
    assert config is not None
    # The moments' tiles are of one view's rows and one view's keys.
    views = 2 if kernel == "moments" else 1
    splits = best_splits(
        views**2 * triton.cdiv(rows // views, config.block_m),
        triton.cdiv(total // views, config.block_n),
        processors * config.resident,
        GRADIENT_SPLITS if "gradient" in kernel else LOSS_SPLITS,
    )
    return Plan(config, splits)


def plan_for(kernel: str, u_all: Tensor, rows: int) -> Plan:
    """`plan` for the GPU that holds û; the interpreter's tensors count as an unlisted one."""
    total, padded = u_all.shape
    capability, processors = (0, 0), 4
    if u_all.is_cuda:
        properties = torch.cuda.get_device_properties(u_all.device)
        capability = (properties.major, properties.minor)
        processors = properties.multi_processor_count
    return plan(kernel, capability, processors, u_all.dtype, padded, rows, total)
