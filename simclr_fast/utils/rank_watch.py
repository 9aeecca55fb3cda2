"""Find out which rank failed, and in which step.

Each rank has a watching thread, which keeps working while the main thread hangs in a collective.
Once a second, and whenever the main thread starts something else, it writes the rank's state to the
process group's store. Such a write is called a beat.

When a rank dies, the collectives of the others fail (gloo) or hang (NCCL). When a rank stalls, they
hang. The other ranks then look for a rank whose beats stopped. If all beat, they look for the rank
that has begun the fewest collectives. The first verdict counts for all, and every rank ends with
it.

The threads also agree on the step after which a signal stops the run. Ranks may be in different
steps, because on a GPU the host runs ahead. Each thread promises the step that its main thread is
in. The main thread does not go beyond that step until all have promised. All ranks stop after the
largest promise. Threads never wait for a main thread, so there is no deadlock. Steps without a
signal send no message.
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

from simclr_fast.utils.rank_failure import RankFailure

_BEAT = 1.0
# When ranks are checked, one that misses this many beats counts as dead.
_MISSED = 4
# After a verdict the main thread has this many seconds to end by itself.
_GRACE = 4.0
# If ranks do not answer a signal to stop within this many seconds, they are checked.
_ANSWER = 5.0
_ADVICE = "; --resume goes on from the last checkpoint"


class _State(NamedTuple):
    """The state that a rank writes at each beat.

    beats: the number of beats so far. step, doing: what the main thread is doing. collectives: how
    many it has begun. promised: as in `_Stop`; None before a signal.
    """

    beats: int
    step: int
    doing: str
    collectives: int
    promised: int | None


class _Stop(NamedTuple):
    """A signal to stop the run, and what has been agreed about it.

    promised: this rank goes on up to this step in any case. since: when it promised, in seconds.
    agreed: the step after which all ranks stop, and the signal's number; None until all ranks have
    promised.
    """

    promised: int
    since: float
    agreed: tuple[int, int] | None = None


class RankWatch:
    """Writes this rank's beats and checks those of the others.

    store: the store of the process group. timeout: if no step, phase or collective begins for this
    many seconds, the run ends.

    Raises:
        RankFailure: a rank did not join within `timeout`.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        # A second connection: the main thread may be waiting in an operation of the first.
        self._store = dist.PrefixStore("rank_watch", store.clone())
        self._beats = 0
        self._mark = (0, "starting")
        self._group: dist.ProcessGroup | None = None
        self._stopped = threading.Event()
        # Guards what both threads use for stopping.
        self._turn = threading.Condition()
        # The last step that the main thread finished.
        self._finished = 0
        # None as long as this rank knows of no signal.
        self._stop: _Stop | None = None
        self._verdict = ""
        self._beat()
        self._await_all()
        self._wake, wakened = socket.socketpair()
        self._wake.setblocking(False)
        wakened.setblocking(False)
        self._woken_before: int | None = None
        # Python runs signal handlers only in the main thread, which may hang.
        with suppress(ValueError):
            self._woken_before = signal.set_wakeup_fd(wakened.fileno(), warn_on_full_buffer=False)
        self._wakened = wakened
        self._thread = threading.Thread(target=self._run, name="rank watch", daemon=True)
        self._thread.start()

    def watch(self, group: dist.ProcessGroup) -> None:
        """Count this group's collectives as progress from now on."""
        self._group = group

    def mark(self, step: int, doing: str) -> None:
        """Tell the other ranks that this one is doing `doing` in `step`, counted from 1."""
        self._mark = (step, doing)
        if not self._stopped.is_set():
            self._beat()

    @property
    def left(self) -> bool:
        """Whether this rank left on purpose."""
        return self._stopped.is_set()

    @property
    def where(self) -> str:
        """The step of this rank, counted from 1, and what it is doing."""
        step, doing = self._mark
        return f"step {step} ({doing})"

    def stop_signal(self, step: int, caught: Sequence[int]) -> int | None:
        """The signal that ends the run after `step`, the same step on all ranks; None to go on.

        The main thread calls this after each step, counted from 1, except the last of the run.
        caught: signals that arrived on this rank.

        Raises:
            RankFailure: another rank ended before it answered.
        """
        with self._turn:
            self._finished = step
            if caught and self._stop is None:
                self._store.compare_set("stop", "", str(caught[0]))
                self._stop = _Stop(step, time.monotonic())
                with suppress(OSError):
                    # Wake the thread now, instead of at its next beat.
                    self._wakened.send(b"\0")
            if self._stop is None or step < self._stop.promised:
                return None
            while self._stop.agreed is None:
                if self._verdict:
                    raise RankFailure(self._verdict + _ADVICE)
                self._turn.wait(_BEAT)
            last, number = self._stop.agreed
            return number if step >= last else None

    def leave(self) -> None:
        """This rank is done: it no longer checks the others, and they no longer check it."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        if self._woken_before is not None:
            signal.set_wakeup_fd(self._woken_before)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._mark = (self._mark[0], "done")
        # The process that hosts the store may have ended already.
        with suppress(dist.DistError):
            self._beat()
        self._wake.close()
        self._wakened.close()

    def let_others_read(self) -> None:
        """If this rank hosts the store, wait two beats: the store's content ends with it."""
        if self.rank == 0 and not self._hosted_by_launcher:
            time.sleep(2 * _BEAT)

    def explain(self, error: BaseException) -> BaseException:
        """RankFailure if another rank caused `error`, else `error`. Tells the others either way."""
        if isinstance(error, RankFailure):
            return error
        own = f"rank {self.rank} ended in {self.where}: {type(error).__name__}: {error}"
        try:
            # Backends raise RuntimeError for a lost rank. Other errors come from this rank.
            verdict = isinstance(error, RuntimeError) and (self._told() or self._missing())
            if not verdict:
                self._tell(own)
                return error
            verdict = self._tell(verdict)
        except dist.DistError:
            # The thread may have read the verdict before the rank that hosts the store ended.
            verdict = self._verdict or self._store_lost()
        return error if verdict == own else RankFailure(verdict + _ADVICE)

    def _beat(self) -> None:
        self._beats += 1
        promised = None if self._stop is None else self._stop.promised
        state = _State(self._beats, *self._mark, self._collectives(), promised)
        self._store.set(str(self.rank), json.dumps(state))

    def _collectives(self) -> int:
        # There is no public counter. Without one, the rank that stalled a step cannot be found.
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
        """Name the ranks that do not beat for `seconds`; or return a verdict that arrives first."""
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
        """Name the ranks that have begun the fewest collectives, given that all of them beat."""
        states = {r: state for r, state in enumerate(self._read()) if state.doing != "done"}
        fewest = min(state.collectives for state in states.values())
        return "; ".join(
            f"rank {r} stalled in step {state.step} ({state.doing}) for {self.timeout:g} s"
            for r, state in states.items()
            if state.collectives == fewest
        )

    @property
    def _hosted_by_launcher(self) -> bool:
        """Whether torchrun's agent hosts the store; otherwise rank 0 does."""
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    def _store_lost(self) -> str:
        host = "the launcher" if self._hosted_by_launcher else "rank 0"
        return f"{host}, which hosts the store, died or left; this rank was in {self.where}"

    def _agree(self) -> bool:
        """Answer a signal to stop that any rank received; True while other answers are missing."""
        if (self._stop and self._stop.agreed) or not self._store.check(["stop"]):
            return False
        with self._turn:
            stop = self._stop = self._stop or _Stop(self._finished + 1, time.monotonic())
        self._beat()
        states = self._read()
        if any(state.promised is None and state.doing != "done" for state in states):
            late = time.monotonic() - stop.since > _ANSWER
            if late and (verdict := self._missing()):
                self._end(self._tell(verdict))
            return True
        # If a rank finished all steps before it could promise, the others must finish them too.
        last = max(sys.maxsize if s.promised is None else s.promised for s in states)
        number = int(self._store.get("stop"))
        with self._turn:
            self._stop = stop._replace(agreed=(last, number))
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
                # When a rank dies, its launcher sends SIGTERM to the others, then kills them.
                if signalled and (verdict := self._missing()):
                    self._end(self._tell(verdict))
            except dist.DistError:
                self._end(self._store_lost())
            if select.select([self._wake], [], [], _BEAT / 10 if waiting else _BEAT)[0]:
                signalled |= signal.SIGTERM in self._wake.recv(64)

    def _end(self, verdict: str) -> None:
        """End the process, unless the main thread ends it within `_GRACE` seconds."""
        with self._turn:
            self._verdict = verdict
            self._turn.notify_all()
        if self._stopped.wait(_GRACE):
            return
        print(f"simclr-fast: rank {self.rank}: {verdict}{_ADVICE}", file=sys.stderr, flush=True)
        os._exit(1)
