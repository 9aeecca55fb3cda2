"""Pretraining: images → two views → encoder → projector → NT-Xent → LARS → checkpoint."""

from pathlib import Path

import torch
from torch import Tensor

from simclr_fast.data.datasets import named_source
from simclr_fast.data.loader import TwoViewLoader
from simclr_fast.losses.nt_xent import nt_xent_loss
from simclr_fast.training.config import PretrainConfig
from simclr_fast.training.loop import Task, train
from simclr_fast.training.setup import build_model, loader_options
from simclr_fast.utils.distributed import join_world


def pretrain(config: PretrainConfig) -> Path:
    """Run `config` to its end and return the output folder.

    The folder holds config.json, metrics.jsonl, checkpoints/, encoder.safetensors. Under a launcher
    every rank calls this; batch, loss and batch normalisation are those of all ranks together.

    Raises:
        FileExistsError: the output folder is not empty, without resume or overwrite.
        BlockingIOError: another run is at work in the output folder.
        Interrupted: SIGINT, SIGTERM or SIGUSR1, after the checkpoint is written.
        OutOfMemory: with the flags to try next.
        FloatingPointError: the loss or a weight is NaN or infinite; the checkpoints are not.
        RankFailure: another rank died or stalled; named, with its step.
    """
    with join_world(config.device, config.timeout) as world:
        torch.manual_seed(config.seed)
        source = named_source(config.data)
        loader = TwoViewLoader(source, config.batch_size, **loader_options(config, world))
        model = build_model(config)

        def loss(outputs: tuple[Tensor, Tensor], _: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            _, z = outputs
            value, statistics = nt_xent_loss(
                z,
                temperature=config.temperature,
                group=world.group,
                return_stats=True,
                row_counts=loader.row_counts(),
            )
            return value, {
                "loss": value.detach(),
                "contrastive_accuracy": statistics.contrastive_accuracy,
                "contrastive_entropy": statistics.contrastive_entropy,
            }

        return train(config, world, Task("pretrain", model, loader, loss))
