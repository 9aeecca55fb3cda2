"""Optimizer, views, loaders and a short run on a GPU."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import TINY, write_photos
from torch import nn

from simclr_fast import LARS, TwoViewLoader, nt_xent_loss
from simclr_fast.augment.params import Augmentation, draw_params
from simclr_fast.augment.views import apply_views
from simclr_fast.data import pipelines
from simclr_fast.training.pretrain import pretrain
from simclr_fast.utils.checkpoint import checkpoints


def test_fused_lars_equals_plain_lars(gpu):
    torch.manual_seed(0)
    shapes = [(64, 3, 7, 7), (2048, 512, 1, 1), (129, 33), (1000,), (17,), (1,)]
    fused = [nn.Parameter(torch.randn(shape, device=gpu)) for shape in shapes]
    plain = copy.deepcopy(fused)
    options = {"lr": 0.3, "momentum": 0.9, "weight_decay": 1e-4}
    steps = LARS(fused, **options, fused=True), LARS(plain, **options, fused=False)
    for _ in range(3):
        for a, b in zip(fused, plain, strict=True):
            a.grad = 0.1 * torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in steps:
            optimizer.step()
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_grad_scaler_skips_the_steps_of_lars_that_overflow(gpu):
    weights = [nn.Parameter(torch.randn(1000, 33, device=gpu)) for _ in range(2)]
    optimizer, scaler = LARS(weights, lr=0.1), torch.amp.GradScaler("cuda", init_scale=2.0**14)
    before = copy.deepcopy(weights)
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(sum((w * w).sum() for w in weights) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        same = [torch.equal(a, b) for a, b in zip(weights, before, strict=True)]
        assert same == 2 * [factor != 1]


@pytest.mark.parametrize("spec", ["simclr", "torchvision"])
@pytest.mark.parametrize("size", [1, 17, 224])
def test_views_of_odd_images_equal_those_of_the_cpu(spec, size, gpu):
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 500, (12, 2), generator=generator).tolist()
    images = [
        torch.randint(0, 256, (h, w, 3), generator=generator, dtype=torch.uint8) for h, w in sizes
    ]
    augmentation = Augmentation(size, spec)
    params = draw_params(augmentation, 0, 0, np.arange(12), 0, np.array(sizes))
    found = apply_views([image.to(gpu) for image in images], params, augmentation).float().cpu()
    wanted = apply_views(images, params, augmentation).float()
    assert (found - wanted).abs().max() < 0.05 / 255


@pytest.mark.parametrize("way", ["kept", "fused", "dali"])
def test_views_of_files_are_close_to_those_of_the_cpu(way, gpu, tmp_path, monkeypatch):
    """GPUs decode JPEG with another inverse transform, so single pixels differ."""
    if way != "kept":
        pytest.importorskip("nvidia.dali")
        monkeypatch.setattr(pipelines, "KEPT_ON_GPU", 0)
    pil = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for i in range(40):
        coarse = pil.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((83, 61), pil.Resampling.BICUBIC).save(tmp_path / f"{i}.jpg", quality=95)
    loaders = [
        TwoViewLoader(tmp_path, 8, 40, device=device, backend=name)
        for device, name in ((gpu, None if way == "kept" else way), ("cpu", "fused"))
    ]
    for _ in range(2):
        for found, wanted in zip(*loaders, strict=True):
            for a, b in zip(found[:2], wanted[:2], strict=True):
                assert a.device.type == "cuda"
                error = (a.cpu() - b).abs()
                assert error.mean() < 1 / 255
                # Decoded on the CPU, only the arithmetic differs.
                assert way != "kept" or error.max() < 0.05 / 255


def test_the_loss_compiles_with_inductor(gpu):
    torch.manual_seed(0)
    z = [torch.randn(64, 32, device=gpu, requires_grad=True) for _ in range(2)]
    gradients = []
    for loss in (nt_xent_loss, torch.compile(nt_xent_loss, fullgraph=True)):
        gradients.append(torch.autograd.grad(loss(*z, 0.1), z))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(gpu, tmp_path):
    photos = write_photos(tmp_path / "photos", 24)
    own = {"data": str(photos), "device": str(gpu), "steps": 6, "checkpoint_every": 3}
    own |= {"memory": "plain"}
    losses = {}
    for name, stops in (("whole", False), ("parts", True)):
        config = replace(TINY, **own, out=tmp_path / name)
        if stops:
            pretrain(config)
            # As if it had been killed after the first checkpoint.
            checkpoints(config.out / "checkpoints")[-1].unlink()
        pretrain(replace(config, resume=stops))
        lines = (config.out / "metrics.jsonl").read_text().splitlines()
        losses[name] = {row["step"]: row["loss"] for row in map(json.loads, lines)}
    assert losses["parts"] == pytest.approx(losses["whole"], rel=1e-4)


@pytest.mark.parametrize(
    ("precision", "close"), [("float32", 1e-4), ("bfloat16", 1e-2), ("float16", 1e-2)]
)
def test_replayed_steps_train_as_eager_ones(precision, close, gpu, tmp_path, monkeypatch):
    """With a probe and an average, which read and write between the replays."""
    photos, replays = write_photos(tmp_path / "photos", 24), []
    replay = torch.cuda.CUDAGraph.replay

    def counted(self):
        replays.append(1)
        replay(self)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    own = {"data": str(photos), "device": str(gpu), "steps": 16, "memory": "plain"}
    own |= {"log_every": 5, "precision": precision, "probe_every": 3, "ema": 0.9}
    losses = []
    for graphed in (False, True):
        config = replace(TINY, **own, cuda_graph=graphed, out=tmp_path / f"graph-{graphed}")
        pretrain(config)
        lines = (config.out / "metrics.jsonl").read_text().splitlines()
        losses.append({row["step"]: row["loss"] for row in map(json.loads, lines)})
    # Steps 5, 10, 15 and 16 are logged.
    assert len(replays) == 12
    assert losses[1] == pytest.approx(losses[0], rel=close)
