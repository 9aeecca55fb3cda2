"""Write an encoder for other libraries, after a check that its outputs there equal ours."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from simclr_fast.models.card import write_card
from simclr_fast.models.encoders import cut_classifier
from simclr_fast.models.weights import Weights
from simclr_fast.utils import checkpoint
from simclr_fast.utils.extras import need

Format = Literal["torchvision", "timm", "hub", "safetensors", "torch-export", "onnx"]
FORMATS: tuple[Format, ...] = get_args(Format)
# Relative to the largest output. Other libraries pool and fuse in another order, so that float32
# rounds differently.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Exported:
    """An exported encoder.

    path: the file. difference: the largest difference of outputs, relative to the largest output.
    usage: Python code that loads it.
    """

    path: Path
    difference: float
    usage: str


def export_encoder(weights: Weights, folder: str | Path, form: Format) -> Exported:
    """Write `weights.encoder` into `folder` in one of FORMATS.

    torchvision: NAME.pth, the state_dict of torchvision's model without its last layer.
        torchvision's detection and segmentation backbones load it too.
    timm: a folder for timm's "local-dir:".
        These two formats need width 1 and the ImageNet stem.
    hub: a folder for a hub of models, with a model card: weights for `load_weights` and
        `HubEncoder`, and for timm if it has such a model.
    safetensors: encoder.safetensors, for `load_weights`.
    torch-export: encoder.pt2. onnx: encoder.onnx.
        These two take any batch size, and images of `weights.augmentation.size` pixels.

    Raises:
        ValueError: the other library has no such model, or its outputs with these weights differ
            from ours. ImportError: the format's library is missing.
    """
    if form not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {form!r}")
    write = {
        "torchvision": _torchvision,
        "timm": _timm,
        "hub": _hub,
        "safetensors": _safetensors,
        "torch-export": _torch_export,
        "onnx": _onnx,
    }[form]
    return write(weights, Path(folder))


def _torchvision(weights: Weights, folder: Path) -> Exported:
    models = need("torchvision").models
    name = _plain_name(weights, "torchvision")
    if weights.model.startswith("timm:") or name not in models.list_models(module=models):
        raise ValueError(f"torchvision has no model {name!r}")
    theirs, _ = cut_classifier(models.get_model(name, weights=None), name)
    difference = _compare(weights, _loaded(theirs, weights))
    path = folder / f"{name}.pth"
    checkpoint.write_atomic(path, lambda part: torch.save(theirs.state_dict(), part))
    (*_, cut) = (key for key, layer in theirs.named_modules() if isinstance(layer, nn.Identity))
    cut = re.sub(r"\.(\d+)", r"[\1]", cut)
    usage = f"model = torchvision.models.{name}(); model.{cut} = torch.nn.Identity(); "
    return Exported(path, difference, f'{usage}model.load_state_dict(torch.load("{path}"))')


def _timm(weights: Weights, folder: Path) -> Exported:
    safetensors = need("safetensors.torch")
    theirs, config = _for_timm(weights)
    difference = _compare(weights, theirs)
    path = folder / "model.safetensors"
    packed = safetensors.save({key: t.contiguous() for key, t in theirs.state_dict().items()})
    checkpoint.write_atomic(path, lambda part: part.write_bytes(packed))
    checkpoint.write_json(folder / "config.json", config)
    usage = f'model = timm.create_model("local-dir:{folder}", pretrained=True)'
    return Exported(path, difference, usage)


def _for_timm(weights: Weights) -> tuple[nn.Module, dict[str, Any]]:
    """timm's model with these weights, and its config.json.

    Raises:
        ValueError: timm has no such model.
    """
    name = _plain_name(weights, "timm")
    timm = need("timm")
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}")
    theirs = timm.create_model(name, num_classes=0)
    augmentation = weights.augmentation
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": weights.feature_dim,
        "pretrained_cfg": {
            "input_size": [3, augmentation.size, augmentation.size],
            "interpolation": augmentation.interpolation,
            "mean": augmentation.mean or (0, 0, 0),
            "std": augmentation.std or (1, 1, 1),
            "num_classes": 0,
            "first_conv": theirs.pretrained_cfg["first_conv"],
            "classifier": theirs.pretrained_cfg["classifier"],
        },
    }
    return _loaded(theirs, weights), config


def _hub(weights: Weights, folder: Path) -> Exported:
    about = weights.about()
    try:
        theirs, config = _for_timm(weights)
    except ValueError:
        # An encoder of ours that timm lacks, such as a narrow one.
        theirs, config = _loaded(weights.build(), weights), {"library": "simclr_fast"}
    difference = _compare(weights, theirs)
    path = folder / "model.safetensors"
    # With our metadata, which timm ignores: `load_weights` rebuilds the encoder from it.
    checkpoint.save_encoder(path, theirs, about)
    checkpoint.write_json(folder / "config.json", config | {"simclr_fast": about})
    ours = (
        "from simclr_fast.models.hub import HubEncoder\n\n"
        'encoder = HubEncoder.from_pretrained("USER/NAME")  # images → features'
    )
    by_timm = "architecture" in config
    timms = 'import timm\n\nmodel = timm.create_model("hf-hub:USER/NAME", pretrained=True).eval()'
    usage = f"{timms}\n\n# or\n{ours}" if by_timm else ours
    write_card(weights, folder, usage, ["timm"] if by_timm else [])
    local = (
        f'timm.create_model("local-dir:{folder}", pretrained=True)'
        if by_timm
        else f'HubEncoder.from_pretrained("{folder}")'
    )
    return Exported(path, difference, f"model = {local}")


def _safetensors(weights: Weights, folder: Path) -> Exported:
    fresh = _loaded(weights.build(), weights)
    difference = _compare(weights, fresh)
    path = folder / "encoder.safetensors"
    checkpoint.save_encoder(path, fresh, weights.about())
    return Exported(path, difference, f'encoder = load_weights("{path}").encoder')


def _torch_export(weights: Weights, folder: Path) -> Exported:
    program = torch.export.export(weights.encoder, (_images(weights),), dynamic_shapes=_ANY_BATCH)
    difference = _compare(weights, program.module())
    path = folder / "encoder.pt2"
    checkpoint.write_atomic(path, lambda part: _save_program(program, part))
    return Exported(path, difference, f'encoder = torch.export.load("{path}").module()')


def _save_program(program: Any, path: Path) -> None:
    # torch.export.save warns if a path does not end in .pt2, and a temporary file's does not.
    with path.open("wb") as file:
        torch.export.save(program, file)


def _onnx(weights: Weights, folder: Path) -> Exported:
    for module in ("onnx", "onnxscript"):
        need(module)
    runtime = need("onnxruntime")
    program: Any = torch.onnx.export(
        weights.encoder,
        (_images(weights),),
        dynamo=True,
        dynamic_shapes=_ANY_BATCH,
        input_names=["images"],
        output_names=["h"],
        verbose=False,
    )
    path, differences = folder / "encoder.onnx", []

    def save_checked(part: Path) -> None:
        program.save(str(part))
        # As bytes: it refuses paths that are not UTF-8.
        session = runtime.InferenceSession(part.read_bytes(), providers=["CPUExecutionProvider"])

        def theirs(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run(["h"], {"images": images.numpy()})[0])

        differences.append(_compare(weights, theirs))

    checkpoint.write_atomic(path, save_checked)
    return Exported(path, differences[0], f'session = onnxruntime.InferenceSession("{path}")')


_ANY_BATCH = ({0: torch.export.Dim("N")},)


def _plain_name(weights: Weights, library: str) -> str:
    if (channels := weights.augmentation.channels) != 3:
        raise ValueError(
            f"{library}'s {weights.model} is for RGB; this encoder is for {channels} channels: use "
            "safetensors, torch-export or onnx"
        )
    if weights.width != 1 or weights.stem not in (None, "imagenet"):
        raise ValueError(
            f"{library} has {weights.model} only at width 1 with the ImageNet stem; this encoder "
            f"has width {weights.width:g} and stem {weights.stem}: use safetensors, torch-export "
            "or onnx"
        )
    return weights.model.removeprefix("timm:")


def _loaded(theirs: nn.Module, weights: Weights) -> nn.Module:
    checkpoint.load_strictly(theirs, weights.encoder.state_dict(), weights.path)
    return theirs.eval()


def _images(weights: Weights, count: int = 2) -> Tensor:
    channels, size = weights.augmentation.channels, weights.augmentation.size
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _compare(weights: Weights, theirs: Callable[[Tensor], Tensor]) -> float:
    """The largest difference of outputs, relative to the largest output.

    Raises:
        ValueError: it exceeds rounding.
    """
    # 3 images: the exporters traced a batch of 2.
    images = _images(weights, 3)
    h, other = weights.encoder(images), theirs(images)
    if other.shape != h.shape:
        raise ValueError(
            f"not exported: h has shape {list(other.shape)} there, {list(h.shape)} here"
        )
    difference = float((h - other).abs().max() / h.abs().max().clamp_min(1e-30))
    if not difference <= _TOLERANCE:
        raise ValueError(
            f"not exported: outputs differ by {difference:.1e} of the largest output, allowed is "
            f"{_TOLERANCE:.0e}"
        )
    return difference
