"""Launch configurations of the NT-Xent tile kernels: a table per architecture, and the splits."""

from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .normalize import cdiv

# Padded features of the gradient that a program can hold while its dot products run over blocks of
# features.
VALUE_BLOCK = 128
# Floats per row that the symmetric forward may keep, as a multiple of the features; and with
# statistics, which keep three planes.
SYMMETRIC_SLOTS = 3
SYMMETRIC_SLOTS_STATISTICS = 6
# The keys of a row tile are cut into at most this many parts.
LOSS_SPLITS = 16
GRADIENT_SPLITS = 8
# See best_splits.
WAVES = 4


class Config(NamedTuple):
    """A tile of block_m rows × block_n keys × block_d features, and how it is compiled.

    If block_d is below the padded features, the dot product runs over blocks of features.
    """

    block_m: int
    block_n: int
    block_d: int
    warps: int
    stages: int
    # Programs per multiprocessor: it sets the registers that the compiler may use.
    resident: int = 1

    def options(self, padded: int, precision: str) -> dict[str, int | str]:
        """The tile kernels' keyword arguments, without BLOCK_N."""
        options: dict[str, int | str] = {
            "PADDED": padded,
            "BLOCK_M": self.block_m,
            "BLOCK_D": self.block_d,
            "PRECISION": precision,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }
        if self.resident > 1:
            options["maxnreg"] = 65536 // (32 * self.warps * self.resident) // 8 * 8
        return options

    def holds_gradient(self, padded: int) -> bool:
        """Whether one program has room for all features of its rows' gradient."""
        return self.block_d >= padded or padded <= VALUE_BLOCK


class Plan(NamedTuple):
    config: Config
    splits: int
    symmetric: bool = False


