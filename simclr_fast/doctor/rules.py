"""The rules: what each finding is made of, and what to say."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from simclr_fast.doctor.evidence import (
    ENOUGH_PAIRS,
    Known,
    judge_pairs,
    recognise,
    reduction,
)
from simclr_fast.doctor.lars_trial import is_lars, norms_and_biases
from simclr_fast.doctor.loss_match import equal
from simclr_fast.doctor.observe import Observer, Stepped
from simclr_fast.doctor.report import Finding, Report
from simclr_fast.doctor.views import chroma_agreement
from simclr_fast.evaluation import geometry
from simclr_fast.optim.schedule import scaled_lr

# Steps after which a model should have learnt something.
PATIENCE = 500
# A loss above this share of its chance level says nothing.
NOTHING_LEARNT = 0.99
# Correlation of the views' mean colours without colour distortion.
_SAME_COLOURS = 0.85
_NAMED = 3


def diagnose(
    observer: Observer,
    report: Report,
    temperature: float | None = None,
    given: Sequence[Tensor] = (),
    patience: int = PATIENCE,
) -> None:
    """Fill the report. Collective over the ranks, if there are several."""
    known = recognise(observer, report.unchecked)
    averaged = reduction(observer) if observer.ranks > 1 else "mean"
    findings = [*_numbers(observer), *_gradients(observer), *_norms(observer, known)]
    if known is not None:
        report.facts += _facts(known, observer.ranks)
        findings += _loss(observer, known, temperature)
        findings += _pairs(known, given, report)
        findings += _ranks(observer, known, averaged)
    elif averaged == "none":
        findings.append(_not_averaged(observer))
    findings += _optimizers(observer, known)
    findings += _geometry(observer, known, patience, report)
    report.findings += sorted(findings, key=lambda finding: finding.severity)


def _facts(known: Known, ranks: int) -> Iterator[str]:
    loss = known.match.loss
    yield f"temperature of the loss: {loss.temperature:.4g}"
    negatives = f", rows of other ranks: {loss.scope}" if ranks > 1 else ""
    yield f"rows in the loss: {known.rows}, {loss.pairing} views{negatives}"
    yield f"loss: {known.match.value:.4f}; chance level ln(2N - 1): {math.log(known.rows - 1):.4f}"
    if loss.positive == 0:
        yield "the positive is not in the denominator (decoupled loss)"
    if not loss.same_view:
        yield "rows are compared with those of the other view only"


def _numbers(observer: Observer) -> Iterator[Finding]:
    if observer.not_finite:
        yield Finding(
            "not-finite",
            "error",
            "; ".join(observer.not_finite),
            "One such step makes all weights NaN, and they stay so.",
            "Lower the learning rate or warm it up; compute the loss in float32; with float16, use "
            "a GradScaler. Look for zero rows that are normalised in float16.",
        )


def _gradients(observer: Observer) -> Iterator[Finding]:
    trained = {id(p) for o in observer.optimizers for g in o.param_groups for p in g["params"]}
    never = sorted(observer.without_grad - observer.with_grad)
    if never and observer.with_grad:
        yield Finding(
            "no-gradient",
            "warning",
            f"{len(never)} parameters got no gradient in {observer.steps} steps: {_some(never)}",
            "They keep their initial values, and DistributedDataParallel raises an error.",
            "Remove them (such as an unused classifier), freeze them by requires_grad_(False), or "
            "use what they compute.",
        )
    parameters = dict(observer.model.named_parameters())
    left_out = [name for name in sorted(observer.with_grad) if id(parameters[name]) not in trained]
    if left_out and trained:
        yield Finding(
            "not-in-optimizer",
            "error",
            f"{len(left_out)} parameters get a gradient and are in no optimizer: {_some(left_out)}",
            "They are never updated.",
            "Give the optimizer all parameters: those of the projector too, and those that were "
            "created or replaced after the optimizer was made.",
        )
    stale = [seen for seen in observer.backwards if seen.stale > 0]
    if stale:
        yield Finding(
            "gradients-not-zeroed",
            "error",
            f"before the backward pass of step {stale[0].step + 1} the gradients had the norm "
            f"{stale[0].stale:.3g}, left over from the step before",
            "Each step then follows the sum of all gradients so far.",
            "Call optimizer.zero_grad() before each backward pass.",
        )


def _norms(observer: Observer, known: Known | None) -> Iterator[Finding]:
    names = {m: name for name, m in observer.model.named_modules()}
    norms = {m: calls for m, calls in observer.norms.items() if m in names}
    asleep = [
        names[m]
        for m, calls in norms.items()
        if calls.evaluated and not calls.training and _has_gradient(observer, names[m])
    ]
    if asleep:
        yield Finding(
            "eval-mode",
            "error",
            f"{len(asleep)} of {len(norms)} batch norms ran in eval mode in a step that trains "
            f"them: {_some(asleep)}",
            "They use old running statistics instead of those of the batch, and do not update "
            "them.",
            "Call model.train() after each evaluation, before the next step.",
        )
    repeated = [(m, calls) for m, calls in norms.items() if calls.repeated]
    if repeated:
        m, calls = repeated[0]
        yield Finding(
            "double-update",
            "warning",
            f"{len(repeated)} batch norms updated their running statistics again while the "
            f"backward pass recomputed activations: {names[m]} {calls.repeated} times besides "
            f"{calls.training} forward passes",
            "The effective momentum is another one, and the running statistics, which evaluation "
            "uses, are off.",
            "Use simclr_fast.LargeBatch(model, memory='replay'), which recomputes with the "
            "statistics of the first pass; or set the momentum m to 1 - sqrt(1 - m).",
        )
    local = [m for m, calls in norms.items() if calls.local]
    if not local:
        return
    if observer.ranks > 1:
        yield Finding(
            "batch-norm-per-rank",
            "warning",
            f"{len(local)} of {len(norms)} batch norms use the statistics of this rank's batch "
            f"only, with {observer.ranks} ranks; first {names[local[0]]}",
            "The result depends on the number of ranks, and the encoder can recognise a rank's "
            "images by their shared statistics. SimCLR uses those of the whole batch.",
            "nn.SyncBatchNorm.convert_sync_batchnorm(model) before DistributedDataParallel, or "
            "simclr_fast.LargeBatch(model, group=...).",
        )
    if known is None:
        return
    calls_of_rows = (
        torch.repeat_interleave(torch.arange(len(known.seen.calls)), torch.tensor(known.seen.calls))
        if known.seen.calls
        else torch.zeros(0, dtype=torch.int64)
    )
    if len(calls_of_rows) != len(known.z):
        return
    apart = bool((calls_of_rows != calls_of_rows[known.partner]).all())
    number = len(known.seen.calls)
    if number > 2 or (number == 2 and not apart):
        yield Finding(
            "ghost-batch-norm",
            "warning",
            f"{len(local)} batch norms see the batch of {len(known.z)} rows in {number} parts of "
            f"{known.seen.calls[0]} rows, each with its own statistics",
            "Statistics of fewer rows give another gradient: its cosine to the true one was 0.94, "
            "0.85, 0.75 and 0.61 for parts of 256, 128, 64 and 32 of 512 views.",
            "simclr_fast.LargeBatch(model, memory='lockstep'), which is exact; or GroupNorm.",
        )


def _has_gradient(observer: Observer, name: str) -> bool:
    norm = observer.model.get_submodule(name)
    prefix = f"{name}." if name else ""
    own = {f"{prefix}{key}" for key, _ in norm.named_parameters(recurse=False)}
    return not own or bool(own & observer.with_grad)


def _loss(observer: Observer, known: Known, declared: float | None) -> Iterator[Finding]:
    match, seen, m = known.match, known.seen, len(known.z)
    loss = match.loss
    lengths = known.z.norm(dim=1)
    low, high = float(lengths.min()), float(lengths.max())
    if not loss.normalised and max(abs(low - 1), abs(high - 1)) > 0.01:
        yield Finding(
            "not-normalised",
            "error",
            f"the gradient is that of inner products of vectors with lengths from {low:.3g} to "
            f"{high:.3g}, not that of cosines",
            "The loss falls by growing the vectors, and the temperature loses its meaning.",
            "z = torch.nn.functional.normalize(z, dim=1) before the similarities.",
        )
    yield from _temperature(observer, known, declared)
    if loss.own:
        yield Finding(
            "self-similarity",
            "error",
            "the denominator contains exp(1 / temperature) for each row with itself "
            f"({_agreement(known)})",
            "A row is always most similar to itself, so the loss is dominated by a constant.",
            "Set the diagonal of the similarities to -inf: logits.fill_diagonal_(float('-inf')).",
        )
    if loss.positive == 2:
        yield Finding(
            "positive-twice",
            "error",
            f"the positive is counted twice in the denominator ({_agreement(known)})",
            "The loss cannot reach 0: it also pushes the two views of an image apart.",
            "Leave the positive out of the negatives' mask, or take cross_entropy over all "
            "2N - 1 other rows.",
        )
    if known.detached and observer.ranks == 1:
        yield Finding(
            "detached-gradient",
            "error",
            f"{known.detached} of {m} rows of the loss get no gradient",
            "Only one side of each pair is trained, on a wrong gradient.",
            "Remove .detach() or torch.no_grad() from the second view.",
        )
    if seen.graph.half:
        kinds = ", ".join(sorted(str(dtype).partition(".")[2] for dtype in seen.graph.half))
        yield Finding(
            "half-precision-loss",
            "warning",
            f"similarities or softmax are computed in {kinds}; the gradient differs by "
            f"{math.sqrt(max(0.0, 2 * match.mismatch)):.1%} from the exact one",
            "Similarities divided by the temperature need more digits than 16 bits have.",
            "Compute the loss outside of autocast on z.float(), or by simclr_fast.nt_xent_loss, "
            "which computes in float32 inside.",
        )
    if known.passes > 1:
        yield Finding(
            "negatives-per-micro-batch",
            "warning",
            f"{known.passes} backward passes before an optimizer step, each with a loss over "
            f"{known.rows} of {known.passes * known.rows} rows",
            "Accumulated gradients of small batches are not the gradient of the large batch: each "
            "row has fewer negatives, and batch norm smaller batches.",
            "simclr_fast.LargeBatch(model, memory='lockstep').backward(views, loss).",
        )
    for head in known.trained_by_others:
        yield Finding(
            "probe-trains-encoder",
            "error",
            f"the loss on {head.name!r} also sends a gradient into "
            f"{len(head.parameters & known.head.parameters)} parameters that the contrastive loss "
            "trains",
            "A probe must only measure. With labels in the encoder, its accuracy says nothing.",
            "Give the probe detached features: probe(h.detach()). Ignore this if you mean to "
            "train the encoder on both losses.",
        )
        break


def _agreement(known: Known) -> str:
    power = max(-9, math.ceil(math.log10(max(known.match.mismatch, 1e-12))))
    return f"1 - cosine of its gradient and the observed one is below 1e{power}"


def _temperature(observer: Observer, known: Known, declared: float | None) -> Iterator[Finding]:
    effective = known.match.loss.temperature
    named = [declared] if declared is not None else observer.temperatures
    twice = [t for t in (*named, *known.seen.graph.twice) if abs(effective / (t * t) - 1) < 0.02]
    if any(abs(effective / t - 1) < 0.02 for t in named):
        return
    if twice:
        yield Finding(
            "temperature-twice",
            "error",
            f"the loss behaves as with temperature {effective:.4g}, which is {twice[0]:.4g} "
            "squared: similarities are divided by it twice",
            "So low a temperature looks at the nearest negatives only.",
            "Divide once: either the similarities or, inside the loss, nothing else.",
        )
    elif declared is not None:
        yield Finding(
            "temperature",
            "error",
            f"the loss behaves as with temperature {effective:.4g}; {declared:.4g} was expected",
            "The temperature decides how much the nearest negatives count.",
            "Look for vectors that are scaled before or after they are normalised.",
        )


def _pairs(known: Known, given: Sequence[Tensor], report: Report) -> Iterator[Finding]:
    pictures, prints = known.seen.pictures, known.seen.prints
    if pictures is None or prints is None or len(prints) != len(known.z):
        report.unchecked.append(
            "the views: the images of the loss's rows were not seen (modules must be called with "
            "[n, C, H, W] tensors)"
        )
        return
    first, second = known.first, known.partner[known.first]
    same = int((prints[first] == prints[second]).sum())
    if 2 * same > len(first):
        yield Finding(
            "identical-views",
            "error",
            f"the two views are equal in every pixel for {same} of {len(first)} images",
            "The task is solved without learning anything.",
            "Draw the random numbers anew for each view: call the transform twice per image.",
        )
        return
    verdict = judge_pairs(known, given)
    if verdict.wrong_order:
        pairing = known.match.loss.pairing
        other = "interleaved" if pairing == "concatenated" else "concatenated"
        yield Finding(
            "wrong-order",
            "error",
            f"the loss takes the rows as {pairing} views, but {verdict.text}",
            "Different images are pulled together.",
            f"The loss expects {pairing} rows ({_layout(pairing)}). Use it with such a batch, or "
            f"use a loss for {other} rows ({_layout(other)}).",
        )
    elif verdict.different_images:
        yield Finding(
            "different-images",
            "error",
            f"the paired rows look like views of different images: {verdict.text}",
            "Different images are pulled together.",
            "Make both views from one image, and shuffle images, not views.",
        )
    elif len(first) < ENOUGH_PAIRS:
        report.unchecked.append(
            f"the pairs and colours: pixels say something from {ENOUGH_PAIRS} images on, the batch "
            f"has {len(first)}"
        )
    elif pictures.colourful > 0.1:
        agreement = chroma_agreement(pictures, first, second)
        if agreement > _SAME_COLOURS:
            yield no_colour_distortion(
                f"the mean colours of two views of an image correlate by {agreement:.2f} (with the "
                "paper's jitter and gray: about 0.4)"
            )


def _layout(pairing: str) -> str:
    if pairing == "concatenated":
        return "all first views, then all second views"
    return "both views of image 0, both views of image 1, ..."


def _not_averaged(observer: Observer) -> Finding:
    return Finding(
        "ranks-not-averaged",
        "error",
        f"the gradients of {observer.ranks} ranks are not added up: each rank keeps its own",
        "The ranks train different models.",
        "Wrap the model in DistributedDataParallel and call the wrapped model, not model.module.",
    )


def _ranks(observer: Observer, known: Known, averaged: str) -> Iterator[Finding]:
    ranks, match = observer.ranks, known.match
    if ranks == 1:
        return
    if averaged == "none":
        yield _not_averaged(observer)
    if known.same_rows is not None:
        yield Finding(
            "same-batch-on-ranks",
            "error",
            f"this rank and rank {known.same_rows} have equal embeddings in every bit",
            "The ranks compute the same thing, and each image is its own negative.",
            "Give each rank its own images (DistributedSampler) and its own random numbers.",
        )
    scope = match.loss.scope
    if scope == "own rank":
        yield Finding(
            "local-negatives",
            "error",
            f"the loss contrasts the {len(known.z)} rows of this rank only, not the {known.rows} "
            f"of {ranks} ranks",
            "SimCLR needs many negatives; adding GPUs adds none here.",
            "simclr_fast.NTXentLoss(temperature, gather_distributed=True), or a gather with "
            "gradient before the loss.",
        )
        return
    if scope in ("own anchors", "detached keys"):
        what = "rows of other ranks" if scope == "own anchors" else "all keys"
        yield Finding(
            "detached-gather",
            "error",
            f"the gather passes no gradient: {what} are constants ({_agreement(known)})",
            "A row's part as a negative and as the positive of rows elsewhere is missing, so the "
            "direction is wrong.",
            "simclr_fast.NTXentLoss(temperature, gather_distributed=True), or "
            "torch.distributed.nn.functional.all_gather, which has a gradient.",
        )
        return
    # Under averaging the gradient at z must be that of the mean loss times the number of ranks.
    needed = 1.0 if averaged == "sum" else float(ranks)
    factor = match.factor / needed
    scale = known.seen.value / match.value if match.value else math.nan
    half = known.half
    if equal(factor, 1, half) or equal(factor, scale, half):
        return
    off = [
        f
        for f in (1 / ranks, float(ranks), 1 / ranks**2)
        for s in (1.0, scale)
        if equal(factor, f * s, half)
    ]
    if off:
        yield Finding(
            "gradient-off-by-ranks",
            "error",
            f"with {ranks} ranks, whose gradients are "
            f"{'added' if averaged == 'sum' else 'averaged'}, the gradient is {off[0]:.3g} times "
            "the right one",
            "The learning rate changes with the number of ranks.",
            "simclr_fast.NTXentLoss(temperature, gather_distributed=True); or multiply the loss by "
            f"{1 / off[0]:.3g} before the backward pass.",
        )


def _optimizers(observer: Observer, known: Known | None) -> Iterator[Finding]:
    excluded = norms_and_biases(observer.model)
    for optimizer, stepped in observer.optimizers.items():
        kind = type(optimizer).__name__
        adapted = [trial.name for trial in stepped.trials if trial.adapted]
        if adapted:
            yield Finding(
                "lars-adapts-norms",
                "warning",
                f"{kind} scales the updates of biases or norm layers by their trust ratio; tried "
                f"on {_some(adapted)}",
                "Their norms say nothing about a useful step: a bias of 0 never moves.",
                "Put them in a group without adaptation: "
                "simclr_fast.optim.lars_param_groups(model, weight_decay).",
            )
        if is_lars(optimizer):
            decayed = [trial.name for trial in stepped.trials if trial.decayed]
        else:
            decayed = [
                excluded[id(p)]
                for group in optimizer.param_groups
                if group.get("weight_decay", 0) > 0
                for p in group["params"]
                if id(p) in excluded
            ]
        if decayed:
            yield Finding(
                "decay-of-norms",
                "warning",
                f"{kind} decays biases or norm layers: {_some(decayed)}",
                "Decay pulls the scale of a batch norm to 0. The paper leaves both out.",
                "Put them in a group with weight_decay=0.",
            )
        if is_lars(optimizer) and known is not None:
            yield from _learning_rate(stepped, known, kind)


def _learning_rate(stepped: Stepped, known: Known, kind: str) -> Iterator[Finding]:
    images = known.rows * known.passes // 2
    peak = stepped.optimizer.param_groups[0].get("initial_lr")
    if peak is not None:
        yield from learning_rate(kind, float(peak), images)
    if not stepped.fresh or not stepped.lr:
        return
    start = stepped.lr[0]
    reference = float(peak) if peak is not None else min(_usual_rates(images))
    if start >= 0.5 * reference and len(set(stepped.lr)) == 1:
        yield no_warm_up(kind, start)


def _usual_rates(images: int) -> tuple[float, float]:
    return scaled_lr(images, "linear"), scaled_lr(images, "sqrt")


def learning_rate(kind: str, peak: float, images: int) -> Iterator[Finding]:
    """A finding if the peak learning rate of LARS is far from the paper's two rules.

    Only for 256 images or more: the rules were made for large batches.
    """
    linear, root = _usual_rates(images)
    if images >= 256 and not min(linear, root) / 6 < peak < 6 * max(linear, root):
        yield Finding(
            "learning-rate",
            "warning",
            f"the peak learning rate of {kind} is {peak:.3g}; for {images} images the paper's "
            f"rules give {linear:.3g} (0.3·B/256) or {root:.3g} (0.075·√B)",
            "LARS needs a learning rate that grows with the batch.",
            f"lr = simclr_fast.optim.scaled_lr({images}).",
        )


def no_warm_up(kind: str, start: float) -> Finding:
    return Finding(
        "no-warm-up",
        "warning",
        f"the first step of {kind} already has the learning rate {start:.3g}",
        "Large first steps of LARS can end in a collapse.",
        "Raise the learning rate linearly from 0 for 10 epochs: "
        "simclr_fast.optim.warmup_cosine(optimizer, warmup_steps, total_steps).",
    )


def no_colour_distortion(seen: str) -> Finding:
    return Finding(
        "no-colour-distortion",
        "warning",
        seen,
        "Two crops of a photo share their colours, which solves the task: the paper's linear "
        "accuracy fell from 56 to 33% without colour distortion.",
        "Add colour jitter (probability 0.8, strength 1) and gray (0.2), as "
        "simclr_fast.SimCLRViews does.",
    )


def at_chance(steps: int, loss: float, chance: float) -> Finding:
    return Finding(
        "at-chance",
        "error",
        f"after {steps} steps the loss is {loss:.4f}; ln(2N - 1) = {chance:.4f} is the loss of "
        "embeddings that say nothing",
        "The network has not begun to learn.",
        "Check the views and the learning rate; a higher temperature (0.2 to 0.5) learns more "
        "easily.",
    )


def _geometry(
    observer: Observer, known: Known | None, patience: int, report: Report
) -> Iterator[Finding]:
    trained = max(observer.steps, _age(observer)) >= patience
    values = observer.values
    if observer.last is None:
        return
    rates = [stepped.lr for stepped in observer.optimizers.values()]
    rising = any(len(lr) > 1 and lr[0] < lr[-1] == max(lr) for lr in rates)
    if known is not None and len(values) >= patience and known.passes == 1 and not rising:
        chance = math.log(known.rows - 1)
        scale = known.seen.value / known.match.value
        late = sum(values[-20:]) / 20 / scale
        if late > NOTHING_LEARNT * chance:
            yield at_chance(len(values), late, chance)
    # Without a gradient, as after a collapse, the loss is not recognised.
    heads = [head for head in observer.last.heads if known is None or head.name == known.head.name]
    if len(heads) != 1:
        return
    z = torch.cat([output.value.double() for output in heads[0].outputs])
    h = [x.double().flatten(1) for x in observer.last.h if x.dim() == 2]
    spaces = {"z": z}
    if h and len({x.size(1) for x in h}) == 1:
        spaces = {"h": torch.cat(h), "z": z}
    for name, x in spaces.items():
        if len(x) >= 8 and bool(x.isfinite().all()):
            yield from collapse(name, x, trained, report)
    if known is not None and len(z) == len(known.z):
        first = known.first
        report.facts.append(
            f"alignment {geometry.alignment(z[first], z[known.partner[first]]):.3f}, "
            f"uniformity {geometry.uniformity(z):.3f}"
        )


def collapse(name: str, x: Tensor, trained: bool, report: Report) -> Iterator[Finding]:
    """A finding if the rows of x [n, D] lie on a point or a line; adds its rank to the facts.

    trained: whether the model should have learnt something. Before that, only equal rows count.
    """
    rank, uniform = geometry.effective_rank(x), geometry.uniformity(x)
    most = min(x.shape)
    report.facts.append(f"effective rank of {name}: {rank:.1f} of at most {most}")
    equal_rows = bool((x - x[0]).norm() <= 1e-6 * x.norm())
    if equal_rows or (trained and (rank < 2 or uniform > -0.05)):
        yield Finding(
            "collapse",
            "error",
            f"all rows of {name} have nearly one direction: effective rank {rank:.2f} of at most "
            f"{most}, uniformity {uniform:.3f}",
            "The encoder gives every image the same features.",
            "Look at the other findings first. Otherwise lower the learning rate, warm it up, and "
            "check that the loss has negatives.",
        )


def _age(observer: Observer) -> int:
    """Steps that the model was trained for, as far as its batch norms and optimizers tell."""
    counts = [0]
    for norm in observer.norms:
        if isinstance(tracked := getattr(norm, "num_batches_tracked", None), Tensor):
            counts.append(int(tracked))
    for optimizer in observer.optimizers:
        for state in optimizer.state.values():
            step = state.get("step", 0) if isinstance(state, dict) else 0
            counts.append(int(step))
    return max(counts)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
