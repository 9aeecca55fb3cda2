"""When pieces of the batch move between the GPU and host memory, decided before the step.

The order in which a step reads, makes and drops its pieces is known. So the piece to move out is
always the one whose next use is farthest in the future (Belady, 1966). Everything here is numbers;
the store does the copies.
"""

import heapq
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Access(NamedTuple):
    """One micro-batch of one pass.

    reads, drops: pieces. makes: new pieces with their bytes. What it drops and has read, it may
    still use: memory of one micro-batch is not counted here.
    """

    reads: Sequence[Hashable] = ()
    makes: Sequence[tuple[Hashable, int]] = ()
    drops: Sequence[Hashable] = ()


@dataclass
class Transfers:
    """The moves of a step.

    out, back: for an access, the pieces that go to the host, and those that are copied back, before
        it runs. A piece of `on_host` that goes out needs no copy.
    device_peak, host_peak, bytes_out, bytes_back: in bytes, without the host copies of `on_host`.
    """

    out: dict[int, list[Hashable]] = field(default_factory=dict)
    back: dict[int, list[Hashable]] = field(default_factory=dict)
    device_peak: int = 0
    host_peak: int = 0
    bytes_out: int = 0
    bytes_back: int = 0


class _Plan:
    """The state while the accesses are gone through."""

    def __init__(
        self,
        accesses: Sequence[Access],
        device_bytes: float,
        host_bytes: float,
        on_host: Sequence[tuple[Hashable, int]],
        ahead: int,
    ) -> None:
        self.device_bytes, self.host_bytes, self.ahead = device_bytes, host_bytes, ahead
        # The accesses that read a piece, the next one last.
        self.uses: dict[Hashable, list[int]] = {}
        for i in reversed(range(len(accesses))):
            for key in accesses[i].reads:
                self.uses.setdefault(key, []).append(i)
        self.size: dict[Hashable, int] = dict(on_host)
        self.fixed = set(self.size)
        self.device: dict[Hashable, int] = {}
        self.host: set[Hashable] = set()
        self.on_device = self.on_host = 0
        # (−next use, serial number, piece). Entries are outdated once a piece was read or moved.
        self.farthest: list[tuple[float, int, Hashable]] = []
        self.serial = 0
        self.result = Transfers()

    def next_use(self, key: Hashable, now: int) -> float:
        order = self.uses.get(key, [])
        while order and order[-1] < now:
            order.pop()
        return order[-1] if order else math.inf

    def note(self, key: Hashable, now: int) -> None:
        """Remember that the next use of `key`, seen from access `now`, is what it is."""
        self.serial += 1
        heapq.heappush(self.farthest, (-self.next_use(key, now), self.serial, key))

    def put(self, key: Hashable) -> None:
        self.device[key] = self.size[key]
        self.on_device += self.size[key]
        self.result.device_peak = max(self.result.device_peak, self.on_device)

    def drop(self, key: Hashable) -> None:
        self.on_device -= self.device.pop(key, 0)
        if key in self.host:
            self.host.remove(key)
            self.on_host -= self.size[key]

    def make_room(self, need: int, now: int) -> bool:
        """Move pieces out until `need` more bytes fit. A piece that is read soon stays."""
        while self.on_device + need > self.device_bytes:
            while self.farthest:
                minus_use, _, key = self.farthest[0]
                if key in self.device and -minus_use == self.next_use(key, now):
                    break
                heapq.heappop(self.farthest)
            if not self.farthest or -minus_use <= now + self.ahead:
                return False
            heapq.heappop(self.farthest)
            self.on_device -= self.device.pop(key)
            self.result.out.setdefault(now, []).append(key)
            if key in self.fixed:
                continue
            self.host.add(key)
            self.on_host += self.size[key]
            if self.on_host > self.host_bytes:
                return False
            self.result.host_peak = max(self.result.host_peak, self.on_host)
            self.result.bytes_out += self.size[key]
        return True


def transfers(
    accesses: Sequence[Access],
    device_bytes: float,
    host_bytes: float = math.inf,
    on_host: Sequence[tuple[Hashable, int]] = (),
    ahead: int = 1,
) -> Transfers | None:
    """The moves that keep the pieces within device_bytes and host_bytes; None if there are none.

    on_host: pieces that lie in host memory before the step and stay there too, such as the views.
        They do not count as host_bytes.
    ahead: a piece is copied back this many accesses before it is read, so the copy overlaps with
        the accesses between.
    """
    plan = _Plan(accesses, device_bytes, host_bytes, on_host, ahead)
    for i, access in enumerate(accesses):
        # Host memory that is free again after the access: its copies out come before those back.
        returned = 0
        for later in accesses[i : i + ahead + 1]:
            for key in later.reads:
                if key in plan.device or not (key in plan.host or key in plan.fixed):
                    continue
                if not plan.make_room(plan.size[key], i):
                    return None
                plan.put(key)
                plan.note(key, i)
                plan.result.bytes_back += plan.size[key]
                plan.result.back.setdefault(i, []).append(key)
                if key in plan.host:
                    plan.host.remove(key)
                    returned += plan.size[key]
        for key in access.drops:
            plan.drop(key)
        for key, nbytes in access.makes:
            plan.size[key] = nbytes
            if not plan.make_room(nbytes, i):
                return None
            plan.put(key)
        # Only now: what an access makes is not there to be moved out before it.
        for key in (*(key for key, _ in access.makes), *access.reads):
            if key in plan.device:
                plan.note(key, i + 1)
        plan.on_host -= returned
    return plan.result
