"""Predict which memory mode fits into a GPU's memory, before anything is run.

Plain, replay and grad-cache are simulated steps (`simulate`). Lockstep has many schedules: `search`
finds the one that costs the least in the given memory, by counting (`pricing`). To this comes what
lies outside the step: the optimizer's state, the loader's batches, gradient buckets and the CUDA
context.

Times are predictions: the sum over operations of max(FLOPs / rate, bytes / rate, launch). Products
are assumed to reach 42% of peak FLOP/s, and operations that only move bytes 56% of the memory's
bandwidth. These shares are those of plain ResNet-50 in bfloat16 on an H200 with torch 2.11, where
`benchmarks/large_batch_gpu.py` measures them; other GPUs are assumed to reach the same. Copies to
host memory and back take `Gpu.bus` bytes/s in each direction, and overlap with the operations of
their own pass only.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from simclr_fast.augment.dali import dali_bytes
from simclr_fast.large_batch.api import Memory, plan_with
from simclr_fast.large_batch.pricing import Clock, Price, Prices
from simclr_fast.large_batch.program import Program
from simclr_fast.large_batch.schedule import CHOICES, Schedule, Stage
from simclr_fast.large_batch.search import Search
from simclr_fast.large_batch.simulate import Phase, Phases, Step
from simclr_fast.large_batch.store import accesses
from simclr_fast.large_batch.transfers import Transfers, transfers
from simclr_fast.losses.nt_xent import nt_xent_loss
from simclr_fast.utils.device import allocator_advice
from simclr_fast.utils.sizes import gigabytes

log = logging.getLogger(__name__)

MICRO_BATCHES = (256, 128, 64, 32)
# The work memory of a micro-batch is at most this share of the GPU's. It holds up to this many
# tensors as large as the model's largest.
_WORK_SHARE, _WORK_TENSORS = 0.05, 8
# How often the planner looks again for a schedule that fits.
_TRIES = 6
# Shares of the host's memory with which schedules are searched: copies take time too.
_HOST_SHARES = (1, 0.5)
# Bytes of host memory per rank that are tried when nothing fits.
_HOST_SIZES = tuple(n * 1e9 for n in (8, 16, 24, 32, 48, 64, 96, 128, 192, 256))
# Bytes of CUDA's context and the libraries' workspaces. The share of memory that is usable despite
# fragmentation: on an H200 torch's allocator reserved 12% more than plain ResNet-50 had allocated,
# and lockstep in 18 GiB needed 11% more.
_CONTEXT = 1.0e9
USABLE = 0.9
# Parts of the out-of-memory messages of the CPU's allocator, CUDA, cuDNN, cuBLAS and DALI.
_EXHAUSTED = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc")
# The shares of peak FLOP/s and of bandwidth that are reached; see the top of this module.
FLOPS_SHARE, BANDWIDTH_SHARE = 0.42, 0.56
# Numbers of micro-batches of grad-cache that are simulated. More are extrapolated linearly.
SIMULATED = (3, 4)


# 70% of what PCIe ×16 carries in one direction: 31.5 GB/s in version 4, 63 in version 5.
PCIE4, PCIE5 = 22e9, 44e9


@dataclass(frozen=True)
class Gpu:
    """Peak bfloat16 FLOP/s (dense) and memory bytes/s, from NVIDIA's data sheets.

    bus: bytes/s of copies from and to pinned host memory, in each direction; assumed. launch:
    seconds of the shortest operation, which is the host's time for it in eager PyTorch. It differs
    between hosts: a virtual machine with an H200 took 45e-6.
    """

    name: str
    flops: float
    bandwidth: float
    bus: float = PCIE4
    launch: float = 15e-6

    def seconds(self, flops: float, moved: float) -> float:
        """The seconds of one operation."""
        computing = flops / (FLOPS_SHARE * self.flops)
        return max(computing, moved / (BANDWIDTH_SHARE * self.bandwidth), self.launch)


# Up to this memory in GB → the GPU for which times are predicted.
_GPUS = (
    (32, Gpu("RTX 4090", 165.2e12, 1.008e12)),
    (60, Gpu("A100 40GB", 312e12, 1.555e12)),
    (math.inf, Gpu("H100 80GB SXM", 989.4e12, 3.35e12, PCIE5)),
)
A100_80GB = Gpu("A100 80GB SXM", 312e12, 2.039e12)
# What runs on the CPU is planned with the rates of one core with AVX-512, in float32.
CPU_CORE = Gpu("CPU core", 140e9, 9e9, launch=12e-6)


def gpu_of(memory: float) -> Gpu:
    return next(gpu for limit, gpu in _GPUS if memory <= limit * 1e9)


@dataclass(frozen=True)
class Setting:
    """One row of a plan, for one rank.

    device_bytes: the most bytes of the GPU's memory. compute: FLOPs relative to plain. seconds: the
    predicted time of a step. refusal: why the mode cannot run this model, if so.
    For lockstep: schedule, what it keeps. host_bytes: kept values in host memory. view_bytes: views
    in host memory, of this batch and the next. bus_bytes: copied per step, both directions
    together. phases: the most bytes of the GPU's memory in the forward and in the backward.
    """

    memory: Memory
    micro_batch: int | None
    device_bytes: float
    compute: float = 1
    seconds: float = 0
    refusal: str = ""
    schedule: Schedule | None = None
    host_bytes: float = 0
    view_bytes: float = 0
    bus_bytes: float = 0
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def flags(self) -> str:
        """The options for `simclr-fast pretrain`, for a GPU with the memory that was planned."""
        parts = [f"--memory {self.memory}"]
        if self.micro_batch is not None:
            parts.append(f"--micro-batch {self.micro_batch}")
        return " ".join(parts)


@dataclass(frozen=True)
class Workload:
    """A run to plan.

    make: builds the model (encoder and projector). shape: of a view. batch_size: images over all
    `ranks`. dtype: that of autocast. state: tensors per parameter beside it, such as the
    optimizer's. cuda: whether the run is on a GPU, with its operations and overheads. loader:
    whether our loader makes the views; it needs memory, and lockstep lets it keep them on the host.
    refused: modes that the run cannot use, and why. compile: whether lockstep compiles; the other
    modes are predicted as without. captured: whether plain replays its steps, all but a few, as a
    CUDA graph, whose activations lie beside those of the few.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch_size: int
    ranks: int = 1
    dtype: torch.dtype | None = None
    state: int = 1
    cuda: bool = True
    gpu: Gpu = _GPUS[-1][1]
    loader: bool = True
    refused: Mapping[str, str] = field(default_factory=dict)
    compile: bool = False
    captured: bool = False

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
        modules = self._module.modules()
        return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules)

    @cached_property
    def _module(self) -> nn.Module:
        with torch.device("meta"):
            return self.make()

    @property
    def images(self) -> int:
        """Images per rank and step, on the rank with the most."""
        return -(-self.batch_size // self.ranks)

    @property
    def rows(self) -> int:
        """Views per rank and step."""
        return 2 * self.images

    def setting(self, memory: Memory, micro_batch: int | None = None) -> Setting:
        """Predict plain, replay or grad-cache. If it cannot run, `refusal` says why."""
        try:
            self._refuse(memory)
            phases = self._phases(memory, micro_batch)
        except ValueError as error:
            return _refused(memory, error)
        peak = max(p.peak for p in phases.values())
        if self.captured and memory == "plain":
            peak *= 2
        peak += self.bytes_outside_step(memory)
        return Setting(
            memory,
            micro_batch,
            peak,
            sum(p.flops for p in phases.values()) / (self.flops_per_view * self.rows),
            sum(p.seconds for p in phases.values()),
        )

    def lockstep(self, memory: float, host: float = 0, micro_batch: int | None = None) -> Setting:
        """Predict the cheapest schedule of lockstep for `memory` bytes of the GPU.

        host: bytes of host memory that this rank may use beside the views. If nothing fits, the
        result needs the least memory that was found. If lockstep cannot run the model, `refusal`
        says why.
        """
        try:
            self._refuse("lockstep")
            search = _search(self, micro_batch or self._micro_batch(memory))
        except ValueError as error:
            return _refused("lockstep", error)
        limit = USABLE * memory
        if (setting := _everything(self, search, limit / 4)) is not None:
            return setting
        found = [
            setting
            for share in (*_HOST_SHARES, 0)
            if (host or not share)
            and (setting := _planned(self, search, limit, share * host)) is not None
        ]
        if found:
            return min(found, key=self._cost_of)
        return self._least(search)

    def _refuse(self, memory: Memory) -> None:
        if memory in self.refused:
            raise ValueError(self.refused[memory])

    def simulated(self, setting: Setting) -> Setting:
        """A setting of lockstep with bytes and compute as a whole step on tensors without data.

        This takes minutes for thousands of views.
        """
        assert setting.schedule is not None
        phases = _cached(self._step, "lockstep", self.rows, None, setting.schedule)
        peak = max(p.peak for p in phases.values())
        # The simulation has everything on one device: host memory, and the views.
        peak -= setting.host_bytes + (self.view_bytes if _on_host(self) else 0)
        flops = sum(p.flops for p in phases.values())
        return replace(
            setting,
            device_bytes=peak + self.bytes_outside_step("lockstep"),
            compute=flops / (self.flops_per_view * self.rows),
        )

    def bytes_outside_step(self, memory: Memory) -> float:
        """Bytes of optimizer state, the next views and, on a GPU, of CUDA and DALI."""
        parameters = sum(p.nbytes for p in self._module.parameters())
        found: float = parameters * (self.state + (self.ranks > 1 and memory != "lockstep"))
        # The next batch. The step counts the views of this one, and lockstep's planner neither.
        if self.loader and memory != "lockstep":
            found += self.view_bytes
        if self.cuda:
            found += _CONTEXT
            if self.loader:
                found += dali_bytes(self.shape[-1])
        return found

    @property
    def model_bytes(self) -> float:
        """Bytes of parameters and buffers."""
        return sum(t.nbytes for t in (*self._module.parameters(), *self._module.buffers()))

    @property
    def view_bytes(self) -> float:
        """Bytes of the views of a batch."""
        return self.rows * math.prod(self.shape) * (2 if self.dtype else 4)

    def _micro_batch(self, memory: float) -> int:
        work = _WORK_SHARE * memory / _WORK_TENSORS
        largest = _prices(self).at(1).largest
        fitting = (m for m in MICRO_BATCHES if m * largest <= work)
        return min(next(fitting, MICRO_BATCHES[-1]), self.images)

    def _least(self, search: Search) -> Setting:
        """The schedule that needs the least, however much that is, without host memory."""
        smallest = min(MICRO_BATCHES[-1], self.images)
        if search.prices.micro_batch > smallest:
            search = _search(self, smallest)
        factor = 1.0
        while (price := search.best(factor * search.least())) is None:
            factor *= 1.02
        price = search.prices.in_detail(price.schedule)
        room = _split(self, search.prices.micro_batch) * price.kept
        return _describe(self, search, price, room, Transfers())

    def cost(self, flops: float, seconds: float) -> float:
        """What the search makes small: on the CPU the time, on GPUs also as much again for FLOPs.

        Predicted times of GPUs are up to a quarter off, and the work of convolutions is certain.
        """
        if not self.cuda:
            return seconds
        return seconds + self._seconds_per_flop * flops

    def _cost_of(self, setting: Setting) -> float:
        return self.cost(setting.compute * self.flops_per_view * self.rows, setting.seconds)

    @cached_property
    def _seconds_per_flop(self) -> float:
        """Of plain's step."""
        seconds = sum(p.seconds for p in _cached(self._step, "plain", 256).values()) / 256
        return seconds / self.flops_per_view

    @property
    def _step(self) -> Step:
        return Step(self.make, self.shape, _loss, self.dtype, self.cuda, self.clock)

    @property
    def clock(self) -> Clock:
        """Gives the seconds of an operation from its FLOPs and bytes."""
        return self.gpu.seconds if self.cuda else CPU_CORE.seconds

    @property
    def flops_per_view(self) -> float:
        return sum(p.flops for p in _cached(self._step, "plain", 8).values()) / 8

    def _phases(self, memory: Memory, micro_batch: int | None) -> Phases:
        if memory in ("plain", "replay") or micro_batch is None:
            return _cached(self._step, memory, self.rows)
        few, more = SIMULATED
        if self.rows <= more * micro_batch:
            return _cached(self._step, memory, self.rows, micro_batch)
        one = _cached(self._step, memory, few * micro_batch, micro_batch)
        two = _cached(self._step, memory, more * micro_batch, micro_batch)
        beyond = (self.rows / micro_batch - few) / (more - few)
        return {key: _line(one[key], two[key], beyond) for key in one}


def _refused(memory: Memory, error: ValueError) -> Setting:
    return Setting(memory, None, math.inf, math.inf, math.inf, refusal=str(error))


def _everything(work: Workload, search: Search, limit: float) -> Setting | None:
    """The schedule that keeps everything, if it fits. It spares the search."""
    kept: dict[str, Any] = dict.fromkeys(CHOICES, "kept")
    stages = tuple(Stage(size, **kept) for size in search.sizes)
    price = search.prices.in_detail(Schedule(search.prices.micro_batch, stages))
    room = limit - _beside(work, search.prices) - price.transient
    if room < _split(work, search.prices.micro_batch) * price.kept:
        return None
    moves = _moves(work, search, price.schedule, room, 0)
    return None if moves is None else _describe(work, search, price, room, moves)


def _planned(work: Workload, search: Search, limit: float, host: float) -> Setting | None:
    """The cheapest schedule whose values fit, those beyond the GPU's memory on the host."""
    count = _split(work, search.prices.micro_batch)
    outside = _beside(work, search.prices)
    # What a micro-batch in work needs depends on the schedule: look again with the right number.
    transient = 0.5 * _WORK_TENSORS * search.prices.largest
    for _ in range(_TRIES):
        room = limit - outside - transient
        price = search.best((room + host) / count) if room > 0 else None
        if price is None:
            return None
        price = search.prices.in_detail(price.schedule)
        needed = price.transient
        if needed <= transient:
            moves = _moves(work, search, price.schedule, room, host)
            if moves is not None:
                return _describe(work, search, price, room, moves)
            # The pieces do not fit evenly: leave some more room.
            host -= 0.03 * room
        transient = max(transient, needed)
    return None


def _describe(
    work: Workload, search: Search, price: Price, room: float, moves: Transfers
) -> Setting:
    """The setting of a schedule. room: bytes for kept values on the GPU."""
    prices = search.prices
    count, rows = _split(work, prices.micro_batch), 2 * work.images
    outside, phases = _beside(work, prices), {}
    for phase in ("forward", "backward"):
        found = [p for p in price.passes if p.name.startswith(phase)]
        kept = max(min(count * p.kept, room) + max(p.local - p.kept, 0) + p.fixed for p in found)
        phases[phase] = outside + kept
    # Copies of a pass overlap with its operations; passes wait for each other.
    out, back = [0.0] * len(price.passes), [0.0] * len(price.passes)
    copies: list[tuple[list[float], dict[int, list[Any]]]]
    copies = [(out, moves.out), (back, moves.back)]
    for way, lists in copies:
        for access, pieces in lists.items():
            way[access // count] += sum(
                prices.nbytes(key)
                for key, _ in pieces
                if way is back or key.node is not prices.graph.input
            )
    seconds = sum(
        max(count * p.seconds, o / work.gpu.bus, b / work.gpu.bus)
        for p, o, b in zip(price.passes, out, back, strict=True)
    )
    on_host = _on_host(work)
    return Setting(
        "lockstep",
        prices.micro_batch,
        max(phases.values()),
        (count * price.flops + price.flops_once) / (work.flops_per_view * rows),
        seconds,
        schedule=replace(
            price.schedule,
            device_bytes=math.floor(room) if on_host or moves.bytes_out else None,
            host_bytes=moves.host_peak,
        ),
        host_bytes=moves.host_peak,
        view_bytes=2 * work.view_bytes if on_host else 0,
        bus_bytes=sum(out) + sum(back),
        phases=phases,
    )


def _moves(
    work: Workload, search: Search, schedule: Schedule, room: float, host: float
) -> Transfers | None:
    """The moves of the store in a step; None if the kept values do not fit."""
    prices, size = search.prices, search.prices.micro_batch
    full, rest = divmod(work.images, size)
    rows = 2 * [*[size] * full, *([rest] if rest else [])]
    program = Program(prices.graph, schedule, prices.specs)
    views = _on_host(work)
    order = accesses(program, rows, views)
    image = math.prod(work.shape) * (2 if work.dtype else 4)
    view = prices.graph.values[prices.graph.input]
    given = [((view, m), n * image) for m, n in enumerate(rows)] if views else []
    return transfers(order, room, max(host, 0), given)


def _split(work: Workload, micro_batch: int) -> int:
    """The number of micro-batches: of each view on its own."""
    return 2 * -(-work.images // micro_batch)


def _on_host(work: Workload) -> bool:
    """Whether lockstep reads the views from host memory."""
    return work.cuda and work.loader


def _beside(work: Workload, prices: Prices) -> float:
    """Bytes on the GPU beside kept values and the micro-batch in work."""
    views = 0.0 if _on_host(work) else work.view_bytes * (1 + work.loader)
    return (
        work.bytes_outside_step("lockstep")
        + work.model_bytes
        + views
        + prices.loss_bytes(work.rows, _loss)
    )


_SEARCHES: dict[Any, Search] = {}
_PRICES: dict[Any, Prices] = {}


def _prices(work: Workload) -> Prices:
    key = (work.make, work.shape, work.dtype, work.cuda, work.clock, work.compile)
    if key not in _PRICES:
        _PRICES[key] = Prices(*key)
    return _PRICES[key]


def _search(work: Workload, micro_batch: int) -> Search:
    prices = _prices(work)
    key = (prices, micro_batch)
    if key not in _SEARCHES:
        _SEARCHES[key] = Search(prices.at(micro_batch), work.cost)
    return _SEARCHES[key]


_CACHE: dict[Any, Phases] = {}


def _cached(
    step: Step,
    memory: Memory,
    rows: int,
    micro_batch: int | None = None,
    schedule: Schedule | None = None,
) -> Phases:
    how = (memory, rows, micro_batch, schedule)
    key = (step.make, step.shape, step.dtype, step.cuda, step.clock, *how)
    if key not in _CACHE:
        _CACHE[key] = step.run(*how)
    return _CACHE[key]


def _line(one: Phase, two: Phase, beyond: float) -> Phase:
    return Phase(
        *(a + (b - a) * beyond for a, b in zip(vars(one).values(), vars(two).values(), strict=True))
    )


def _loss(outputs: Any) -> Any:
    return nt_xent_loss(outputs[1], return_stats=True)


def settings(
    work: Workload, limit: float, host: float = 0, micro_batch: int | None = None
) -> Iterator[Setting]:
    """A setting of each mode: plain, lockstep, replay, grad-cache.

    host: bytes of host memory that this rank may use. micro_batch: of lockstep and grad-cache.
    """
    yield work.setting("plain")
    yield work.lockstep(limit, host, micro_batch)
    yield work.setting("replay")
    size = micro_batch or next((m for m in MICRO_BATCHES if m < work.rows), work.rows)
    yield work.setting("grad-cache", size)


def fits(setting: Setting, limit: float) -> bool:
    return setting.device_bytes <= USABLE * limit


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


def choose(
    work: Workload, limit: float, host: float = 0, micro_batch: int | None = None
) -> Setting:
    """The first setting that is predicted to fit. If the model cannot be simulated, plain.

    Raises:
        ValueError: nothing fits.
    """
    tried = []
    for setting in settings(work, limit, host, micro_batch):
        if exact(work, setting):
            if fits(setting, limit):
                return setting
            tried.append(setting)
    least = min(tried, key=lambda setting: setting.device_bytes)
    if math.isinf(least.device_bytes):
        log.warning("memory='auto' chose plain: %s", least.refusal)
        return Setting("plain", None, math.inf)
    raise ValueError(does_not_fit(work, least, limit, host))


def fitting_lockstep(
    work: Workload, limit: float, host: float = 0, micro_batch: int | None = None
) -> Setting:
    """`Workload.lockstep`.

    Raises:
        ValueError: lockstep cannot run the model, or nothing fits.
    """
    found = work.lockstep(limit, host, micro_batch)
    if found.refusal:
        raise ValueError(found.refusal)
    if not fits(found, limit):
        raise ValueError(does_not_fit(work, found, limit, host))
    return found


def does_not_fit(work: Workload, least: Setting, limit: float, host: float = 0) -> str:
    """Say that nothing fits, what needs the least, and what to try."""
    found = more_host_memory(work, limit, host)
    advice = "use more GPUs, a smaller batch or a smaller model"
    if found is not None:
        advice = f"{advice}, or allow {gigabytes(found)} of RAM per GPU with --host-memory"
    return (
        f"batch_size {work.batch_size} fits in no mode: {least.flags} needs "
        f"{gigabytes(least.device_bytes)}, but {gigabytes(USABLE * limit)} of "
        f"{gigabytes(limit)} can be used; {advice}"
    )


def more_host_memory(work: Workload, limit: float, host: float = 0) -> float | None:
    """The bytes of host memory for a rank with which lockstep fits, if it then does."""
    for size in _HOST_SIZES:
        if work.cuda and size > host:
            setting = work.lockstep(limit, size)
            if not setting.refusal and fits(setting, limit):
                return size
    return None


def next_smaller(work: Workload, setting: Setting) -> tuple[Setting, str] | None:
    """What to try after `setting` did not fit: needs at least 10% less. With its options."""
    limit = 0.9 * (setting.device_bytes if math.isfinite(setting.device_bytes) else 0)
    if not limit:
        limit = 0.9 * work.setting(setting.memory, setting.micro_batch).device_bytes
    found = work.lockstep(limit / USABLE)
    if not found.refusal and found.device_bytes <= limit:
        return found, f"--memory lockstep --gpu-memory {gigabytes(limit / USABLE, down=True)}"
    if found.refusal:
        for memory in ("replay", "grad-cache"):
            size = MICRO_BATCHES[-1] if memory == "grad-cache" else None
            other = work.setting(memory, size)
            if other.device_bytes <= limit and exact(work, other):
                return other, other.flags
        return None
    more = more_host_memory(work, limit / USABLE)
    if more is None:
        return None
    found = work.lockstep(limit / USABLE, more)
    memory = gigabytes(limit / USABLE, down=True)
    return found, f"--memory lockstep --gpu-memory {memory} --host-memory {gigabytes(more)}"


def schedule_of(
    model: nn.Module,
    shape: tuple[int, ...],
    rows: int,
    dtype: torch.dtype | None,
    gpu_memory: float,
    host_memory: float = 0,
    micro_batch: int | None = None,
    *,
    cuda: bool = True,
    compile: bool = False,
) -> Schedule:
    """The schedule with which `LargeBatch` runs a model whose user gave none.

    shape: of a view. rows: of the rank with the most. gpu_memory: bytes for model, gradients,
    optimizer, views and the step. host_memory: bytes for kept values.

    Raises:
        ValueError: lockstep cannot run the model, or it does not fit.
    """
    work = Workload(
        partial(without_data, model),
        shape,
        max(1, -(-rows // 2)),
        dtype=dtype,
        cuda=cuda,
        gpu=gpu_of(gpu_memory),
        loader=False,
        compile=compile,
    )
    found = fitting_lockstep(work, gpu_memory, host_memory, micro_batch)
    assert found.schedule is not None
    return found.schedule


def without_data(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters and buffers have no data, under FakeTensorMode.

    Numbers become float32; LargeBatch counts what others take.
    """
    memo: dict[int, Any] = {}
    for t in (*model.parameters(), *model.buffers()):
        dtype = torch.float32 if t.is_floating_point() else t.dtype
        empty = torch.empty_strided(t.shape, t.stride(), dtype=dtype)
        memo[id(t)] = empty
        if isinstance(t, nn.Parameter):
            memo[id(t)] = nn.Parameter(empty, t.requires_grad)
    return copy.deepcopy(model, memo)


@contextmanager
def out_of_memory(work: Workload, setting: Setting, where: Callable[[], str]) -> Iterator[None]:
    """A context that turns out-of-memory errors into OutOfMemory, with advice.

    setting: what runs. where: returns the rank and step as text.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        advice = "no setting needs less: use more GPUs or a smaller batch"
        found = next_smaller(work, setting)
        if found is not None:
            needs = f"{found[0].device_bytes / 1e9:.1f} GB per rank"
            advice = f"next: {found[1]} (predicted {needs})"
        message = f"{where()}: out of memory with {setting.flags}; {advice}"
        if work.cuda:
            message += allocator_advice()
        raise OutOfMemory(message) from error


plan_with(schedule_of)
