"""Predict which memory mode fits into a GPU's memory, before anything is run.

Each row of a plan is a simulated step (`simulate`) plus the memory outside the step: the
optimizer's state, the loader's batches, gradient buckets and the CUDA context. Times are roofline
predictions: the sum over operations of max(FLOPs / peak, bytes / bandwidth, launch), divided by an
efficiency. The efficiency is chosen such that plain ResNet-50 on an A100-80GB trains the
2,470 images/s that NVIDIA publishes for it (DeepLearningExamples, ResNet-50 v1.5, mixed precision).
No time here was measured on a GPU.
"""

import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from simclr_fast.augment.dali import dali_bytes
from simclr_fast.large_batch.api import Memory
from simclr_fast.large_batch.simulate import Phase, Phases, Step
from simclr_fast.losses.nt_xent import nt_xent_loss

log = logging.getLogger(__name__)

MICRO_BATCHES = (256, 128, 64, 32)
# Larger values save little, because all recomputed blocks are in memory together.
_KEEP_EVERY = 2
# Bytes of CUDA's context and the libraries' workspaces. The share of memory that is usable despite
# fragmentation.
_CONTEXT = 1.0e9
_USABLE = 0.95
_LAUNCH = 4e-6
# Parts of the out-of-memory messages of the CPU's allocator, CUDA, cuDNN, cuBLAS and DALI.
_EXHAUSTED = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc")
# The fraction of the roofline's speed; see the top of this module.
_EFFICIENCY = 0.58
# Bytes per second of pinned copies over PCIe 4.0 ×16, each way (32 GB/s minus protocol).
_PCIE = 25e9
# Numbers of micro-batches that are simulated. Memory and time of more are extrapolated linearly.
_SIMULATED = (3, 4)


@dataclass(frozen=True)
class Gpu:
    """Peak bfloat16 FLOP/s (dense) and memory bytes/s, from NVIDIA's data sheets."""

    name: str
    flops: float
    bandwidth: float

    def seconds(self, flops: float, moved: float) -> float:
        """The seconds of one operation at peak speed."""
        return max(flops / self.flops, moved / self.bandwidth, _LAUNCH)


# Up to this memory in GB → the GPU for which times are predicted.
_GPUS = (
    (32, Gpu("RTX 4090", 165.2e12, 1.008e12)),
    (60, Gpu("A100 40GB", 312e12, 1.555e12)),
    (math.inf, Gpu("H100 80GB SXM", 989.4e12, 3.35e12)),
)
A100_80GB = Gpu("A100 80GB SXM", 312e12, 2.039e12)


def gpu_of(memory: float) -> Gpu:
    return next(gpu for limit, gpu in _GPUS if memory <= limit * 1e9)


