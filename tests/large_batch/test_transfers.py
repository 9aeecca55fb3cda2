"""The moves between GPU and host: what is read is there, within the bounds, with few copies."""

import itertools
import math
import random

import pytest

from simclr_fast.large_batch.transfers import Access, transfers


def replayed(accesses, moves, on_host=()):
    """Go through the moves; return the most bytes on the device and on the host."""
    size = dict(on_host)
    device, host, peaks = set(), set(size), [0, 0]

    def note():
        peaks[0] = max(peaks[0], sum(size[k] for k in device))
        peaks[1] = max(peaks[1], sum(size[k] for k in host if k not in dict(on_host)))

    for i, access in enumerate(accesses):
        for key in moves.out.get(i, ()):
            device.remove(key)
            host.add(key)
        for key in moves.back.get(i, ()):
            assert key in host
            device.add(key)
            host.discard(key)
        assert device >= set(access.reads), i
        for key in access.drops:
            device.discard(key)
            host.discard(key)
        for key, nbytes in access.makes:
            size[key] = nbytes
            device.add(key)
        note()
    return peaks


def walk(rng, pieces, length, sizes=(3, 5, 8)):
    """A random order of making, reading and dropping pieces."""
    alive, accesses, serial = [], [], itertools.count()
    for _ in range(length):
        reads = rng.sample(alive, min(len(alive), rng.randint(0, 2)))
        drops = [key for key in reads if rng.random() < 0.3]
        alive = [key for key in alive if key not in drops]
        makes = []
        if len(alive) < pieces:
            makes = [(next(serial), rng.choice(sizes))]
            alive.append(makes[0][0])
        accesses.append(Access(reads, makes, drops))
    return accesses


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_what_is_read_is_there_within_the_bounds(seed, ahead):
    accesses = walk(random.Random(seed), 8, 60)
    free = transfers(accesses, math.inf, ahead=ahead)
    assert (free.bytes_out, free.bytes_back, free.host_peak) == (0, 0, 0)
    found = False
    for limit in range(20, free.device_peak):
        moves = transfers(accesses, limit, ahead=ahead)
        if moves is not None:
            found = True
            device, host = replayed(accesses, moves)
            assert device <= moves.device_peak <= limit
            assert host <= moves.host_peak
            assert transfers(accesses, limit, moves.host_peak, ahead=ahead) == moves
            assert transfers(accesses, limit, moves.host_peak - 1, ahead=ahead) is None or (
                moves.host_peak == 0
            )
    assert found


def fewest_copies(accesses, limit):
    """The fewest pieces of size 1 that come back, over all choices of what moves out."""
    states = {(frozenset(), frozenset()): 0}
    for access in accesses:
        after = {}
        for (device, host), cost in states.items():
            missing = set(access.reads) - device
            made = {key for key, _ in access.makes}
            full = device | missing
            kept_reads = set(access.reads)
            movable = full - kept_reads
            for size in range(len(movable) + 1):
                for gone in itertools.combinations(sorted(movable), size):
                    now = full - set(gone)
                    if len(now) > limit or len((now - set(access.drops)) | made) > limit:
                        continue
                    key = (
                        frozenset((now - set(access.drops)) | made),
                        frozenset(((host - missing) | set(gone)) - set(access.drops)),
                    )
                    after[key] = min(after.get(key, math.inf), cost + len(missing))
        states = after
    return min(states.values(), default=None)


@pytest.mark.parametrize("seed", range(12))
def test_pieces_of_one_size_move_as_seldom_as_possible(seed):
    accesses = walk(random.Random(seed), 5, 14, sizes=(1,))
    for limit in (3, 4):
        moves, fewest = transfers(accesses, limit, ahead=0), fewest_copies(accesses, limit)
        if moves is not None:
            assert moves.bytes_back == fewest


def test_views_stay_on_the_host_and_are_never_copied_out():
    views = [(("view", k), 10) for k in range(4)]
    accesses = [Access([key]) for _ in range(3) for key, _ in views]
    moves = transfers(accesses, 20, 0, views)
    assert moves.bytes_out == 0
    assert moves.host_peak == 0
    assert moves.bytes_back >= 100
    assert replayed(accesses, moves, views)[0] <= 20
    everything = transfers(accesses, 40, 0, views)
    assert everything.bytes_back == 40


def test_too_little_is_said():
    accesses = [Access([], [("a", 10)]), Access([], [("b", 10)]), Access(["a", "b"])]
    assert transfers(accesses, 19) is None
    assert transfers(accesses, 20) is not None
