"""Pretraining: images → two views → encoder → projector → NT-Xent → LARS → checkpoint."""

import json
import logging
import math
import shutil
import signal
import sys
import time
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simclr_fast import __version__
from simclr_fast.data.datasets import named_source
from simclr_fast.data.loader import TwoViewLoader
from simclr_fast.evaluation.online import OnlineProbe
from simclr_fast.large_batch import LargeBatch, planner
from simclr_fast.losses.nt_xent import nt_xent_loss
from simclr_fast.models.encoders import SimCLR, build_encoder, build_projector
from simclr_fast.models.weights import about_encoder
from simclr_fast.optim.lars import LARS, lars_param_groups
from simclr_fast.optim.schedule import scaled_lr, warmup_cosine
from simclr_fast.training.config import PretrainConfig, to_json
from simclr_fast.utils import checkpoint
from simclr_fast.utils.distributed import World, free_memory, join_world
from simclr_fast.utils.extras import need
from simclr_fast.utils.interrupts import Interrupted, catch_signals

log = logging.getLogger(__name__)
# Adam's, for runs too small for LARS.
_ADAM_LR = 2e-3


def pretrain(config: PretrainConfig) -> Path:
    """Run `config` to its end and return the output folder.

    The folder holds config.json, metrics.jsonl, checkpoints/, encoder.safetensors. Under torchrun
    every rank calls this; batch, loss and batch normalisation are those of all ranks together.

    Raises:
        FileExistsError: the output folder is not empty, without resume or overwrite.
        Interrupted: SIGINT or SIGTERM, after the checkpoint is written.
        OutOfMemory: with the flags to try next.
        RankFailure: another rank died or stalled; named, with its step.
    """
    with join_world(config.device, config.timeout) as world:
        return _pretrain(config, world)


