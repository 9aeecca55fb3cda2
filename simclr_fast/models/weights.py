"""Encoders from checkpoints of any library: the key layout is detected, the fit is strict."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from simclr_fast.augment.params import Augmentation, augmentation_from
from simclr_fast.models.encoders import RESNETS, Stem, build_encoder, default_stem
from simclr_fast.utils import checkpoint

Layout = Literal[
    "simclr_fast", "torchvision", "timm", "torchvision and timm", "lightly", "solo-learn"
]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Where training programs keep the weights among the rest of a checkpoint.
_CONTAINERS = ("state_dict", "model_state_dict", "model")
_CLASSIFIERS = ("fc.", "classifier.", "head.", "heads.", "linear.")
_STAGES = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True)
class Weights:
    """An encoder with the weights of `path`, in eval mode, and what builds it.

    encoder: images [N, 3, H, W] → h [N, feature_dim]. Its state_dict has torchvision's names, for
        timm's models timm's, and no classifier.
    layout: whose key names the file had. unused: the file's keys that are not the encoder's: heads.
    model, width, stem: of `build_encoder`. augmentation: what images the encoder was trained on:
        size and normalisation, and for our own runs the whole distribution.
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

    def build(self) -> nn.Module:
        """The same encoder untrained, from torch's current random state."""
        return build_encoder(self.model, width=self.width, stem=self.stem)[0]

    def about(self) -> dict[str, str]:
        """Metadata for `save_encoder`, which `load_weights` reads back."""
        return about_encoder(self.model, self.width, self.stem, self.augmentation)

    def __str__(self) -> str:
        stem = f", stem {self.stem}" if self.stem else ""
        heads = f"; left aside: {', '.join(_first_parts(self.unused))}" if self.unused else ""
        return f"{self.model} ×{self.width:g}{stem} from {self.layout} keys in {self.path}{heads}"


def load_weights(
    path: str | Path,
    *,
    model: str | None = None,
    width: float | None = None,
    stem: Stem | None = None,
    augmentation: Augmentation | None = None,
) -> Weights:
    """Read an encoder out of a checkpoint; no code in the file is run.

    path: a .safetensors file, or what torch.save wrote (.pth, .pt, .ckpt) of a state_dict or of a
        dict that holds one; or the output folder of a run. Key layouts: ours (encoder.safetensors,
        checkpoints/step-*.pt), torchvision's and timm's, lightly's (backbone.* as a ResNet or as
        the Sequential of its children) and solo-learn's (backbone.*, before 1.0.3 encoder.*), each
        also under "module." or "_orig_mod.".
    model, width, stem: what the encoder is (`build_encoder`); by default what our files say, else
        what the shapes of a ResNet's weights say. A 3×3 first layer says no more than that: stem
        is then "cifar" ("cifar-pad2" for solo-learn, whose first layer pads by 2).
    augmentation: by default what our files say; for others ImageNet's mean and standard deviation,
        at 224 pixels, or 32 for a 3×3 first layer.

    Raises:
        ValueError: an unreadable file, an unknown architecture, or weights that do not fit whole:
            keys missing or unexpected, shapes, NaN; with path and keys. FileNotFoundError.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "encoder.safetensors"
    content, about, prefix = _read(path)
    tensors = _tensors(content, path)
    layout: Layout = "simclr_fast"
    if not about:
        layout, prefix = _layout(tensors)
    state = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    stem_layers = None
    if layout == "lightly":
        state, stem_layers = _lightly_names(state)
    if not about and (model is None or model in RESNETS):
        about = _resnet_of(state, layout, stem_layers)
    if model is None and not about:
        raise ValueError(
            f"{path}: not a plain ResNet by its keys ({', '.join(list(state)[:3])}, …): say which "
            'model it is (model="…", --model …: a torchvision or timm name)'
        )
    model = model or about["model"]
    width = float(about.get("width", 1)) if width is None else width
    stem = stem or cast("Stem | None", about.get("stem") or None)
    if stem is None and model in RESNETS:
        stem = default_stem(int(about.get("image_size", 224)))
    encoder, dim = build_encoder(model, width=width, stem=stem)
    own = encoder.state_dict()
    # Weights from before PyTorch 0.4.1 count no batches, torchvision's own files among them.
    for key in own:
        statistics = key.replace("num_batches_tracked", "running_mean")
        if key.endswith("num_batches_tracked") and key not in state and statistics in state:
            state[key] = torch.tensor(0)
    heads = {key for key in state if key not in own and key.startswith(_CLASSIFIERS)}
    checkpoint.load_strictly(
        encoder, {key: t for key, t in state.items() if key not in heads}, path
    )
    return Weights(
        path=path,
        layout=_library(model) if layout == "torchvision" else layout,
        encoder=encoder.eval(),
        feature_dim=dim,
        model=model,
        width=width,
        stem=stem,
        augmentation=augmentation or _augmentation(about, stem, encoder),
        unused=(*(key for key in tensors if not key.startswith(prefix)), *sorted(heads)),
    )


def about_encoder(
    model: str, width: float, stem: str | None, augmentation: Augmentation
) -> dict[str, str]:
    """What builds an encoder again, as text: the metadata of encoder.safetensors."""
    return {
        "model": model,
        "width": str(width),
        "stem": stem or "",
        "image_size": str(augmentation.size),
        "augmentation": json.dumps(vars(augmentation)),
    }


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str], str]:
    """The file's content; of our own files also what builds the encoder, and its keys' prefix."""
    if path.suffix == ".safetensors":
        weights, about = checkpoint.load_encoder(path)
        return weights, about if "model" in about else {}, ""
    content: object = checkpoint.load_checkpoint(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not weights by name")
    entry = content.get("encoder")
    ours = isinstance(entry, dict) and isinstance(entry.get("model"), str)
    return content, cast("dict[str, str]", entry) if ours else {}, "encoder."


def _tensors(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The weights by name, wrappers' prefixes taken off."""
    for name in _CONTAINERS:
        if isinstance(content.get(name), dict):
            content = content[name]
            break
    tensors = {
        str(key).replace("_orig_mod.", "").removeprefix("module."): value
        for key, value in content.items()
        if isinstance(value, Tensor)
    }
    if not tensors:
        raise ValueError(f"{path} holds no weights by name; it has {', '.join(map(str, content))}")
    return tensors


