"""Encoders from checkpoints of any library. The layout of the keys is detected."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from simclr_fast.augment.params import Augmentation, augmentation_from
from simclr_fast.models.encoders import RESNETS, Stem, build_encoder, default_stem
from simclr_fast.utils import checkpoint

Layout = Literal[
    "simclr_fast",
    "torchvision",
    "timm",
    "torchvision and timm",
    "lightly",
    "solo-learn",
    "VISSL",
    "mmselfsup",
    "other",
]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# If a file holds several encoders, the one whose prefix has an earlier name here is taken.
_PREFERRED = ("encoder_q", "base_encoder", "online", "teacher", "student", "backbone", "encoder")
# Names of encoders that follow another one. They are taken only if there is no other.
_FOLLOWERS = ("encoder_k", "momentum", "target", "ema")
_CLASSIFIERS = ("fc.", "classifier.", "head.", "heads.", "linear.")
_STAGES = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True)
class Weights:
    """An encoder with the weights of `path`, in eval mode, and the settings that build it.

    encoder: images [N, 3, H, W] → h [N, feature_dim]. Its state_dict has no classifier. The names
        in it are torchvision's, or timm's for a model of timm.
    layout: the library whose names the file used.
    prefix: what stood before the encoder's names, such as "module.encoder_q.".
    others: prefixes of further encoders in the file, which were not taken.
    unused: keys of the file that the encoder does not have, such as those of heads.
    model, width, stem: as in `build_encoder`.
    augmentation: the size and normalisation of the training images; for our own runs the whole
        augmentation.
    input_known_from: how the normalisation was found if the file does not say it.
    """

    path: Path
    layout: Layout
    encoder: nn.Module
    feature_dim: int
    model: str
    width: float
    stem: Stem | None
    augmentation: Augmentation
    unused: tuple[str, ...]
    prefix: str = ""
    others: tuple[str, ...] = ()
    input_known_from: str = ""

    def build(self) -> nn.Module:
        """The same encoder with new random weights, from torch's current random state."""
        channels = self.augmentation.channels
        return build_encoder(self.model, width=self.width, stem=self.stem, channels=channels)[0]

    def about(self) -> dict[str, str]:
        """Metadata for `save_encoder`; `load_weights` reads it."""
        return about_encoder(self.model, self.width, self.stem, self.augmentation)

    def __str__(self) -> str:
        stem = f", stem {self.stem}" if self.stem else ""
        kind = "" if self.layout == "other" else f"{self.layout} "
        under = f" under {self.prefix!r}" if self.prefix else ""
        inputs = "pixels in [0, 1]"
        if self.augmentation.mean is not None:
            mean, std = self.augmentation.mean, self.augmentation.std
            inputs += f", minus {_numbers(mean)}, divided by {_numbers(std or ())}"
        if self.input_known_from:
            inputs += f" ({self.input_known_from}; else --mean and --std)"
        heads = f"; not used: {', '.join(_first_parts(self.unused))}" if self.unused else ""
        others = f"; also there: {', '.join(self.others)} (--prefix)" if self.others else ""
        return (
            f"{self.model} ×{self.width:g}{stem} from {kind}keys{under} in {self.path}; input: "
            f"{inputs}{heads}{others}"
        )


