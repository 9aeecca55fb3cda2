"""Encoders from checkpoints of any library. The layout of the keys is detected."""

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
# The keys under which training programs store the weights in a checkpoint.
_CONTAINERS = ("state_dict", "model_state_dict", "model")
_CLASSIFIERS = ("fc.", "classifier.", "head.", "heads.", "linear.")
_STAGES = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True)
class Weights:
    """An encoder with the weights of `path`, in eval mode, and the settings that build it.

    encoder: images [N, 3, H, W] → h [N, feature_dim]. Its state_dict has no classifier. The names
        in it are torchvision's, or timm's for a model of timm.
    layout: the library whose names the file used.
    unused: keys of the file that the encoder does not have, such as those of heads.
    model, width, stem: as in `build_encoder`.
    augmentation: the size and normalisation of the training images; for our own runs the whole
        augmentation.
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
        """The same encoder with new random weights, from torch's current random state."""
        return build_encoder(self.model, width=self.width, stem=self.stem)[0]

    def about(self) -> dict[str, str]:
        """Metadata for `save_encoder`; `load_weights` reads it."""
        return about_encoder(self.model, self.width, self.stem, self.augmentation)

    def __str__(self) -> str:
        stem = f", stem {self.stem}" if self.stem else ""
        heads = f"; not used: {', '.join(_first_parts(self.unused))}" if self.unused else ""
        return f"{self.model} ×{self.width:g}{stem} from {self.layout} keys in {self.path}{heads}"


def load_weights(
    path: str | Path,
    *,
    model: str | None = None,
    width: float | None = None,
    stem: Stem | None = None,
    augmentation: Augmentation | None = None,
) -> Weights:
    """Read an encoder from a checkpoint. No code in the file is run.

    path: a .safetensors file; a file that torch.save wrote (.pth, .pt, .ckpt) with a state_dict or
        a dict that holds one; or the output folder of a run. Keys may be named as here
        (encoder.safetensors, checkpoints/step-*.pt), as in torchvision and timm, as in lightly
        (backbone.* as a ResNet or as the Sequential of its children) or as in solo-learn
        (backbone.*; encoder.* before 1.0.3). The prefixes "module." and "_orig_mod." are removed.
    model, width, stem: the encoder's architecture, as in `build_encoder`. By default it is read
        from our own files, and for other files of ResNets inferred from the shapes of the weights.
        Shapes do not tell the stride and padding of a 3×3 first layer: stem is then "cifar", or
        "cifar-pad2" for solo-learn.
    augmentation: by default read from our own files. For other files it has the mean and standard
        deviation of ImageNet, at 224 pixels, or at 32 for a 3×3 first layer.

    Raises:
        ValueError: the file is unreadable, the architecture is unknown, or the weights do not fit
            it: keys are missing or unexpected, shapes differ, values are NaN. The message has the
            path and the keys. FileNotFoundError: there is no such file.
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
            f"{path} does not hold a plain ResNet (its keys are {', '.join(list(state)[:3])}, …): "
            'name its torchvision or timm model with model="…" or --model …'
        )
    model = model or about["model"]
    width = float(about.get("width", 1)) if width is None else width
    stem = stem or cast("Stem | None", about.get("stem") or None)
    if stem is None and model in RESNETS:
        stem = default_stem(int(about.get("image_size", 224)))
    # Whatever torch's default device and dtype are: on "meta" there would be no weights.
    with torch.device("cpu"):
        encoder, dim = build_encoder(model, width=width, stem=stem)
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
    ours = isinstance(entry, dict) and isinstance(entry.get("model"), str)
    return content, cast("dict[str, str]", entry) if ours else {}, "encoder."


def _tensors(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The weights by name, without the prefixes of DistributedDataParallel and torch.compile."""
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
        raise ValueError(f"{path} holds no weights; its keys are {', '.join(map(str, content))}")
    return tensors


def _layout(tensors: Iterable[str]) -> tuple[Layout, str]:
    """The library that these names are from, and the prefix of the encoder's names."""
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
    return {"model": names[0], "width": str(first[0] / 64), "stem": stem} if names else {}


def _augmentation(about: dict[str, str], stem: Stem | None, encoder: nn.Module) -> Augmentation:
    if "augmentation" in about:
        return augmentation_from(json.loads(about["augmentation"]))
    if "image_size" in about:
        return Augmentation(size=int(about["image_size"]))
    # A model of timm knows the images that it was trained on.
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
    """The library of a model. torchvision and timm have the same keys for the plain ResNets."""
    if model in RESNETS:
        return "torchvision and timm"
    from torchvision import models

    known = not model.startswith("timm:") and model in models.list_models(module=models)
    return "torchvision" if known else "timm"
