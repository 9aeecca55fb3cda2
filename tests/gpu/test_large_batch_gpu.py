"""LargeBatch on a GPU against plain autograd: every mode, views on the host, copies to the host."""

import copy

import pytest
import torch
from large_batch_cases import (
    MODES,
    assert_equal,
    crop_loss,
    crops,
    large_batch,
    loss_fn,
    mode_name,
    plain_autograd,
    simclr,
    step,
    views,
)

from simclr_fast.large_batch import LargeBatch
from simclr_fast.losses.nt_xent import nt_xent_loss
from simclr_fast.models.encoders import SimCLR, build_encoder, build_projector

pytest.importorskip("torchvision")


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("mode", MODES, ids=mode_name)
def test_modes_equal_plain_autograd(name, mode, gpu):
    model, x = simclr(name).to(gpu), views().to(gpu)
    other = copy.deepcopy(model)
    wanted = step(other, lambda m: plain_autograd(m, x))
    for place in (x, x.cpu().pin_memory()):
        if mode["memory"] == "lockstep" or place is x:
            own = copy.deepcopy(model)
            batch = large_batch(own, **mode)
            found = step(own, lambda _, b=batch, p=place: b.backward(p, loss_fn))
            assert_equal(found, wanted, 1e-9)


def test_small_crops_in_replay_equal_plain(gpu):
    model, parts = simclr("resnet18").to(gpu), [part.to(gpu) for part in crops()]
    found = [
        step(m, lambda m, mode=mode: LargeBatch(m, memory=mode).backward(parts, crop_loss))
        for mode in ("plain", "replay")
        for m in [copy.deepcopy(model)]
    ]
    assert_equal(found[1], found[0], 1e-9)


def test_grad_cache_equals_plain_autograd(gpu):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {"num_classes": 32, "img_size": 32, "patch_size": 8}
    model = timm.create_model("vit_tiny_patch16_224", **options).to(gpu).double()
    x = torch.randn(24, 3, 32, 32, device=gpu, dtype=torch.float64)
    wanted = step(copy.deepcopy(model), lambda m: plain_autograd(m, x))
    batch = LargeBatch(model, memory="grad-cache", micro_batch=7)
    assert_equal(step(model, lambda _: batch.backward(x, loss_fn)), wanted, 1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lockstep_under_autocast_learns_as_plain(dtype, gpu):
    """The same loss of the first step, and of some steps after it: gradients of half precision are
    noisy, and a wrong one would not reach the same loss."""
    torch.manual_seed(0)
    encoder, dim = build_encoder("resnet18", width=0.25, image_size=32, stem="cifar")
    model = SimCLR(encoder, build_projector("nonlinear", dim, 32)).to(gpu)
    images = torch.randn(64, 3, 32, 32, device=gpu)
    x = torch.cat([images, images + 0.3 * torch.randn_like(images)])
    losses = {}
    for memory in ("plain", "lockstep", "lockstep on the host"):
        own = copy.deepcopy(model).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(own.parameters(), lr=0.05)
        options = {"memory": memory.partition(" ")[0], "autocast": dtype}
        if memory != "plain":
            options["micro_batch"] = 16
            options["choices"] = {"bytes": (6_500_000, 10**8)} if "host" in memory else {}
        batch = large_batch(own, **options)
        losses[memory] = []
        for _ in range(12):
            optimizer.zero_grad()
            loss = batch.backward(x, lambda o: nt_xent_loss(o[1], temperature=0.3))
            losses[memory].append(loss.item())
            optimizer.step()
    for memory in ("lockstep", "lockstep on the host"):
        assert losses[memory][0] == pytest.approx(losses["plain"][0], rel=0.01), losses
        assert losses[memory][-1] == pytest.approx(losses["plain"][-1], rel=0.05), losses
    assert losses["plain"][-1] < 0.8 * losses["plain"][0]
