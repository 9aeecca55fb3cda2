"""simclr-fast export."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import get_args

from simclr_fast.models.encoders import Stem
from simclr_fast.models.export import FORMATS, export_encoder
from simclr_fast.models.weights import load_weights
from simclr_fast.utils.launch import require_one_process


def run(arguments: list[str]) -> int:
    """Write an encoder in another library's format, and say how it is loaded there."""
    parser = argparse.ArgumentParser(prog="simclr-fast export", allow_abbrev=False)
    parser.add_argument("--encoder", required=True, help="a checkpoint of any library, or a run")
    parser.add_argument("--to", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--model", help="what the encoder is, if its file does not tell")
    parser.add_argument("--width", type=float)
    parser.add_argument("--stem", choices=get_args(Stem))
    parser.add_argument("--image-size", type=int, help="of torch-export and onnx")
    given = parser.parse_args(arguments)
    require_one_process()
    weights = load_weights(given.encoder, model=given.model, width=given.width, stem=given.stem)
    if given.image_size:
        augmentation = replace(weights.augmentation, size=given.image_size)
        weights = replace(weights, augmentation=augmentation)
    exported = export_encoder(weights, given.to, given.format)
    print(f"encoder        {weights}")
    print(
        f"written        {exported.path}, outputs within {exported.difference:.0e} of the largest"
    )
    print(f"load it by     {exported.usage}")
    return 0
