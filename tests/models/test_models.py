"""Encoders by name, widths, stems, projection heads."""

import copy

import pytest
import torch
import torchvision

from simclr_fast.models.encoders import ResNet, SimCLR, build_encoder, build_projector


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnets_equal_torchvisions_without_the_classifier(name):
    ours, dim = build_encoder(name)
    theirs = torchvision.models.get_model(name, weights=None)
    theirs.fc = torch.nn.Identity()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(ours.eval()(images), theirs.eval()(images))
    assert dim == (512 if name == "resnet18" else 2048)


@pytest.mark.parametrize("name", ["resnet10", "resnet50"])
def test_no_strided_convolution_of_pixels_has_few_channels(name):
    """oneDNN writes outside its memory for the weights' gradient of such a one in channels_last."""
    narrow, _ = build_encoder(name, width=0.125, stem="cifar")
    for module in narrow.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (1, 1):
            assert module.stride == (1, 1) or module.in_channels >= 16
    wide, _ = build_encoder(name, width=0.25, stem="cifar")
    assert narrow.state_dict().keys() == wide.state_dict().keys()
    # With the convolution itself strided, as torchvision has it, in an odd size.
    strided = copy.deepcopy(narrow).double()
    for block in (strided.layer2[0], strided.layer3[0], strided.layer4[0]):
        convolution = block.downsample.get_submodule("0")
        convolution.stride = (2, 2)
        block.downsample = torch.nn.Sequential(convolution, block.downsample.get_submodule("1"))
    images = torch.rand(2, 3, 21, 21)
    h, exact = narrow.double()(images.double()), strided(images.double())
    torch.testing.assert_close(h, exact, rtol=1e-12, atol=1e-12)
    upstream = torch.rand_like(h)
    h.backward(upstream)
    exact.backward(upstream)
    for ours, theirs in zip(narrow.parameters(), strided.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("width", "millions"), [(1, 23.5), (2, 94), (4, 375)])
def test_widths_have_the_papers_sizes(width, millions):
    with torch.device("meta"):
        encoder, dim = build_encoder("resnet50", width=width)
    assert dim == 2048 * width
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_each_stem_has_its_layers():
    images = torch.rand(1, 3, 32, 32)
    sizes = {}
    for stem in ("imagenet", "cifar", "cifar-stride2"):
        encoder = ResNet("resnet10", 0.25, stem)
        encoder.layer1.register_forward_hook(
            lambda *given, stem=stem: sizes.update({stem: given[2].shape[-1]})
        )
        assert encoder.eval()(images).shape == (1, 128)
    assert sizes == {"imagenet": 8, "cifar": 32, "cifar-stride2": 16}
    assert build_encoder("resnet18", image_size=32)[0].conv1.kernel_size == (3, 3)
    assert build_encoder("resnet18", image_size=96)[0].conv1.kernel_size == (7, 7)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "vit_b_16", "convnext_tiny", "squeezenet"])
def test_torchvision_models_give_their_features(name):
    if name == "squeezenet":
        with pytest.raises(ValueError, match="no linear classifier"):
            build_encoder("squeezenet1_0")
        return
    encoder, dim = build_encoder(name)
    assert encoder.eval()(torch.rand(1, 3, 224, 224)).shape == (1, dim)


@pytest.mark.parametrize("name", ["timm:resnet18", "mobilenetv3_small_050", "timm:vgg11"])
def test_timm_models_give_their_features(name):
    pytest.importorskip("timm")
    encoder, dim = build_encoder(name)
    assert encoder.eval()(torch.rand(1, 3, 224, 224)).shape == (1, dim)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "resnet51"}, "resnet51"),
        ({"name": "resnet50", "width": 0}, "width"),
        ({"name": "vgg11", "width": 2}, "width must be 1 for vgg11, got 2"),
    ],
)
def test_unknown_names_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        build_encoder(**arguments)


def test_each_projector_has_its_layers():
    kinds = {
        ("nonlinear", 2): "Linear BatchNorm1d ReLU Linear BatchNorm1d",
        ("nonlinear", 3): "Linear BatchNorm1d ReLU Linear BatchNorm1d ReLU Linear BatchNorm1d",
        ("linear", 2): "Linear BatchNorm1d",
    }
    for (kind, depth), layers in kinds.items():
        head = build_projector(kind, 24, 16, depth)
        assert " ".join(type(layer).__name__ for layer in head) == layers
        assert head(torch.rand(5, 24)).shape == (5, 16)
        assert all(layer.bias is None for layer in head if isinstance(layer, torch.nn.Linear))
        assert not head[-1].bias.requires_grad
    assert build_projector("none", 24)(torch.ones(1, 24)).shape == (1, 24)
    for kind, depth in (("mlp", 2), ("nonlinear", 0)):
        with pytest.raises(ValueError, match="must be"):
            build_projector(kind, 24, 16, depth)


def test_h_and_z_are_both_reachable():
    encoder, dim = build_encoder("resnet10", width=0.25, image_size=32)
    h, z = SimCLR(encoder, build_projector("nonlinear", dim, 16))(torch.rand(4, 3, 32, 32))
    assert (h.shape, z.shape) == ((4, 128), (4, 16))
