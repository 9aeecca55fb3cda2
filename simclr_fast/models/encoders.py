"""Encoders (images → h, which evaluation uses) and projection heads (h → z, for the loss)."""

from collections import OrderedDict
from typing import Any, Literal

from torch import Tensor, nn

from simclr_fast.utils.extras import need
from simclr_fast.utils.numbers import as_int

# Name → kind of block and blocks per stage. resnet10 is for the demo data; the others are those of
# He et al. 2015.
RESNETS = {
    "resnet10": ("BasicBlock", (1, 1, 1, 1)),
    "resnet18": ("BasicBlock", (2, 2, 2, 2)),
    "resnet34": ("BasicBlock", (3, 4, 6, 3)),
    "resnet50": ("Bottleneck", (3, 4, 6, 3)),
    "resnet101": ("Bottleneck", (3, 4, 23, 3)),
    "resnet152": ("Bottleneck", (3, 8, 36, 3)),
}
Stem = Literal["imagenet", "cifar", "cifar-stride2", "cifar-pad2", "cifar-no-relu"]


class ResNet(nn.Module):
    """torchvision's ResNet at any width, with torchvision's parameter names and no classifier.

    images: [N, 3, H, W] → h: [N, feature_dim].
    width: multiplies the channels of every layer, the stem included, as in the SimCLR paper.
        (torchvision's wide_resnet widens only the inner layers of its blocks.)
    stem: "imagenet": 7×7 convolution with stride 2, then max-pooling. "cifar": 3×3 convolution
        without pooling (arXiv:2002.05709, B.9). "cifar-stride2": the same with stride 2. Two more
        are for imported weights. "cifar-pad2": "cifar" padded by 2, as solo-learn has it.
        "cifar-no-relu": "cifar" without the ReLU, as lightly's ResNetGenerator has it in a
        Sequential.
    zero_gamma: start with γ = 0 in the last batch norm of every block, so that each block is the
        identity at first (arXiv:1706.02677, 5.1).
    channels: of the images.
    """

    def __init__(
        self,
        name: str,
        width: float = 1,
        stem: Stem = "imagenet",
        zero_gamma: bool = False,
        channels: int = 3,
    ) -> None:
        super().__init__()
        resnet = need("torchvision").models.resnet
        kind, blocks = RESNETS[name]
        block = getattr(resnet, kind)
        widths = [round(64 * width * 2**stage) for stage in range(4)]
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(channels, widths[0], 7, stride=2, padding=3, bias=False)
            maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            stride = 2 if stem == "cifar-stride2" else 1
            padding = 2 if stem == "cifar-pad2" else 1
            self.conv1 = nn.Conv2d(
                channels, widths[0], 3, stride=stride, padding=padding, bias=False
            )
            maxpool = nn.Identity()
        # Registered in the order of use: torchvision's IntermediateLayerGetter runs them in it.
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.Identity() if stem == "cifar-no-relu" else nn.ReLU(inplace=True)
        self.maxpool = maxpool
        inputs = widths[0]
        for stage, (planes, count) in enumerate(zip(widths, blocks, strict=True)):
            layers = []
            for i in range(count):
                stride = 2 if stage and not i else 1
                outputs = planes * block.expansion
                downsample = None
                if stride != 1 or inputs != outputs:
                    downsample = _downsample(inputs, outputs, stride)
                layers.append(block(inputs, planes, stride, downsample))
                inputs = outputs
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.feature_dim = inputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if zero_gamma and isinstance(module, block):
                nn.init.zeros_(getattr(module, "bn3" if kind == "Bottleneck" else "bn2").weight)

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for stage in range(4):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.avgpool(x).flatten(1)