def _pretrain(config: PretrainConfig, world: World) -> Path:
    torch.manual_seed(config.seed)
    loader = TwoViewLoader(
        named_source(config.data), config.batch_size, **loader_options(config, world)
    )
    total_steps = config.steps or config.epochs * len(loader)
    model = build_model(config).to(world.device)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    autocast = autocast_dtype(config, world.device)
    group = torch.distributed.group.WORLD if world.size > 1 else None
    chosen = choose_memory(config, world, autocast)
    large_batch = LargeBatch(model, group=group, autocast=autocast, **chosen)
    probe = None
    if config.probe_every and world.rank == 0:
        probe = OnlineProbe(loader.source.labels, config.probe_every, world.device)
    # After everything that a wrong argument stops.
    out = prepare_output(config, world)
    optimizer = build_optimizer(model, config)
    warmup = min(round(config.warmup_epochs * len(loader)), total_steps - 1)
    scheduler = warmup_cosine(optimizer, warmup, total_steps)
    scaler = torch.amp.GradScaler(world.device.type, enabled=autocast is torch.float16)
    step = 0
    if config.resume and (saved := checkpoint.checkpoints(out / "checkpoints")):
        parts = {"loader": loader, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
        state = checkpoint.restore(saved[-1], world.device, model=model, **parts)
        torch.set_rng_state(state["rng"].cpu())
        step = state["step"]
        if probe is not None:
            probe.state = state.get("probe") or {}
        log.info("resuming at step %d from %s", step, saved[-1])

    def loss_fn(outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Any]:
        loss, statistics = nt_xent_loss(
            outputs[1], temperature=config.temperature, group=group, return_stats=True
        )
        if probe is not None:
            probe.take(outputs[0])
        return scaler.scale(loss), loss.detach(), statistics

    def save() -> None:
        if world.rank == 0:
            world.mark(step, "saving a checkpoint")
            state = {
                "step": step,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "scaler": scaler.state_dict(),
                "loader": loader.state_dict(),
                "rng": torch.get_rng_state(),
                "probe": None if probe is None else probe.state,
                "version": __version__,
                "encoder": describe(config),
            }
            checkpoint.save_checkpoint(out / "checkpoints", step, state)

    model.train()
    if probe is not None:
        probe.open(out / "online_probe.jsonl", step)
    metrics = Metrics(out / "metrics.jsonl", config, world, step, total_steps)

    def where() -> str:
        return f"rank {world.rank}, step {step + 1}"

    work = workload(config, world, autocast)
    with catch_signals() as caught, metrics, planner.out_of_memory(work, chosen, where):
        while step < total_steps:
            waiting = time.perf_counter()
            world.mark(step + 1, "loading its batch")
            for view1, view2, index in loader:
                world.mark(step + 1, "training")
                metrics.waited += time.perf_counter() - waiting
                optimizer.zero_grad(set_to_none=True)
                _, loss, statistics = large_batch.backward((view1, view2), loss_fn)
                lr = optimizer.param_groups[0]["lr"]
                # Averaged gradients are the same on all ranks, and so is an overflow in them.
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                step += 1
                seen = {
                    "loss": loss,
                    "contrastive_accuracy": statistics.contrastive_accuracy,
                    "contrastive_entropy": statistics.contrastive_entropy,
                }
                metrics.after_step(step, seen, lr)
                if probe is not None:
                    probe.after_step(step, index)
                # Ranks agree on a stop when they meet anyway: not at the cost of a sync per step.
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
    if loader.skipped:
        log.warning("%d corrupt images were replaced by others", len(loader.skipped))
    if world.rank == 0:
        checkpoint.save_encoder(out / "encoder.safetensors", model.encoder, describe(config))
    return out


def workload(config: PretrainConfig, world: World, dtype: torch.dtype | None) -> planner.Workload:
    """The planner's view of a run."""
    return planner.Workload(
        partial(build_model, config),
        config.augmentation.size,
        config.batch_size,
        world.size,
        dtype,
        2 if config.optimizer == "adam" else 1,
        cuda=world.device.type == "cuda",
    )


def choose_memory(
    config: PretrainConfig, world: World, dtype: torch.dtype | None
) -> dict[str, Any]:
    """`LargeBatch`'s options: config's or, for "auto", the planner's, alike on all ranks."""
    chosen = {
        "memory": config.memory,
        "micro_batch": config.micro_batch,
        "keep_every": config.keep_every,
        "offload_gb": config.offload_gb,
        "compile": config.compile,
        "allow_ghost_bn": config.allow_ghost_bn,
    }
    if config.memory != "auto":
        return chosen
    free = world.least(free_memory(world.device))
    setting = planner.choose(workload(config, world, dtype), free)
    if setting.memory != "plain":
        log.info("%s: plain does not fit %.1f GB", setting.flags, free / 1e9)
    if config.compile and setting.memory != "lockstep":
        log.warning("memory 'auto' takes %s, which is not compiled", setting.memory)
    return chosen | {
        "memory": setting.memory,
        "micro_batch": config.micro_batch or setting.micro_batch,
        "keep_every": setting.keep_every,
        "compile": config.compile and setting.memory == "lockstep",
    }


def loader_options(config: PretrainConfig, world: World) -> dict[str, Any]:
    """What the loader of a run is given beside its source and batch size."""
    return {
        "augmentation": config.augmentation,
        "seed": config.seed,
        "rank": world.rank,
        "world_size": world.size,
        "device": world.device,
        "backend": config.backend,
        "channels_last": config.channels_last,
        # What autocast would round them to.
        "dtype": autocast_dtype(config, world.device) or torch.float32,
        "on_error": config.on_error,
        "num_threads": config.workers,
    }


def build_model(config: PretrainConfig) -> SimCLR:
    """The untrained encoder and projector of `config`, from torch's current random state."""
    encoder, dim = build_encoder(
        config.model, width=config.width, image_size=config.augmentation.size, stem=config.stem
    )
    projector = build_projector(config.projector, dim, config.projector_dim, config.projector_depth)
    return SimCLR(encoder, projector)


def build_optimizer(model: nn.Module, config: PretrainConfig) -> torch.optim.Optimizer:
    """LARS as in the paper, or Adam; biases and norm layers are neither decayed nor adapted."""
    groups = lars_param_groups(model, config.weight_decay)
    if config.optimizer == "lars":
        return LARS(
            groups,
            lr=config.lr or scaled_lr(config.batch_size, config.lr_rule),
            momentum_order="tf",
            norm="joint",
            eps=0.0,
        )
    for given in groups:
        given.pop("adapt", None)
    return torch.optim.Adam(groups, lr=config.lr or _ADAM_LR, fused=True)


def describe(config: PretrainConfig) -> dict[str, str]:
    """Metadata of encoder.safetensors: what builds the encoder again, and what its images were."""
    return about_encoder(config.model, config.width, config.stem, config.augmentation)


def prepare_output(config: PretrainConfig, world: World) -> Path:
    """Make the output folder and its config.json; refuse one that is in use."""
    name = Path(config.data).stem or "run"
    out = config.out or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    if config.out is None and world.size > 1:
        raise ValueError("out must be given when several ranks run")
    if world.rank == 0:
        in_use = out.is_dir() and any(out.iterdir())
        if in_use and not (config.resume or config.overwrite):
            raise FileExistsError(
                f"{out} is not empty: pass --resume, --overwrite or another --out"
            )
        if in_use and config.overwrite:
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_atomic(out / "config.json", lambda p: p.write_text(to_json(config)))
    return out


def autocast_dtype(config: PretrainConfig, device: torch.device) -> torch.dtype | None:
    """What the model computes in, or None for the parameters' dtype."""
    if config.precision == "auto":
        on = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if on else None
    return None if config.precision == "float32" else getattr(torch, config.precision)


class Metrics:
    """The progress bar, and a line of metrics.jsonl every `log_every` steps. Rank 0 alone."""

    def __init__(
        self,
        path: Path,
        config: PretrainConfig,
        world: World,
        step: int,
        total_steps: int,
        name: str = "pretrain",
    ) -> None:
        self.name, self.path, self.config, self.world = name, path, config, world
        self.first, self.total = step, total_steps
        self.waited = 0.0

    def __enter__(self) -> "Metrics":
        self.bar: Any = None
        if self.world.rank == 0:
            # A resumed run repeats the steps after its checkpoint, and their lines.
            old = self.path.read_text().splitlines() if self.first and self.path.exists() else []
            kept = [line for line in old if json.loads(line)["step"] <= self.first]
            self.path.write_text("".join(line + "\n" for line in kept))
            self.file = self.path.open("a")
            images = self.config.batch_size
            self.bar = need("tqdm").tqdm(
                total=self.total * images,
                initial=self.first * images,
                unit="images",
                unit_scale=True,
                desc=self.name,
                smoothing=0.05,
                # A log file wants a line now and then, not a screen that moves.
                mininterval=0.5 if sys.stderr.isatty() else 20,
                dynamic_ncols=True,
            )
        self.start, self.since = time.perf_counter(), self.first
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
            self.file.close()

    def after_step(self, step: int, seen: dict[str, Tensor], lr: float) -> None:
        """seen: 0-dim tensors, the loss and an accuracy among them."""
        if self.bar is None:
            return
        self.bar.update(self.config.batch_size)
        if step % self.config.log_every and step != self.total:
            return
        now = time.perf_counter()
        row = {
            "step": step,
            **{name: value.item() for name, value in seen.items()},
            "lr": float(lr),
            "images_per_second": (step - self.since) * self.config.batch_size / (now - self.start),
            "data_wait_percent": 100 * self.waited / (now - self.start),
        }
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self.bar.set_postfix(
            loss=f"{row['loss']:.3f}",
            acc=f"{next(row[name] for name in row if name.endswith('accuracy')):.0%}",
            wait=f"{row['data_wait_percent']:.0f}%",
            refresh=False,
        )
        if math.isnan(row["loss"]):
            raise FloatingPointError(f"the loss is NaN at step {step}: lower the learning rate")
        self.start, self.since, self.waited = now, step, 0.0