def _layout(tensors: Iterable[str]) -> tuple[Layout, str]:
    """Whose names these are, and the prefix of the encoder's."""
    tops = set(_first_parts(tensors))
    if "backbone" in tops:
        return "solo-learn" if tops & {"classifier", "projector"} else "lightly", "backbone."
    if any(key.startswith("encoder.conv1.") for key in tensors):
        return "solo-learn", "encoder."
    if any(".shortcut." in key for key in tensors):
        return "lightly", ""
    return "torchvision", ""


def _first_parts(keys: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(key.partition(".")[0] for key in keys))


def _lightly_names(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], int | None]:
    """torchvision's names for those of Sequential(*list(resnet.children())[:-1]).

    The second is the number of modules between batch norm and the stages: 2 in torchvision's ResNet
    (ReLU, pooling), 0 in lightly's, whose ReLU is in a forward that the Sequential does not have.
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
    """Which ResNet has these weights, by blocks, channels and the first kernel; {} if none does."""
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    first, inner = shapes.get("conv1.weight", ()), shapes.get("layer1.0.conv1.weight", ())
    # Grouped and wide variants have other channels inside their blocks.
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
    return {"model": names[0], "width": str(first[0] / 64), "stem": stem} if names else {}


def _augmentation(about: dict[str, str], stem: Stem | None, encoder: nn.Module) -> Augmentation:
    if "augmentation" in about:
        return augmentation_from(json.loads(about["augmentation"]))
    if "image_size" in about:
        return Augmentation(size=int(about["image_size"]))
    # timm's models say what they were trained on.
    given: Any = getattr(encoder, "pretrained_cfg", {})
    size = given.get("input_size", (3, 224))[-1] if stem in (None, "imagenet") else 32
    return Augmentation(
        size=size,
        spec="torchvision",
        interpolation="bilinear",
        mean=tuple(given.get("mean", IMAGENET_MEAN)),
        std=tuple(given.get("std", IMAGENET_STD)),
    )


def _library(model: str) -> Layout:
    """Whose model names: torchvision's and timm's ResNets have the same keys."""
    if model in RESNETS:
        return "torchvision and timm"
    from torchvision import models

    known = not model.startswith("timm:") and model in models.list_models(module=models)
    return "torchvision" if known else "timm"
