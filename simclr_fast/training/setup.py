"""Build what a PretrainConfig describes: model, optimizer, memory mode, output folder."""

import logging
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import nn

from simclr_fast.data.account import Account
from simclr_fast.data.datasets import named_source
from simclr_fast.data.sources import Source
from simclr_fast.data.whole import whole_images
from simclr_fast.large_batch import planner
from simclr_fast.large_batch.refusals import compile_refusal
from simclr_fast.models.encoders import SimCLR, build_encoder, build_projector
from simclr_fast.models.weights import about_encoder
from simclr_fast.optim.lars import LARS, lars_param_groups
from simclr_fast.optim.schedule import scaled_lr
from simclr_fast.training.config import FIXED, MAY_CHANGE, PretrainConfig, differences, to_json
from simclr_fast.utils.backends import cudnn_benchmark, tf32
from simclr_fast.utils.checkpoint import write_text
from simclr_fast.utils.device import autocast_dtype, free_memory
from simclr_fast.utils.distributed import World
from simclr_fast.utils.launch import launched
from simclr_fast.utils.locks import locked
from simclr_fast.utils.sizes import parse_size

log = logging.getLogger(__name__)
# The default learning rate of Adam and AdamW.
_ADAM_LR = 2e-3
_LARS_VARIANTS: dict[str, dict[str, Any]] = {
    "google": {"momentum_order": "tf", "norm": "joint", "eps": 0.0},
    "lightly": {"momentum_order": "torch", "norm": "split", "eps": 1e-8},
}
_LOCK = ".lock"


@overload
def open_data(config: PretrainConfig, split: Literal["train"] = "train") -> Source: ...
@overload
def open_data(config: PretrainConfig, split: Literal["test"]) -> Source | None: ...
def open_data(config: PretrainConfig, split: Literal["train", "test"] = "train") -> Source | None:
    """The images of a run; None if there are no test images."""
    return named_source(
        config.data,
        split,
        labels=config.labels,
        image_key=config.image_key,
        on_error=config.on_error,
        channels=config.augmentation.channels,
    )


@overload
def images_to_evaluate(config: PretrainConfig, split: Literal["train"] = "train") -> Source: ...
@overload
def images_to_evaluate(config: PretrainConfig, split: Literal["test"]) -> Source | None: ...
def images_to_evaluate(
    config: PretrainConfig, split: Literal["train", "test"] = "train"
) -> Source | None:
    """`open_data`, with on_error="skip" without the images that cannot be decoded."""
    source = open_data(config, split)
    return None if source is None else whole_images(source, config.on_error, config.workers)


def build_model(config: PretrainConfig) -> SimCLR:
    """The untrained encoder and projector of `config`, from torch's current random state."""
    encoder, dim = untrained_encoder(config)
    projector = build_projector(
        config.projector,
        dim,
        config.projector_dim,
        config.projector_depth,
        hidden=config.projector_hidden,
        batch_norm=config.projector_batch_norm,
    )
    return SimCLR(encoder, projector)


def check_views(config: PretrainConfig, model: SimCLR) -> None:
    """Warn about views that teach little, and refuse small crops that the encoder cannot take."""
    views = config.augmentation
    if not views.p_jitter and not views.p_gray:
        log.warning(
            "the views have no colour distortion (p_jitter and p_gray are 0): both crops of an "
            "image have its colours, so the network may learn to compare colours and little else"
        )
    if not config.small_crops:
        return
    small, training = config.small_size, model.training
    try:
        with torch.no_grad():
            model.encoder.eval()(torch.zeros(1, views.channels, small, small))
    except Exception as error:
        raise ValueError(
            f"small_size must be a size that {config.model} can take beside {views.size}, got "
            f"{small}: {' '.join(str(error).split())}"
        ) from error
    finally:
        model.train(training)


def embedding_dim(config: PretrainConfig) -> int:
    """The width of the projector's output, or of h without one."""
    if config.projector != "none":
        return config.projector_dim
    with torch.device("meta"):
        return untrained_encoder(config)[1]


