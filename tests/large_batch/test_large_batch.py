"""Every memory mode against plain autograd of the whole batch, in float64, in one process."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from cuda_batch_norm import cuda_batch_norm
from large_batch_cases import (
    MODES,
    assert_equal,
    crop_loss,
    crops,
    large_batch,
    lively,
    loss_fn,
    mode_name,
    plain_autograd,
    plain_autograd_of_crops,
    simclr,
    step,
    views,
)
from torch import nn
from torch.nn.utils import prune

from simclr_fast.large_batch import LargeBatch
from simclr_fast.large_batch import global_batch_norm as gbn
from simclr_fast.large_batch.blocks import recomputed_blocks
from simclr_fast.training.config import PretrainConfig

LOCKSTEP = {"memory": "lockstep", "micro_batch": 5}
REFERENCES = {}


def reference(name):
    if name not in REFERENCES:
        REFERENCES[name] = step(simclr(name), plain_autograd)
    return REFERENCES[name]


def run(model, x=None, loss=loss_fn, **mode):
    return large_batch(model, **mode).backward(views() if x is None else x, loss)


@pytest.mark.parametrize(
    ("model", "mode"),
    [*(("basic", mode) for mode in MODES), *(("bottleneck", mode) for mode in MODES[1::2])],
    ids=lambda value: value if isinstance(value, str) else mode_name(value),
)
def test_equals_plain_autograd(model, mode):
    found = step(simclr(model), lambda m: run(m, **mode))
    assert_equal(found, reference(model))


def any_size():
    """A model without batch norm that takes images of any size."""
    torch.manual_seed(1)
    layers = nn.Conv2d(3, 8, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8)
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize(
    ("model", "mode"),
    [
        (partial(simclr, "basic"), {"memory": "plain"}),
        (partial(simclr, "basic"), {"memory": "replay"}),
        (any_size, {"memory": "grad-cache", "micro_batch": 3}),
    ],
    ids=["plain", "replay", "grad-cache"],
)
def test_views_of_two_sizes(model, mode):
    found = step(model(), lambda m: run(m, crops(), crop_loss, **mode))
    assert_equal(found, step(model(), plain_autograd_of_crops))


def test_views_of_two_sizes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'lockstep' needs views of one shape, got"):
        run(simclr("basic"), crops(), crop_loss, **LOCKSTEP)
    uneven = [torch.zeros(3, 3, 16, 16), torch.zeros(2, 3, 10, 10)]
    with pytest.raises(ValueError, match="the same number of rows in every part"):
        run(simclr("basic"), uneven, crop_loss, memory="plain")


@pytest.mark.parametrize("memory", ["plain", "replay", "grad-cache"])
def test_a_second_model_runs_without_a_graph(memory):
    model, other = any_size(), any_size().requires_grad_(False)
    mode = {"micro_batch": 3} if memory == "grad-cache" else {}
    large = large_batch(model if memory != "replay" else simclr("basic"), memory=memory, **mode)
    found = large.forward(other, views().chunk(2))
    assert not found.requires_grad
    torch.testing.assert_close(found, other(views()))
    half = LargeBatch(model, memory="plain", autocast=torch.bfloat16)
    assert half.forward(other.float(), views().float()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="'lockstep' runs one model"):
        large_batch(simclr("basic"), **LOCKSTEP).forward(other, views())


@pytest.mark.parametrize("mode", MODES[1:6], ids=mode_name)
def test_cuda_path_equals_plain_autograd(mode):
    """With CUDA's batch norm operations, computed on the CPU."""
    with cuda_batch_norm():
        found = step(simclr("basic"), lambda m: run(m, **mode))
    assert_equal(found, reference("basic"))


@pytest.mark.parametrize("memory", ["plain", "replay", "lockstep"])
def test_views_may_come_in_parts(memory):
    mode = {"memory": memory, "micro_batch": 5}
    x = views()
    parts = (x[:7], x[7:7], x[7:])
    assert_equal(step(simclr("basic"), lambda m: run(m, parts, **mode)), reference("basic"))
    with pytest.raises(ValueError, match="views must hold"):
        run(simclr("basic"), (), **mode)


def timm_resnet():
    """Deep stem, pooled shortcut, squeeze-and-excitation."""
    resnet = pytest.importorskip("timm").models.resnet
    return resnet.ResNet(
        resnet.BasicBlock,
        (1, 1, 1, 1),
        num_classes=0,
        channels=(4, 8, 16, 32),
        stem_width=8,
        stem_type="deep",
        avg_down=True,
        block_args={"attn_layer": "se"},
    )


