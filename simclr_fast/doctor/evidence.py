"""From what was observed to what is known: the loss, the pairs, what the ranks do together."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from simclr_fast.doctor import loss_match
from simclr_fast.doctor.loss_match import Match, partners
from simclr_fast.doctor.observe import Backward, Head, Observer, Output
from simclr_fast.doctor.views import likeness
from simclr_fast.utils.distributed import all_gather_rows, gather_row_counts

# For fewer pairs the pixels do not say whether the pairs are right.
ENOUGH_PAIRS = 64


@dataclass
class Known:
    """A backward pass whose loss was recognised.

    z: [m, D], rows of this rank. rows: of all ranks. steps_of_loss: the number of backward passes
    with this loss before the first optimizer step. same_rows: a rank with the same embeddings.
    """

    seen: Backward
    head: Head
    match: Match
    z: Tensor
    rows: int
    detached: int
    half: bool
    passes: int = 1
    same_rows: int | None = None
    trained_by_others: list[Head] = field(default_factory=list)

    @property
    def first(self) -> Tensor:
        """The first row of each pair, [m / 2]."""
        index = torch.arange(len(self.z))
        return index[index < self.partner]

    @property
    def partner(self) -> Tensor:
        return partners(len(self.z), self.match.loss.pairing)


def recognise(observer: Observer, unchecked: list[str]) -> Known | None:
    """The first backward pass whose loss is a variant of NT-Xent. Collective over the ranks."""
    passes = observer.backwards
    number = _least(len(passes[0].heads) if passes else 0, observer.ranks)
    if not number:
        unchecked.append("the loss: no backward pass from a scalar loss to embeddings was seen")
        return None
    known = None
    for i in range(number):
        known = known or _try_head(observer, passes[0], passes[0].heads[i], unchecked)
    if known is None:
        if not any("rows" in reason for reason in unchecked):
            unchecked.append(
                "the loss: its gradient is not that of NT-Xent or a usual variant of it"
            )
        return None
    for seen in passes[1:]:
        if seen.step == known.seen.step and _new_images(seen, known) and _same_loss(seen, known):
            known.passes += 1
    for seen in passes:
        for head in seen.heads:
            other = head.name not in ("", known.head.name)
            if other and head.parameters & known.head.parameters:
                known.trained_by_others.append(head)
    return known


def _try_head(observer: Observer, seen: Backward, head: Head, unchecked: list[str]) -> Known | None:
    reached = [output for output in head.outputs if output.reached]
    # Outputs that the loss does not reach may be the detached half of the pairs.
    for outputs in [reached] if len(reached) == len(head.outputs) else [reached, head.outputs]:
        z = torch.cat([_exact(output.value) for output in outputs])
        grad = torch.cat([_exact(_gradient(output)) for output in outputs])
        live = torch.cat([_whole(output.reached, output.value) for output in outputs])
        half = bool(seen.graph.half) or outputs[0].value.dtype in (torch.float16, torch.bfloat16)
        counts = [len(z)]
        rank = 0
        z_all = z
        if observer.ranks > 1:
            world = dist.group.WORLD
            assert world is not None
            device = outputs[0].value.device
            counts = gather_row_counts(len(z), device, world)
            z_all = all_gather_rows(z.to(device), world, counts).to(z.device)
            rank = dist.get_rank()
        if sum(counts) > loss_match.LARGEST:
            unchecked.append(
                f"the loss: the batch has {sum(counts)} rows; give the doctor at most "
                f"{loss_match.LARGEST}"
            )
            return None
        if any(n % 2 or not n for n in counts) or not bool(z_all.isfinite().all()):
            continue
        observed = loss_match.Observed(z_all, grad, live, counts, rank, seen.value, half)
        hints = [t for t in (*observer.temperatures, *seen.graph.divisors) if 0.004 < t < 8]
        match = loss_match.find(observed, [*hints, *(t * t for t in hints if t < 1)])
        if match is not None:
            return Known(
                seen,
                head,
                match,
                z,
                sum(counts),
                int((~live).sum()),
                half,
                same_rows=_same_rows(z_all, counts, rank),
            )
    return None


def _same_rows(z: Tensor, counts: Sequence[int], rank: int) -> int | None:
    parts = z.split(list(counts))
    for other, part in enumerate(parts):
        if other != rank and part.shape == parts[rank].shape and part.equal(parts[rank]):
            return other
    return None


def _new_images(seen: Backward, known: Known) -> bool:
    """Whether another pass has other images. Some optimizers repeat a step on the same ones."""
    mine, others = known.seen.prints, seen.prints
    return mine is not None and others is not None and not mine.equal(others)


def _same_loss(seen: Backward, known: Known) -> bool:
    """Whether another pass has the loss that is known, in this rank alone."""
    for head in seen.heads:
        outputs = [output for output in head.outputs if output.reached]
        if head.name != known.head.name or any(output.grad is None for output in outputs):
            continue
        z = torch.cat([_exact(output.value) for output in outputs])
        if len(z) == len(known.z) and len(known.z) == known.rows:
            grad = torch.cat([_exact(_gradient(output)) for output in outputs])
            observed = loss_match.Observed(z, grad, _whole(True, z), [len(z)])
            if loss_match.measure(observed, known.match.loss).mismatch < 5e-3:
                return True
    return False


class Verdict(NamedTuple):
    """Whether the loss pairs views of one image. text: the evidence."""

    wrong_order: bool = False
    different_images: bool = False
    text: str = ""


def judge_pairs(known: Known, given: Sequence[Tensor]) -> Verdict:
    """Compare the pairs of the loss with the images that went in.

    given: prints of the two views that the caller passed in order; [] if they are not known.
    """
    pictures, prints, partner = known.seen.pictures, known.seen.prints, known.partner
    assert pictures is not None
    assert prints is not None
    m = len(partner)
    if len(given) == 2:
        # Different images can have equal views, such as a white corner of each.
        numbers: dict[int, set[int]] = {}
        for view in given:
            for i, value in enumerate(view.tolist()):
                numbers.setdefault(value, set()).add(i)
        image = [numbers.get(value, set()) for value in prints.tolist()]
        right = sum(bool(image[i] & image[j]) for i, j in enumerate(partner.tolist()))
        if all(image) and right < m:
            return Verdict(True, text=f"{right} of {m} rows get the other view of their image")
    if m < 2 * ENOUGH_PAIRS:
        return Verdict()
    own = likeness(pictures, known.first, partner[known.first])
    other = partners(
        m, "interleaved" if known.match.loss.pairing == "concatenated" else "concatenated"
    )
    first = torch.arange(m)[torch.arange(m) < other]
    swapped = likeness(pictures, first, other[first])
    text = (
        f"the images of its pairs are alike by {own:.1f} standard errors (random pairs: 0 ± 1; "
        f"views made as in the paper: above 5)"
    )
    if own < 2.5 and swapped > 6:
        return Verdict(True, text=f"{text}; those of the other order by {swapped:.1f}")
    return Verdict(different_images=own < 2, text=text)


def reduction(observer: Observer) -> str:
    """How .grad is made from the ranks' own gradients: "mean", "sum", "none" or "unknown".

    Collective over the ranks.
    """
    verdicts = set()
    for i in range(_least(len(observer.samples), observer.ranks)):
        sample = observer.samples[i]
        usable = sample.clean and sample.own is not None and sample.at_end is not None
        usable = usable and sample.own.shape == sample.at_end.shape  # type: ignore[union-attr]
        if not _least(int(usable), observer.ranks):
            continue
        own, after, end = sample.own, sample.after_backward, sample.at_end
        assert own is not None
        assert end is not None
        total = own.double()
        dist.all_reduce(total)
        parallel = _cosine(total, own.double()) > 1 - 1e-6
        for grad in (after, end):
            if grad is None or parallel or _cosine(grad.double(), total) < 1 - 1e-5:
                continue
            ratio = float(grad.double().norm() / total.norm())
            if abs(ratio - 1) < 0.01:
                verdicts.add("sum")
            elif abs(ratio * observer.ranks - 1) < 0.01:
                verdicts.add("mean")
        if not parallel and not verdicts and _cosine(end.double(), own.double()) > 1 - 1e-6:
            verdicts.add("none")
    found = _least(len(verdicts), observer.ranks)
    return next(iter(verdicts)) if found == 1 and len(verdicts) == 1 else "unknown"


def _least(value: int, ranks: int) -> int:
    if ranks == 1:
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    least = torch.tensor(value, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-300))


def _exact(value: Tensor) -> Tensor:
    # Devices such as mps have no float64.
    return value.detach().to("cpu", torch.float64) if value.device.type == "mps" else value.double()


def _gradient(output: Output) -> Tensor:
    return torch.zeros_like(output.value) if output.grad is None else output.grad


def _whole(flag: bool, value: Tensor) -> Tensor:
    return torch.full((len(value),), flag, dtype=torch.bool, device=value.device)
