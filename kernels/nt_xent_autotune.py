"""With SIMCLR_FAST_AUTOTUNE=1, time every architecture's launch configurations, once per shape.

The fastest is used until the process ends, so results repeat within a process. Another run may
choose another configuration, which rounds differently. Otherwise the table of nt_xent_configs.py
gives the configurations.
"""

import os
import warnings
from collections.abc import Callable
from functools import partial

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from .nt_xent_configs import (
    SYMMETRIC,
    TABLE,
    Plan,
    fits_symmetric,
    gpu_of,
    splits_of,
    table_config,
)

# Read once: os.environ takes the host several microseconds in each launch.
ENABLED = os.environ.get("SIMCLR_FAST_AUTOTUNE") == "1"
_CHOICES: dict[tuple[object, ...], Plan] = {}


def tuned(
    kernel: str, made: Plan, u_all: Tensor, rows: int, launch: Callable[[Plan], object]
) -> Plan:
    """The fastest plan of a kernel. `made` without autotuning, and while a graph is captured."""
    if not ENABLED or not u_all.is_cuda:
        return made
    key = (kernel, made, u_all.device, u_all.dtype, *u_all.shape, rows)
    if key not in _CHOICES:
        if torch.cuda.is_current_stream_capturing():
            return made
        processors = gpu_of(u_all.device).processors
        plans = candidates(kernel, made, u_all.dtype, u_all.size(1), rows, len(u_all), processors)
        _CHOICES[key] = fastest(plans, launch)
    return _CHOICES[key]


def candidates(
    kernel: str,
    made: Plan,
    dtype: torch.dtype,
    padded: int,
    rows: int,
    total: int,
    processors: int,
) -> list[Plan]:
    """`made`, then every architecture's configuration with its splits."""
    plans = [made]
    for capability in TABLE:
        kind = SYMMETRIC[kernel] if made.symmetric else kernel
        config = table_config(kind, capability, dtype, padded)
        if config is None:
            continue
        splits = splits_of(kernel, config, made.symmetric, processors, padded, rows, total)
        if made.symmetric and not fits_symmetric(kernel, config, splits, total, padded):
            continue
        plans.append(Plan(config, splits, made.symmetric))
    return list(dict.fromkeys(plans))


def _milliseconds(step: Callable[[], object]) -> float:
    return triton.testing.do_bench(step, warmup=5, rep=20, return_mode="median")


def fastest(
    plans: list[Plan],
    launch: Callable[[Plan], object],
    milliseconds: Callable[[Callable[[], object]], float] = _milliseconds,
) -> Plan:
    """The fastest of the plans that run with this GPU's resources and free memory.

    If none runs, the first plan, with a warning that gives the cause.
    """
    times: dict[Plan, float] = {}
    failure: Exception | None = None
    for plan in plans:
        try:
            times[plan] = milliseconds(partial(launch, plan))
        except (OutOfResources, PTXASError, torch.OutOfMemoryError) as error:
            # Drop the traceback: its frames hold the tensors of the failed launch.
            failure = error.with_traceback(None)
    if not times:
        warnings.warn(
            f"SIMCLR_FAST_AUTOTUNE=1 could not time any launch configuration ({failure}); the "
            "table's configuration is used.",
            RuntimeWarning,
            stacklevel=2,
        )
        return plans[0]
    return min(times, key=times.__getitem__)
