"""Exported encoders load strictly where they are meant to go, and compute the same there."""

from dataclasses import replace
from functools import cache

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone

from simclr_fast.augment.params import Augmentation
from simclr_fast.commands.cli import run
from simclr_fast.models import export
from simclr_fast.models.encoders import build_encoder
from simclr_fast.models.export import FORMATS, export_encoder
from simclr_fast.models.weights import about_encoder, load_weights
from simclr_fast.utils.checkpoint import save_encoder

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def pretrained(folder, model, width=1.0, stem=None, size=64):
    """A run's encoder.safetensors, of weights that no initialisation gives."""
    torch.manual_seed(0)
    encoder, _ = build_encoder(model, width=width, stem=stem)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -0.5, 1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    augmentation = Augmentation(size=size, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    about = about_encoder(model, width, stem, augmentation)
    save_encoder(folder / "encoder.safetensors", encoder, about)
    return load_weights(folder)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    return pretrained(tmp_path_factory.mktemp("narrow"), "resnet10", 0.125, "imagenet")


@pytest.fixture(scope="module")
def torchvision_export(tmp_path_factory):
    """Name → a model's weights and their export to torchvision, made once."""

    @cache
    def made(name):
        folder = tmp_path_factory.mktemp(name)
        weights = pretrained(folder, name, stem="imagenet" if "resnet" in name else None)
        return weights, export_encoder(weights, folder / "tv", "torchvision")

    return made


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        pytest.param("resnet34", marks=pytest.mark.slow),
        "resnet50",
        pytest.param("resnet101", marks=pytest.mark.slow),
        pytest.param("resnet152", marks=pytest.mark.slow),
        "mobilenet_v3_small",
    ],
)
@torch.no_grad()
def test_exports_to_torchvision_and_timm_compute_the_same(name, tmp_path, torchvision_export):
    weights, exported = torchvision_export(name)
    h = weights.encoder(IMAGES)
    theirs = torchvision.models.get_model(name, weights=None)
    if name == "mobilenet_v3_small":
        theirs.classifier[3] = nn.Identity()
        assert "model.classifier[3] = " in exported.usage
        with pytest.raises(ValueError, match="timm has no model"):
            export_encoder(weights, tmp_path / "timm", "timm")
    else:
        theirs.fc = nn.Identity()
        assert "model.fc = " in exported.usage
    theirs.load_state_dict(torch.load(exported.path, weights_only=True), strict=True)
    assert torch.equal(theirs.eval()(IMAGES), h)
    if name != "mobilenet_v3_small":
        timm = pytest.importorskip("timm")
        export_encoder(weights, tmp_path / "timm", "timm")
        theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
        assert torch.allclose(theirs(IMAGES), h, rtol=1e-5, atol=1e-6)
        assert theirs.pretrained_cfg["mean"] == [0.5, 0.4, 0.3]
        assert theirs.pretrained_cfg["input_size"] == [3, 64, 64]


@torch.no_grad()
def test_encoders_of_any_width_are_exported(narrow, tmp_path):
    h = narrow.encoder(IMAGES)
    again = load_weights(export_encoder(narrow, tmp_path, "safetensors").path)
    assert torch.equal(again.encoder(IMAGES), h)
    assert again.augmentation == narrow.augmentation
    program = torch.export.load(export_encoder(narrow, tmp_path, "torch-export").path)
    for images in (IMAGES, IMAGES[:1], IMAGES.repeat(3, 1, 1, 1)):
        assert torch.allclose(program.module()(images), narrow.encoder(images), rtol=1e-5)


