"""Which contrastive loss gives this gradient?

The embeddings z of a step and the gradient dL/dz that arrived at them are known; the code of the
loss is not. NT-Xent and its usual mistakes are computed in float64 for those embeddings, and the
one whose gradient points in the same direction is what the code computes. The direction does not
depend on factors (sums, gradient scalers, the number of ranks) nor on terms that do not contain z.
The temperature is found by a search for the best agreement.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice, product
from typing import Any, Literal

import torch
from torch import Tensor

# Matrices of M² numbers are made for M rows. With more rows nothing is searched.
LARGEST = 2048
# 1 - cosine of two gradients: below the first no other loss is tried; above the second it is not
# a match, and above the third not even if the loss was computed in half precision.
_CERTAIN, _MATCH, _HALF_MATCH = 1e-7, 1e-4, 5e-3
# If NT-Xent is farther away than this, variants of it are not tried.
_FAR = 0.8
# Matches whose mismatch is below this are told apart by the value of the loss. The second is for
# half precision.
_NOISE, _HALF_NOISE = 1e-6, 1e-3
# Relative tolerance when gradient and value are compared. The second is for half precision.
_EQUAL, _HALF_EQUAL = 2e-3, 3e-2
_COARSE = [0.004 * 1.5**k for k in range(20)]
_REFINEMENTS, _FLAT = 18, 0.05
# Temperatures are tried with so many rows.
_GLANCE = 32
# After so many refinements, a loss farther away than this is none that matches.
_FIRST_REFINEMENTS, _NEAR = 6, 0.1

Pairing = Literal["concatenated", "interleaved"]
Scope = Literal["all ranks", "own anchors", "detached keys", "own rank"]


@dataclass(frozen=True)
class Loss:
    """NT-Xent or one of its variants.

    pairing: "concatenated": row i belongs to row i + N. "interleaved": row 2k to row 2k + 1.
    normalised: rows are divided by their length.
    own, positive, same_view: how often exp(similarity) of a row with itself, with its positive, and
        with each other row of its own view is in the denominator. NT-Xent: 0, 1, 1.
    scope: "all ranks": the exact gradient. "own anchors": rows of this rank against all rows, those
        of other ranks being constants. "detached keys": the same, with all keys constant. "own
        rank": rows of other ranks do not occur.
    """

    pairing: Pairing = "concatenated"
    normalised: bool = True
    own: int = 0
    positive: int = 1
    same_view: int = 1
    scope: Scope = "all ranks"
    temperature: float = 1.0


@dataclass(frozen=True)
class Match:
    """mismatch: 1 - cosine of the gradients. factor: the observed gradient divided by that of the
    loss's mean. value: the mean."""

    loss: Loss
    mismatch: float
    factor: float
    value: float


@dataclass(frozen=True)
class Observed:
    """What arrived at the embeddings in one backward pass.

    z: [M, D], rows of all ranks in rank order, float64. counts: rows of each rank. rank: this one.
    grad: [counts[rank], D], dL/dz of this rank's rows. reached: bool, the rows that are in the
    graph of the loss; only those are compared. value: L. half: some of it was computed in half
    precision.
    """

    z: Tensor
    grad: Tensor
    reached: Tensor
    counts: Sequence[int]
    rank: int = 0
    value: float = math.nan
    half: bool = False
    # What does not depend on the temperature, by its arguments.
    prepared: dict[Any, "_Prepared"] = field(default_factory=dict, repr=False)
    # What variants of a loss share, by its arguments.
    sums: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def mine(self) -> slice:
        start = sum(self.counts[: self.rank])
        return slice(start, start + self.counts[self.rank])

    @cached_property
    def longest(self) -> Tensor:
        """Numbers of the compared rows with the longest gradients, int64."""
        lengths = self.grad.norm(dim=1).masked_fill(~self.reached, -1)
        return lengths.topk(min(_GLANCE, int(self.reached.sum()))).indices


