"""Which rank failed, and in what step: one thread per rank that outlives a hung collective.

Every rank writes its state to the process group's store once a second and whenever it turns to
something else: a beat. When a rank dies, the others'
collectives fail (gloo: at once) or hang (NCCL; under either if a rank stalls). The survivors then
look for the rank whose beats stopped or, if all beat, the one that has begun the fewest
collectives. The first verdict stands for all; every rank ends with it.

The threads also agree on the step after which a signal stops the run. Ranks are not in the same
step: on a GPU the host runs ahead. So each rank's thread promises the step that its main thread is
in, the main thread does not pass that step before all have promised, and the largest promise is
where all stop. Threads never wait for a main thread, so this ends, and no step costs a message.
"""

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

_BEAT = 1.0
# Beats without which a rank counts as gone, once there is reason to look.
_MISSED = 4
# Seconds that the main thread has to end by itself after a verdict.
_GRACE = 4.0
# Seconds after which a rank that did not answer a signal to stop is looked for.
_ANSWER = 5.0
_ADVICE = "; --resume goes on from the last checkpoint"


class RankFailure(RuntimeError):
    """Another rank died or stalled; the message names it and the step."""


class _State(NamedTuple):
    """What a rank writes at each beat.

    beats: how many so far. step, doing: where its main thread is. collectives: how many it has
    begun. promised: the step before which it does not stop, once a signal asked it.
    """

    beats: int
    step: int
    doing: str
    collectives: int
    promised: int | None