@torch.no_grad()
def test_onnx_computes_the_same(narrow, tmp_path):
    for module in ("onnx", "onnxscript"):
        pytest.importorskip(module)
    runtime = pytest.importorskip("onnxruntime")
    exported = export_encoder(narrow, tmp_path, "onnx")
    session = runtime.InferenceSession(exported.path)
    for images in (IMAGES, IMAGES[:1]):
        (h,) = session.run(None, {"images": images.numpy()})
        assert torch.allclose(torch.from_numpy(h), narrow.encoder(images), rtol=1e-4, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["encoder.onnx"]


def test_a_missing_library_is_named(narrow, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"onnxscript .* missing: pip install onnxscript$"):
        export_encoder(narrow, tmp_path / "none", "onnx")
    assert not (tmp_path / "none").exists()


def test_nothing_is_written_that_computes_something_else(narrow, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_loaded", lambda theirs, weights: theirs.eval())
    with pytest.raises(ValueError, match="outputs differ by"):
        export_encoder(narrow, tmp_path / "none", "safetensors")
    assert not (tmp_path / "none").exists()


def test_encoders_that_the_library_lacks_are_refused(narrow, tmp_path):
    for form in ("torchvision", "timm"):
        with pytest.raises(ValueError, match=r"width 0\.125"):
            export_encoder(narrow, tmp_path, form)
        with pytest.raises(ValueError, match="has no model 'resnet10'"):
            export_encoder(replace(narrow, width=1), tmp_path, form)
        with pytest.raises(ValueError, match="stem cifar"):
            export_encoder(replace(narrow, width=1, stem="cifar"), tmp_path, form)
    with pytest.raises(ValueError, match="format must be one of"):
        export_encoder(narrow, tmp_path, "torchscript")


def test_faster_rcnn_loads_the_export(torchvision_export):
    weights, exported = torchvision_export("resnet18")
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    backbone.body.load_state_dict(torch.load(exported.path, weights_only=True), strict=True)
    with torch.no_grad():
        top = backbone.body(IMAGES)["3"].mean(dim=(2, 3))
        assert torch.allclose(top, weights.encoder(IMAGES), rtol=1e-4, atol=1e-5)
    detects(backbone)


def detects(backbone):
    detector = FasterRCNN(backbone, num_classes=3, min_size=64, max_size=64)
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]), "labels": torch.tensor([1])}
    losses = detector(list(IMAGES), [target, target])
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert backbone.body.layer4[0].conv1.weight.grad.abs().sum() > 0
    found = detector.eval()(list(IMAGES))
    assert len(found) == 2
    assert all(f["boxes"].shape == (len(f["scores"]), 4) for f in found)


def test_faster_rcnn_loads_an_encoder_of_any_width(narrow):
    encoder = load_weights(narrow.path).encoder
    with torch.no_grad():
        h = encoder(IMAGES)
    names = {f"layer{stage + 1}": str(stage) for stage in range(4)}
    backbone = BackboneWithFPN(encoder, names, [8, 16, 32, 64], out_channels=32)
    with torch.no_grad():
        assert torch.equal(encoder.avgpool(backbone.body(IMAGES)["3"]).flatten(1), h)
    detects(backbone)


def test_deeplab_loads_the_export(torchvision_export):
    _, exported = torchvision_export("resnet50")
    segmenter = torchvision.models.segmentation.deeplabv3_resnet50(
        weights=None, weights_backbone=None, num_classes=3
    )
    state = torch.load(exported.path, weights_only=True)
    segmenter.backbone.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert segmenter.eval()(IMAGES)["out"].shape == (2, 3, 64, 64)


@pytest.mark.parametrize("form", ["safetensors", "torch-export"])
def test_the_export_command_writes_each_format(narrow, form, tmp_path, capsys):
    to = tmp_path / form
    assert form in FORMATS
    options = ["--encoder", str(narrow.path), "--to", str(to), "--image-size", "32"]
    assert run(["export", *options, "--format", form]) == 0
    printed = capsys.readouterr().out
    assert "resnet10 ×0.125, stem imagenet from simclr_fast keys" in printed
    (written,) = to.iterdir()
    assert str(written) in printed


def test_errors_of_the_export_command_are_one_line(narrow, tmp_path, capsys):
    options = ["--encoder", str(narrow.path), "--to", str(tmp_path), "--format", "torchvision"]
    assert run(["export", *options, "--model", "resnet18"]) == 1
    errors = capsys.readouterr().err
    assert "encoder.safetensors does not fit" in errors
    assert "missing layer1.1.conv1.weight" in errors
    assert "Traceback" not in errors
