"""Encoders on the Hugging Face Hub. Needs huggingface_hub."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from simclr_fast.models.export import export_encoder
from simclr_fast.models.weights import Weights, load_weights
from simclr_fast.utils.extras import need

_hub = need("huggingface_hub")
_FILE = "model.safetensors"


class HubEncoder(nn.Module, _hub.PyTorchModelHubMixin):  # type: ignore[misc, name-defined]
    """An encoder with `from_pretrained`, `save_pretrained` and `push_to_hub` of huggingface_hub.

    HubEncoder.from_pretrained("USER/NAME") reads what `simclr-fast export --format hub` wrote, from
    a folder or from the hub. No code in the files is run. `push_to_hub` uploads.

    encoder: images [N, C, H, W] → h [N, D]. weights: what `load_weights` found of it; `of` takes
    both from there.
    """

    def __init__(self, encoder: nn.Module, weights: Weights) -> None:
        super().__init__()
        self.encoder = encoder
        self._weights = weights
        self.train(encoder.training)

    @classmethod
    def of(cls, weights: Weights) -> "HubEncoder":
        """The encoder of `load_weights`, to save or to upload."""
        return cls(weights.encoder, weights)

    @property
    def weights(self) -> Weights:
        """What `load_weights` found: augmentation, feature_dim and so on."""
        return self._weights

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.encoder(images)
        return features

    def _save_pretrained(self, save_directory: Path) -> None:
        export_encoder(self._weights, save_directory, "hub")

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, map_location: str = "cpu", strict: bool = True, **options: Any
    ) -> "HubEncoder":
        folder = Path(model_id)
        if folder.is_dir():
            path = folder / _FILE
        else:
            names = ("revision", "cache_dir", "force_download", "token", "local_files_only")
            given = {name: options[name] for name in names if name in options}
            path = Path(_hub.hf_hub_download(repo_id=model_id, filename=_FILE, **given))
        weights = load_weights(path)
        weights.encoder.to(map_location)
        return cls.of(weights)


def push(folder: Path, name: str) -> str:
    """Upload what `export --format hub` wrote to the repository USER/NAME; return its address.

    A repository that does not exist is made, and is private.
    """
    api = _hub.HfApi()
    address = api.create_repo(name, private=True, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=folder, commit_message="Add a SimCLR encoder")
    return str(address)
