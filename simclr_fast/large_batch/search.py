"""Search for the schedule of lockstep that costs the least in a given memory.

The blocks of the model are put into stages: consecutive blocks whose outputs have the same shape.
A stage has a few hundred possible choices, so a model has far too many schedules to count them all.
But stages hardly depend on each other. Let K_i be what stage i keeps from the forward to the
backward. While stage j is in work, in either direction, memory holds the K of all stages before it,
and P_j ≥ K_j of its own. So a schedule fits if K_0 + ... + K_{j-1} + P_j is within the limit for
every j. Its cost is the sum of the costs of its stages. A stage that does not keep its input also
pays for making it again, which depends on what the stages before it keep.

A schedule that makes the same choices in all stages gives K, P and the cost of every stage for
these choices. So each combination of choices is counted once. Then the stages are put together from
the first to the last. Of all schedules of the first j stages only those stay that no other one
beats in kept bytes, cost, and the cost of making their output again.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from torch.fx import Node

from simclr_fast.large_batch.pricing import Price, Prices
from simclr_fast.large_batch.schedule import CHOICES, Schedule, Stage

# How often the limit is lowered if a schedule keeps more than the sums of its stages said.
_TRIES = 5
# The most schedules of the first stages that are carried on.
_MOST = 500


class Row(NamedTuple):
    """What the same choices in all stages mean for one stage, for one micro-batch.

    kept: K. forward, backward: P in each direction. cost: of its operations. asks: the passes that
    make the stage's input again. chain: the cost of making its last output from its input.
    """

    kept: float
    forward: float
    backward: float
    cost: float
    asks: int
    chain: float


class Search:
    """The best schedules of a model, for any memory.

    cost: gives what shall be least, from FLOPs and seconds.
    """

    def __init__(self, prices: Prices, cost: Callable[[float, float], float]) -> None:
        self.prices, self.cost = prices, cost
        self.sizes = stage_sizes(prices)
        self._stage_of: dict[Node, int] = {}
        self._entering: dict[Node, int] = {}
        blocks = iter(prices.graph.blocks)
        for j, size in enumerate(self.sizes):
            own = list(itertools.islice(blocks, size))
            self._entering[own[0].input] = j
            self._stage_of.update({node: j for block in own for node in block.nodes})
        self._tables: list[tuple[list[Stage], np.ndarray]] | None = None

    def best(self, limit: float) -> Price | None:
        """The least cost with at most `limit` bytes kept of a micro-batch. None: nothing fits."""
        room = limit
        for _ in range(_TRIES):
            stages = self._combine(room)
            if stages is None:
                return None
            price = self.prices.price(Schedule(self.prices.micro_batch, stages))
            if price.kept <= limit:
                return price
            room -= price.kept - limit
        return None

    def least(self) -> float:
        """The fewest bytes kept of a micro-batch by any schedule, as the sums of the stages say."""
        below, least = np.zeros(1), np.zeros(1)
        for _, rows in self._rows():
            kept, own = rows[:, 0], rows[:, 1:3].max(1)
            peaks = np.maximum(least[:, None], below[:, None] + own).ravel()
            below, least = np.add.outer(below, kept).ravel(), peaks
            best = _unbeaten(np.stack([below, least], -1))
            below, least = below[best], least[best]
        return float(least.min())

    def count(self, choices: dict[str, str]) -> list[Row]:
        """The rows of all stages for the same choices everywhere."""
        n, nbytes = len(self.sizes), self.prices.nbytes
        stages = tuple(Stage(size, **choices) for size in self.sizes)  # type: ignore[arg-type]
        kept, costs, asks, chains = [0.0] * n, [0.0] * n, [0] * n, [float("inf")] * n
        # The stage in work, whether in the backward, and the bytes kept after a pass.
        states: list[tuple[int, bool, float]] = []
        for current, found, after in self.prices.walk(Schedule(self.prices.micro_batch, stages)):
            backward = current.phase == "backward"
            if current.phase == "outputs":
                for key in current.pieces_after:
                    # The output of a stage is kept for the next one, as its input.
                    at = self._entering.get(key.node, self._stage_of.get(key.node, 0))
                    kept[at] += nbytes(key)
            if not current.ops:
                continue
            home = max(self._stage_of[op.node] for op in current.ops)
            again, asked = 0.0, False
            for op, cost in zip(current.ops, found, strict=True):
                stage, value = self._stage_of[op.node], self.cost(cost.flops, cost.seconds)
                if op.kind == "make" and stage < home:
                    asked = asked or self._entering.get(op.node) == home
                    again += value if stage == home - 1 else 0
                costs[stage] += value
            if backward and asked:
                asks[home] += 1
                chains[home - 1] = min(chains[home - 1], again)
            states.append((home, backward, after))
        # What the last pass of a stage's backward leaves behind belongs to the stage before it.
        homes = [home for home, _, _ in states]
        following = [*homes[1:], 0]
        peaks = {(j, backward): 0.0 for j in range(n) for backward in (False, True)}
        for (home, backward, nbytes_kept), later in zip(states, following, strict=True):
            at = later if backward else home
            peaks[at, backward] = max(peaks[at, backward], nbytes_kept - sum(kept[:at]))
        return [
            Row(kept[j], peaks[j, False], peaks[j, True], costs[j], asks[j], chains[j])
            for j in range(n)
        ]

    def _rows(self) -> list[tuple[list[Stage], np.ndarray]]:
        """For every stage its choices, and a table of their rows: [choices, 6]."""
        if self._tables is not None:
            return self._tables
        names = [name for name in CHOICES if name != "input"]
        found: list[dict[Row, Stage]] = [{} for _ in self.sizes]
        for values in itertools.product(*(CHOICES[name] for name in names)):
            choices = dict(zip(names, values, strict=True))
            kept, again = (self.count({**choices, "input": i}) for i in ("kept", "again"))
            for j, (k, a) in enumerate(zip(kept, again, strict=True)):
                # With "kept", no stage pays for making another one's output again.
                rows = {
                    "kept": k._replace(asks=0, chain=a.chain),
                    "once": Row(a.kept, a.forward, k.backward, k.cost, 1, a.chain),
                    "again": a._replace(cost=k.cost),
                }
                for name, row in rows.items():
                    stage = Stage(self.sizes[j], **{**choices, "input": name})  # type: ignore[arg-type]
                    # The views are kept anyway.
                    if j or name == "kept":
                        found[j].setdefault(row, stage)
        self._tables = [(list(rows.values()), np.array(list(rows))) for rows in found]
        return self._tables

    def _combine(self, limit: float) -> tuple[Stage, ...] | None:
        """The least cost of which the sums of the stages say that it fits."""
        # Of every schedule of the first stages: kept bytes, cost, cost of making its output again.
        totals, chosen = np.zeros((1, 3)), np.zeros((1, 0), int)
        for _, rows in self._rows():
            kept, forward, backward, cost, asks, chain = rows.T
            below, spent, again = (column[:, None] for column in totals.T)
            first, second = (below + np.maximum(forward, backward) <= limit).nonzero()
            asked = asks > 0
            paid = np.multiply(asks, again, where=asked, out=np.zeros((len(totals), len(rows))))
            through = chain + np.where(asked, again, 0)
            new = np.stack([below + kept, spent + cost + paid, through], -1)[first, second]
            best = _unbeaten(new)
            if not len(best):
                return None
            totals = new[best]
            chosen = np.column_stack([chosen[first[best]], second[best]])
        winner = chosen[totals[:, 1].argmin()]
        return tuple(stages[i] for (stages, _), i in zip(self._rows(), winner, strict=True))


def stage_sizes(prices: Prices) -> list[int]:
    """The number of blocks of every stage."""
    sizes: list[int] = []
    before = None
    for block in prices.graph.blocks:
        spec = prices.specs[block.outputs[0]]
        shape = None if spec is None or len(block.outputs) > 1 else spec.shape
        if shape is None or shape != before:
            sizes.append(0)
        sizes[-1] += 1
        before = shape
    return sizes


def _unbeaten(points: np.ndarray) -> np.ndarray:
    """The rows of points [n, k] of which no other row is as small or smaller in every column."""
    found: list[int] = []
    front = np.empty((0, points.shape[1]))
    for i in np.lexsort(points.T[::-1]):
        if not (front <= points[i]).all(1).any():
            found.append(i)
            front = np.concatenate([front, points[i : i + 1]])
    if len(found) > _MOST:
        found = [found[i] for i in np.linspace(0, len(found) - 1, _MOST).astype(int)]
    return np.array(found, int)