def parse_size(text: str) -> float:
    """The bytes of a size such as "80GB" (10⁹ each), "24GiB" (2³⁰ each), "512MB" or "1.5TB".

    Raises:
        ValueError: the text is not such a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B\s*", text)
    if not match or float(match[1]) == 0:
        raise ValueError(
            f"a size must be a positive number with KB, MB, GB, TB, MiB or GiB, "
            f"such as 80GB or 24GiB, got {text!r}"
        )
    return float(match[1]) * (1024 if match[3] else 1000) ** ("KMGT".index(match[2]) + 1)


@dataclass(frozen=True)
class Setting:
    """One row of a plan, for one rank.

    compute: FLOPs relative to plain. seconds: the predicted time of a step. refusal: why the mode
    cannot run this model, if so.
    """

    memory: Memory
    micro_batch: int | None
    device_bytes: float
    compute: float = 1
    seconds: float = 0
    offload_bytes: float = 0
    keep_every: int = 1
    refusal: str = ""

    @property
    def flags(self) -> str:
        """The options for `simclr-fast pretrain`."""
        parts = [f"--memory {self.memory}"]
        if self.micro_batch is not None:
            parts.append(f"--micro-batch {self.micro_batch}")
        if self.offload_bytes:
            parts.append(f"--offload-gb {math.ceil(self.offload_bytes / 1e8) / 10:g}")
        if self.keep_every > 1:
            parts.append(f"--keep-every {self.keep_every}")
        return " ".join(parts)


@dataclass(frozen=True)
class Workload:
    """A run to plan.

    make: builds the model (encoder and projector). image_size: in pixels. batch_size: images over
    all `ranks`. dtype: that of autocast. state: optimizer tensors per parameter. cuda: whether the
    run is on a GPU, with its operations and overheads.
    """

    make: Callable[[], nn.Module]
    image_size: int
    batch_size: int
    ranks: int = 1
    dtype: torch.dtype | None = None
    state: int = 1
    cuda: bool = True
    gpu: Gpu = _GPUS[-1][1]

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ValueError(f"gpus must be at least 1, got {self.ranks}")
        if self.batch_size < self.ranks:
            raise ValueError(
                f"batch_size must be at least {self.ranks}, the number of ranks, got "
                f"{self.batch_size}"
            )

    @cached_property
    def has_batch_norms(self) -> bool:
        """Whether the model has batch norms; grad-cache is not exact then."""
        with torch.device("meta"):
            modules = self.make().modules()
        return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules)

    @property
    def rows(self) -> int:
        """Views per rank and step."""
        return 2 * -(-self.batch_size // self.ranks)

    def setting(
        self, memory: Memory, micro_batch: int | None = None, keep_every: int = 1
    ) -> Setting:
        """Predict one setting. If it cannot run, `refusal` says why, and numbers are infinite."""
        try:
            phases = self._phases(memory, micro_batch, keep_every)
        except ValueError as error:
            return Setting(memory, micro_batch, math.inf, math.inf, math.inf, refusal=str(error))
        peak = max(p.peak for p in phases.values()) + self.bytes_outside_step(memory)
        return Setting(
            memory,
            micro_batch,
            peak,
            sum(p.flops for p in phases.values()) / (self._per_view * self.rows),
            sum(p.seconds for p in phases.values()) / _EFFICIENCY,
            keep_every=keep_every,
        )

    def offloaded(self, setting: Setting, limit: float) -> Setting:
        """`setting` of lockstep, with just enough block inputs in host memory to fit into `limit`.

        The inputs of the first blocks are moved, one block after the other. If moving all of them
        does not suffice, the result needs more than `limit`.
        """
        phases = self._phases("lockstep", setting.micro_batch)
        outside = self.bytes_outside_step("lockstep")
        blocks = 1 + max(block for kind, block in phases if kind == "forward")
        stored = [phases["forward", block].stored for block in range(blocks)]
        best = setting
        # The input of the first block, the views, is not moved.
        for count in range(2, blocks + 1):
            moved = sum(stored[:count])
            peak = outside + max(
                phase.peak - sum(stored[: _absent(kind, block, count)])
                for (kind, block), phase in phases.items()
            )
            seconds = max(setting.seconds, 2 * moved / _PCIE)
            best = replace(setting, device_bytes=peak, offload_bytes=moved, seconds=seconds)
            if peak <= limit:
                break
        return best

    def bytes_outside_step(self, memory: Memory) -> float:
        """Bytes of parameters, optimizer state, the next views and, on a GPU, of CUDA and DALI."""
        with torch.device("meta"):
            parameters = sum(p.numel() * p.element_size() for p in self.make().parameters())
        # The views of the next batch. The step counts those of this one.
        views = self.rows * 3 * self.image_size**2 * (2 if self.dtype else 4)
        buckets = self.ranks > 1 and memory != "lockstep"
        found = parameters * (self.state + buckets) + views
        return found + _CONTEXT + dali_bytes(self.image_size) if self.cuda else found

    @property
    def _step(self) -> Step:
        shape = (3, self.image_size, self.image_size)
        return Step(self.make, shape, _loss, self.dtype, self.cuda, self.gpu.seconds)

    @property
    def _per_view(self) -> float:
        phases = _cached(self._step, "plain", 8)
        return sum(p.flops for p in phases.values()) / 8

    def _phases(self, memory: Memory, micro_batch: int | None, keep_every: int = 1) -> Phases:
        if memory in ("plain", "replay") or micro_batch is None:
            return _cached(self._step, memory, self.rows)
        few, more = _SIMULATED
        how = (micro_batch, keep_every)
        if self.rows <= more * micro_batch:
            return _cached(self._step, memory, self.rows, *how)
        one = _cached(self._step, memory, few * micro_batch, *how)
        two = _cached(self._step, memory, more * micro_batch, *how)
        beyond = (self.rows / micro_batch - few) / (more - few)
        return {key: _line(one[key], two[key], beyond) for key in one}


def _absent(kind: str, block: int, count: int) -> int:
    """How many of the first `count` block inputs are only in host memory while `block` runs.

    The input of `block` is in use. In the backward, that of the block before it is being copied
    back.
    """
    return max(min(count, block if kind == "forward" else block - 1), 0)


_CACHE: dict[Any, Phases] = {}


def _cached(
    step: Step, memory: Memory, rows: int, micro_batch: int | None = None, keep_every: int = 1
) -> Phases:
    how = (memory, rows, micro_batch or rows, keep_every)
    key = (step.make, step.shape, step.dtype, step.cuda, step.clock, how)
    if key not in _CACHE:
        _CACHE[key] = step.run(*how)
    return _CACHE[key]


def _line(one: Phase, two: Phase, beyond: float) -> Phase:
    return Phase(
        *(a + (b - a) * beyond for a, b in zip(vars(one).values(), vars(two).values(), strict=True))
    )


def _loss(outputs: Any) -> Any:
    return nt_xent_loss(outputs[1], return_stats=True)


def settings(work: Workload, limit: float, host: float = 0) -> Iterator[Setting]:
    """All settings, from the least compute to the least memory; grad-cache comes last.

    host: bytes of host memory that this rank may use for offloading.
    """
    yield work.setting("plain")
    yield work.setting("replay")
    sizes = [m for m in MICRO_BATCHES if m < work.rows] or [work.rows]
    for micro_batch in sizes:
        setting = work.setting("lockstep", micro_batch)
        yield setting
        if setting.refusal:
            break
    if host and not setting.refusal and setting.device_bytes > _USABLE * limit:
        for micro_batch in sizes:
            moved = work.offloaded(work.setting("lockstep", micro_batch), _USABLE * limit)
            if moved.offload_bytes <= host:
                yield moved
    if not setting.refusal:
        yield from (work.setting("lockstep", m, _KEEP_EVERY) for m in sizes)
    yield work.setting("grad-cache", sizes[0])


def fits(setting: Setting, limit: float) -> bool:
    return setting.device_bytes <= _USABLE * limit


def exact(work: Workload, setting: Setting) -> bool:
    """Whether the gradient of `setting` is that of the whole batch."""
    return setting.memory != "grad-cache" or not work.has_batch_norms


class OutOfMemory(MemoryError):
    """A step did not fit into memory. The message has rank, step and the flags to try next."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the memory of the GPU or the CPU is exhausted."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _EXHAUSTED)
    )