def untrained_encoder(config: PretrainConfig) -> tuple[nn.Module, int]:
    """The encoder of `config`, from torch's current random state, and the width of h."""
    return build_encoder(
        config.model,
        width=config.width,
        image_size=config.augmentation.size,
        stem=config.stem,
        zero_gamma=config.zero_gamma,
        channels=config.augmentation.channels,
    )


def build_optimizer(model: nn.Module, config: PretrainConfig) -> torch.optim.Optimizer:
    """LARS as in the paper, SGD, AdamW or Adam. Biases and norm layers are neither decayed nor
    adapted, unless `decay_norms`."""
    groups = lars_param_groups(model, config.weight_decay)
    if config.decay_norms:
        weights = [p for p in model.parameters() if p.requires_grad]
        groups = [{"params": weights, "weight_decay": config.weight_decay}]
    if config.optimizer == "lars":
        return LARS(
            groups,
            lr=config.lr or scaled_lr(config.batch_size, config.lr_rule),
            trust_coefficient=config.trust_coefficient,
            trust_clip=config.trust_clip,
            **_LARS_VARIANTS[config.lars_variant],
        )
    for group in groups:
        group.pop("adapt", None)
    if config.optimizer == "sgd":
        assert config.lr is not None
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True, fused=True)
        # SGD makes them in its first step, and leaves them unset if the scaler skips that step.
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr or _ADAM_LR, fused=True)


def loader_options(config: PretrainConfig, world: World) -> dict[str, Any]:
    """A loader's arguments except its source and batch size."""
    return {
        "augmentation": config.augmentation,
        "seed": config.seed,
        "rank": world.rank,
        "world_size": world.size,
        "device": world.device,
        "backend": config.backend,
        "channels_last": config.channels_last,
        # Autocast would round the views to this anyway.
        "dtype": autocast_dtype(config.precision, world.device) or torch.float32,
        "on_error": config.on_error,
        "num_threads": config.workers,
    }


def workload(
    config: PretrainConfig, ranks: int, device: torch.device, n_views: int
) -> planner.Workload:
    """Describe a run with `n_views` views per image on `ranks` devices to the planner.

    It always counts two views of one size, so other numbers count as more or fewer images with as
    many pixels.
    """
    size = config.augmentation.size
    views = n_views - config.small_crops * (1 - (config.small_size / size) ** 2)
    images = math.ceil(config.batch_size * views / 2)
    # At least one on each rank; too small a batch size is refused as it is.
    images = max(ranks, images) if config.batch_size >= ranks else config.batch_size
    followers = (config.queue is not None) + (config.ema is not None)
    return planner.Workload(
        partial(build_model, config),
        (config.augmentation.channels, size, size),
        images,
        ranks,
        autocast_dtype(config.precision, device),
        (2 if config.optimizer in ("adam", "adamw") else 1) + followers,
        refused=config.refused_memory,
        cuda=device.type == "cuda",
        compile=config.compile,
        captured=config.cuda_graph,
    )


def choose_memory(
    config: PretrainConfig, world: World, work: planner.Workload
) -> tuple[planner.Setting, dict[str, Any]]:
    """What the run does, equal on all ranks, and the options for `LargeBatch`.

    For memory "auto" the planner chooses the mode, and for lockstep the schedule.

    Raises:
        ValueError: nothing fits, or lockstep cannot run the model.
    """
    setting = planner.Setting(config.memory, config.micro_batch, math.inf)  # type: ignore[arg-type]
    if config.memory in ("auto", "lockstep"):
        limit, host = memory_limits(config, world)
        work = replace(work, gpu=planner.gpu_of(limit))
        if config.memory == "auto":
            setting = planner.choose(work, limit, host, config.micro_batch)
        else:
            setting = planner.fitting_lockstep(work, limit, host, config.micro_batch)
    compiles = config.compile
    if compiles and config.memory == "auto":
        why = compile_refusal(setting.memory)
        if why:
            log.warning("compile has no effect: memory 'auto' chose %s; %s", setting.memory, why)
            compiles = False
    return setting, {
        "memory": setting.memory,
        "micro_batch": setting.micro_batch,
        "schedule": setting.schedule,
        "compile": compiles,
        "allow_ghost_bn": config.allow_ghost_bn,
    }


