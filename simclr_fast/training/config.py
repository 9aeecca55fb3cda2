"""The settings of a run. Presets are functions that return a PretrainConfig."""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from simclr_fast.augment.params import Augmentation, augmentation_from
from simclr_fast.data.account import Account
from simclr_fast.utils.extras import need
from simclr_fast.utils.numbers import as_float, as_int
from simclr_fast.utils.sizes import parse_size

# That of float32.
_LARGEST = 3.4e38


@dataclass(frozen=True)
class PretrainConfig:
    """One run. The defaults are the paper's ImageNet recipe (arXiv:2002.05709, section 2.2)."""

    data: str = "demo"
    """Images: a folder, a .tar, .tfrecord or .rec file or a pattern of them (DIR/{000..099}.tar),
    an address (s3://, https://) of such files, which are copied to the cache folder, "demo",
    "demo-grain" or "demo-held-out" (embedded), or NAME:ROOT for torchvision's data set NAME
    (cifar10, stl10, food101, ...) in the folder ROOT."""
    labels: Path | None = None
    """A CSV file with lines "path,label", or a column of a Hugging Face data set. Its labels
    replace those of the data."""
    image_key: str | None = None
    """Which image of a sample to use if it has several: a field of tars (jpg), a feature of
    TFRecords, a column of Hugging Face data sets."""
    out: Path | None = None
    """Output folder. By default runs/NAME-DATE."""
    model: str = "resnet50"
    """A torchvision or timm model."""
    width: float = 1.0
    """Channel multiplier of ResNets. The paper uses 1, 2 and 4."""
    stem: Literal["imagenet", "cifar", "cifar-stride2"] | None = None
    """First layers of ResNets. By default chosen by the image size."""
    projector: Literal["nonlinear", "linear", "none"] = "nonlinear"
    """The head between encoder and loss."""
    projector_dim: int = 128
    """Width of the projector's output."""
    projector_depth: int = 2
    """Layers of the nonlinear projector. SimCLR: 2, SimCLR v2: 3."""
    projector_hidden: int | None = None
    """Width of the projector's layers before the last. By default that of h."""
    projector_batch_norm: bool = True
    """Batch norm after every layer of the projector, as google-research/simclr has it."""
    zero_gamma: bool = False
    """ResNets start with γ = 0 in the last batch norm of every block."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    batch_size: int = 4096
    """Images per step, over all ranks."""
    epochs: int = 100
    """Passes over the images."""
    steps: int | None = None
    """Steps; if given, it replaces epochs."""
    loss: Literal["nt-xent", "decoupled", "sup-con"] = "nt-xent"
    """nt-xent: SimCLR's loss. decoupled: the same without the positive in the denominator
    (arXiv:2110.06848). sup-con: all images of a class are positives (arXiv:2004.11362); images
    without a label have only their other view."""
    temperature: float = 0.1
    """Temperature of the loss."""
    views: int = 2
    """Views of each image. With more than two, every other view of the image is a positive."""
    small_crops: int = 0
    """More views of each image, which are smaller and cheaper (multi-crop, arXiv:2006.09882). Every
    other view of the image is a positive, as with more views. Not for memory lockstep."""
    small_size: int = 96
    """Height and width of the small crops in pixels."""
    small_area: tuple[float, float] = (0.05, 0.14)
    """Range of the small crops' share of the image. All else is as in augmentation, whose area is
    usually set to begin where this range ends."""
    queue: int | None = None
    """Keys of past batches that are the negatives, instead of the other images of the batch (MoCo,
    arXiv:1911.05722). A momentum encoder makes the keys. For small batches. By default no queue.
    Not for memory lockstep."""
    queue_momentum: float = 0.999
    """The share of its old weights that the momentum encoder keeps in a step."""
    ema: float | None = None
    """Also keep an exponential moving average of the encoder's weights with this decay, such as
    0.999, for the file encoder-ema.safetensors."""
    optimizer: Literal["lars", "sgd", "adamw", "adam"] = "lars"
    """LARS is the paper's, for large batches. SGD has Nesterov momentum 0.9."""
    lr: float | None = None
    """Peak learning rate. By default lr_rule decides for LARS, and Adam and AdamW take 0.002; SGD
    needs a value."""
    lr_rule: Literal["linear", "sqrt", "sqrt-v2"] = "linear"
    """Peak learning rate of LARS. linear: 0.3 × batch / 256. sqrt: 0.075 × √batch. sqrt-v2: 0.1 ×
    √batch, as in SimCLR v2."""
    trust_coefficient: float = 1e-3
    """η of LARS: the first step of a weight is lr × η times its norm. Biases and norm layers use lr
    alone."""
    trust_clip: bool = False
    """LARS clips the trust ratio: min(ratio / lr, 1), as in LARC and solo-learn."""
    lars_variant: Literal["google", "lightly"] = "google"
    """google: the learning rate is applied inside the momentum buffer, and the trust ratio has the
    norm of gradient plus decay. lightly, also solo-learn's: the learning rate is applied after the
    buffer, and the trust ratio has the sum of the two norms."""
    weight_decay: float = 1e-6
    """Weight decay of all weights, except biases and norm layers unless decay_norms."""
    decay_norms: bool = False
    """Biases and norm layers are decayed, and adapted by LARS, as all weights; VISSL's recipe."""
    warmup_epochs: float = 10
    """Epochs during which the learning rate rises to its peak."""
    seed: int = 0
    """Determines the initial weights, the order of the images and their views."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps. auto: a GPU if torch sees one, else the CPU."""
    backend: Literal["fused", "dali"] | None = None
    """How views are made. By default chosen by the device and the data."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 autocast on GPUs and CPUs that compute in it (AVX512_BF16, AMX, Arm BF16);
    float16 autocast with a scaled loss on other GPUs; float32 on other CPUs."""
    tf32: bool = False
    """NVIDIA GPUs compute products and convolutions of precision float32 in TF32: faster, with 10
    bits after the point instead of 23. NT-Xent does so too for float32 embeddings; without, it
    reaches float32 accuracy by three TF32 products. Without, convolutions are float32 as well,
    though torch's default for them is TF32."""
    cudnn_benchmark: Literal["auto", "on", "off"] = "auto"
    """on: cuDNN times its algorithms for each shape of a convolution and takes the fastest, which
    may differ between runs and so round differently. auto: on for memory plain and replay, whose
    shapes are always the same. Always off with torch.use_deterministic_algorithms."""
    memory: Literal["auto", "plain", "replay", "lockstep", "grad-cache"] = "auto"
    """How the gradient of the batch fits into memory; see simclr_fast.large_batch.LargeBatch. auto:
    the first mode that `simclr-fast plan` predicts to fit."""
    micro_batch: int | None = None
    """Views per rank that lockstep and grad-cache process at a time. By default chosen to suit the
    memory, 256 for grad-cache."""
    gpu_memory: str | None = None
    """GPU memory that a run may use per rank, such as 24GB. By default all that is free. For memory
    auto and lockstep."""
    host_memory: str | None = None
    """RAM of the machine in which lockstep may keep values, such as 32GB, shared by its ranks. By
    default none. The views are in RAM as well, beside it."""
    compile: bool = False
    """Run the model through torch.compile, which takes time in the first step. plain and grad-cache
    compile its forward; weights and files are as without. lockstep compiles the layers between
    batch norms and convolutions, and may become slower by it: try both. Not for replay."""
    cuda_graph: bool = False
    """Replay forward, loss and backward of the steps between lines of metrics.jsonl as a CUDA
    graph: one launch of the host instead of hundreds. For small models on one NVIDIA GPU, with
    memory plain, two views and loss nt-xent or decoupled. Activations take twice the memory."""
    allow_ghost_bn: bool = False
    """Let grad-cache run models with batch norm. Its statistics are then of a micro-batch only."""
    channels_last: bool = True
    """Memory format of views and weights; faster for convolutions."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a corrupt image or a damaged archive. raise: end the run and name it. skip:
    take another image instead, and go on without what a damaged archive lacks."""
    workers: int | None = None
    """Threads that decode images. By default the cores that this process may use, at most 8."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    log: tuple[Literal["tensorboard", "wandb", "trackio", "csv"], ...] = ()
    """Where the numbers of metrics.jsonl go as well, with pictures of views and features at every
    checkpoint: tensorboard (files in the output folder), wandb, trackio, csv (metrics.csv)."""
    probe_every: int | None = None
    """Steps between reports of a linear and a k-NN probe on the features that training computes.
    Needs labels; they train only the probe."""
    checkpoint_every: int = 500
    """Steps between checkpoints. The newest two are kept."""
    checkpoint_minutes: float = 15
    """Minutes after which a checkpoint is written even if checkpoint_every is not reached."""
    timeout: float = 600
    """Seconds without progress after which a run of several ranks ends and names the rank that
    stalled."""
    resume: bool = False
    """Continue from the newest checkpoint in `out`."""
    overwrite: bool = False
    """Delete the contents of `out` first."""

    def __post_init__(self) -> None:
        for name in (
            "batch_size",
            "epochs",
            "steps",
            "projector_dim",
            "projector_depth",
            "projector_hidden",
            "small_size",
            "queue",
            "micro_batch",
            "workers",
            "log_every",
            "probe_every",
            "checkpoint_every",
        ):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, as_int(name, value, 1))
        object.__setattr__(self, "seed", as_int("seed", self.seed))
        object.__setattr__(self, "small_crops", as_int("small_crops", self.small_crops, 0))
        # Comparisons that are false for NaN. Larger numbers overflow in float32.
        for name in (
            "width",
            "temperature",
            "lr",
            "trust_coefficient",
            "checkpoint_minutes",
            "timeout",
        ):
            if (value := getattr(self, name)) is None:
                continue
            object.__setattr__(self, name, value := as_float(name, value))
            if not 0 < value < _LARGEST:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        for name in ("weight_decay", "warmup_epochs"):
            object.__setattr__(self, name, value := as_float(name, getattr(self, name)))
            if not 0 <= value < _LARGEST:
                raise ValueError(f"{name} must be at least 0 and finite, got {value}")
        for name in ("queue_momentum", "ema"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, value := as_float(name, value))
                if not 0 <= value < 1:
                    raise ValueError(f"{name} must be at least 0 and below 1, got {value}")
        for name in ("gpu_memory", "host_memory"):
            if (size := getattr(self, name)) is not None:
                parse_size(size)
        for name, given, modes in (
            ("micro_batch", self.micro_batch is not None, ("auto", "lockstep", "grad-cache")),
            ("gpu_memory", self.gpu_memory is not None, ("auto", "lockstep")),
            ("host_memory", self.host_memory is not None, ("auto", "lockstep")),
            ("compile", self.compile, ("auto", "plain", "lockstep", "grad-cache")),
            ("cuda_graph", self.cuda_graph, ("auto", "plain")),
            ("allow_ghost_bn", self.allow_ghost_bn, ("grad-cache",)),
        ):
            if given and self.memory not in modes:
                raise ValueError(f"{name} is for memory {' or '.join(modes)}, got {self.memory!r}")
        if self.cuda_graph:
            self._refuse_with_cuda_graph()
        if self.views < 2:
            raise ValueError(f"views must be at least 2, got {self.views}")
        if self.loss == "decoupled" and self.all_views > 2:
            raise ValueError(
                f"loss decoupled is for two views, got views={self.views} and "
                f"small_crops={self.small_crops}"
            )
        if self.queue is not None and (self.loss != "nt-xent" or self.all_views > 2):
            raise ValueError(
                f"queue is for loss nt-xent and two views, got loss={self.loss!r}, "
                f"views={self.views}, small_crops={self.small_crops}"
            )
        if self.memory in self.refused_memory:
            raise ValueError(self.refused_memory[self.memory])
        if self.small_crops:
            # Its own message if a value is out of range.
            object.__setattr__(self, "small_area", self.small_augmentation.area)
        if self.optimizer == "sgd" and self.lr is None:
            raise ValueError("lr must be given for optimizer sgd, such as --lr 0.05")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite exclude each other")

    def _refuse_with_cuda_graph(self) -> None:
        """Raise ValueError for settings whose steps a CUDA graph does not replay."""
        allowed: dict[str, tuple[Any, ...]] = {
            "loss": ("nt-xent", "decoupled"),
            "views": (2,),
            "small_crops": (0,),
            "queue": (None,),
            "compile": (False,),
        }
        for name, values in allowed.items():
            if (given := getattr(self, name)) not in values:
                those = " or ".join(map(repr, values))
                raise ValueError(f"cuda_graph is for {name} {those}, got {given!r}")
        if self.log_every < 2:
            raise ValueError(
                "cuda_graph replays the steps between two lines of metrics.jsonl, so log_every "
                f"must be at least 2 with it, got {self.log_every}"
            )

    @property
    def all_views(self) -> int:
        """Views of each image, the small crops among them."""
        return self.views + self.small_crops

    @property
    def small_augmentation(self) -> Augmentation:
        """The distribution of the small crops."""
        own: dict[str, Any] = {"size": self.small_size, "area": self.small_area, "min_covered": 0.0}
        return replace(self.augmentation, **own)

    @property
    def refused_memory(self) -> dict[str, str]:
        """Memory modes that other settings exclude, and why."""
        others = "use memory plain, replay or grad-cache"
        if self.queue is not None:
            return {"lockstep": f"queue cannot be used with memory lockstep, got both: {others}"}
        if self.small_crops:
            return {
                "lockstep": f"small_crops cannot be used with memory lockstep, got both: {others}"
            }
        return {}

    @property
    def chance_loss(self) -> float:
        """The loss if all similarities were equal: log of the number of terms in a denominator.

        The other rows of the batch, or the queue; for the decoupled loss without the positive.
        """
        if self.queue is not None:
            return math.log(self.queue + 1)
        return math.log(self.all_views * self.batch_size - 1 - (self.loss == "decoupled"))


# Mean and standard deviation of the pixels, as the peers' recipes use them.
_IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_CIFAR10: dict[str, Any] = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
_CIFAR100: dict[str, Any] = {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)}


def imagenet() -> PretrainConfig:
    """ResNet-50 at batch 4096 for 100 epochs: the paper's setting.

    Source: arXiv:2002.05709, section 2.2 and table B.1. google-research/simclr's own command decays
    weights by 1e-4; the paper says 1e-6. Published linear probe: 64.5 (paper), 64.4 (VISSL). With
    200, 400 and 800 epochs, VISSL reports 66.6, 67.7 and 69.7.
    """
    return PretrainConfig(data="imagenet/train")


def imagenet_256() -> PretrainConfig:
    """ResNet-50 at batch 256 for 100 epochs, with the learning rate 0.075 · √batch.

    Source: arXiv:2002.05709, table B.1; lightly, benchmarks/imagenet/resnet50/simclr.py. Published
    linear probe: 62.8 (paper), 63.2 (lightly); with --loss decoupled 65.1 (lightly's DCL).
    """
    return PretrainConfig(data="imagenet/train", batch_size=256, lr_rule="sqrt")


def simclr_v2() -> PretrainConfig:
    """ResNet-50 with SimCLR v2's projector of three layers, batch 4096, 800 epochs.

    Source: arXiv:2006.10029, section 2 and table 1, which reports a linear probe of 71.7 for
    ResNet-50 without selective kernels, which are not here. The paper's memory is --queue 65536.
    """
    return PretrainConfig(
        data="imagenet/train",
        projector_depth=3,
        lr_rule="sqrt-v2",
        weight_decay=1e-4,
        epochs=800,
        warmup_epochs=40,
    )


def _solo_learn(augmentation: Augmentation, **options: Any) -> PretrainConfig:
    """What solo-learn's SimCLR recipes have in common."""
    return PretrainConfig(
        augmentation=augmentation,
        model="resnet18",
        projector_batch_norm=False,
        batch_size=256,
        temperature=0.2,
        trust_coefficient=0.02,
        trust_clip=True,
        lars_variant="lightly",
        weight_decay=1e-4,
        **options,
    )


def imagenet100() -> PretrainConfig:
    """ResNet-18 on ImageNet-100 at batch 256 for 400 epochs.

    Source: solo-learn, scripts/pretrain/imagenet-100/simclr.yaml. Published linear probe: 77.64.
    """
    return _solo_learn(
        Augmentation(spec="torchvision", **_IMAGENET),
        data="imagenet100/train",
        projector_hidden=4096,
        projector_dim=512,
        lr=0.3,
        epochs=400,
    )


def cifar10() -> PretrainConfig:
    """ResNet-18 on CIFAR-10 at batch 256 for 1,000 epochs.

    Source: solo-learn, scripts/pretrain/cifar/simclr.yaml, without blur as in its published runs.
    Published linear probe: 90.74.
    """
    return _solo_learn(
        Augmentation(size=32, spec="torchvision", p_blur=0, **_CIFAR10),
        data="cifar10:data",
        projector_hidden=2048,
        projector_dim=256,
        lr=0.4,
        epochs=1000,
    )


def cifar100() -> PretrainConfig:
    """`cifar10` with the data and pixel statistics of CIFAR-100. Published (solo-learn): 65.78."""
    return replace(
        cifar10(),
        data="cifar100:data",
        augmentation=Augmentation(size=32, spec="torchvision", p_blur=0, **_CIFAR100),
    )


def stl10() -> PretrainConfig:
    """`cifar10` at 96² with blur, on the labelled and unlabelled training images of STL-10.

    Nobody published these settings for STL-10.
    """
    return replace(
        cifar10(),
        data="stl10:data",
        augmentation=Augmentation(size=96, spec="torchvision", **_CIFAR10),
    )


def cifar10_resnet50() -> PretrainConfig:
    """ResNet-50 on CIFAR-10 at batch 1024 for 1,000 epochs: the paper's appendix B.9.

    Source: arXiv:2002.05709, B.9 (93.95), as reproduced by AndrewAtanov/simclr-pytorch,
    configs/cifar_train_epochs1000_bs1024.yaml (93.44).
    """
    return PretrainConfig(
        data="cifar10:data",
        augmentation=Augmentation(size=32, s=0.5, p_blur=0),
        batch_size=1024,
        epochs=1000,
        temperature=0.5,
        lr=4.0,
    )


def demo() -> PretrainConfig:
    """The demo data; takes minutes on two CPU cores. Chosen on held-out training images.

    With the paper's trust coefficient, 0.001, batch norms would need a learning rate of 2, which
    they do not bear: they take it without adaptation. With a temperature of 0.5 the loss stays on a
    plateau that runs leave early or late by chance.
    """
    return PretrainConfig(
        data="demo",
        model="resnet10",
        width=0.25,
        stem="cifar-stride2",
        augmentation=Augmentation(size=32, area=(0.2, 1.0), hue=0.5, p_blur=0),
        batch_size=256,
        steps=1500,
        temperature=0.2,
        lr=0.2,
        trust_coefficient=0.02,
        warmup_epochs=2,
    )


# Settings of a resumed run. FIXED ones must be those of the run that it continues: the checkpoint
# fits no others, or they decide which image comes when.
FIXED = (
    "model",
    "width",
    "stem",
    "projector",
    "projector_dim",
    "projector_depth",
    "projector_hidden",
    "projector_batch_norm",
    "batch_size",
    "optimizer",
    "lars_variant",
    "decay_norms",
    "queue",
    "ema",
    "seed",
    "image_key",
)
# These take the new value from the resumed step on, and a warning names it. The images of `data`
# must be the same, in count and names. The learning rate goes on where the schedule of the new
# settings has it.
MAY_CHANGE = (
    "data",
    "labels",
    "augmentation",
    "epochs",
    "steps",
    "views",
    "small_crops",
    "small_size",
    "small_area",
    "queue_momentum",
    "loss",
    "temperature",
    "lr",
    "lr_rule",
    "trust_coefficient",
    "trust_clip",
    "weight_decay",
    "warmup_epochs",
    "backend",
    "precision",
    "tf32",
    "cudnn_benchmark",
    "memory",
    "micro_batch",
    "gpu_memory",
    "host_memory",
    "compile",
    "allow_ghost_bn",
    "channels_last",
    "on_error",
)
# Settings that do not change what a run computes.
NOT_COMPARED = (
    "out",
    "resume",
    "overwrite",
    "device",
    "cuda_graph",
    "workers",
    "timeout",
    "log_every",
    "log",
    "probe_every",
    "checkpoint_every",
    "checkpoint_minutes",
)
# Of no use to a resumed run: it made the first weights.
IGNORED = ("zero_gamma",)
# The key in config.json of the account of the run's images. It is no option.
IMAGES = "images"
_ACCOUNT = (f"{IMAGES} used", f"{IMAGES} labels")
PRESETS = {
    "demo": demo,
    "cifar10": cifar10,
    "cifar10-resnet50": cifar10_resnet50,
    "cifar100": cifar100,
    "stl10": stl10,
    "imagenet100": imagenet100,
    "imagenet-256": imagenet_256,
    "imagenet": imagenet,
    "simclr-v2": simclr_v2,
}


def to_json(config: Any, images: Account | None = None) -> str:
    """A dataclass as JSON; with `images`, what the run found in its data as well."""
    values = dataclasses.asdict(config)
    if images is not None:
        values[IMAGES] = images.to_json()
    return json.dumps(values, indent=2, default=str) + "\n"


def from_json(text: str) -> PretrainConfig:
    """The inverse of `to_json`."""
    values = json.loads(text)
    augmentation = augmentation_from(values.pop("augmentation"))
    values.pop(IMAGES, None)
    if "small_area" in values:
        values["small_area"] = tuple(values["small_area"])
    out, labels = values.pop("out"), values.pop("labels", None)
    values["log"] = tuple(values.get("log", ()))
    return PretrainConfig(
        **values,
        augmentation=augmentation,
        out=Path(out) if out else None,
        labels=Path(labels) if labels else None,
    )


def read_config(path: Path) -> tuple[str | None, dict[str, Any]]:
    """The preset that a file of settings names, if any, and its settings.

    The file is YAML or JSON: names of PretrainConfig and values, and `preset`. A run's config.json
    is one. Where it was written to, and whether that run resumed, are left out of it: they belong
    to that run.

    Raises:
        ValueError: it is no mapping, or a name or value is none of PretrainConfig's. ImportError:
            it is YAML, and pyyaml is missing.
    """
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        if path.suffix == ".json":
            raise ValueError(f"{path} is not JSON: {error}") from error
        yaml = need("yaml")
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as reason:
            raise ValueError(f"{path} is neither YAML nor JSON: {reason}") from reason
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold names and values, such as temperature: 0.2")
    if IMAGES in values:
        for name in (IMAGES, "out", "resume", "overwrite"):
            values.pop(name, None)
    preset = values.pop("preset", None)
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset in {path} must be one of {', '.join(PRESETS)}, got {preset!r}")
    known = typing.get_type_hints(PretrainConfig)
    for name, value in values.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            hint = f"; do you mean {close[0]}?" if close else ""
            raise ValueError(f"{path} has the unknown setting {name!r}{hint}")
        if name != "augmentation":
            values[name] = _typed(f"{name} in {path}", known[name], value)
    if "augmentation" in values and not isinstance(values["augmentation"], dict):
        raise ValueError(f"augmentation in {path} must hold names and values")
    return preset, values


def with_settings(config: PretrainConfig, values: dict[str, Any]) -> PretrainConfig:
    """`config` with the settings of `read_config`. Those of `augmentation` may be some of them."""
    values = dict(values)
    if "augmentation" in values:
        given = {**dataclasses.asdict(config.augmentation), **values["augmentation"]}
        try:
            values["augmentation"] = augmentation_from(given)
        except (TypeError, KeyError) as error:
            raise ValueError(f"augmentation has other settings: {error}") from error
    return replace(config, **values)


def _typed(name: str, hint: Any, value: Any) -> Any:
    """`value` from JSON as the type of a field. Numbers are checked by PretrainConfig itself."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = options[0]
    if typing.get_origin(kind) is tuple:
        many = value if isinstance(value, list) else [value]
        return tuple(_typed(name, typing.get_args(kind)[0], one) for one in many)
    if typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    elif kind in (str, Path):
        if not isinstance(value, str):
            raise ValueError(f"{name} must be text, got {value!r}")
        return kind(value)
    elif kind is bool and not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    elif kind in (int, float) and isinstance(value, str):
        # YAML reads 1e-4 as text.
        try:
            return kind(value)
        except ValueError:
            raise ValueError(f"{name} must be a number, got {value!r}") from None
    return value


def differences(before: str, after: str, names: Sequence[str]) -> list[str]:
    """Those of the settings `names` that differ between two texts of `to_json`, such as
    "lr: 2.0 → 1.0". Settings that the first does not have are left out.

    With MAY_CHANGE, also the number of images and the kind of their labels.
    """
    old, new = json.loads(before), json.loads(after)
    for values in (old, new):
        account = values.pop(IMAGES, {})
        values |= {name: account.get(name.removeprefix(f"{IMAGES} ")) for name in _ACCOUNT}
    names = (*names, *_ACCOUNT) if names is MAY_CHANGE else names
    changed = [name for name in new if name in names and name in old and old[name] != new[name]]
    return [f"{name}: {old[name]} → {new[name]}" for name in changed]