Configs = dict[str, tuple[Config | None, ...]]
# Statistics and classes in float32 are rare: one configuration for all numbers of features.
_FLOAT32_SUMS = (Config(64, 32, 32, 8, 2),) * 5
# Each kernel has five configurations: for padded features up to each of these, and for more.
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
    "symmetric_moments": (
        Config(64, 64, 64, 4, 2, 2),
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
    "symmetric_moments": (
        Config(128, 128, 64, 8, 2),
        Config(128, 128, 128, 8, 2),
        Config(128, 128, 256, 8, 2),
        None,
        None,
    ),
    "gradient": (
        Config(128, 64, 64, 8, 2, 2),
        Config(128, 128, 128, 8, 2),
        Config(128, 64, 256, 8, 2),
        Config(128, 64, 64, 8, 2),
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
    # Timed on an H200 at 4096 pairs. The second spills up to 128 bytes, and takes half the time of
    # the fastest without spills.
    "float32 gradient": (
        Config(64, 32, 32, 8, 2),
        Config(128, 64, 32, 8, 2),
        *(Config(128, 64, 32, 8, 3),) * 3,
    ),
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
    # Larger tiles spill.
    "symmetric": (
        Config(64, 64, 64, 4, 2, 2),
        Config(64, 64, 128, 4, 2, 2),
        None,
        None,
        None,
    ),
    "symmetric_moments": (
        Config(64, 64, 64, 8, 2),
        Config(64, 64, 128, 8, 2),
        None,
        None,
        None,
    ),
    "gradient": (
        Config(128, 32, 64, 8, 3, 2),
        Config(128, 64, 128, 8, 2),
        Config(128, 64, 256, 8, 2),
        Config(64, 32, 512, 8, 2),
        Config(128, 64, 64, 8, 2),
    ),
    "sums": (
        Config(128, 64, 64, 8, 3),
        Config(128, 64, 128, 8, 2),
        Config(128, 64, 256, 8, 3),
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
    # Triton 3.6 takes all of the tensor memory for it, and spills with eight warps.
    "float32 gradient": (Config(64, 32, 32, 4, 2),) * 5,
    "float32 sums": _FLOAT32_SUMS,
    "float32 class_gradient": (Config(64, 16, 32, 4, 2), *_FLOAT32_SUMS[1:]),
}
# GPUs with less shared memory. ptxas spills there with 32 keys in the gradient, and with eight
# warps in the symmetric forward (Triton 3.6, sm_89).
_CONSUMER_HMMA: Configs = _HMMA | {
    "symmetric": (*_HMMA["symmetric"][:2], Config(64, 64, 256, 4, 2), None, None),
    "gradient": (*_HMMA["gradient"][:2], Config(64, 64, 256, 8, 2), *_HMMA["gradient"][3:]),
}
# On sm_120 and sm_121 ptxas spills with these rows of the table above.
_BLACKWELL_HMMA: Configs = _CONSUMER_HMMA | {
    "forward": (
        Config(128, 64, 64, 4, 3, 2),
        Config(128, 32, 128, 4, 3, 2),
        Config(64, 64, 256, 4, 2),
        *_HMMA["forward"][3:],
    ),
    "sums": (
        _HMMA["sums"][0],
        Config(64, 32, 128, 4, 3),
        Config(64, 32, 256, 8, 2),
        *_HMMA["sums"][3:],
    ),
    "gradient": (Config(64, 64, 64, 4, 2, 3), *_CONSUMER_HMMA["gradient"][1:]),
    "float32 gradient": (Config(64, 32, 32, 8, 3), *_HMMA["float32 gradient"][1:]),
    "float32 sums": (Config(64, 32, 32, 8, 2), *(Config(64, 32, 32, 8, 3),) * 4),
    "float32 class_gradient": (Config(64, 16, 32, 8, 2),) * 5,
}
TABLE = {
    (8, 0): _HMMA,
    (8, 6): _CONSUMER_HMMA,
    (8, 9): _CONSUMER_HMMA,
    (9, 0): _HOPPER,
    (10, 0): _BLACKWELL,
    (12, 0): _BLACKWELL_HMMA,
}
# Kernel → the one that gives the same results with half as many dot products.
SYMMETRIC = {"forward": "symmetric", "moments": "symmetric_moments"}
# For a GPU that the table does not list.
SMALLEST = Config(32, 32, 32, 4, 2)


def table_config(
    kernel: str, capability: tuple[int, int], dtype: torch.dtype, padded: int
) -> Config | None:
    """The configuration of a kernel for û of a dtype.

    kernel: "forward" and "moments" (without and with statistics), "symmetric" and
        "symmetric_moments" (see SYMMETRIC), "gradient", "class_sums", "class_gradient".

    A GPU that the table does not list takes the row of its family (the same major version), or
    the smallest configuration. The result is None only for symmetric kernels, where they are
    slower or do not fit.
    """
    family = [key for key in TABLE if key[0] == capability[0] and key <= capability]
    if not family:
        return None if kernel in SYMMETRIC.values() else _fit(SMALLEST, padded)
    if kernel in ("moments", "class_sums"):
        kernel = "sums"
    if dtype == torch.float32:
        kernel = f"float32 {kernel}"
    configs = TABLE[max(family)].get(kernel, (None,) * 5)
    config = configs[sum(padded > limit for limit in LIMITS)]
    return None if config is None else _fit(config, padded)


def _fit(config: Config, padded: int) -> Config:
    """Make the block of features no larger than the features need."""
    return config._replace(block_d=min(config.block_d, triton.next_power_of_2(padded)))


def dot_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies. float32 becomes tf32 only if the user allowed it for torch.matmul."""
    if dtype != torch.float32:
        return "ieee"
    allowed = torch.backends.cuda.matmul.fp32_precision
    if allowed == "none":
        allowed = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if allowed == "tf32" else "tf32x3"


def best_splits(row_tiles: int, key_tiles: int, slots: int, limit: int) -> int:
    """The number of splits of the keys that takes the fewest steps.

    The GPU runs `slots` programs at a time. Steps: the waves of programs that run one after the
    other, times the key tiles of a program. There are at most WAVES · slots programs, so that the
    memory of partial sums is bounded; or one split.
    """

    def steps(splits: int) -> int:
        # Two more for a program's first loads and for writing its results.
        return cdiv(row_tiles * splits, slots) * (cdiv(key_tiles, splits) + 2)

    limit = max(1, min(limit, key_tiles, WAVES * slots // row_tiles))
    return min(range(1, limit + 1), key=steps)


def fits_symmetric(kernel: str, config: Config, splits: int, total: int, padded: int) -> bool:
    """Whether the rows of each view are whole tiles, and the slots fit SYMMETRIC_SLOTS."""
    if total % (2 * config.block_m):
        return False
    half = total // config.block_m // 2
    if kernel == "forward":
        return splits + half <= SYMMETRIC_SLOTS * padded
    return 3 * (2 * splits + half) <= SYMMETRIC_SLOTS_STATISTICS * padded


def splits_of(
    kernel: str,
    config: Config,
    symmetric: bool,
    processors: int,
    padded: int,
    rows: int,
    total: int,
) -> int:
    """Into how many parts the keys of a row tile are cut."""
    slots = processors * config.resident
    if symmetric:
        tiles = cdiv(total, config.block_m)
        return best_splits(tiles, tiles // 2 + 1, slots, LOSS_SPLITS)
    gradient = kernel in ("gradient", "class_gradient")
    if gradient and not config.holds_gradient(padded):
        return 1
    # The forward's tiles are of one view's rows and one view's keys.
    views = 2 if kernel in SYMMETRIC else 1
    return best_splits(
        views**2 * cdiv(rows // views, config.block_m),
        cdiv(total // views, config.block_n),
        slots,
        GRADIENT_SPLITS if gradient else LOSS_SPLITS,
    )


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
    """Configuration and splits of a kernel of `table_config`, symmetric where that is possible.

    kernel: "forward", "moments", "gradient", "class_sums" or "class_gradient".
    """
    sizes = processors, padded, rows, total
    if kernel in SYMMETRIC and rows == total:
        config = table_config(SYMMETRIC[kernel], capability, dtype, padded)
        if config is not None:
            splits = splits_of(kernel, config, True, *sizes)
            if fits_symmetric(kernel, config, splits, total, padded):
                return Plan(config, splits, symmetric=True)
    config = table_config(kernel, capability, dtype, padded)
    assert config is not None
    return Plan(config, splits_of(kernel, config, False, *sizes))


def chunk_rows(u_all: Tensor) -> int:
    """Rows of W that `weight_tiles_kernel` writes at a time: the bytes of the float32 gradient."""
    return 128 * cdiv(4 * u_all.size(1) // u_all.element_size(), 128)


class Gpu(NamedTuple):
    capability: tuple[int, int]
    # Streaming multiprocessors.
    processors: int


@cache
def gpu_of(device: torch.device) -> Gpu:
    properties = torch.cuda.get_device_properties(device)
    return Gpu((properties.major, properties.minor), properties.multi_processor_count)


def plan_for(kernel: str, u_all: Tensor, rows: int) -> Plan:
    """`plan` for the GPU that holds û. The interpreter's tensors count as on an unlisted GPU."""
    total, padded = u_all.shape
    capability, processors = gpu_of(u_all.device) if u_all.is_cuda else ((0, 0), 4)
    return plan(kernel, capability, processors, u_all.dtype, padded, rows, total)
