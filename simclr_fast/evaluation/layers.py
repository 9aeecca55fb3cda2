"""The features after each layer: h, each layer of the projector, z. Which classify best?"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from simclr_fast.augment.params import Augmentation, augmentation_from
from simclr_fast.models.encoders import SimCLR, build_encoder, build_projector
from simclr_fast.utils.checkpoint import load_strictly, newest_good


def load_run(folder: Path) -> tuple[SimCLR, Augmentation]:
    """The model of a run's newest checkpoint, in eval mode, and the run's augmentation.

    folder: the output folder of the run.

    Raises:
        FileNotFoundError: the folder has no config.json, or no checkpoint. ValueError: the
            checkpoint is unreadable or does not fit.
    """
    described = folder / "config.json"
    if not described.is_file():
        raise FileNotFoundError(f"{folder} is not the output folder of a run: no config.json")
    path, state, bad = newest_good(folder / "checkpoints")
    if bad and path is None:
        raise ValueError(
            f"no usable checkpoint in {folder / 'checkpoints'}: {'; '.join(bad.values())}"
        )
    if path is None:
        raise FileNotFoundError(
            f"no checkpoint in {folder / 'checkpoints'}: the projector's weights are stored there"
        )
    config = json.loads(described.read_text())
    augmentation = augmentation_from(config["augmentation"])
    encoder, dim = build_encoder(
        config["model"],
        width=config["width"],
        image_size=augmentation.size,
        stem=config["stem"],
        channels=augmentation.channels,
    )
    # Older runs have no record of the last two.
    projector = build_projector(
        config["projector"],
        dim,
        config["projector_dim"],
        config["projector_depth"],
        hidden=config.get("projector_hidden"),
        batch_norm=config.get("projector_batch_norm", True),
    )
    model = SimCLR(encoder, projector)
    load_strictly(model, state["model"], path)
    return model.eval(), augmentation


def projector_layers(projector: nn.Module) -> list[nn.Sequential]:
    """Split the projector before each Linear; [] if it has no layers."""
    layers: list[list[nn.Module]] = []
    for module in projector if isinstance(projector, nn.Sequential) else []:
        if isinstance(module, nn.Linear) or not layers:
            layers.append([])
        layers[-1].append(module)
    return [nn.Sequential(*layer) for layer in layers]


class Taps(nn.Module):
    """images [N, 3, H, W] → h, every projector layer's output and z, concatenated: [N, ΣD]."""

    def __init__(self, model: SimCLR) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.layers = nn.ModuleList(projector_layers(model.projector))

    @property
    def names(self) -> list[str]:
        """The name of each output: h, projector layer 1, …, z."""
        inner = [f"projector layer {i}" for i in range(1, len(self.layers))]
        return ["h", *inner, *(["z"] if len(self.layers) else [])]

    def widths(self, total: int) -> list[int]:
        """The number of features of each output. total: their sum."""
        linears = [m for m in self.layers.modules() if isinstance(m, nn.Linear)]
        outputs = [linear.out_features for linear in linears]
        return [total - sum(outputs), *outputs]

    def forward(self, images: Tensor) -> Tensor:
        out = [self.encoder(images)]
        for layer in self.layers:
            out.append(layer(out[-1]))
        return torch.cat(out, 1)
