"""The supervised baseline: images → one view → encoder → linear layer → cross-entropy.

The same encoder, data, augmentation, optimizer and schedule as `pretrain`, with labels.
"""

import json
import logging
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from simclr_fast import __version__
from simclr_fast.data.datasets import named_source
from simclr_fast.data.loader import ImageLoader, OneViewLoader
from simclr_fast.data.sources import Source
from simclr_fast.evaluation.accuracy import Scores, score, true_class_rank
from simclr_fast.large_batch import LargeBatch, planner
from simclr_fast.models.encoders import SimCLR, build_encoder
from simclr_fast.optim.schedule import warmup_cosine
from simclr_fast.training.config import PretrainConfig
from simclr_fast.training.pretrain import (
    Metrics,
    autocast_dtype,
    build_optimizer,
    choose_memory,
    describe,
    loader_options,
    prepare_output,
    workload,
)
from simclr_fast.utils import checkpoint
from simclr_fast.utils.distributed import World, join_world
from simclr_fast.utils.interrupts import Interrupted, catch_signals

log = logging.getLogger(__name__)


def supervise(config: PretrainConfig) -> tuple[Path, Scores | None]:
    """Train a classifier to its end; the output folder, and its scores on the test images.

    The folder is that of `pretrain`, and supervised.json: the scores, with bootstrap intervals.
    Scores are None for data without labelled test images, and on ranks other than 0. The projector
    and temperature of `config` mean nothing here.

    Raises:
        ValueError: the data have no labels. FileExistsError, Interrupted: as `pretrain`.
    """
    with join_world(config.device, config.timeout) as world:
        return _supervise(config, world)


def _supervise(config: PretrainConfig, world: World) -> tuple[Path, Scores | None]:
    torch.manual_seed(config.seed)
    source = named_source(config.data)
    if source.labels is None or source.labels.min() < 0:
        raise ValueError(f"data {config.data!r} have no labels: name a folder of class folders")
    labels = torch.from_numpy(source.labels).to(world.device)
    loader = OneViewLoader(source, config.batch_size, **loader_options(config, world))
    total_steps = config.steps or config.epochs * len(loader)
    model = build_classifier(config, int(labels.max()) + 1).to(world.device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    autocast = autocast_dtype(config, world.device)
    group = dist.group.WORLD if world.size > 1 else None
    # The planner counts two views per image, here there is one.
    halved = replace(config, batch_size=max(world.size, -(-config.batch_size // 2)))
    chosen = choose_memory(halved, world, autocast)
    large_batch = LargeBatch(model, group=group, autocast=autocast, **chosen)
    out = prepare_output(config, world)
    optimizer = build_optimizer(model, config)
    warmup = min(round(config.warmup_epochs * len(loader)), total_steps - 1)
    scheduler = warmup_cosine(optimizer, warmup, total_steps)
    scaler = torch.amp.GradScaler(world.device.type, enabled=autocast is torch.float16)
    parts: dict[str, Any] = {
        "model": model,
        "loader": loader,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "scaler": scaler,
    }
    step = 0
    if config.resume and (saved := checkpoint.checkpoints(out / "checkpoints")):
        state = checkpoint.restore(saved[-1], world.device, **parts)
        torch.set_rng_state(state["rng"].cpu())
        step = state["step"]
        log.info("resuming at step %d from %s", step, saved[-1])

    def save() -> None:
        if world.rank == 0:
            world.mark(step, "saving a checkpoint")
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": step, "rng": torch.get_rng_state()}
            state |= {"version": __version__, "encoder": describe(config)}
            checkpoint.save_checkpoint(out / "checkpoints", step, state)

    model.train()
    metrics = Metrics(out / "metrics.jsonl", config, world, step, total_steps, "supervised")

    def where() -> str:
        return f"rank {world.rank}, step {step + 1}"

    work = workload(halved, world, autocast)
    with catch_signals() as caught, metrics, planner.out_of_memory(work, chosen, where):
        while step < total_steps:
            waiting = time.perf_counter()
            world.mark(step + 1, "loading its batch")
            for views, index in loader:
                world.mark(step + 1, "training")
                metrics.waited += time.perf_counter() - waiting
                targets = labels[index.to(world.device)]

                def loss_fn(
                    outputs: tuple[Tensor, Tensor], targets: Tensor = targets
                ) -> tuple[Tensor, Tensor]:
                    logits = outputs[1].float()
                    total = F.cross_entropy(logits, targets, reduction="sum")
                    correct = (logits.detach().argmax(1) == targets).sum()
                    # Averaged over ranks, gradients are those of the mean over the whole batch.
                    loss = total * (world.size / config.batch_size)
                    return scaler.scale(loss), torch.stack([total.detach(), correct.float()])

                optimizer.zero_grad(set_to_none=True)
                _, sums = large_batch.backward(views, loss_fn)
                if group is not None:
                    dist.all_reduce(sums, group=group)
                loss, accuracy = (sums / config.batch_size).unbind()
                lr = optimizer.param_groups[0]["lr"]
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                step += 1
                metrics.after_step(step, {"loss": loss, "accuracy": accuracy}, lr)
                meet = world.size == 1 or step % config.log_every == 0
                if meet and step < total_steps and world.any(bool(caught)):
                    save()
                    world.leave()
                    raise Interrupted(caught[0] if caught else signal.SIGTERM, out)
                if step % config.checkpoint_every == 0 or step == total_steps:
                    save()
                if step == total_steps:
                    break
                waiting = time.perf_counter()
                world.mark(step + 1, "loading its batch")
    if world.rank != 0:
        return out, None
    checkpoint.save_encoder(out / "encoder.safetensors", model.encoder, describe(config))
    test = named_source(config.data, "test")
    if test is None or test.labels is None:
        return out, None
    scores = score_classifier(model, test, config, world.device)
    text = json.dumps(scores.to_json(), indent=2) + "\n"
    checkpoint.write_atomic(out / "supervised.json", lambda part: part.write_text(text))
    return out, scores


def build_classifier(config: PretrainConfig, n_classes: int) -> SimCLR:
    """The untrained encoder of `build_model`, same weights for a seed, and a linear layer."""
    encoder, dim = build_encoder(
        config.model, width=config.width, image_size=config.augmentation.size, stem=config.stem
    )
    return SimCLR(encoder, nn.Linear(dim, n_classes))


@torch.no_grad()
def score_classifier(
    model: SimCLR, test: Source, config: PretrainConfig, device: torch.device
) -> Scores:
    """Top-1 and top-5 on the undistorted test images."""
    assert test.labels is not None
    model.eval()
    labels, found = torch.from_numpy(test.labels), []
    loader = ImageLoader(test, 256, config.augmentation, channels_last=config.channels_last)
    for images, index in loader:
        _, logits = model(images.to(device))
        found.append(true_class_rank(logits.float().cpu(), labels[index]))
    classes = test.classes or tuple(map(str, range(int(labels.max()) + 1)))
    return score(torch.cat(found), test.labels, classes)