def load_weights(
    path: str | Path,
    *,
    model: str | None = None,
    width: float | None = None,
    stem: Stem | None = None,
    augmentation: Augmentation | None = None,
    prefix: str | None = None,
) -> Weights:
    """Read an encoder from a checkpoint. No code in the file is run.

    path: a .safetensors file; a file that torch.save wrote (.pth, .pt, .ckpt) with a state_dict or
        dicts that hold one, at any depth; or the folder of a run or of `export --format hub`. The
        names of the weights may be ours (encoder.safetensors, checkpoints/step-*.pt), those of
        torchvision and timm, or those of lightly (a ResNet, or the Sequential of its children),
        with any prefix before them: solo-learn's "backbone." and "encoder.", MoCo's
        "module.encoder_q.", "base_encoder.", "model.backbone.", "teacher.", VISSL's
        "_feature_blocks.". "_orig_mod." is removed.
    model, width, stem: the encoder's architecture, as in `build_encoder`. By default it is read
        from our own files, and for other files of ResNets inferred from the shapes of the weights.
        Shapes do not tell the stride and padding of a 3×3 first layer: stem is then "cifar", or
        "cifar-pad2" for solo-learn.
    augmentation: its `channels` are those of the encoder's images. By default read from our own
        files. For other files it has the mean and standard deviation of ImageNet, at 224 pixels, or
        at 32 for a 3×3 first layer. A ResNet that was trained on pixels in [0, 1], such as those
        of google-research/simclr, shows it in its first batch norm: then mean and std are None.
    prefix: the end of what stands before the encoder's names, if the file has several encoders,
        such as "encoder_k.".

    Raises:
        ValueError: the file is unreadable, the architecture is unknown, or the weights do not fit
            it: keys are missing or unexpected, shapes differ, values are NaN. The message has the
            path and the keys. FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        # Of a run, or of an export for a hub.
        exported, path = path / "model.safetensors", path / "encoder.safetensors"
        path = exported if exported.exists() and not path.exists() else path
    content, about, start = _read(path)
    tensors = _tensors(content, path)
    layout: Layout = "simclr_fast"
    others: list[str] = []
    if not about:
        found = _prefixes(tensors, model)
        matching = [p for p in found if prefix is None or p.endswith(prefix)]
        if prefix is not None and not matching:
            known = ", ".join(repr(p) for p in found) or "none that is known"
            raise ValueError(f"no encoder in {path} has the prefix {prefix!r}; found: {known}")
        start = matching[0] if matching else ""
        others = [p for p in found if p != start]
        layout = _layout(tensors, start)
    state = {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}
    state, stem_layers = _lightly_names(state)
    if not about and (model is None or model in RESNETS):
        about = _resnet_of(state, layout, stem_layers)
    if model is None and not about:
        raise ValueError(
            f"{path} does not hold a plain ResNet (its keys are {', '.join(list(state)[:3])}, …): "
            'name its torchvision or timm model with model="…" or --model …'
        )
    model = model or about["model"]
    width = float(about.get("width", 1)) if width is None else width
    stem = stem or cast("Stem | None", about.get("stem") or None)
    if stem is None and model in RESNETS:
        stem = default_stem(int(about.get("image_size", 224)))
    channels = _channels(about, augmentation)
    # Whatever torch's default device and dtype are: on "meta" there would be no weights.
    with torch.device("cpu"):
        encoder, dim = build_encoder(model, width=width, stem=stem, channels=channels)
    encoder.float()
    own = encoder.state_dict()
    # Files from before PyTorch 0.4.1, some of torchvision's among them, lack num_batches_tracked.
    for key in own:
        statistics = key.replace("num_batches_tracked", "running_mean")
        if key.endswith("num_batches_tracked") and key not in state and statistics in state:
            state[key] = torch.tensor(0, device="cpu")
    heads = {key for key in state if key not in own and key.startswith(_CLASSIFIERS)}
    checkpoint.load_strictly(
        encoder, {key: t for key, t in state.items() if key not in heads}, path
    )
    known_from = ""
    if augmentation is None:
        augmentation = _augmentation(about, stem, encoder, channels)
        if augmentation.mean is not None and "augmentation" not in about:
            known_from = "assumed"
            if model in RESNETS and _sees_plain_pixels(state):
                augmentation = replace(augmentation, mean=None, std=None)
                known_from = "as its first batch norm shows"
    return Weights(
        path=path,
        layout=_library(model) if layout == "torchvision" else layout,
        encoder=encoder.eval(),
        feature_dim=dim,
        model=model,
        width=width,
        stem=stem,
        augmentation=augmentation,
        unused=(*_siblings(tensors, [start, *others]), *sorted(heads)),
        prefix=start,
        others=tuple(others),
        input_known_from=known_from,
    )


def about_encoder(
    model: str, width: float, stem: str | None, augmentation: Augmentation
) -> dict[str, str]:
    """The settings that rebuild an encoder, as text: the metadata of encoder.safetensors."""
    return {
        "model": model,
        "width": str(width),
        "stem": stem or "",
        "image_size": str(augmentation.size),
        "augmentation": json.dumps(vars(augmentation)),
    }


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str], str]:
    """The file's content, the settings that rebuild the encoder, and the prefix of its keys.

    The settings are empty unless the file is our own.
    """
    if path.suffix == ".safetensors":
        weights, about = checkpoint.load_encoder(path)
        return weights, about if "model" in about else {}, ""
    content: object = checkpoint.load_checkpoint(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    entry = content.get("encoder")
    if isinstance(entry, dict) and isinstance(entry.get("model"), str):
        return content["model"], cast("dict[str, str]", entry), "encoder."
    return content, {}, ""


def _tensors(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The weights by name, those of dicts in dicts as "outer.inner.name".

    A dict that only wraps others ("state_dict" beside "epoch") gives no part of the name. Dicts
    with numbers as keys, such as an optimizer's state, are left out.
    """
    inner = {k: v for k, v in content.items() if isinstance(v, dict) and _holds_weights(v)}
    while len(inner) == 1 and not any(isinstance(v, Tensor) for v in content.values()):
        (content,) = inner.values()
        inner = {k: v for k, v in content.items() if isinstance(v, dict) and _holds_weights(v)}
    tensors = {name.replace("_orig_mod.", ""): value for name, value in _flat(content, "")}
    # What DistributedDataParallel puts before all names.
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    if not tensors:
        raise ValueError(f"{path} holds no weights; its keys are {', '.join(map(str, content))}")
    return tensors