def partners(rows: int, pairing: Pairing) -> Tensor:
    """The other view of each of `rows` rows of one rank, int64 [rows]."""
    index = torch.arange(rows)
    return index.roll(rows // 2) if pairing == "concatenated" else index ^ 1


def views(rows: int, pairing: Pairing) -> Tensor:
    """The view, 0 or 1, of each row of one rank."""
    index = torch.arange(rows)
    return index // max(1, rows // 2) if pairing == "concatenated" else index % 2


def find(seen: Observed, hints: Sequence[float] = ()) -> Match | None:
    """The loss whose gradient has the direction of the observed one; None if there is none.

    hints: numbers that the code divides by, tried first as temperatures.
    """
    found = list(_search(seen, hints))
    least = min(match.mismatch for match in found)
    if least >= (_HALF_MATCH if seen.half else _MATCH):
        return None
    noise = _HALF_NOISE if seen.half else _NOISE
    near = [match for match in found if match.mismatch <= max(4 * least, noise)]
    # Of losses that fit about as well, take the most usual one, which comes first. If the loss has
    # other terms, its value tells nothing. Then only NT-Xent itself is believed: at extreme
    # temperatures the others become other losses, such as an attraction without negatives.
    best = next((match for match in near if _consistent(seen, match)), None)
    if best is None:
        best = next((m for m in near if m.mismatch <= 4 * least and _is_nt_xent(m.loss)), None)
    if best is None or not _COARSE[1] < best.loss.temperature < _COARSE[-2]:
        return None
    # A row's similarity with itself can outweigh all negatives. What is left is an attraction, the
    # same at every temperature, and other libraries' losses are that on purpose.
    if best.loss.own and best.loss.temperature not in hints:
        other = replace(best.loss, temperature=1.5 * best.loss.temperature)
        if measure(seen, other).mismatch < _MATCH:
            return None
    return best


def _is_nt_xent(loss: Loss) -> bool:
    return loss.normalised and (loss.own, loss.positive, loss.same_view) == (0, 1, 1)


def _consistent(seen: Observed, match: Match) -> bool:
    """Whether value and gradient are the same multiple of the loss, up to the number of ranks."""
    ratio = match.factor * match.value / seen.value if seen.value else math.nan
    ranks = len(seen.counts)
    return any(equal(ratio, factor, seen.half) for factor in {1.0, float(ranks), 1 / ranks})


def equal(a: float, b: float, half: bool = False) -> bool:
    """Whether two positive numbers agree, given the precision of the loss."""
    return abs(a / b - 1) < (_HALF_EQUAL if half else _EQUAL)


def measure(seen: Observed, loss: Loss) -> Match:
    """Compare the observed gradient with that of one loss, computed in float64."""
    return _compare(seen, loss, seen.reached.nonzero()[:, 0], torch.float64)


def _compare(seen: Observed, loss: Loss, rows: Tensor, dtype: torch.dtype) -> Match:
    """rows: int64, some of this rank's rows."""
    gradient, value = _gradient(seen, loss, rows, dtype)
    ours, theirs = gradient.double(), seen.grad[rows]
    dot, norms = float((ours * theirs).sum()), float(ours.norm() * theirs.norm())
    mismatch = 1 - dot / norms if norms > 0 else 2.0
    factor = dot / float(ours.square().sum()) if norms > 0 else 0.0
    return Match(loss, mismatch if math.isfinite(mismatch) else 2.0, factor, value)


def _search(seen: Observed, hints: Sequence[float]) -> Iterator[Match]:
    """Matches, the usual losses first. Ends after the first that is certain."""
    scopes: tuple[Scope, ...] = ("all ranks",)
    if len(seen.counts) > 1:
        scopes = ("all ranks", "own anchors", "detached keys", "own rank")
    elif not bool(seen.reached.all()):
        scopes = ("all ranks", "detached keys")
    pairings: tuple[Pairing, ...] = ("concatenated", "interleaved")
    least = math.inf
    for normalised, scope, pairing in product((True, False), scopes, pairings):
        match = _best(seen, Loss(pairing, normalised, scope=scope), hints)
        yield match
        if match.mismatch < _CERTAIN and _consistent(seen, match):
            return
        least = min(least, match.mismatch)
    if least > _FAR:
        return
    denominators = [(1, 1, 1), (0, 2, 1), (1, 2, 1), (0, 0, 1), (0, 1, 0), (1, 1, 0)]
    for (own, positive, same), normalised, pairing in product(
        denominators, (True, False), pairings
    ):
        match = _best(seen, Loss(pairing, normalised, own, positive, same), hints)
        yield match
        if match.mismatch < _CERTAIN and _consistent(seen, match):
            return


def _best(seen: Observed, loss: Loss, hints: Sequence[float]) -> Match:
    """The best temperature for this loss, by the rows with the longest gradients."""

    def near(temperature: float, dtype: torch.dtype = torch.float32) -> Match:
        return _compare(seen, replace(loss, temperature=temperature), seen.longest, dtype)

    tried = []
    for hint in hints:
        if near(hint).mismatch < _NEAR:
            tried.append(measure(seen, replace(loss, temperature=hint)))
            if tried[-1].mismatch < _CERTAIN and _consistent(seen, tried[-1]):
                return tried[-1]
    # The search for the valley needs no float64. First every second temperature is tried.
    coarse = {k: near(_COARSE[k]) for k in range(1, len(_COARSE), 2)}
    k = min(coarse, key=lambda k: coarse[k].mismatch)
    coarse |= {i: near(_COARSE[i]) for i in (k - 1, k + 1) if i < len(_COARSE)}
    k = min(coarse, key=lambda k: coarse[k].mismatch)
    k = min(max(k, 1), len(_COARSE) - 2)
    glances = [coarse[k]]
    # Refining what is far from a match would change nothing. A few steps tell.
    around = _COARSE[k - 1 : k + 2]
    if coarse[k].mismatch < 0.5:
        glances += islice(_refined(near, around), _FIRST_REFINEMENTS)
        if min(match.mismatch for match in glances) < _NEAR:
            finest = _refined(lambda t: near(t, torch.float64), around)
            glances = [measure(seen, min(finest, key=lambda match: match.mismatch).loss)]
    return min([*tried, *glances], key=lambda match: match.mismatch)


def _refined(at: Callable[[float], Match], bracket: Sequence[float]) -> Iterator[Match]:
    """Tries around the least mismatch between three temperatures, by parabolas in log(t)."""
    points = [(math.log(t), at(t).mismatch) for t in bracket]
    for i in range(_REFINEMENTS):
        (x0, y0), (x1, y1), (x2, y2) = points
        left, right = (x1 - x0) * (y1 - y2), (x1 - x2) * (y1 - y0)
        x = x1 - ((x1 - x0) * left - (x1 - x2) * right) / (2 * (left - right) or math.inf)
        # Now and then, and where the parabola is of no use, divide the longer side.
        if i % 3 == 2 or not x0 < x < x2 or x == x1:
            x = x1 + 0.3 * (x2 - x1 if x2 - x1 > x1 - x0 else x0 - x1)
        match = at(math.exp(x))
        yield match
        points = sorted([*points, (x, match.mismatch)])
        # Keep the least with its neighbours.
        least = min((1, 2), key=lambda j: points[j][1])
        points = points[least - 1 : least + 2]
        lowest, highest = points[1][1], max(points[0][1], points[2][1])
        # A valley that is this flat does not end in 0.
        flat = highest - lowest < _FLAT * lowest
        if match.mismatch < 1e-13 or flat or points[2][0] - points[0][0] < 1e-7:
            return


@dataclass(frozen=True)
class _Prepared:
    """u: [M, D]. length: [M, 1]. gram: u uᵀ of the anchors, [A, M]. partner: [A]. rows: the
    anchors' numbers, [A]. numbers: 0 … M - 1. view: [M], 0 or 1. own: this rank's rows."""

    u: Tensor
    length: Tensor
    gram: Tensor
    partner: Tensor
    rows: Tensor
    numbers: Tensor
    view: Tensor
    own: slice


def _prepare(seen: Observed, loss: Loss, dtype: torch.dtype) -> _Prepared:
    key = (loss.normalised, loss.pairing, loss.scope, dtype)
    if key in seen.prepared:
        return seen.prepared[key]
    z, counts, own = seen.z, list(seen.counts), seen.mine
    if loss.scope == "own rank":
        z, counts = z[own], [seen.counts[seen.rank]]
        own = slice(0, counts[0])
    z = z.to(dtype)
    length = z.norm(dim=1, keepdim=True).clamp_min(1e-12)
    u = z / length if loss.normalised else z
    starts = [sum(counts[:r]) for r in range(len(counts))]
    partner = torch.cat(
        [partners(n, loss.pairing) + start for n, start in zip(counts, starts, strict=True)]
    ).to(z.device)
    view = torch.cat([views(n, loss.pairing) for n in counts]).to(z.device)
    rows = torch.arange(len(z), device=z.device)
    anchors = own if loss.scope in ("own anchors", "detached keys") else slice(None)
    gram = u[anchors] @ u.T
    made = _Prepared(u, length, gram, partner[anchors], rows[anchors], rows, view, own)
    # The search goes through the keys in order: older ones are not needed again.
    if len(seen.prepared) > 3:
        seen.prepared.pop(next(iter(seen.prepared)))
    seen.prepared[key] = made
    return made


def _denominators(seen: Observed, loss: Loss, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sums of exp(s) over the negatives, s the similarities of the anchors divided by the
    temperature: their logarithms, [A, 2], of those of the row's own view and of the other; and s of
    the positives, [A, 1]. Variants of the loss share them."""
    key = (loss.normalised, loss.pairing, loss.scope, dtype, loss.temperature)
    if key not in seen.sums:
        at = _prepare(seen, loss, dtype)
        s, partner = at.gram / loss.temperature, at.partner[:, None]
        positive = s.gather(1, partner)
        s.scatter_(1, partner, -math.inf).scatter_(1, at.rows[:, None], -math.inf)
        most = s.amax(1, keepdim=True).clamp_min_(torch.finfo(dtype).min)
        sums = s.sub_(most).exp_() @ torch.stack((1 - at.view, at.view), 1).to(dtype)
        mine = at.view[at.rows, None]
        sums = torch.cat((sums.gather(1, mine), sums.gather(1, 1 - mine)), 1)
        seen.sums[key] = sums.log_().add_(most), positive
    return seen.sums[key]


def _gradient(seen: Observed, loss: Loss, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """dL/dz of some of this rank's rows, L the mean over the rows of the scope; and L."""
    at = _prepare(seen, loss, dtype)
    negatives, positive = _denominators(seen, loss, dtype)
    myself = at.gram.gather(1, at.rows[:, None]) / loss.temperature
    terms = torch.cat((negatives, positive, myself), 1)
    times = terms.new_tensor((loss.same_view, 1, loss.positive, loss.own))
    lse = (terms + times.log()).logsumexp(1, keepdim=True)
    keys = rows + at.own.start
    own_anchors = loss.scope in ("own anchors", "detached keys")
    du = _softmax(loss, at, lse, rows if own_anchors else keys, slice(None)) @ at.u
    if loss.scope != "detached keys":
        du += _softmax(loss, at, lse, slice(None), keys).T @ at.u[at.rows]
    du /= len(lse) * loss.temperature
    value = float((lse - positive).mean())
    if not loss.normalised:
        return du, value
    v = at.u[keys]
    return (du - (du * v).sum(1, keepdim=True) * v) / at.length[keys], value


def _softmax(
    loss: Loss, at: _Prepared, lse: Tensor, anchors: Tensor | slice, keys: Tensor | slice
) -> Tensor:
    """The derivatives of the rows' losses by their similarities: the softmax, minus 1 at the
    positives. anchors: [a], of A. keys: [k], of M. lse: [A, 1], the denominators' logarithms."""
    g = (at.gram[anchors][:, keys] / loss.temperature).sub_(lse[anchors]).exp_()
    row, key = at.rows[anchors, None], at.numbers[keys]
    partner = at.partner[anchors, None] == key
    if not loss.same_view:
        g.masked_fill_((at.view[row] == at.view[key]) & (row != key), 0)
    if not loss.own:
        g.masked_fill_(row == key, 0)
    if not loss.positive:
        g.masked_fill_(partner, 0)
    return torch.where(partner, loss.positive * g - 1, g)
