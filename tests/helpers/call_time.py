"""Compare the times of two calls on a machine that is busy with other work."""

import gc
import time
from collections.abc import Callable

ROUNDS, TRIES = 60, 5


def least_ratio(step: Callable[[], object], other: Callable[[], object]) -> float:
    """The least time of `step` as a multiple of the least time of `other`. They take turns.

    Other processes only make a call slower, so the least time is that of the call itself. This is
    the smallest ratio of a few tries, because other work may disturb only one of the two.

    extra: seconds that a call of `step` and of `other` would take besides.
    """
    for _ in range(3):
        step()
        other()
    collecting = gc.isenabled()
    gc.disable()
    try:
        return min(_ratio(step, other) for _ in range(TRIES))
    finally:
        if collecting:
            gc.enable()


def _ratio(step: Callable[[], object], other: Callable[[], object]) -> float:
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for call, taken in zip((step, other), times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return min(times[0]) / min(times[1])
