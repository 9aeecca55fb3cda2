"""A linear classifier on an encoder, trained with random crops: linear evaluation, fine-tuning.

The recipes are those of arXiv:2002.05709, B.5 and B.6. The learning-rate schedule and the head's
zero weights at the start are those of google-research/simclr. That is: Nesterov SGD with momentum
0.9, batch 4096, lr = base · batch / 256, cosine decay without warm-up, random crops and flips only.
B.6 also allows LARS, as in pretraining.
"""

import hashlib
import logging
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from simclr_fast.augment.params import Augmentation
from simclr_fast.data.loader import ImageLoader, OneViewLoader
from simclr_fast.data.sources import Source
from simclr_fast.evaluation.accuracy import true_class_rank
from simclr_fast.evaluation.features import fingerprint
from simclr_fast.optim.lars import LARS, lars_param_groups
from simclr_fast.optim.schedule import scaled_lr, warmup_cosine
from simclr_fast.utils.checkpoint import checkpoints, newest_good, save_checkpoint, set_aside
from simclr_fast.utils.device import autocast_dtype, seed_step
from simclr_fast.utils.extras import need

log = logging.getLogger(__name__)
_SECONDS_BETWEEN_SAVES = 60.0


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained.

    frozen: train only the linear head; the encoder keeps its weights and runs in eval mode.
        Otherwise encoder and head are trained.
    lr: for SGD, per 256 images of the batch. LARS ignores it: it uses 0.3 per 256 images
        (`scaled_lr`) and weight decay 1e-6.
    """

    frozen: bool
    epochs: int
    lr: float
    batch_size: int = 4096
    optimizer: Literal["sgd", "lars"] = "sgd"

    def __post_init__(self) -> None:
        for name in ("epochs", "lr", "batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


class Classifier(nn.Module):
    """images [N, 3, H, W] → logits [N, n_classes]; the head starts at zero."""

    def __init__(self, encoder: nn.Module, feature_dim: int, n_classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(feature_dim, n_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))


def train_classifier(
    encoder: nn.Module,
    feature_dim: int,
    source: Source,
    n_classes: int,
    recipe: Recipe,
    augmentation: Augmentation,
    folder: Path,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    workers: int | None = None,
    name: str = "train",
) -> Classifier:
    """Train by `recipe` on the labelled images of `source`; the encoder is trained in place.

    augmentation: its crops and flips are used, and nothing else of it.
    folder: for checkpoints, written after every epoch and once a minute. Training continues from
        the newest one that belongs to the same encoder, images and arguments. If that one is of the
        last step, it is loaded and nothing is trained. Other checkpoints are deleted.

    A batch size above the number of images is lowered to it. GPUs with native bfloat16 train under
    autocast.
    """
    device = torch.device(device)
    if source.labels is None:
        raise ValueError("a classifier needs labelled images: this source has no labels")
    labels = torch.from_numpy(source.labels)
    crops = replace(augmentation, p_jitter=0, p_gray=0, p_blur=0)
    batch = min(recipe.batch_size, len(source))
    loader = OneViewLoader(
        source, batch, crops, seed=seed, device=device, channels_last=True, num_threads=workers
    )
    about = f"{recipe} {seed} {n_classes} {fingerprint(encoder, source, crops)} {labels.tolist()}"
    key = hashlib.blake2b(about.encode(), digest_size=16).hexdigest()
    model = Classifier(encoder, feature_dim, n_classes).to(device)
    if recipe.frozen:
        encoder.requires_grad_(False)
    optimizer = _optimizer(model, recipe, batch)
    total = recipe.epochs * len(loader)
    scheduler = warmup_cosine(optimizer, 0, total)
    part = model.head if recipe.frozen else model
    step = 0
    _, state, bad = newest_good(folder, device)
    for path, why in bad.items():
        log.warning("not continuing from %s, now %s: %s", path, set_aside(path).name, why)
    if state:
        if state["key"] == key:
            part.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            loader.load_state_dict(state["loader"])
            step = state["step"]
        else:
            # These checkpoints belong to another encoder or recipe.
            for path in checkpoints(folder):
                path.unlink()

    def save() -> None:
        state: dict[str, Any] = {
            "key": key,
            "step": step,
            "model": part.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "loader": loader.state_dict(),
        }
        save_checkpoint(folder, step, state)

    bfloat16 = _uses_bfloat16(device)
    model.train()
    if recipe.frozen:
        encoder.eval()
    saved_at = time.monotonic()
    bar = need("tqdm").tqdm(total=total, initial=step, unit="steps", desc=name, leave=False)
    with bar:
        while step < total:
            for images, index in loader:
                images = images.to(device)
                seed_step(seed, step, device)
                with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                    with torch.no_grad() if recipe.frozen else nullcontext():
                        h = encoder(images)
                    logits = model.head(h)
                targets = labels[index].to(device, non_blocking=True)
                loss = nn.functional.cross_entropy(logits.float(), targets)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                scheduler.step()
                step += 1
                bar.update()
                late = time.monotonic() - saved_at > _SECONDS_BETWEEN_SAVES
                if late or step % len(loader) == 0:
                    if not torch.isfinite(loss):
                        raise FloatingPointError(
                            f"the loss is {loss.item()} at step {step}: lower the learning rate"
                        )
                    save()
                    saved_at = time.monotonic()
                if step == total:
                    break
    return model.eval()


def classify(
    model: nn.Module,
    source: Source,
    augmentation: Augmentation,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    workers: int | None = None,
) -> Tensor:
    """`true_class_rank` of every image, without augmentation: int64 [n], 0 where top-1 is right."""
    assert source.labels is not None
    labels, device = torch.from_numpy(source.labels), torch.device(device)
    loader = ImageLoader(
        source, batch_size, augmentation, channels_last=True, device=device, num_threads=workers
    )
    model.eval()
    with torch.inference_mode():
        return torch.cat(
            [
                true_class_rank(model(images.to(device)).float(), labels[index].to(device)).cpu()
                for images, index in loader
            ]
        )


def _uses_bfloat16(device: torch.device) -> bool:
    """Whether to train under autocast. Other GPUs would need float16 and a scaled loss."""
    return device.type == "cuda" and autocast_dtype("auto", device) is torch.bfloat16


def _optimizer(model: Classifier, recipe: Recipe, batch: int) -> torch.optim.Optimizer:
    if recipe.optimizer == "lars":
        return LARS(
            lars_param_groups(model),
            lr=scaled_lr(batch),
            momentum_order="tf",
            norm="joint",
            eps=0.0,
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=recipe.lr * batch / 256, momentum=0.9, nesterov=True)