def choose(work: Workload, limit: float) -> Setting:
    """The first setting that is predicted to fit. If the model cannot be simulated, plain.

    Raises:
        ValueError: nothing fits without offloading, which is never chosen automatically.
    """
    least = None
    for setting in settings(work, limit):
        if not exact(work, setting):
            continue
        if fits(setting, limit):
            return setting
        if least is None or setting.device_bytes < least.device_bytes:
            least = setting
    assert least is not None
    if math.isinf(least.device_bytes):
        log.warning("memory='auto' chose plain: %s", least.refusal)
        return Setting("plain", None, math.inf)
    raise ValueError(
        f"batch_size {work.batch_size} fits in no mode: {least.flags} needs "
        f"{least.device_bytes / 1e9:.1f} GB, but {limit / 1e9:.1f} are free; simclr-fast plan "
        "--host-memory finds settings that offload to RAM"
    )


def next_smaller(
    work: Workload, memory: Memory, micro_batch: int | None, keep_every: int = 1
) -> Setting | None:
    """The setting to try after one did not fit: the next that needs at least 10% less memory."""
    size = micro_batch or (MICRO_BATCHES[0] if memory == "lockstep" else None)
    now = work.setting(memory, size, keep_every)
    for setting in settings(work, 0):
        if setting.device_bytes < 0.9 * now.device_bytes and exact(work, setting):
            return setting
    # Most of the memory is block inputs, which smaller micro-batches do not reduce: offload half.
    moved = work.offloaded(work.setting("lockstep", MICRO_BATCHES[0]), 0.6 * now.device_bytes)
    return moved if moved.device_bytes < 0.9 * now.device_bytes else None


@contextmanager
def out_of_memory(
    work: Workload, chosen: dict[str, Any], where: Callable[[], str]
) -> Iterator[None]:
    """A context that turns out-of-memory errors into OutOfMemory, with advice.

    chosen: the options of `LargeBatch`. where: returns the rank and step as text.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        used = {name: chosen[name] for name in ("memory", "micro_batch", "keep_every")}
        found = next_smaller(work, **used)
        now = Setting(**used, device_bytes=0, offload_bytes=1e9 * chosen["offload_gb"]).flags
        advice = "no setting needs less: use more GPUs or a smaller batch"
        if found is not None:
            needs = f"{found.device_bytes / 1e9:.1f} GB per rank"
            advice = f"next: {found.flags} (predicted {needs})"
        raise OutOfMemory(f"{where()}: out of memory with {now}; {advice}") from error