class RankWatch:
    """Writes this rank's beats and looks at the others'.

    store: the process group's, which every rank reaches. timeout: seconds without progress (a step,
    a phase or a collective) after which the run ends.

    Raises:
        RankFailure: a rank did not join within `timeout`.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        # A connection of its own: the main thread may wait in an operation of the other one.
        self._store = dist.PrefixStore("rank_watch", store.clone())
        self._beats = 0
        self._mark = (0, "starting")
        self._group: dist.ProcessGroup | None = None
        self._stopped = threading.Event()
        # Guards what the two threads tell each other about stopping: the main thread's last step,
        # this rank's promise, and what was agreed: the last step of all ranks, and the signal.
        self._turn = threading.Condition()
        self._finished = 0
        self._promised: int | None = None
        self._stop: tuple[int, int] | None = None
        self._asked_at = 0.0
        self._verdict = ""
        self._beat()
        self._await_all()
        self._wake, wakened = socket.socketpair()
        self._wake.setblocking(False)
        wakened.setblocking(False)
        self._woken_before: int | None = None
        # Python runs its own handlers in the main thread alone, which may be hung.
        with suppress(ValueError):
            self._woken_before = signal.set_wakeup_fd(wakened.fileno(), warn_on_full_buffer=False)
        self._wakened = wakened
        self._thread = threading.Thread(target=self._run, name="rank watch", daemon=True)
        self._thread.start()

    def watch(self, group: dist.ProcessGroup) -> None:
        """Count this group's collectives as progress from now on."""
        self._group = group

    def mark(self, step: int, doing: str) -> None:
        """This rank is in `step`, counted from 1, and does `doing`; the others can read it."""
        self._mark = (step, doing)
        if not self._stopped.is_set():
            self._beat()

    @property
    def left(self) -> bool:
        """Whether this rank's end is meant."""
        return self._stopped.is_set()

    @property
    def where(self) -> str:
        """The step of this rank, counted from 1, and what it does there."""
        step, doing = self._mark
        return f"step {step} ({doing})"

    def stop_signal(self, step: int, caught: Sequence[int]) -> int | None:
        """The signal that ends the run after `step`, the same step on all ranks; None: go on.

        The main thread asks after each of its steps, counted from 1, but the run's last.
        caught: signals that arrived on this rank.

        Raises:
            RankFailure: another rank ended before it answered.
        """
        with self._turn:
            self._finished = step
            if caught and self._promised is None:
                self._store.compare_set("stop", "", str(caught[0]))
                self._promised = step
                with suppress(OSError):
                    # The thread looks around now, not at its next beat.
                    self._wakened.send(b"\0")
            if self._promised is None or step < self._promised:
                return None
            while self._stop is None and not self._verdict:
                self._turn.wait(_BEAT)
            if self._stop is None:
                raise RankFailure(self._verdict + _ADVICE)
            last, number = self._stop
            return number if step >= last else None

    def leave(self) -> None:
        """This rank is done: from now on it looks for no other, and no other looks for it."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        if self._woken_before is not None:
            signal.set_wakeup_fd(self._woken_before)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._mark = (self._mark[0], "done")
        # The store's host may have left before us.
        with suppress(dist.DistError):
            self._beat()
        self._wake.close()
        self._wakened.close()

    def let_others_read(self) -> None:
        """Stay for two beats if this rank hosts the store: what it told is lost with it."""
        if self.rank == 0 and not self._hosted_by_launcher:
            time.sleep(2 * _BEAT)

    def explain(self, error: BaseException) -> BaseException:
        """What ended this rank: RankFailure if another's end caused `error`, else `error` itself.

        The others are told either way.
        """
        if isinstance(error, RankFailure):
            return error
        own = f"rank {self.rank} ended in {self.where}: {type(error).__name__}: {error}"
        try:
            # The backends raise RuntimeError for a lost peer; anything else is this rank's own.
            verdict = isinstance(error, RuntimeError) and (self._told() or self._missing())
            if not verdict:
                self._tell(own)
                return error
            verdict = self._tell(verdict)
        except dist.DistError:
            verdict = self._store_lost()
        return error if verdict == own else RankFailure(verdict + _ADVICE)

    def _beat(self) -> None:
        self._beats += 1
        state = _State(self._beats, *self._mark, self._collectives(), self._promised)
        self._store.set(str(self.rank), json.dumps(state))

    def _collectives(self) -> int:
        # No public counter exists; without one, a hung step is not traced to its rank.
        count = getattr(self._group, "_get_sequence_number_for_group", None)
        return count() if count else 0

    def _read(self) -> list[_State]:
        """The states of all ranks, in rank order."""
        found = self._store.multi_get([str(rank) for rank in range(self.size)])
        return [_State(*json.loads(state)) for state in found]

    def _await_all(self) -> None:
        try:
            names = [str(rank) for rank in range(self.size)]
            self._store.wait(names, timedelta(seconds=self.timeout))
        except dist.DistError as error:
            absent = [name for name in names if not self._store.check([name])]
            raise RankFailure(
                f"rank {', '.join(absent)} of {self.size} did not join within {self.timeout:g} s"
            ) from error

    def _told(self) -> str:
        return self._store.get("verdict").decode() if self._store.check(["verdict"]) else ""

    def _tell(self, verdict: str) -> str:
        return self._store.compare_set("verdict", "", verdict).decode()

    def _missing(self, seconds: float = _MISSED * _BEAT) -> str:
        """Names the ranks that do not beat for `seconds`; or passes on what they say meanwhile."""
        before, end = self._read(), time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(_BEAT / 4)
            self._beat()
            if told := self._told():
                return told
            after = self._read()
            silent = [r for r in range(self.size) if after[r].beats == before[r].beats]
            silent = [r for r in silent if r != self.rank and after[r].doing != "done"]
            if not silent:
                return ""
        return "; ".join(
            f"rank {r} died or froze in step {after[r].step} ({after[r].doing})" for r in silent
        )

    def _behind(self) -> str:
        """Names the ranks that have begun the fewest collectives, all of them beating."""
        states = {r: state for r, state in enumerate(self._read()) if state.doing != "done"}
        fewest = min(state.collectives for state in states.values())
        return "; ".join(
            f"rank {r} stalled in step {state.step} ({state.doing}) for {self.timeout:g} s"
            for r, state in states.items()
            if state.collectives == fewest
        )

    @property
    def _hosted_by_launcher(self) -> bool:
        """torchrun's agent hosts the store of its ranks; without torchrun, rank 0 does."""
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    def _store_lost(self) -> str:
        host = "the launcher" if self._hosted_by_launcher else "rank 0"
        return f"{host}, which hosts the store, died or left; here it was {self.where}"

    def _agree(self) -> bool:
        """Answer a signal to stop, on whatever rank; True while others' answers are awaited."""
        if self._stop is not None or not self._store.check(["stop"]):
            return False
        with self._turn:
            if self._promised is None:
                self._promised = self._finished + 1
        self._beat()
        self._asked_at = self._asked_at or time.monotonic()
        states = self._read()
        if any(state.promised is None and state.doing != "done" for state in states):
            if time.monotonic() - self._asked_at > _ANSWER and (verdict := self._missing()):
                self._end(self._tell(verdict))
            return True
        # A rank that was done before it was asked lets nobody stop before the end.
        last = max(sys.maxsize if s.promised is None else s.promised for s in states)
        number = int(self._store.get("stop"))
        with self._turn:
            self._stop = (last, number)
            self._turn.notify_all()
        return False

    def _run(self) -> None:
        progress: Any = None
        signalled = waiting = False
        while not self._stopped.is_set():
            try:
                self._beat()
                if verdict := self._told():
                    self._end(verdict)
                waiting = self._agree()
                now = (self._mark, self._collectives())
                if now != progress:
                    progress, since = now, time.monotonic()
                elif time.monotonic() - since > self.timeout:
                    self._end(self._tell(self._missing() or self._behind()))
                # A launcher that saw a rank die asks the others to go, then kills them.
                if signalled and (verdict := self._missing()):
                    self._end(self._tell(verdict))
            except dist.DistError:
                self._end(self._store_lost())
            if select.select([self._wake], [], [], _BEAT / 10 if waiting else _BEAT)[0]:
                signalled |= signal.SIGTERM in self._wake.recv(64)

    def _end(self, verdict: str) -> None:
        """End the process, unless its main thread does so itself."""
        with self._turn:
            self._verdict = verdict
            self._turn.notify_all()
        if self._stopped.wait(_GRACE):
            return
        print(f"simclr-fast: rank {self.rank}: {verdict}{_ADVICE}", file=sys.stderr, flush=True)
        os._exit(1)