def _downsample(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """The shortcut of a block that changes the size: torchvision's, with its parameter names."""
    parts: list[tuple[str, nn.Module]] = []
    if inputs < 16 and stride != 1:
        # oneDNN 3.12's gradient for the weights of a strided 1×1 convolution of fewer than 16
        # channels (8 with AVX2) in channels_last writes outside its memory: wrong gradients or a
        # crash (uxlfoundation/oneDNN issue 6035). The same pixels are taken before it instead.
        parts.append(("subsample", nn.AvgPool2d(1, stride)))
        stride = 1
    convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
    parts += [("0", convolution), ("1", nn.BatchNorm2d(outputs))]
    return nn.Sequential(OrderedDict(parts))


def build_encoder(
    name: str,
    *,
    width: float = 1,
    image_size: int = 224,
    stem: Stem | None = None,
    zero_gamma: bool = False,
    channels: int = 3,
) -> tuple[nn.Module, int]:
    """An untrained encoder and its feature dimension.

    name: resnet10/18/34/50/101/152 (with any `width`), a classification model of torchvision, or a
        model of timm ("timm:NAME", or a name that torchvision does not have). The classifier is
        removed.
    stem: the first layers of a ResNet; by default "cifar" up to 64 pixels, else "imagenet".
    zero_gamma: for ResNets; see `ResNet`.
    channels: of the images. A model of torchvision gets a new first convolution for it, with He's
        initialisation.

    Raises:
        ValueError: the name is unknown, or the model has no width or zero_gamma. ImportError:
            torchvision is not installed.
    """
    if width <= 0:
        raise ValueError(f"width must be positive, got {width}")
    if name in RESNETS:
        stem = stem or default_stem(image_size)
        resnet = ResNet(name, width, stem, zero_gamma, as_int("channels", channels, 1))
        return resnet, resnet.feature_dim
    if zero_gamma:
        raise ValueError(f"zero_gamma is for {', '.join(RESNETS)}, got model {name!r}")
    if width != 1:
        raise ValueError(
            f"width must be 1 for {name}, got {width}; only {', '.join(RESNETS)} have a width"
        )
    models = need("torchvision").models
    if not name.startswith("timm:") and name in models.list_models(module=models):
        model = models.get_model(name, weights=None)
        if channels != 3:
            _replace_first_convolution(model, name, as_int("channels", channels, 1))
        return cut_classifier(model, name)
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f"torchvision has no model {name!r}; for models of timm: pip install timm"
        ) from error
    bare = name.removeprefix("timm:")
    if not timm.is_model(bare):
        raise ValueError(f"neither torchvision nor timm has a model {bare!r}")
    inputs: dict[str, Any] = {} if channels == 3 else {"in_chans": as_int("channels", channels, 1)}
    encoder: Any = timm.create_model(bare, num_classes=0, **inputs)
    # Some models, such as MobileNetV3, widen the pooled features: head_hidden_size is their number.
    dim: int = getattr(encoder, "head_hidden_size", None) or encoder.num_features
    return encoder, dim


def _replace_first_convolution(model: nn.Module, name: str, channels: int) -> None:
    """Put a convolution of `channels` inputs in the place of the first one, which has three."""
    convolutions = ((path, m) for path, m in model.named_modules() if isinstance(m, nn.Conv2d))
    path, old = next(convolutions, ("", None))
    if old is None or old.in_channels != 3 or old.groups != 1:
        raise ValueError(
            f"{name} does not begin with a convolution of RGB: channels must be 3, got {channels}"
        )
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    model.set_submodule(path, new)


def default_stem(image_size: int) -> Stem:
    """The first layers of a ResNet for images of this size in pixels."""
    return "cifar" if image_size <= 64 else "imagenet"


def cut_classifier(model: nn.Module, name: str) -> tuple[nn.Module, int]:
    """Replace the last Linear of the head by Identity; also return the number of features."""
    for attribute in ("fc", "classifier", "heads", "head"):
        head = getattr(model, attribute, None)
        if isinstance(head, nn.Linear):
            setattr(model, attribute, nn.Identity())
            return model, head.in_features
        if isinstance(head, nn.Sequential):
            for key, layer in reversed(list(head.named_children())):
                if isinstance(layer, nn.Linear):
                    setattr(head, key, nn.Identity())
                    return model, layer.in_features
    raise ValueError(f"{name} has no linear classifier that can be removed: choose another model")


def build_projector(
    kind: Literal["nonlinear", "linear", "none"],
    in_dim: int,
    out_dim: int = 128,
    depth: int = 2,
    *,
    hidden: int | None = None,
    batch_norm: bool = True,
) -> nn.Module:
    """The head between encoder and loss: h [N, in_dim] → z. Evaluation does not use it.

    kind: "nonlinear": depth - 1 times (linear, batch norm, ReLU), then linear and batch norm
        without shift. "linear": only the last linear and batch norm. "none": z = h.
    depth: the number of linear layers: 2 in SimCLR, 3 in SimCLR v2.
    hidden: the width of the layers before the last; by default in_dim.
    batch_norm: False leaves the batch norms out and gives the linear layers a bias, as solo-learn's
        projector has it.

    Source: google-research/simclr, model_util.py; solo-learn, solo/methods/simclr.py.
    """
    if kind not in ("nonlinear", "linear", "none"):
        raise ValueError(f"kind must be 'nonlinear', 'linear' or 'none', got {kind!r}")
    for name, value in (("depth", depth), ("hidden", hidden)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if kind == "none":
        return nn.Identity()
    layers: list[nn.Module] = []
    width = hidden or in_dim
    for _ in range(depth - 1 if kind == "nonlinear" else 0):
        layers.append(nn.Linear(in_dim, width, bias=not batch_norm))
        layers += [nn.BatchNorm1d(width), nn.ReLU()] if batch_norm else [nn.ReLU()]
        in_dim = width
    layers.append(nn.Linear(in_dim, out_dim, bias=not batch_norm))
    if batch_norm:
        last = nn.BatchNorm1d(out_dim)
        last.bias.requires_grad_(False)
        layers.append(last)
    return nn.Sequential(*layers)


class SimCLR(nn.Module):
    """Encoder, then projector: images [N, 3, H, W] → (h [N, feature_dim], z [N, out_dim])."""

    def __init__(self, encoder: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projector = encoder, projector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encoder(images)
        return h, self.projector(h)
