"""Pretraining: images → views → encoder → projector → NT-Xent → LARS → checkpoint."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from simclr_fast.data.loader import MultiViewLoader
from simclr_fast.data.sources import Source
from simclr_fast.losses.nt_xent import nt_xent_loss
from simclr_fast.losses.sup_con import multi_view_nt_xent_loss, sup_con_loss
from simclr_fast.training.config import PretrainConfig
from simclr_fast.training.loop import Task, train
from simclr_fast.training.momentum import MomentumKeys
from simclr_fast.training.setup import (
    build_model,
    check_views,
    embedding_dim,
    loader_options,
    open_data,
)
from simclr_fast.utils.distributed import join_world


def pretrain(config: PretrainConfig) -> Path:
    """Run `config` to its end and return the output folder.

    The folder holds config.json, metrics.jsonl, checkpoints/, encoder.safetensors, and with `ema`
    encoder-ema.safetensors. Under a launcher every rank calls this. Batch size, loss and batch
    normalisation are over all ranks.

    Raises:
        FileExistsError: the output folder is not empty, without resume or overwrite.
        BlockingIOError: another run uses the output folder.
        Interrupted: SIGINT, SIGTERM or SIGUSR1 arrived; a checkpoint was written.
        OutOfMemory: the message says which flags to try next.
        FloatingPointError: the loss or a weight is NaN or infinite; it is in no checkpoint.
        RankFailure: another rank died or stalled; the message names it and its step.
    """
    if config.batch_size < 2:
        raise ValueError(
            "batch_size must be at least 2 for pretraining, got 1: a single image has no "
            "negatives, so its loss is always 0"
        )
    with join_world(config.device, config.timeout) as world:
        torch.manual_seed(config.seed)
        source = open_data(config)
        options = loader_options(config, world)
        loader = MultiViewLoader(
            source,
            config.batch_size,
            n_views=config.views,
            small_crops=config.small_crops,
            small=config.small_augmentation if config.small_crops else None,
            **options,
        )
        model = build_model(config)
        check_views(config, model)
        classes = momentum = None
        if config.loss == "sup-con":
            classes = positive_classes(source, world.device)
        if config.queue is not None:
            momentum = MomentumKeys(config, world, model, loader, embedding_dim(config))
        is_pair = classes is None and momentum is None and loader.n_views == 2

        def loss(
            outputs: tuple[Tensor, Tensor], index: Tensor, logged: bool
        ) -> tuple[Tensor, dict[str, Tensor]]:
            _, z = outputs
            value, statistics = None, None
            if is_pair or logged:
                # Whatever the loss is, the statistics are those of NT-Xent on the first two views.
                found = nt_xent_loss(
                    z if is_pair else z[: 2 * len(index)].detach(),
                    temperature=config.temperature,
                    decoupled=config.loss == "decoupled",
                    group=world.group,
                    return_stats=logged,
                    row_counts=[2 * rows // loader.n_views for rows in loader.row_counts()],
                )
                value, statistics = found if isinstance(found, tuple) else (found, None)
            if momentum is not None:
                value = momentum.loss(z)
            elif classes is not None:
                rows = classes[index.to(world.device, non_blocking=True)].repeat(loader.n_views)
                value = sup_con_loss(z, rows, config.temperature, group=world.group)
            elif not is_pair:
                value = multi_view_nt_xent_loss(
                    z, loader.n_views, config.temperature, group=world.group
                )
            assert value is not None
            shown = {"loss": value.detach()}
            if statistics is not None:
                shown["contrastive_accuracy"] = statistics.contrastive_accuracy
                shown["contrastive_entropy"] = statistics.contrastive_entropy
            return value, shown

        task = Task("pretrain", model, loader, loss)
        if momentum is not None:
            task = replace(task, parts=momentum.parts, around_backward=momentum.around_backward)
        return train(config, world, task)


def positive_classes(source: Source, device: torch.device) -> Tensor:
    """The class of every image for the sup-con loss: int64 [n].

    An image without a label (a negative one) gets a class of its own.

    Raises:
        ValueError: no image has a label.
    """
    labels = torch.from_numpy(source.need_labels("loss sup-con needs labels"))
    own = labels.max() + 1 + torch.arange(len(labels))
    return torch.where(labels < 0, own, labels).to(device)