def timm_norm_act():
    """timm's batch norms with an activation of their own."""
    return pytest.importorskip("timm").create_model("mobilenetv3_small_050", num_classes=8)


def torchvision_resnet():
    resnet = pytest.importorskip("torchvision").models.resnet
    body = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=8)
    return nn.Sequential(*list(body.children())[:-1], nn.Flatten(), nn.Linear(512, 8))


def chain():
    """Norms on the images and of every option, padding by name and by reflection, a tied layer."""
    tied = nn.Conv2d(6, 6, 3, padding="same")
    return nn.Sequential(
        *(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect")),
        *(nn.BatchNorm2d(6, affine=False), nn.ReLU(inplace=True), tied),
        *(nn.BatchNorm2d(6, momentum=None), nn.ReLU(inplace=True), tied),
        *(nn.BatchNorm2d(6, track_running_stats=False), nn.MaxPool2d(2), nn.Conv2d(6, 4, 1)),
        *(nn.BatchNorm2d(4).eval(), nn.Flatten(), nn.Linear(256, 8), nn.BatchNorm1d(8)),
    )


@pytest.mark.parametrize("build", [timm_resnet, timm_norm_act, torchvision_resnet, chain])
def test_lockstep_runs_models_of_other_libraries(build):
    torch.manual_seed(3)
    model = lively(build())
    if build is chain:
        model[11].eval()
    expected = step(copy.deepcopy(model), plain_autograd)
    assert_equal(step(model, lambda m: run(m, **LOCKSTEP)), expected)


def test_lockstep_chooses_a_schedule_for_the_memory():
    model = simclr("resnet10")
    engine = LargeBatch(model, gpu_memory=1.5e6, micro_batch=7)
    found = step(model, lambda m: engine.backward(views(), loss_fn))
    assert_equal(found, step(simclr("resnet10"), plain_autograd))
    first = engine.lockstep.program.schedule
    assert first.micro_batch == 7
    engine.backward(views(), loss_fn)
    assert engine.lockstep.program.schedule is first
    with pytest.raises(ValueError, match="GB"):
        LargeBatch(simclr("resnet10"), gpu_memory=1e4).backward(views(), loss_fn)


def test_lockstep_takes_imagenet_stem_and_frozen_layers():
    def frozen():
        model = simclr("resnet10", stem="imagenet")
        model.encoder.conv1.requires_grad_(False)
        model.encoder.layer1.requires_grad_(False)
        return model

    expected = step(frozen(), plain_autograd)
    assert_equal(step(frozen(), lambda m: run(m, **LOCKSTEP)), expected)


def blockwise(model, parts):
    """Plain autograd over parts of the rows, each drawing its own random numbers."""
    torch.manual_seed(5)
    loss = loss_fn(torch.cat([model(part) for part in parts]))
    loss.backward()
    return loss.detach()


def test_grad_cache_draws_the_same_random_numbers_twice():
    layers = nn.Flatten(), nn.Linear(768, 16), nn.LayerNorm(16), nn.Dropout(0.3), nn.Linear(16, 8)
    model = nn.Sequential(*layers).double()
    expected = step(copy.deepcopy(model), lambda m: blockwise(m, views().split(5)))
    torch.manual_seed(5)
    found = step(model, lambda m: run(m, memory="grad-cache", micro_batch=5))
    assert_equal(found, expected)
    after = torch.rand(1)
    torch.manual_seed(5)
    with torch.no_grad():
        [model(part) for part in views().split(5)]
    assert torch.equal(torch.rand(1), after)


def test_grad_cache_refuses_batch_norm():
    for build in (
        lambda: LargeBatch(simclr("basic"), memory="grad-cache"),
        lambda: run(simclr("basic").eval().train(), memory="grad-cache"),
    ):
        with pytest.raises(ValueError, match=r"0\.94, 0\.85, 0\.75 and 0\.61"):
            build()
    model = simclr("basic")
    run(model, memory="grad-cache", micro_batch=5, allow_ghost_bn=True)
    # Once per micro-batch, not twice.
    assert model.encoder.bn1.num_batches_tracked == 3
    assert_gradient_differs(model)
    run(simclr("basic").eval(), memory="grad-cache")


def assert_gradient_differs(model):
    weight = reference("basic")[1]["encoder.conv1.weight"]
    found = model.encoder.conv1.weight.grad
    assert torch.cosine_similarity(found.flatten(), weight.flatten(), 0) < 0.999


FAULTS = {
    "statistics of one micro-batch": ("merge", lambda original: lambda rows: rows[-1]),
    "sums of one micro-batch": (
        "join_sums",
        lambda original: lambda parts, s, weight: original(parts[:1], s, weight),
    ),
    "buffers updated twice": (
        "update_running",
        lambda original: lambda *args: (original(*args), original(*args)),
    ),
    "no gradient through the statistics": (
        "input_gradient",
        lambda original: lambda dy, x, s, w, sums, *rest: original(dy, x, s, w, sums * 0, *rest),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault, monkeypatch):
    name, make = FAULTS[fault]
    monkeypatch.setattr(gbn, name, make(getattr(gbn, name)))
    with pytest.raises(AssertionError):
        assert_equal(step(simclr("basic"), lambda m: run(m, **LOCKSTEP)), reference("basic"))


def test_each_statistic_is_taken_once(monkeypatch):
    calls = dict.fromkeys(("moments", "gradient_sums", "input_gradient", "update_running"), 0)

    def counting(name, original, *args):
        calls[name] += 1
        return original(*args)

    for name in calls:
        monkeypatch.setattr(gbn, name, partial(counting, name, getattr(gbn, name)))
    model = simclr("basic")
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    for mode, parts in (({"memory": "replay"}, 1), (LOCKSTEP, 3)):
        calls.update(dict.fromkeys(calls, 0))
        run(model, **mode)
        per_part = dict.fromkeys(("moments", "gradient_sums", "input_gradient"), parts * norms)
        assert calls == {**per_part, "update_running": norms}
    assert model.encoder.bn1.num_batches_tracked == 2


def test_gradients_add_up():
    model = simclr("basic")
    engine = LargeBatch(model, **LOCKSTEP)
    for _ in range(2):
        engine.backward(views(), loss_fn)
    for name, gradient in reference("basic")[1].items():
        found = model.get_parameter(name).grad
        assert (found - 2 * gradient).norm() <= 1e-11 * max(1, gradient.norm())


def mixed(dtype, x, **mode):
    model = simclr("resnet10", width=0.25).float().to(memory_format=torch.channels_last)
    x = x.float().to(memory_format=torch.channels_last)
    scale = 1024.0 if dtype is torch.float16 else 1.0

    def loss(outputs):
        assert not torch.is_autocast_enabled("cpu")
        assert outputs[1].dtype is dtype
        return loss_fn(outputs) * scale

    run(model, x, loss, autocast=dtype, **mode)
    gradient = model.encoder.layer4[0].conv1.weight.grad
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) / scale


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
def test_half_precision_is_as_close_as_plain(dtype):
    """Over several batches: of one, a ReLU that rounding flips may decide."""
    paths = {"plain": nullcontext, "replay": nullcontext, "lockstep": nullcontext}
    paths |= {"replay on CUDA": cuda_batch_norm, "lockstep on CUDA": cuda_batch_norm}
    errors = dict.fromkeys(paths, 0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        x = torch.randn(views().shape, generator=generator, dtype=torch.float64)
        model = simclr("resnet10", width=0.25)
        plain_autograd(model, x)
        exact = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        for path, context in paths.items():
            mode = LOCKSTEP if "lockstep" in path else {"memory": path.split()[0]}
            with context():
                errors[path] += float((mixed(dtype, x, **mode) - exact).norm()) ** 2
    for path, error in errors.items():
        assert error**0.5 <= 1.5 * errors["plain"] ** 0.5, (path, errors)


def test_outer_autocast_is_followed():
    seen = []

    def loss(outputs):
        seen.append((outputs[1].dtype, torch.is_autocast_enabled("cpu")))
        return loss_fn(outputs), "more"

    model = simclr("resnet10").float()
    with torch.autocast("cpu", torch.bfloat16):
        for mode in ({"memory": "plain"}, {"memory": "replay"}, LOCKSTEP):
            value, more = run(model, views().float(), loss, **mode)
            assert not value.requires_grad
            assert more == "more"
    assert seen == [(torch.bfloat16, True)] * 3


def test_replay_finds_the_blocks():
    assert len(recomputed_blocks(simclr("resnet18"))) == 8
    models = pytest.importorskip("torchvision").models
    assert len(recomputed_blocks(models.mobilenet_v2())) >= 17
    assert len(recomputed_blocks(models.VisionTransformer(32, 16, 3, 2, 8, 16))) == 3
    with pytest.raises(ValueError, match="Sequential or ModuleList"):
        LargeBatch(nn.Linear(2, 2), memory="replay")


class Overwrites(nn.Module):
    def forward(self, x):
        y = x * 2
        z = y
        y += 1
        return (z * y).flatten(1)


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), "random"),
        (Branches(), "traced"),
        (Overwrites(), "overwrites"),
    ],
)
def test_lockstep_refuses_what_it_would_change(model, says):
    with pytest.raises(ValueError, match=says):
        LargeBatch(model)


