"""simclr-fast export."""

from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from simclr_fast.models.encoders import Stem
from simclr_fast.models.export import Format, export_encoder
from simclr_fast.models.weights import load_weights
from simclr_fast.utils.extras import require
from simclr_fast.utils.launch import require_one_process


@dataclass(frozen=True)
class Export:
    """Write an encoder in the format of another library, and print how to load it.

    It is written only if its outputs there are the same.
    """

    encoder: str
    """A file of weights (ours, torchvision's, timm's, lightly's, solo-learn's), or the folder of a
    run."""
    to: Path
    """The folder to write to."""
    format: Format
    """The format to write."""
    model: str | None = None
    """The encoder's model, if its file does not say: resnet50, ..."""
    width: float | None = None
    """The encoder's width, if its file does not say."""
    stem: Stem | None = None
    """The encoder's first layers, if its file does not say."""
    prefix: str | None = None
    """What stands before the names of the encoder's weights, if the file has several encoders."""
    image_size: int | None = None
    """Side of the images in pixels, for torch-export and onnx. By default that of the training."""
    push: str | None = None
    """For hub: upload the folder to this repository USER/NAME of the Hugging Face Hub. A new one is
    private. Without it nothing is uploaded."""


def run(arguments: list[str]) -> int:
    """Write an encoder in the format of another library, and print how to load it."""
    given = tyro.cli(Export, args=arguments, prog="simclr-fast export")
    require_one_process()
    if given.push is not None and given.format != "hub":
        raise ValueError(f"push is for format hub, got {given.format}")
    if given.push is not None:
        require(["huggingface_hub"])
    weights = load_weights(
        given.encoder,
        model=given.model,
        width=given.width,
        stem=given.stem,
        prefix=given.prefix,
    )
    if given.image_size:
        augmentation = replace(weights.augmentation, size=given.image_size)
        weights = replace(weights, augmentation=augmentation)
    exported = export_encoder(weights, given.to, given.format)
    print(f"encoder        {weights}")
    print(
        f"written        {exported.path}, outputs within {exported.difference:.0e} of the largest"
    )
    print(f"load it by     {exported.usage}")
    if given.push is not None:
        from simclr_fast.models.hub import push

        print(f"uploaded       {push(given.to, given.push)}")
    return 0
