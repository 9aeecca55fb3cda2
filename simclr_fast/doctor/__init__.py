"""Check a SimCLR training step from outside, whoever wrote it.

    from simclr_fast import doctor

    print(doctor.check(step, model, batch))        # calls step(model, batch), then undoes it
    with doctor.watch(model) as report:            # or around a few steps of any loop
        ...
    print(report)

Nothing of the loop's code is known. Modules, backward passes and optimizer steps are watched
through torch's hooks. The loss is recognised by its gradient: `loss_match` computes NT-Xent and its
usual mistakes in float64 for the embeddings that were seen, and takes the one that agrees.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from simclr_fast.doctor.observe import Observer, tensors_in
from simclr_fast.doctor.report import Finding, Report
from simclr_fast.doctor.rules import PATIENCE, diagnose
from simclr_fast.doctor.snapshot import untouched
from simclr_fast.doctor.views import prints

__all__ = ["Finding", "Report", "check", "watch"]


def check(
    step: Callable[[Any, Any], Any],
    model: nn.Module,
    batch: Any,
    *,
    steps: int = 2,
    temperature: float | None = None,
) -> Report:
    """Call step(model, batch) a few times, report what is wrong with it, and undo it.

    Parameters, buffers, gradients, optimizer states and random states are the same bits afterwards
    as before. Learning-rate schedulers, gradient scalers and iterators that `step` moves on are
    not put back: leave them out of `step`.

    step: what one iteration does: forward, loss, and whatever else belongs to it. If it returns a
        loss that requires a gradient (or a dict with "loss"), its backward pass is added.
    model: the module whose parameters are trained, or a ModuleList with the loss if that has
        parameters too.
    batch: what `step` needs. If it holds exactly two image tensors of one shape, they are taken as
        the two views of the same images in the same order.
    steps: how often `step` is called. Some mistakes show in the second step only.
    temperature: that of the loss, if the report shall compare it.

    With several ranks, all ranks must call this together. At most 2048 rows in the loss.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    images = [t for t in tensors_in(batch) if t.is_floating_point() and t.dim() == 4]
    pair = len(images) == 2 and images[0].shape == images[1].shape
    given = [prints(t) for t in images] if pair else []
    report = Report()
    with untouched(model) as snapshot:
        observer = Observer(model, snapshot)
        with observer.watching():
            for _ in range(steps):
                passes = observer.passes
                returned = step(model, batch)
                loss = returned.get("loss") if isinstance(returned, dict) else returned
                if isinstance(loss, Tensor) and loss.requires_grad and observer.passes == passes:
                    loss.backward()
                observer.end_step()
        diagnose(observer, report, temperature, given)
    return report


@contextmanager
def watch(
    model: nn.Module, *, temperature: float | None = None, patience: int = PATIENCE
) -> Iterator[Report]:
    """Watch the training steps inside of the context; the report is filled when it ends.

    The steps compute the same bits as without. The first two are looked at in detail.

    model: the module whose parameters are trained; it may be wrapped in DistributedDataParallel, or
        be a LightningModule. Optimizers and the loss are found by themselves.
    temperature: that of the loss, if the report shall compare it.
    patience: after so many watched steps the loss must have left its chance level, ln(2N - 1), and
        after so many steps in all, which batch norms and optimizers count, the embeddings must
        not be collapsed.

    With several ranks, all ranks must enter and leave together. At most 2048 rows in the loss.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    report = Report()
    observer = Observer(model)
    with observer.watching():
        yield report
    diagnose(observer, report, temperature, patience=patience)
