"""The one training loop: load → backward → step → log → probe → save → stop, and resume.

`pretrain` and `supervise` bring a model, a loader and a loss; everything else is here.
"""

import logging
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simclr_fast import __version__
from simclr_fast.data.account import printable
from simclr_fast.data.loader import OneViewLoader, TwoViewLoader
from simclr_fast.evaluation.online import OnlineProbe
from simclr_fast.large_batch import LargeBatch, planner
from simclr_fast.models.average import WeightAverage
from simclr_fast.models.encoders import SimCLR
from simclr_fast.models.fused_norms import fused_norms
from simclr_fast.optim.schedule import warmup_cosine
from simclr_fast.training.config import PretrainConfig
from simclr_fast.training.cuda_graph import StepGraph, refuse_cuda_graph, step_graph
from simclr_fast.training.loggers import require_loggers
from simclr_fast.training.metrics import Metrics, line_is_due
from simclr_fast.training.page import write_machine
from simclr_fast.training.setup import (
    backend_settings,
    build_optimizer,
    choose_memory,
    describe,
    output_folder,
    refuse_changes,
    workload,
    write_config,
)
from simclr_fast.utils import checkpoint
from simclr_fast.utils.device import (
    allocator_setting,
    autocast_dtype,
    keep_freed_memory,
    seed_step,
)
from simclr_fast.utils.distributed import World
from simclr_fast.utils.interrupts import Interrupted, catch_signals

log = logging.getLogger(__name__)
# The weights that a run leaves: the last ones, and with `ema` their moving average.
ENCODER, AVERAGED = "encoder.safetensors", "encoder-ema.safetensors"


@dataclass(frozen=True)
class Task:
    """A model, a loader and a loss to train.

    loss: called once per step with the model's outputs for this rank's views, the numbers of the
        images, int64 [n] on the CPU, and whether the step is logged. It returns the loss of this
        rank and the values for metrics.jsonl. Gradients of the loss are averaged over ranks. The
        values are detached 0-dim tensors, equal on all ranks, with the loss among them, and an
        accuracy if the step is logged.
    parts: further modules, which checkpoints hold as well.
    around_backward: called with the views; its context is around the backward of each step.
    """

    name: str
    model: SimCLR
    loader: TwoViewLoader | OneViewLoader
    loss: Callable[[Any, Tensor, bool], tuple[Tensor, dict[str, Tensor]]]
    parts: dict[str, nn.Module] = field(default_factory=dict)
    around_backward: Callable[[LargeBatch, Sequence[Tensor]], AbstractContextManager[None]] = (
        lambda large_batch, views: nullcontext()
    )


