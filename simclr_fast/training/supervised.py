"""The supervised baseline: images → one view → encoder → linear layer → cross-entropy.

Encoder, data, augmentation, optimizer and schedule are those of `pretrain`; it also uses labels.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from simclr_fast.data.loader import ImageLoader, OneViewLoader
from simclr_fast.data.sources import Source
from simclr_fast.evaluation.accuracy import Scores, score, true_class_rank
from simclr_fast.models.encoders import SimCLR
from simclr_fast.training.config import PretrainConfig
from simclr_fast.training.loop import Task, train
from simclr_fast.training.setup import (
    images_to_evaluate,
    loader_options,
    open_data,
    untrained_encoder,
)
from simclr_fast.utils.checkpoint import write_json
from simclr_fast.utils.distributed import join_world


def supervise(config: PretrainConfig) -> tuple[Path, Scores | None]:
    """Train a classifier to its end; return the output folder and the scores on the test images.

    The folder holds the files of `pretrain` and supervised.json: the scores, with bootstrap
    intervals. The scores are None for data without labelled test images, and on ranks other than 0.
    The projector and temperature of `config` are not used.

    Raises:
        ValueError: the data have no labels. All errors of `pretrain`.
    """
    for name in ("queue", "small_crops", "cuda_graph"):
        if getattr(config, name):
            raise ValueError(f"{name} is for pretrain, got {getattr(config, name)}")
    with join_world(config.device, config.timeout) as world:
        torch.manual_seed(config.seed)
        source = open_data(config).labelled(f"data {config.data!r} have no labels")
        assert source.labels is not None
        labels = torch.from_numpy(source.labels).to(world.device)
        loader = OneViewLoader(source, config.batch_size, **loader_options(config, world))
        model = build_classifier(config, int(source.labels.max()) + 1)

        def loss(
            outputs: tuple[Tensor, Tensor], index: Tensor, logged: bool
        ) -> tuple[Tensor, dict[str, Tensor]]:
            logits = outputs[1].float()
            targets = labels[index.to(world.device, non_blocking=True)]
            total = F.cross_entropy(logits, targets, reduction="sum")
            correct = (logits.detach().argmax(1) == targets).sum()
            sums = torch.stack([total.detach(), correct.float()]) / config.batch_size
            if world.group is not None:
                dist.all_reduce(sums, group=world.group)
            # Averaged over ranks, gradients are those of the mean over the whole batch.
            value = total * (world.size / config.batch_size)
            return value, {"loss": sums[0], "accuracy": sums[1]}

        out = train(config, world, Task("supervised", model, loader, loss))
        test = images_to_evaluate(config, "test") if world.rank == 0 else None
        if test is None or not test.has_labels:
            return out, None
        scores = score_classifier(model, test.labelled("test images"), config, world.device)
        write_json(out / "supervised.json", scores.to_json())
        return out, scores


def build_classifier(config: PretrainConfig, n_classes: int) -> SimCLR:
    """The untrained encoder of `build_model`, and a linear layer in place of the projector.

    From the same random state the encoder has the same weights as `build_model`'s.
    """
    encoder, dim = untrained_encoder(config)
    return SimCLR(encoder, nn.Linear(dim, n_classes))


@torch.no_grad()
def score_classifier(
    model: SimCLR, test: Source, config: PretrainConfig, device: torch.device
) -> Scores:
    """Top-1 and top-5 on the test images, without augmentation."""
    assert test.labels is not None
    model.eval()
    labels, found = torch.from_numpy(test.labels), []
    loader = ImageLoader(test, 256, config.augmentation, channels_last=config.channels_last)
    for images, index in loader:
        _, logits = model(images.to(device))
        found.append(true_class_rank(logits.float().cpu(), labels[index]))
    classes = test.classes or tuple(map(str, range(int(labels.max()) + 1)))
    return score(torch.cat(found), test.labels, classes)
