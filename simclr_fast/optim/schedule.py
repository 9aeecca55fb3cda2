"""The learning rate of the SimCLR paper: its scaling with the batch, warm-up and cosine decay."""

import math
from functools import partial

from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import Optimizer

from simclr_fast.utils.numbers import as_int


def warmup_cosine(optimizer: Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """The paper's schedule: linear warm-up, then cosine decay, per step.

    Step t uses lr·t/warmup_steps while t < warmup_steps, then
    lr·(1 + cos(π(t - warmup_steps)/(total_steps - warmup_steps)))/2, and 0 from total_steps on. So
    the first step of a warm-up has the learning rate 0. Call ``step()`` on the returned scheduler
    after each ``optimizer.step()``.
    """
    warmup_steps = as_int("warmup_steps", warmup_steps)
    total_steps = as_int("total_steps", total_steps)
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            "0 <= warmup_steps < total_steps is needed, got "
            f"warmup_steps={warmup_steps}, total_steps={total_steps}"
        )

    # Unlike a function in a function, it can be pickled and copied. LambdaLR keeps nothing of it in
    # its state, so a resumed run follows its own schedule.
    return LambdaLR(optimizer, partial(_factor, warmup_steps, total_steps))


def _factor(warmup_steps: int, total_steps: int, step: int) -> float:
    if step < warmup_steps:
        return step / warmup_steps
    progress = min((step - warmup_steps) / (total_steps - warmup_steps), 1.0)
    return (1.0 + math.cos(math.pi * progress)) / 2.0


def scaled_lr(batch_size: int, rule: str = "linear") -> float:
    """The paper's peak learning rate for a batch of ``batch_size`` images over all devices.

    rule: "linear": 0.3·batch_size/256. "sqrt": 0.075·√batch_size, which is better for batches below
        4096 images and for short runs (table B.1). "sqrt-v2": 0.1·√batch_size, that of SimCLR v2
        (arXiv:2006.10029, 2).
    """
    batch_size = as_int("batch_size", batch_size, 1)
    if rule == "linear":
        return 0.3 * batch_size / 256
    if rule == "sqrt":
        return 0.075 * math.sqrt(batch_size)
    if rule == "sqrt-v2":
        return 0.1 * math.sqrt(batch_size)
    raise ValueError(f"rule must be 'linear', 'sqrt' or 'sqrt-v2', got {rule!r}")
