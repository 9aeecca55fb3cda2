"""Models train with fused batch norms as with torch's, and keep their modules."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from simclr_fast import ops
from simclr_fast.models.encoders import SimCLR, build_encoder, build_projector
from simclr_fast.models.fused_norms import fused_norms
from simclr_fast.ops import norm_train

pytestmark = pytest.mark.skipif(not ops.has_extension(), reason="the extension is not built")
LAST = torch.channels_last


@pytest.fixture
def calls(monkeypatch):
    """What the fused op was called with: rows, channels, whether there is a residual and a ReLU."""
    seen, real = [], norm_train.norm_train

    def counted(x, weight, bias, other, eps, relu):
        seen.append((x.numel() // x.size(1), x.size(1), other is not None, relu))
        return real(x, weight, bias, other, eps, relu)

    monkeypatch.setattr(norm_train, "norm_train", counted)
    return seen


def model(name="resnet18", **options):
    torch.manual_seed(0)
    encoder, dim = build_encoder(name, width=0.25, image_size=32, **options)
    made = SimCLR(encoder, build_projector("nonlinear", dim, 16, 3)).train()
    for norm in made.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            # Few values are near 0, where rounding would decide whether a gradient passes.
            nn.init.uniform_(norm.weight, 0.3, 0.5)
            nn.init.uniform_(norm.bias, 1.0, 1.5)
    return made.to(memory_format=LAST)


IMAGES = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def trained(net, fuse, images=IMAGES):
    """The output, gradients and buffers after a step, and the result of the context."""
    with fused_norms(net) if fuse else nullcontext():
        h, z = net(images.contiguous(memory_format=LAST))
    (z.tanh() * torch.randn(z.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    return [h.detach(), z.detach(), *gradients, *net.buffers()]


def errors(found, exact):
    """Relative to each tensor, but some gradients are 0: a shift before a batch norm."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, exact, strict=True)]
    least = 0.1 * torch.stack([b.norm() for _, b in pairs]).median()
    return torch.stack([(a - b).norm() / (b.norm() + least) for a, b in pairs])


NORMS = {"resnet18": 20 + 3, "resnet50": 53 + 3}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", NORMS)
def test_a_step_is_as_exact_as_torchs(name, momentum, calls):
    net = model(name)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.momentum = momentum
    exact = trained(copy.deepcopy(net).double(), False, IMAGES.double())
    torchs = trained(copy.deepcopy(net), False)
    assert not calls
    ours = trained(net, True)
    assert len(calls) == NORMS[name]
    limit = errors(torchs, exact)
    assert errors(ours, exact).mean() <= 2 * limit.mean()
    assert limit.mean() < 1e-4
    # Residuals in every block, ReLU everywhere but in shortcuts and the last layer.
    blocks, shortcuts = {"resnet18": (8, 3), "resnet50": (16, 4)}[name]
    assert sum(residual for *_, residual, _ in calls) == blocks
    assert sum(not relu for *_, relu in calls) == shortcuts + 1


def test_under_autocast(calls):
    net = model()
    results = []
    for fuse in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(trained(copy.deepcopy(net), fuse))
    exact = trained(net.double(), False, IMAGES.double())
    assert len(calls) == NORMS["resnet18"]
    torchs, ours = (errors(found, exact) for found in results)
    assert ours.mean() <= 1.2 * torchs.mean()


def evaluated(net):
    return net.eval()


def hooked(net):
    for module in net.modules():
        module.register_forward_hook(lambda *_: None)
    return net


def statistics_of_batches(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean = module.running_var = None
    return net


CHANGES = {
    "eval": evaluated,
    "hooks": hooked,
    "no running statistics": statistics_of_batches,
    "contiguous": lambda net: net.to(memory_format=torch.contiguous_format),
    "float64": lambda net: net.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_fused_runs_as_always(change, calls):
    net = CHANGES[change](model())
    images = IMAGES.to(next(net.parameters()).dtype)
    layout = torch.contiguous_format if change == "contiguous" else LAST
    outputs = []
    for fuse in (True, False):
        with fused_norms(net) if fuse else nullcontext():
            outputs.append(net(images.contiguous(memory_format=layout)))
    # Those of the projector have no layout.
    assert len(calls) == (3 if change == "contiguous" else 0)
    if not calls:
        assert all(map(torch.equal, *outputs))


def test_the_model_is_unchanged_after_the_context(calls):
    net = model()
    before = copy.deepcopy(net.state_dict()), [vars(m).keys() for m in net.modules()]
    with pytest.raises(KeyError), fused_norms(net):
        raise KeyError
    assert [vars(m).keys() for m in net.modules()] == before[1]
    assert all(map(torch.equal, net.state_dict().values(), before[0].values()))
    with fused_norms(net):
        assert any("forward" in vars(m) for m in net.modules())
    trained(net, False)
    assert not calls


def test_other_models_and_a_shortcut_of_its_own(calls):
    """Of other models nothing is fused, and other layers in a block run as they are."""
    net = model("resnet18", stem="cifar-no-relu")
    net.encoder.layer2[0].downsample = nn.Sequential(
        nn.AvgPool2d(2), nn.Conv2d(16, 32, 1), nn.GroupNorm(4, 32)
    )
    exact = trained(copy.deepcopy(net).double(), False, IMAGES.double())
    torchs = trained(copy.deepcopy(net), False)
    ours = trained(net, True)
    # Without that of the shortcut, and of the stem.
    assert len(calls) == NORMS["resnet18"] - 2
    assert errors(ours, exact).mean() <= 2 * errors(torchs, exact).mean()
    calls.clear()
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).to(memory_format=LAST)
    with fused_norms(plain):
        plain(IMAGES.contiguous(memory_format=LAST))
    assert not calls