def backend_settings(
    config: PretrainConfig, world: World, memory: str
) -> Iterator[AbstractContextManager[None]]:
    """The contexts in which a run of this memory mode uses cuBLAS and cuDNN as `config` says."""
    cuda = world.device.type == "cuda"
    if config.tf32 and (not cuda or autocast_dtype(config.precision, world.device)):
        log.warning("tf32 has no effect: it is for precision float32 on NVIDIA GPUs")
    yield tf32(config.tf32)
    wanted = config.cudnn_benchmark == "on"
    if config.cudnn_benchmark == "auto":
        wanted = cuda and memory in ("plain", "replay")
    deterministic = torch.are_deterministic_algorithms_enabled() or (
        torch.backends.cudnn.deterministic
    )
    if deterministic and config.cudnn_benchmark == "on":
        log.warning("cudnn_benchmark has no effect: the algorithms must be deterministic")
    yield cudnn_benchmark(wanted and not deterministic)


def memory_limits(config: PretrainConfig, world: World) -> tuple[float, float]:
    """Bytes that each rank may use: of its device, and of host memory for kept values."""
    limit = free_memory(world.device)
    if config.gpu_memory is not None:
        limit = min(limit, parse_size(config.gpu_memory))
    host = 0.0
    if config.host_memory is not None:
        host = parse_size(config.host_memory) / launched().local_size
    return world.least(limit), world.least(host)


def describe(config: PretrainConfig) -> dict[str, str]:
    """The metadata of encoder.safetensors: how to rebuild the encoder, and its augmentation."""
    return about_encoder(config.model, config.width, config.stem, config.augmentation)


@contextmanager
def output_folder(config: PretrainConfig, world: World) -> Iterator[Path]:
    """The run's folder. Only rank 0 writes there; it creates and locks it until the run ends.

    Raises:
        FileExistsError: it is not empty, without resume or overwrite. BlockingIOError: another run
            uses it. ValueError: there are several ranks and no `out`.
    """
    if config.out is None and world.size > 1:
        raise ValueError("out must be given when several ranks run")
    # Without what a shell or a file system may not take, such as the braces of a pattern.
    name = re.sub(r"[^\w.:-]+", "-", Path(config.data).stem).strip("-") or "run"
    out = config.out or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    if world.rank != 0:
        yield out
        return
    if _contents(out) and not (config.resume or config.overwrite):
        raise FileExistsError(f"{out} is not empty: pass --resume, --overwrite or another --out")
    with locked(out / _LOCK, f"another run uses {out}: wait until it ends, or stop it"):
        if config.overwrite:
            for path in _contents(out):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        yield out


def refuse_changes(config: PretrainConfig, out: Path) -> None:
    """Raise ValueError if a resumed run has another value of a setting in `FIXED`."""
    path = out / "config.json"
    if path.exists() and (changed := differences(path.read_text(), to_json(config), FIXED)):
        raise ValueError(
            f"--resume cannot change {'; '.join(changed)} of the run in {out}: give the old value, "
            "or start another run in another folder"
        )


def write_config(config: PretrainConfig, images: Account, out: Path) -> None:
    """Write config.json: the options, and what was found in the data.

    If there is an older one, first warn of the settings that differ.
    """
    path, text = out / "config.json", to_json(config, images)
    if path.exists() and (changed := differences(path.read_text(), text, MAY_CHANGE)):
        log.warning("continues with changed settings: %s", "; ".join(changed))
    write_text(path, text)


def _contents(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name != _LOCK] if folder.is_dir() else []