def train(config: PretrainConfig, world: World, task: Task) -> Path:
    """Train `task` to its end and return the output folder.

    Raises:
        FileExistsError, BlockingIOError: the output folder is in use. Interrupted: a signal ended
            the run. OutOfMemory: the message says which flags to try next. FloatingPointError: the
            loss or a weight is no longer finite; the last checkpoint was written before that.
    """
    require_loggers(config.log)
    model, loader, average = task.model, task.loader, None
    more: dict[str, nn.Module] = dict(task.parts)
    if config.ema is not None:
        more["ema"] = average = WeightAverage(model.encoder, config.ema, warm_up=True, buffers=True)
    for part in (model, *more.values()):
        part.to(world.device)
        if config.channels_last:
            part.to(memory_format=torch.channels_last)

    work = workload(config, world.size, world.device, loader.n_views)
    setting, options = choose_memory(config, world, work)
    if config.cuda_graph:
        refuse_cuda_graph(world, setting.memory)
    if setting.memory == "lockstep":
        # The planner counts on it.
        loader.place_views(on_host=True)
    dtype = autocast_dtype(config.precision, world.device)
    large_batch = LargeBatch(model, group=world.group, autocast=dtype, **options)
    # Over several ranks and in the other modes LargeBatch has batch norms of its own.
    fuses = setting.memory == "plain" and world.group is None and not config.compile
    if world.device.type == "cpu":
        keep_freed_memory()

    step, total_steps = 0, config.steps or config.epochs * len(loader)
    warmup = min(round(config.warmup_epochs * len(loader)), total_steps - 1)
    optimizer = build_optimizer(model, config)
    scheduler = warmup_cosine(optimizer, warmup, total_steps)
    scaler = torch.amp.GradScaler(world.device.type, enabled=dtype is torch.float16)
    parts = {
        "model": model,
        "loader": loader,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "scaler": scaler,
        **more,
    }
    # Both on rank 0 only.
    metrics: Metrics | None = None
    probe: OnlineProbe | None = None
    if config.probe_every and world.rank == 0:
        labels = loader.source.need_labels("probe_every needs labelled images")
        probe = OnlineProbe(labels, config.probe_every, world.device)

    def where() -> str:
        twice = ", with --cuda-graph, which takes activations twice" if config.cuda_graph else ""
        return f"rank {world.rank}, step {step + 1}{twice}"

    def loss_of(
        outputs: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """The scaled loss of this step's images, after a look at the outputs; h for the probe."""
        loss, shown = task.loss(outputs, index, logged)
        if metrics is not None and logged:
            metrics.look(*outputs, loader.n_views)
        return scaler.scale(loss), shown, None if probe is None else outputs[0].detach()

    def step_of(views: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        with fused_norms(model) if fuses else nullcontext():
            return large_batch.backward(views, loss_of, loader.row_counts())

    # Created only now: a wrong argument fails above and leaves no empty folder.
    with ExitStack() as stack:
        out = stack.enter_context(output_folder(config, world))
        for context in backend_settings(config, world, setting.memory):
            stack.enter_context(context)
        folder = out / "checkpoints"
        if config.resume:
            world.share(lambda: refuse_changes(config, out))
            step = resume(folder, world, parts, probe)
        world.check_alike(model, step)
        if world.rank == 0:
            write_config(config, loader.source.account, out)
            write_machine(out, world.device, world.size)
            log.info("%s", summary(config, world, task, setting, total_steps, out))
            metrics = stack.enter_context(
                Metrics(task.name, out / "metrics.jsonl", config, step, total_steps)
            )
        if probe is not None:
            probe.open(out / "online_probe.jsonl", step)

        caught = stack.enter_context(catch_signals())
        stack.enter_context(planner.out_of_memory(work, setting, where))
        model.train()
        graph: StepGraph | None = None
        if config.cuda_graph:
            graph = stack.enter_context(step_graph(model, world.device))
            index, logged = torch.empty(0, dtype=torch.int64), False
            graph.capture(step_of, loader.empty_views())
        # Closed after an error too: a thread may be making the next batch.
        batches = stack.enter_context(closing(endless(loader)))
        saved_at = time.monotonic()
        while step < total_steps:
            world.mark(step + 1, "loading its batch")
            waiting = time.perf_counter()
            *views, index = next(batches)
            if metrics is not None:
                metrics.waited += time.perf_counter() - waiting

            world.mark(step + 1, "training")
            seed_step(config.seed, step, world.device, world.rank)
            # On every rank: the values of a line may need collectives.
            logged = line_is_due(step + 1, config.log_every, total_steps)
            optimizer.zero_grad(set_to_none=True)
            with task.around_backward(large_batch, views):
                run = step_of if graph is None else partial(graph.run, step_of, logged)
                _, shown, h = run(views)
            if probe is not None and h is not None:
                probe.take(h)
            # The probe frees it before the next step.
            del h
            if metrics is not None and logged:
                metrics.measure_gradients(model, scaler.get_scale())
            lr = optimizer.param_groups[0]["lr"]
            # All ranks have the same averaged gradients, so all skip the same overflowing steps.
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            if average is not None:
                average.update(model.encoder)
            step += 1

            if metrics is not None:
                metrics.after_step(step, shown, lr)
            if probe is not None:
                found = probe.after_step(step, index)
                if found is not None and metrics is not None:
                    found.pop("step")
                    metrics.log(step, found, "probe_")

            last = step == total_steps
            stop = None if last else world.stop_signal(step, caught)
            late = time.monotonic() - saved_at > 60 * config.checkpoint_minutes
            due = late or last or stop is not None or step % config.checkpoint_every == 0
            if due and world.rank == 0:
                world.mark(step, "saving a checkpoint")
                save(folder, step, shown["loss"], config, parts, probe)
                if metrics is not None:
                    metrics.pictures(step, views)
                saved_at = time.monotonic()
            if stop is not None:
                # Wait for rank 0, which is saving: a launcher kills all ranks when one ends.
                world.meet()
                world.leave()
                raise Interrupted(stop, out)

        if loader.skipped:
            log.warning("%d corrupt images were replaced by others", len(loader.skipped))
        if world.rank == 0:
            checkpoint.save_encoder(out / ENCODER, model.encoder, describe(config))
            if average is not None:
                checkpoint.save_encoder(out / AVERAGED, average.module, describe(config))
        if caught:
            # The signal came in the last step. Raise, so that no report follows.
            world.leave()
            raise Interrupted(caught[0], out)
    return out


def endless(loader: TwoViewLoader | OneViewLoader) -> Generator[tuple[Tensor, ...]]:
    """The batches of all epochs, one after the other, without end."""
    while True:
        yield from loader


def save(
    folder: Path,
    step: int,
    loss: Tensor,
    config: PretrainConfig,
    parts: dict[str, Any],
    probe: OnlineProbe | None,
) -> None:
    """Write a checkpoint from which `resume` continues and `load_weights` reads the encoder."""
    state: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
    state |= {"step": step, "loss": loss, "version": __version__}
    state["probe"] = None if probe is None else probe.state
    state["encoder"] = describe(config)
    checkpoint.save_checkpoint(folder, step, state)


def resume(
    folder: Path, world: World, parts: dict[str, Any], probe: OnlineProbe | None = None
) -> int:
    """Load the newest good checkpoint that rank 0 finds into `parts`; return its step, 0 without
    one.

    The other ranks get the state from rank 0, so their machines need not see the file. Newer
    checkpoints that are unreadable or not finite are renamed, and a warning names them.
    """

    def newest() -> dict[str, Any]:
        path, state, bad = checkpoint.newest_good(folder)
        if bad and path is None:
            raise ValueError(f"no usable checkpoint in {folder}: {'; '.join(bad.values())}")
        reasons = {str(newer): why for newer, why in bad.items()}
        return {"path": str(path or ""), "state": state, "bad": reasons}

    found = world.share(newest)
    state, path = found["state"], Path(found["path"])
    if not state:
        return 0
    optimizer, scheduler = parts["optimizer"], parts["scheduler"]
    options = [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    peaks = list(scheduler.base_lrs)
    checkpoint.restore(state, path, **parts)
    # This run's learning rate, weight decay and momentum replace the checkpoint's.
    scheduler.base_lrs = peaks
    for group, given, peak, factor in zip(
        optimizer.param_groups, options, peaks, scheduler.lr_lambdas, strict=True
    ):
        group.update(given, lr=peak * factor(scheduler.last_epoch))
    if probe is not None:
        probe.load_state_dict(state.get("probe") or {})
    if world.rank == 0:
        for newer, why in found["bad"].items():
            kept = checkpoint.set_aside(Path(newer))
            log.warning("not resuming from %s, now %s: %s", newer, kept.name, why)
        log.info("resuming at step %d from %s", state["step"], path)
    return state["step"]


def summary(
    config: PretrainConfig,
    world: World,
    task: Task,
    setting: planner.Setting,
    total_steps: int,
    out: Path,
) -> str:
    """A few lines that describe a run before it starts."""
    loader = task.loader
    weights = sum(p.numel() for p in task.model.parameters())
    mode: str = setting.memory
    if setting.device_bytes < float("inf"):
        mode += f" (predicted {setting.device_bytes / 1e9:.3g} GB per rank)"
    if setting.host_bytes:
        mode += f" and {setting.host_bytes / 1e9:.3g} GB of RAM per rank"
    precision = autocast_dtype(config.precision, world.device)
    ranks = f" over {world.size} ranks" if world.size > 1 else ""
    epochs = total_steps / len(loader)
    cuda = world.device.type == "cuda"
    if cuda:
        device = f"{torch.cuda.get_device_name(world.device)} ({world.device})"
    else:
        threads = torch.get_num_threads()
        device = f"{world.device}, {threads} thread{'s' * (threads > 1)}"
    lines = {
        "data": f"{printable(config.data)}: {loader.source.account.line()}",
        "model": f"{config.model}, {weights / 1e6:.1f} million weights",
        "batch": f"{config.batch_size:,} images{ranks}",
        "length": f"{total_steps:,} steps, {epochs:.4g} epochs",
        "memory": mode,
        "precision": "float32" if precision is None else str(precision).partition(".")[2],
        "device": device,
        **({"allocator": allocator_setting()} if cuda else {}),
        "views": loader.describe(),
        "folder": f"{out}; checkpoints every {config.checkpoint_every} steps or "
        f"{config.checkpoint_minutes:g} minutes in {out / 'checkpoints'}",
    }
    return f"{task.name}\n" + "\n".join(f"  {name:<10} {text}" for name, text in lines.items())
