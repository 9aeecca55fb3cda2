"""Checkpoints of every library give the outputs that they gave there; bad ones change nothing."""

import argparse

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from simclr_fast.augment.params import Augmentation
from simclr_fast.models.encoders import build_encoder
from simclr_fast.models.weights import IMAGENET_MEAN, _resnet_of, load_weights
from simclr_fast.training.config import PretrainConfig
from simclr_fast.training.setup import build_model, describe
from simclr_fast.utils.checkpoint import load_strictly, save_checkpoint, save_encoder


def lived_in(model):
    """`model` with batch statistics unlike those of a new one, in eval mode."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1, 1)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def same(loaded, model, size=40):
    images = torch.rand(2, 3, size, size)
    assert not loaded.encoder.training
    with torch.no_grad():
        expected = model(images).flatten(1)
        assert torch.allclose(loaded.encoder(images), expected, rtol=1e-5)
    assert loaded.feature_dim == expected.shape[1]


@pytest.fixture(scope="module")
def resnet18():
    return lived_in(torchvision.models.resnet18(num_classes=7))


def headless(resnet):
    return nn.Sequential(*list(resnet.children())[:-1])


def prefixed(module, prefix):
    return {prefix + key: tensor for key, tensor in module.state_dict().items()}


def test_weights_of_torchvision_and_timm_resnets(resnet18, tmp_path):
    # As torchvision's own files: with the classifier, without counts of batches.
    state = {k: v for k, v in resnet18.state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "r18.pth")
    loaded = load_weights(tmp_path / "r18.pth")
    same(loaded, headless(resnet18))
    assert (loaded.model, loaded.width, loaded.stem) == ("resnet18", 1, "imagenet")
    assert loaded.layout == "torchvision and timm"
    assert loaded.unused == ("fc.bias", "fc.weight")
    assert loaded.augmentation.mean == IMAGENET_MEAN
    timm = pytest.importorskip("timm")
    theirs = lived_in(timm.create_model("resnet18", num_classes=5))
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    theirs.reset_classifier(0)
    same(load_weights(tmp_path / "model.safetensors"), theirs)


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "resnet101", "resnet152"])
def test_the_architecture_is_found_from_shapes(name):
    with torch.device("meta"):
        state = torchvision.models.get_model(name).state_dict()
    assert _resnet_of(state, "torchvision", None) == {
        "model": name,
        "width": "1.0",
        "stem": "imagenet",
        "channels": "3",
    }


def test_checkpoints_of_unsupported_models_are_named(tmp_path):
    theirs = lived_in(torchvision.models.mobilenet_v3_small())
    torch.save({"model": theirs.state_dict()}, tmp_path / "m.pth")
    with pytest.raises(
        ValueError, match=r"m\.pth does not hold a plain ResNet .*features\.0\.0\.weight"
    ):
        load_weights(tmp_path / "m.pth")
    theirs.classifier[-1] = nn.Identity()
    loaded = load_weights(tmp_path / "m.pth", model="mobilenet_v3_small")
    same(loaded, theirs)
    assert loaded.layout == "torchvision"
    assert loaded.unused == ("classifier.3.bias", "classifier.3.weight")
    with torch.device("meta"):
        wide = torchvision.models.wide_resnet50_2().state_dict()
    assert _resnet_of(wide, "torchvision", None) == {}


def test_weights_of_a_timm_model(tmp_path):
    timm = pytest.importorskip("timm")
    theirs = lived_in(timm.create_model("test_vit", num_classes=3))
    torch.save({"state_dict": prefixed(theirs, "module.")}, tmp_path / "vit.pth")
    loaded = load_weights(tmp_path / "vit.pth", model="timm:test_vit")
    theirs.reset_classifier(0)
    same(loaded, theirs, size=160)
    assert loaded.layout == "timm"
    assert loaded.augmentation.mean == tuple(theirs.pretrained_cfg["mean"])


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_weights_of_lightly_with_torchvisions_resnet(resnet18, prefix, tmp_path):
    heads = pytest.importorskip("lightly.models.modules.heads")
    head = heads.SimCLRProjectionHead(512, 512, 128)
    state = prefixed(headless(resnet18), f"{prefix}backbone.") | prefixed(
        head, f"{prefix}projection_head."
    )
    lightning = {"epoch": 3, "state_dict": state, "hyper_parameters": {"lr": 0.1}}
    torch.save(lightning, tmp_path / "last.ckpt")
    loaded = load_weights(tmp_path / "last.ckpt")
    same(loaded, headless(resnet18))
    assert loaded.layout == "lightly"
    assert {key.partition(".")[0] for key in loaded.unused} == {"projection_head"}
    torch.save(prefixed(resnet18, f"{prefix}backbone."), tmp_path / "named.ckpt")
    same(load_weights(tmp_path / "named.ckpt"), headless(resnet18))


def test_weights_of_lightlys_own_resnet(tmp_path):
    models = pytest.importorskip("lightly.models")
    theirs = lived_in(models.ResNetGenerator("resnet-18", width=0.25))
    backbone = nn.Sequential(*list(theirs.children())[:-1], nn.AdaptiveAvgPool2d(1)).eval()
    torch.save(prefixed(backbone, "backbone."), tmp_path / "sequential.ckpt")
    loaded = load_weights(tmp_path / "sequential.ckpt")
    same(loaded, backbone)
    assert (loaded.width, loaded.stem) == (0.25, "cifar-no-relu")
    torch.save(theirs.state_dict(), tmp_path / "whole.pth")
    theirs.linear = nn.Identity()
    loaded = load_weights(tmp_path / "whole.pth")
    same(loaded, theirs, size=32)
    assert (loaded.layout, loaded.stem) == ("lightly", "cifar")


@pytest.mark.parametrize("prefix", ["backbone.", "encoder."])
def test_weights_of_solo_learn(prefix, tmp_path):
    backbone = torchvision.models.resnet18()
    backbone.fc = nn.Identity()
    # solo/methods/base.py for CIFAR: padded by 2.
    backbone.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=2, bias=False)
    backbone.maxpool = nn.Identity()
    lived_in(backbone)
    state = prefixed(backbone, prefix)
    for name in ("projector.0", "classifier"):
        state |= prefixed(nn.Linear(512, 10), f"{name}.")
    torch.save({"state_dict": state, "pytorch-lightning_version": "1.6"}, tmp_path / "s.ckpt")
    loaded = load_weights(tmp_path / "s.ckpt")
    same(loaded, backbone, size=32)
    assert (loaded.layout, loaded.stem) == ("solo-learn", "cifar-pad2")
    assert "classifier, projector" in str(loaded) or "projector, classifier" in str(loaded)
    assert load_weights(tmp_path / "s.ckpt", stem="cifar").stem == "cifar"


@pytest.mark.parametrize("stem", [None, "cifar-stride2"])
def test_weights_of_our_own_runs(stem, tmp_path):
    augmentation = Augmentation(size=32, mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
    config = PretrainConfig(model="resnet10", width=0.125, stem=stem, augmentation=augmentation)
    model = lived_in(build_model(config))
    save_encoder(tmp_path / "encoder.safetensors", model.encoder, describe(config))
    state = {"step": 3, "model": model.state_dict(), "encoder": describe(config)}
    for path in (tmp_path, save_checkpoint(tmp_path / "checkpoints", 3, state)):
        loaded = load_weights(path)
        same(loaded, model.encoder, size=32)
        assert (loaded.model, loaded.width, loaded.stem) == ("resnet10", 0.125, stem or "cifar")
        assert loaded.layout == "simclr_fast"
        assert loaded.augmentation == augmentation
        load_strictly(loaded.build(), loaded.encoder.state_dict(), tmp_path)
        save_encoder(tmp_path / "again.safetensors", loaded.encoder, loaded.about())
        same(load_weights(tmp_path / "again.safetensors"), model.encoder)


def optimizer_state():
    model = nn.Linear(3, 3)
    made = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    made.step()
    return made.state_dict()


def in_moco(state):
    key = {f"module.encoder_k.{k}": torch.zeros_like(v) for k, v in state.items()}
    query = {f"module.encoder_q.{k}": v for k, v in state.items()}
    head = {"module.encoder_q.fc.0.weight": torch.ones(3, 3), "module.queue": torch.ones(4, 4)}
    return {"epoch": 1, "state_dict": key | query | head, "optimizer": optimizer_state()}


def in_vissl(state):
    trunk = {f"_feature_blocks.{k}": v for k, v in state.items()}
    model = {"trunk": trunk, "heads": {"0.clf.weight": torch.ones(5, 5)}}
    return {"classy_state_dict": {"base_model": {"model": model}, "optimizer": optimizer_state()}}


def in_dino(state):
    student = {f"module.backbone.{k}": torch.zeros_like(v) for k, v in state.items()}
    teacher = {f"backbone.{k}": v for k, v in state.items()}
    return {"student": student, "teacher": teacher, "optimizer": optimizer_state(), "epoch": 3}


# Name → the file's content from an encoder's state, the prefix that is found, the library.
OTHERS = {
    "MoCo": (in_moco, "encoder_q.", "other"),
    "MoCo v3": (
        lambda s: {"state_dict": {f"module.base_encoder.{k}": v for k, v in s.items()}},
        "base_encoder.",
        "other",
    ),
    "Lightning": (
        lambda s: {"state_dict": {f"model.backbone.{k}": v for k, v in s.items()}, "loops": {}},
        "model.backbone.",
        "other",
    ),
    "Lightning, a model": (
        lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}},
        "model.",
        "other",
    ),
    "teacher and student": (in_dino, "teacher.backbone.", "other"),
    "VISSL": (in_vissl, "trunk._feature_blocks.", "VISSL"),
    "mmselfsup": (
        lambda s: {
            "meta": {"mmcls": "1"},
            "state_dict": {f"backbone.{k}": v for k, v in s.items()}
            | {"neck.fc0.weight": torch.ones(3, 3)},
        },
        "backbone.",
        "mmselfsup",
    ),
    "BYOL": (
        lambda s: (
            {f"target_encoder.{k}": torch.zeros_like(v) for k, v in s.items()}
            | {f"online_encoder.{k}": v for k, v in s.items()}
        ),
        "online_encoder.",
        "other",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_weights_under_any_prefix(name, resnet18, tmp_path):
    make, prefix, layout = OTHERS[name]
    state = {k: v for k, v in resnet18.state_dict().items() if not k.startswith("fc.")}
    torch.save(make(state), tmp_path / "w.pth")
    loaded = load_weights(tmp_path / "w.pth")
    same(loaded, headless(resnet18))
    assert (loaded.prefix, loaded.layout, loaded.model) == (prefix, layout, "resnet18")
    assert repr(prefix) in str(loaded)
    assert "minus (0.485, 0.456, 0.406), divided by (0.229, 0.224, 0.225)" in str(loaded)
    # Named outright, a model that is no ResNet of ours is found in the same way.
    torch.save(make(resnet18.state_dict()), tmp_path / "named.pth")
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("resnet18", num_classes=0).eval()
    theirs.load_state_dict(state)
    same(load_weights(tmp_path / "named.pth", model="timm:resnet18"), theirs)


def test_another_encoder_of_the_file(resnet18, tmp_path):
    state = {k: v for k, v in resnet18.state_dict().items() if not k.startswith("fc.")}
    swapped = {
        k.replace("encoder_k", "x").replace("encoder_q", "encoder_k").replace("x", "encoder_q"): v
        for k, v in in_moco(state)["state_dict"].items()
    }
    torch.save(swapped, tmp_path / "w.pth")
    taken = load_weights(tmp_path / "w.pth")
    assert not taken.encoder.conv1.weight.any()
    assert taken.others == ("encoder_k.",)
    assert "also there: encoder_k. (--prefix)" in str(taken)
    same(load_weights(tmp_path / "w.pth", prefix="encoder_k."), headless(resnet18))
    with pytest.raises(ValueError, match=r"prefix 'x\.'; found: 'encoder_q\.', 'encoder_k\.'"):
        load_weights(tmp_path / "w.pth", prefix="x.")


BAD = {
    "missing": (lambda s: s.pop("1.running_var"), r"missing 1\.running_var"),
    "unexpected": (lambda s: s.update(extra=torch.ones(1)), "unexpected extra"),
    "shape": (lambda s: s.update({"0.weight": torch.ones(4, 3)}), r"0\.weight is \[4, 3\], must"),
    "NaN": (lambda s: s["1.bias"].fill_(torch.nan), r"1\.bias has 4 of 4 values .* not finite"),
    "infinity": (lambda s: s["1.running_var"][:1].fill_(torch.inf), r"1\.running_var has 1 of 4"),
    "kind": (lambda s: s.update({"1.bias": torch.ones(4, dtype=torch.int8)}), r"1\.bias is .*int8"),
    "no tensor": (lambda s: s.update({"1.bias": 3.0}), r"1\.bias is a float"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_named_and_nothing_loaded(name, tmp_path):
    damage, says = BAD[name]
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    state = {
        key: torch.ones_like(tensor) if tensor.is_floating_point() else tensor
        for key, tensor in before.items()
    }
    damage(state)
    path = tmp_path / "some.pt"
    with pytest.raises(ValueError, match=f"some.pt does not fit this model: {says}"):
        load_strictly(module, state, path)
    assert all(torch.equal(before[key], tensor) for key, tensor in module.state_dict().items())


def test_unreadable_files_are_named(resnet18, tmp_path):
    path = tmp_path / "bad.pth"

    def fails(content, says, **options):
        torch.save(content, path)
        with pytest.raises(ValueError, match=rf"bad\.pth.*{says}"):
            load_weights(path, **options)

    state = resnet18.state_dict()
    fails({k: v for k, v in state.items() if "layer2.0.bn2" not in k}, r"missing layer2\.0\.bn2")
    fails(state | {"layer1.0.bn1.weight": torch.full([64], torch.nan)}, r"layer1\.0\.bn1\.weight")
    fails(state, r"missing .*layer1\.2\.conv1", model="resnet34")
    fails(state | {"layer9.weight": torch.ones(1)}, r"unexpected layer9\.weight")
    fails({"state_dict": state, "args": argparse.Namespace()}, "argparse.Namespace")
    fails({"epoch": 3}, "no weights; its keys are epoch")
    fails([torch.ones(3)], "holds a list")
    fails({k.replace("conv", "cnv"): v for k, v in state.items()}, "not hold a plain ResNet")
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"not a readable checkpoint: .*bad\.pth"):
        load_weights(path)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_weights(tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError, match=r"encoder\.safetensors"):
        load_weights(tmp_path)


def pictures(count=32, side=40):
    """Smooth colours of the mean and deviation of photographs, clipped to [0, 1]: [N, 3, H, W]."""
    noise = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    noise += noise.mean(1, keepdim=True) * 3
    rows = torch.fft.fftfreq(side).square()
    far = (rows[:, None] + rows + 1 / side**2).rsqrt()
    smooth = torch.fft.ifft2(torch.fft.fft2(noise) * far).real
    return (0.45 + 0.25 * smooth / smooth.std()).clamp(0, 1)


@pytest.mark.parametrize(
    ("width", "mean", "std", "found"),
    [
        (2, 0.0, 1.0, None),
        (1, 0.0, 1.0, None),
        (1, 0.45, 0.225, IMAGENET_MEAN),
        (1, 0.5, 0.5, IMAGENET_MEAN),
        (1, 0.0, 1 / 255, IMAGENET_MEAN),
    ],
)
def test_the_first_batch_norm_shows_pixels_in_0_1(tmp_path, width, mean, std, found):
    """As in conversions of google-research/simclr: torchvision's names, and no word on the input.
    width 2: theirs are also twice as wide."""
    torch.manual_seed(0)
    encoder, _ = build_encoder("resnet18", width=width, stem="imagenet")
    encoder.bn1.momentum = 1.0
    with torch.no_grad():
        encoder.bn1(encoder.conv1((pictures() - mean) / std))
    torch.save({"state_dict": encoder.state_dict()}, tmp_path / "resnet.pth")
    loaded = load_weights(tmp_path / "resnet.pth")
    assert loaded.augmentation.mean == found
    assert ("as its first batch norm shows" in str(loaded)) == (found is None)
    assert ("(assumed; else --mean and --std)" in str(loaded)) == (found is not None)