def _flat(content: dict[Any, Any], before: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            yield before + name, value
        elif isinstance(name, str) and isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")


def _holds_weights(content: dict[Any, Any]) -> bool:
    """Whether matrices are in it. A scheduler's or an optimizer's state has none under names."""
    return any(value.ndim > 1 for _, value in _flat(content, ""))


def _prefixes(tensors: dict[str, Tensor], model: str | None) -> list[str]:
    """What stands before the names of an encoder, the preferred encoder first.

    An encoder is a ResNet, or `model`.
    """
    if model is None or model in RESNETS:
        found = [
            key.removesuffix("conv1.weight")
            for key in tensors
            if key.endswith("conv1.weight")
            and f"{key.removesuffix('conv1.weight')}layer1.0.conv1.weight" in tensors
        ]
        # lightly's Sequential: convolution, batch norm, up to two layers, the first stage.
        starts = [key.removesuffix("0.weight") for key in tensors if key.endswith("0.weight")]
        found += [p for p in starts if any(f"{p}{i}.0.conv1.weight" in tensors for i in (2, 3, 4))]
    else:
        with torch.device("meta"):
            names = list(build_encoder(model)[0].state_dict())
        first = names[0]
        found = [key.removesuffix(first) for key in tensors if key.endswith(first)]
        found = [p for p in found if not p or p.endswith(".")]
        found = [p for p in found if sum(p + name in tensors for name in names) > len(names) / 2]
    return sorted(set(found), key=_preference)


def _preference(prefix: str) -> tuple[bool, int, int]:
    parts = prefix.split(".")
    follows = any(name in part for part in parts for name in _FOLLOWERS)
    known = [i for i, name in enumerate(_PREFERRED) if any(name in part for part in parts)]
    return follows, min(known, default=len(_PREFERRED)), len(prefix)


def _layout(tensors: Iterable[str], prefix: str) -> Layout:
    """The library whose names these are."""
    names = [key for key in tensors if key.startswith(prefix)]
    beside = set(_first_parts(key for key in tensors if not key.startswith(prefix)))
    numbered = any(key.removeprefix(prefix)[:2] == "0." for key in names)
    if "_feature_blocks." in prefix:
        return "VISSL"
    if numbered or any(".shortcut." in key for key in names):
        return "lightly"
    if prefix == "backbone." and beside & {"neck", "head"}:
        return "mmselfsup"
    if prefix == "backbone.":
        return "solo-learn" if beside & {"classifier", "projector"} else "lightly"
    if prefix == "encoder.":
        return "solo-learn"
    return "other" if prefix else "torchvision"


def _siblings(tensors: Iterable[str], prefixes: list[str]) -> list[str]:
    """The keys that belong to no encoder."""
    return [key for key in tensors if not key.startswith(tuple(prefixes))]


def _numbers(values: Iterable[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _first_parts(keys: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(key.partition(".")[0] for key in keys))


def _lightly_names(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], int | None]:
    """Rename the keys of Sequential(*list(resnet.children())[:-1]) to torchvision's.

    Returns:
        The renamed weights, and the number of modules between batch norm and the stages: 2 in
        torchvision's ResNet (ReLU, pooling). It is 0 in lightly's ResNet: there the ReLU is called
        in forward(), which the Sequential does not have.
    """
    state = {key.replace(".shortcut.", ".downsample."): tensor for key, tensor in state.items()}
    numbers = sorted({int(key.partition(".")[0]) for key in state if key[0].isdigit()})
    if len(numbers) != len(_STAGES):
        return state, None
    names = dict(zip(map(str, numbers), _STAGES, strict=True))
    parts = ((key.partition("."), tensor) for key, tensor in state.items())
    renamed = {f"{names.get(top, top)}.{rest}": tensor for (top, _, rest), tensor in parts}
    return renamed, numbers[2] - numbers[1] - 1


def _resnet_of(state: dict[str, Tensor], layout: Layout, stem_layers: int | None) -> dict[str, str]:
    """Recognise a ResNet by the shapes of its blocks, channels and first kernel; {} for others."""
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    first, inner = shapes.get("conv1.weight", ()), shapes.get("layer1.0.conv1.weight", ())
    # ResNeXt and wide variants have other numbers of channels inside their blocks.
    if len(first) != 4 or inner[:2] != (first[0], first[0]) or first[2] not in (3, 7):
        return {}
    kind = "Bottleneck" if "layer1.0.conv3.weight" in shapes else "BasicBlock"
    blocks = tuple(
        len({m[1] for key in shapes if (m := re.match(rf"layer{stage}\.(\d+)\.", key))})
        for stage in range(1, 5)
    )
    stem = "imagenet"
    if first[2] == 3:
        stem = "cifar-pad2" if layout == "solo-learn" else "cifar"
        stem = "cifar-no-relu" if stem_layers == 0 else stem
    elif stem_layers not in (None, 2):
        return {}
    names = [name for name, built in RESNETS.items() if built == (kind, blocks)]
    if not names:
        return {}
    width, channels = first[0] / 64, first[1]
    return {"model": names[0], "width": str(width), "stem": stem, "channels": str(channels)}


def _channels(about: dict[str, str], augmentation: Augmentation | None) -> int:
    """The channels of the encoder's images."""
    if augmentation is not None:
        return augmentation.channels
    if "augmentation" in about:
        return int(json.loads(about["augmentation"]).get("channels", 3))
    return int(about.get("channels", 3))


def _augmentation(
    about: dict[str, str], stem: Stem | None, encoder: nn.Module, channels: int
) -> Augmentation:
    if "augmentation" in about:
        return augmentation_from(json.loads(about["augmentation"]))
    if "image_size" in about:
        return Augmentation(size=int(about["image_size"]))
    # A model of timm knows the images that it was trained on.
    given: Any = getattr(encoder, "pretrained_cfg", {})
    size = given.get("input_size", (3, 224))[-1] if stem in (None, "imagenet") else 32
    if channels != 3:
        return Augmentation(
            size,
            spec="torchvision",
            interpolation="bilinear",
            channels=channels,
            saturation=0,
            hue=0,
            p_gray=0,
        )
    return Augmentation(
        size=size,
        spec="torchvision",
        interpolation="bilinear",
        mean=tuple(given.get("mean", IMAGENET_MEAN)),
        std=tuple(given.get("std", IMAGENET_STD)),
    )


def _sees_plain_pixels(state: dict[str, Tensor]) -> bool:
    """Whether a ResNet was trained on pixels in [0, 1].

    Its first batch norm has the means and variances of the first convolution's outputs. Of constant
    colours they follow from the colours' mean and deviation, which least squares find again.
    Photographs have about 0.45 and 0.25. Normalised by ImageNet's numbers they have 0 and 1.
    """
    weight, mean = state["conv1.weight"].double(), state["bn1.running_mean"].double()
    variance = state["bn1.running_var"].double()
    per_colour = weight.sum((2, 3))
    found = torch.linalg.lstsq(per_colour, mean[:, None]).solution[:, 0]
    gray = per_colour.sum(1).square()
    deviation = ((variance * gray).sum() / gray.square().sum()).sqrt()
    unexplained = (per_colour @ found - mean).square().sum() / mean.square().sum()
    usual = bool((found > 0.15).all() and (found < 0.85).all())
    return usual and bool(deviation < 0.35) and bool(unexplained < 0.3)


def _library(model: str) -> Layout:
    """The library of a model. torchvision and timm have the same keys for the plain ResNets."""
    if model in RESNETS:
        return "torchvision and timm"
    from torchvision import models

    known = not model.startswith("timm:") and model in models.list_models(module=models)
    return "torchvision" if known else "timm"
