"""Where along encoder and projector the features are best: h, each projector layer, z."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from simclr_fast.augment.params import Augmentation, augmentation_from
from simclr_fast.models.encoders import SimCLR, build_encoder, build_projector
from simclr_fast.utils.checkpoint import checkpoints, load_checkpoint, load_strictly


def load_run(folder: Path) -> tuple[SimCLR, Augmentation]:
    """Encoder and projector of a run's newest checkpoint, in eval mode, and its augmentation.

    Raises:
        FileNotFoundError: no run's config.json or checkpoint there. ValueError: a bad checkpoint.
    """
    described = folder / "config.json"
    if not described.is_file():
        raise FileNotFoundError(f"{folder} is not the output folder of a run: no config.json")
    saved = checkpoints(folder / "checkpoints")
    if not saved:
        raise FileNotFoundError(f"no checkpoint in {folder / 'checkpoints'}: it has the projector")
    config = json.loads(described.read_text())
    augmentation = augmentation_from(config["augmentation"])
    encoder, dim = build_encoder(
        config["model"], width=config["width"], image_size=augmentation.size, stem=config["stem"]
    )
    projector = build_projector(
        config["projector"], dim, config["projector_dim"], config["projector_depth"]
    )
    model = SimCLR(encoder, projector)
    load_strictly(model, load_checkpoint(saved[-1])["model"], saved[-1])
    return model.eval(), augmentation


def projector_layers(projector: nn.Module) -> list[nn.Sequential]:
    """The projector cut before each Linear: what is between two is one layer. [] for none."""
    layers: list[list[nn.Module]] = []
    for module in projector if isinstance(projector, nn.Sequential) else []:
        if isinstance(module, nn.Linear) or not layers:
            layers.append([])
        layers[-1].append(module)
    return [nn.Sequential(*layer) for layer in layers]


class Taps(nn.Module):
    """images [N, 3, H, W] → h, every projector layer's output and z beside each other [N, ΣD]."""

    def __init__(self, model: SimCLR) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.layers = nn.ModuleList(projector_layers(model.projector))

    @property
    def names(self) -> list[str]:
        """Of the outputs: h, layer 1, …, z."""
        inner = [f"projector layer {i}" for i in range(1, len(self.layers))]
        return ["h", *inner, *(["z"] if len(self.layers) else [])]

    def widths(self, total: int) -> list[int]:
        """D of every output, `total` being their sum."""
        linears = [m for m in self.layers.modules() if isinstance(m, nn.Linear)]
        outputs = [linear.out_features for linear in linears]
        return [total - sum(outputs), *outputs]

    def forward(self, images: Tensor) -> Tensor:
        out = [self.encoder(images)]
        for layer in self.layers:
            out.append(layer(out[-1]))
        return torch.cat(out, 1)
