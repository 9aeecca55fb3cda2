"""Batch 4096 of ResNets at 224²: planned work and bytes on GPUs of 24, 40 and 80 GB, and one
simulated step. All on tensors without data."""

from functools import cache, partial

import pytest
import torch

from simclr_fast.commands.plan import GPUS
from simclr_fast.large_batch import planner
from simclr_fast.large_batch.planner import Workload
from simclr_fast.models.encoders import SimCLR, build_encoder, build_projector

pytest.importorskip("torchvision")
slow = pytest.mark.slow


@cache
def make_of(model, width):
    def make(model, width):
        encoder, dim = build_encoder(model, width=width, image_size=224)
        return SimCLR(encoder, build_projector("nonlinear", dim))

    return partial(make, model, width)


def work(model, width, gpu, gpus, images=4096, **options):
    make, dtype = make_of(model, width), torch.bfloat16
    return Workload(make, (3, 224, 224), images, gpus, dtype, gpu=GPUS[gpu][1], **options)


# Model, width, GPUs, all RAM that may be used in GB (the views included), most work.
GOALS = [
    ("resnet50", 1, "rtx4090", 1, 24, 1.5),
    ("resnet50", 1, "a100-40gb", 1, 0, 1.7),
    ("resnet50", 1, "a100-40gb", 1, 16, 1.4),
    ("resnet50", 1, "a100-80gb", 1, 0, 1.2),
    ("resnet50", 2, "a100-80gb", 1, 0, 1.7),
    ("resnet50", 2, "a100-80gb", 1, 32, 1.35),
    ("resnet50", 4, "a100-80gb", 2, 0, 1.7),
    ("resnet34", 1, "rtx4090", 1, 24, 1.25),
]


@slow
@pytest.mark.parametrize("goal", GOALS)
def test_it_fits_with_so_much_work(goal):
    model, width, gpu, gpus, ram, most = goal
    task, memory = work(model, width, gpu, gpus), GPUS[gpu][0] * 1e9
    views = 2 * task.view_bytes
    found = task.lockstep(memory, max(ram * 1e9 - gpus * views, 0) / gpus)
    assert planner.fits(found, memory)
    assert found.compute <= most
    if ram:
        assert gpus * (found.host_bytes + found.view_bytes) <= ram * 1e9
    else:
        assert found.host_bytes == 0


@slow
@pytest.mark.parametrize(("gpu", "host"), [("rtx4090", 15e9), ("a100-80gb", 0)])
def test_a_whole_step_takes_what_was_planned(gpu, host):
    task = work("resnet50", 1, gpu, 1)
    planned = task.lockstep(GPUS[gpu][0] * 1e9, host)
    simulated = task.simulated(planned)
    assert simulated.device_bytes == pytest.approx(planned.device_bytes, rel=0.03)
    assert simulated.compute == pytest.approx(planned.compute, rel=0.005)


@slow
def test_the_first_step_down_from_plain_repeats_hardly_any_convolution():
    task = work("resnet50", 1, "b200", 1)
    plain = task.setting("plain")
    found = task.lockstep(0.53 * plain.device_bytes / planner.USABLE)
    assert found.device_bytes <= 0.53 * plain.device_bytes
    assert found.compute <= 1.03