HOOKS = {
    "forward": lambda m: m.encoder.layer1[0].conv1.register_forward_hook(lambda *_: None),
    "forward pre": lambda m: m.encoder.layer1[0].conv1.register_forward_pre_hook(lambda *_: None),
    "backward": lambda m: m.encoder.layer1[0].conv1.register_full_backward_hook(lambda *_: None),
    "gradient": lambda m: m.encoder.layer1[0].conv1.weight.register_hook(lambda g: g),
    "pruned": lambda m: prune.l1_unstructured(m.encoder.layer1[0].conv1, "weight", 0.5),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_lockstep_refuses_hooks_by_name(hook):
    model = simclr("resnet10")
    engine = LargeBatch(model, **LOCKSTEP)
    HOOKS[hook](model)
    says = r"encoder\.layer1\.0\.conv1.*memory='replay' can"
    with pytest.raises(ValueError, match=says):
        engine.backward(views(), loss_fn)
    with pytest.raises(ValueError, match=says):
        LargeBatch(model, **LOCKSTEP)


def test_lockstep_sees_a_module_that_was_replaced():
    def replaced(model):
        assert isinstance(model.projector[2], nn.ReLU)
        model.projector[2] = nn.GELU()
        return model

    model = simclr("resnet10")
    engine = LargeBatch(model, **LOCKSTEP)
    found = step(replaced(model), lambda m: engine.backward(views(), loss_fn))
    assert_equal(found, step(replaced(simclr("resnet10")), plain_autograd))


@pytest.mark.parametrize(
    "arguments",
    [
        {"memory": "little"},
        {"micro_batch": 0},
        {"gpu_memory": 0},
        {"memory": "plain", "gpu_memory": 1e9},
        {"host_memory": -1},
        {"memory": "replay", "host_memory": 1},
        {"memory": "replay", "compile": True},
    ],
)
def test_bad_arguments_of_large_batch_are_refused(arguments):
    with pytest.raises(ValueError, match=list(arguments)[-1]):
        LargeBatch(nn.Linear(2, 2), **arguments)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("offload_gb", "offload_gb is gone: give host_memory"),
        ("keep_every", "keep_every is gone: give gpu_memory"),
        ("micro_batches", "unexpected argument 'micro_batches'"),
    ],
)
def test_arguments_that_are_gone_name_their_replacement(name, says):
    with pytest.raises(TypeError, match=says):
        LargeBatch(nn.Linear(2, 2), **{name: 2})


def test_a_loss_must_be_a_number():
    with pytest.raises(TypeError, match="0-dim"):
        run(simclr("resnet10"), loss=lambda outputs: outputs[1], **LOCKSTEP)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("micro_batch", -1, "micro_batch"),
        ("gpu_memory", "24", "such as 80GB or 24GiB, got '24'"),
        ("host_memory", "-1GB", "such as 80GB or 24GiB, got '-1GB'"),
    ],
)
def test_bad_memory_settings_are_refused(field, value, says):
    with pytest.raises(ValueError, match=says):
        PretrainConfig(**{field: value})


@pytest.mark.parametrize(
    "given",
    [
        {"memory": "plain", "micro_batch": 64},
        {"memory": "plain", "gpu_memory": "24GB"},
        {"memory": "replay", "host_memory": "1GB"},
        {"memory": "replay", "compile": True},
        {"memory": "lockstep", "allow_ghost_bn": True},
    ],
)
def test_options_of_other_modes_are_refused(given):
    with pytest.raises(ValueError, match=f"{list(given)[1]} is for memory .*, got '"):
        PretrainConfig(**given)
