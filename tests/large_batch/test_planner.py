"""The plan against real steps: bytes, saved tensors, FLOPs; its command and what auto takes."""

import math
from dataclasses import replace

import pytest
import torch
from tiny_runs import TINY
from torch import nn

from simclr_fast.augment.dali import dali_bytes
from simclr_fast.augment.params import Augmentation
from simclr_fast.commands.cli import run
from simclr_fast.commands.plan import Plan, workload
from simclr_fast.data.loader import TwoViewLoader
from simclr_fast.large_batch import LargeBatch, planner
from simclr_fast.large_batch.planner import Setting, Workload
from simclr_fast.large_batch.schedule import Schedule, Stage
from simclr_fast.large_batch.simulate import Meter, Step
from simclr_fast.losses.nt_xent import nt_xent_loss
from simclr_fast.models.encoders import SimCLR, build_encoder, build_projector
from simclr_fast.optim.lars import LARS
from simclr_fast.training.pretrain import pretrain
from simclr_fast.utils.sizes import gigabytes, parse_size

pytest.importorskip("torchvision")
SIZE, ROWS, MICRO = 32, 48, 10


def resnet10():
    encoder, dim = build_encoder("resnet10", width=0.25, image_size=SIZE)
    return SimCLR(encoder, build_projector("nonlinear", dim))


def make():
    """The stem of resnet10, its first two blocks, and a head."""
    model = resnet10()
    model.encoder.layer3 = model.encoder.layer4 = nn.Identity()
    model.projector = build_projector("nonlinear", 32)
    return model


def loss(outputs):
    return nt_xent_loss(outputs[1], return_stats=True)


def step(dtype=None, make=make):
    return Step(make, (3, SIZE, SIZE), loss, dtype)


def peak(phases):
    return max(phase.peak for phase in phases.values())


def work(batch_size=ROWS // 2, make=make, **options):
    options = {"dtype": None, "cuda": False, **options}
    return Workload(make, (3, SIZE, SIZE), batch_size, **options)


NARROW = Schedule(MICRO, tuple(Stage(1, last=last) for last in ("again", *["kept"] * 3)))


@pytest.mark.parametrize("dtype", [None, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("memory", ["plain", "replay", "lockstep", "grad-cache"])
def test_simulated_is_what_a_real_step_takes(memory, dtype):
    how = (None, NARROW) if memory == "lockstep" else (MICRO,)
    found, real = (step(dtype).run(memory, ROWS, *how, fake=fake) for fake in (True, False))
    assert found.keys() == real.keys()
    for key, phase in found.items():
        assert phase.peak == pytest.approx(real[key].peak, rel=1e-3), key
        assert phase.flops == real[key].flops


def test_dali_is_counted_by_the_size_of_the_views():
    """Beside what CUDA itself takes, which is the same for all sizes."""
    at_32, at_224 = (
        Workload(make, (3, size, size), 8, dtype=None, cuda=True).bytes_outside_step("plain")
        - Workload(make, (3, size, size), 8, dtype=None, cuda=False).bytes_outside_step("plain")
        for size in (32, 224)
    )
    assert at_32 > dali_bytes(32)
    assert at_224 - at_32 == dali_bytes(224) - dali_bytes(32) > 1e9


def test_plain_is_its_saved_tensors():
    """Independently of the meter: storages that autograd's hooks see, and what was there before."""
    model, views = resnet10(), torch.randn(ROWS, 3, SIZE, SIZE)
    storages = {}

    def keep(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        # Two views are joined first.
        _, z = model.train()(torch.cat(views.chunk(2)))
    before = [views, *model.parameters(), *model.buffers()]
    storages.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in before})
    at_loss = step(make=resnet10).run("plain", ROWS, MICRO)["step", 0].peak
    assert at_loss == pytest.approx(sum(storages.values()) + z.nbytes, rel=0.02)


def test_many_micro_batches_lie_on_the_line():
    whole = step().run("grad-cache", 56, 8)
    found = work(28)._phases("grad-cache", 8)
    assert peak(found) == pytest.approx(peak(whole), rel=0.01)
    sums = [sum(p.flops for p in phases.values()) for phases in (found, whole)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)


def test_the_meter_sees_what_is_freed():
    meter = Meter()
    with meter:
        kept = torch.ones(1000)
        for _ in range(5):
            kept = kept * 2
        view = kept.view(10, 100)
    assert meter.alive == 4000
    assert meter.phases["step", 0].peak == 8000
    del kept
    assert meter.alive == 4000
    del view
    assert meter.alive == 0


def usable(setting, factor=1.0):
    """The GPU memory with which `setting` just fits."""
    return factor * setting.device_bytes / planner.USABLE


def test_settings_need_less_and_compute_more():
    plain, replay = work().setting("plain"), work().setting("replay")
    half = work().lockstep(usable(plain, 0.6), micro_batch=4)
    least = work().lockstep(1.0, micro_batch=4)
    assert plain.device_bytes > replay.device_bytes > least.device_bytes
    assert plain.compute == pytest.approx(1, rel=0.01)
    assert 1.25 < replay.compute < 1.4
    # The first step down from plain repeats no convolution, or hardly any.
    assert half.device_bytes <= 0.6 * plain.device_bytes
    assert 0.99 < half.compute < 1.1
    assert half.compute < least.compute < 2.5
    # With plenty of memory, everything is kept, and no schedule is searched.
    everything = work().lockstep(usable(plain, 8), micro_batch=4)
    assert {stage.last for stage in everything.schedule.stages} == {"kept"}
    assert everything.compute == pytest.approx(1, abs=0.02)
    assert half.flags == f"--memory lockstep --micro-batch {half.micro_batch}"
    # What lies beside a step: momentum, and the next batch's views.
    momentum = sum(p.nbytes for p in make().parameters())
    assert work().bytes_outside_step("plain") == momentum + ROWS * 3 * SIZE**2 * 4
    outside = [work(ranks=2).bytes_outside_step(m) for m in ("replay", "lockstep")]
    # Lockstep's own views are counted elsewhere.
    assert outside[0] - outside[1] == momentum + work(ranks=2).view_bytes


def test_a_planned_schedule_is_what_its_step_takes():
    task = work(24, resnet10, cuda=True, loader=False, dtype=torch.bfloat16)
    for share in (0.6, 0.8):
        memory = usable(task.setting("plain"), share) + planner._CONTEXT
        planned = task.lockstep(memory, micro_batch=4)
        simulated = task.simulated(planned)
        assert planner.fits(planned, memory)
        # CUDA's own gigabyte would hide what this step needs.
        found, foreseen = (s.device_bytes - planner._CONTEXT for s in (simulated, planned))
        assert found == pytest.approx(foreseen, rel=0.03)
        assert simulated.compute == pytest.approx(planned.compute, rel=0.005)


def test_host_memory_saves_work_and_is_counted():
    task = work(24, resnet10, loader=False)
    alone = task.lockstep(1.0, micro_batch=4)
    memory = usable(alone, 1.05)
    without = task.lockstep(memory, 0, 4)
    helped = task.lockstep(memory, alone.device_bytes, 4)
    assert planner.fits(helped, memory)
    assert helped.compute < without.compute
    assert 0 < helped.host_bytes <= alone.device_bytes
    assert helped.schedule.host_bytes == helped.host_bytes
    assert helped.bus_bytes >= 2 * helped.host_bytes
    simulated = task.simulated(helped)
    assert simulated.device_bytes == pytest.approx(helped.device_bytes, rel=0.03)


def test_choice_follows_memory():
    task = work()
    plain = task.setting("plain")
    assert planner.choose(task, 2 * plain.device_bytes).memory == "plain"
    found = planner.choose(task, usable(plain, 0.9))
    assert found.memory == "lockstep"
    assert found.schedule is not None
    with pytest.raises(ValueError, match="fits in no mode"):
        planner.choose(task, 1e6)


def test_a_model_that_lockstep_cannot_run_is_replayed(monkeypatch):
    refused = Setting("lockstep", None, math.inf, refusal="no")
    monkeypatch.setattr(Workload, "lockstep", lambda *_: refused)
    task = work()
    replay = task.setting("replay")
    assert planner.choose(task, usable(replay, 1.01)) == replay
    with pytest.raises(ValueError, match="no"):
        planner.fitting_lockstep(task, 1e12)
    assert planner.next_smaller(task, task.setting("plain"))[0] == replay


def test_grad_cache_is_exact_for_a_model_without_batch_norms():
    setting = Setting("grad-cache", 32, 100)
    assert planner.exact(Workload(_Plain, (3, SIZE, SIZE), ROWS // 2, cuda=False), setting)
    assert not planner.exact(work(), setting)


def test_the_schedule_for_a_given_model():
    model = make()
    before = [p.clone() for p in model.parameters()]
    plain = work().setting("plain")
    shape = (3, SIZE, SIZE)
    found = planner.schedule_of(model, shape, ROWS, None, plain.device_bytes * 0.7, cuda=False)
    assert found.blocks == 4
    assert all(map(torch.equal, before, model.parameters()))
    with pytest.raises(ValueError, match="fits in no mode"):
        planner.schedule_of(model, shape, ROWS, None, 1e5, cuda=False)
    loss = LargeBatch(model, memory="lockstep", schedule=found).backward(
        torch.randn(ROWS, *shape), lambda z: nt_xent_loss(z[1])
    )
    assert loss.isfinite()


def test_a_model_that_a_mode_cannot_run_is_said():
    task = replace(work(), make=lambda: _Plain())
    found = task.setting("replay")
    assert math.isinf(found.device_bytes)
    assert "_Plain has none" in found.refusal
    task = replace(work(), make=lambda: nn.Sequential(make(), nn.Dropout(0.5)))
    found = task.lockstep(1e12)
    assert math.isinf(found.device_bytes)
    assert "memory='lockstep' cannot run this model" in found.refusal


class _Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * SIZE * SIZE, 8)

    def forward(self, x):
        return None, self.linear(x.flatten(1))


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80e9), ("24GiB", 24 * 2**30), ("1.5 TB", 1.5e12), ("512MB", 512e6)]
)
def test_sizes_are_read_with_their_unit(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["80", "GB", "-1GB", "0GB", "80 gigs", "8e1GB", "1GBs"])
def test_bad_sizes_are_refused(text):
    with pytest.raises(ValueError, match="80GB or 24GiB"):
        parse_size(text)


def test_the_plan_command_prints_every_mode(capsys):
    small = ["--model", "resnet18", "--width", "0.25", "--image-size", "32", "--batch-size", "64"]
    assert run(["plan", *small, "--gpus", "2", "--gpu-memory", "24GiB"]) == 0
    printed = capsys.readouterr().out
    for word in ("plain", "replay", "lockstep", "grad-cache", "predicted", "GPU GB", "host GB"):
        assert word in printed
    assert "22 GB/s in each direction" in printed
    assert printed.splitlines()[-1].endswith(" --memory plain")
    assert run(["plan", *small, "--gpu-memory", "80"]) == 1
    assert "80GB or 24GiB" in capsys.readouterr().err
    assert run(["plan", *small, "--gpus", "0"]) == 1
    assert "gpus" in capsys.readouterr().err
    assert run(["plan", "--width", "0"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "width must be positive" in printed.err


def test_the_plan_counts_views_crops_and_followers(capsys, monkeypatch):
    given = Plan(model="resnet18", width=0.25, image_size=32, batch_size=64)

    def plain_bytes(options):
        work = workload(replace(given, **options).config, 1, planner.A100_80GB)
        return work.setting("plain").device_bytes

    # Four crops of 16² have the pixels of one view of 32².
    two, four, crops = map(plain_bytes, ({}, {"views": 4}, {"small_crops": 4, "small_size": 16}))
    assert four - two == pytest.approx(2 * (crops - two), rel=0.02)
    # A momentum encoder and an average of weights.
    assert plain_bytes({"queue": 1024, "ema": 0.99}) > two
    kinds = ("plain", "lockstep")
    monkeypatch.setattr(planner, "settings", lambda work, *_: map(work.setting, kinds))
    small = ["--model", "resnet18", "--width", "0.25", "--image-size", "32", "--batch-size", "64"]
    assert run(["plan", *small, "--small-crops", "4", "--small-size", "16", "--ema", "0.9"]) == 0
    printed = capsys.readouterr().out
    assert "64 images in 2 views of 32×32 and 4 of 16×16" in printed
    assert "small_crops cannot be used with memory lockstep" in printed
    assert " --small-crops 4 --small-size 16 --ema 0.9 " in printed


class Stop(Exception):
    pass


@pytest.fixture
def config(tmp_path):
    own = {"width": 0.25, "augmentation": Augmentation(size=32), "batch_size": 16}
    return replace(TINY, data="arrays", out=tmp_path / "run", steps=1, warmup_epochs=0, **own)


@pytest.fixture
def arrays(monkeypatch):
    images = torch.randint(0, 255, (16, 20, 20, 3), dtype=torch.uint8).numpy()
    monkeypatch.setattr("simclr_fast.training.pretrain.open_data", lambda config: images)


def test_auto_takes_plain_for_a_small_batch_on_the_cpu(config, arrays, monkeypatch):
    taken = []

    def note(model, **options):
        taken.append(options["memory"])
        return LargeBatch(model, **options)

    monkeypatch.setattr("simclr_fast.training.loop.LargeBatch", note)
    assert config.memory == "auto"
    pretrain(config)
    assert taken == ["plain"]


def exhaust_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory")


def exhaust_cpu():
    torch.empty(1 << 55)


def exhaust_cudnn():
    raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")


def exhaust_python():
    raise MemoryError


PLACES = {
    "backward": (LargeBatch, "backward", 1),
    "optimizer's first step": (LARS, "step", 1),
    "optimizer's second step": (LARS, "step", 2),
    "forward": (SimCLR, "forward", 1),
    "loader": (TwoViewLoader, "__iter__", 1),
}


@pytest.mark.parametrize("exhaust", [exhaust_gpu, exhaust_cpu, exhaust_cudnn, exhaust_python])
@pytest.mark.parametrize("place", PLACES)
def test_out_of_memory_names_the_next_setting(config, arrays, monkeypatch, place, exhaust):
    kind, name, step = PLACES[place]
    original, calls = getattr(kind, name), []

    def fail(*arguments, **options):
        calls.append(1)
        if len(calls) == step:
            monkeypatch.setattr(kind, name, original)
            exhaust()
        return original(*arguments, **options)

    monkeypatch.setattr(kind, name, fail)
    smaller = Setting("replay", None, 1.5e9)
    monkeypatch.setattr(planner, "next_smaller", lambda *_: (smaller, smaller.flags))
    says = f"rank 0, step {step}: out of memory with --memory plain; next: --memory replay"
    with pytest.raises(planner.OutOfMemory, match=says):
        pretrain(replace(config, memory="plain", steps=2))


@pytest.mark.parametrize("cuda", [True, False])
def test_out_of_memory_names_the_allocators_variable(monkeypatch, cuda):
    monkeypatch.setattr(planner, "next_smaller", lambda *_: None)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    task = replace(work(24), cuda=cuda)
    with (
        pytest.raises(planner.OutOfMemory) as found,
        planner.out_of_memory(task, Setting("lockstep", 8, 1e9), lambda: "rank 0, step 1"),
    ):
        exhaust_gpu()
    assert ("PYTORCH_ALLOC_CONF=expandable_segments:True" in str(found.value)) is cuda


def test_what_comes_after_a_setting_needs_less():
    task = work(24, resnet10)
    now = task.setting("plain")
    for _ in range(3):
        found, flags = planner.next_smaller(task, now)
        assert found.device_bytes <= 0.9 * now.device_bytes
        assert flags.startswith("--memory lockstep --gpu-memory ")
        now = found
    assert planner.next_smaller(task, Setting("lockstep", 8, 1e6)) is None
    # A mode that was not planned: its memory is predicted first.
    found, _ = planner.next_smaller(task, Setting("replay", None, math.inf))
    assert found.device_bytes < task.setting("replay").device_bytes


def test_other_errors_stay_what_they_are():
    assert not planner.is_out_of_memory(RuntimeError("shapes do not match"))
    assert not planner.is_out_of_memory(ValueError("out of memory"))


def test_the_command_says_it_in_a_line(monkeypatch, capsys):
    def fail(config):
        raise planner.OutOfMemory("rank 0, step 1: out of memory with --memory plain; next: ...")

    monkeypatch.setattr("simclr_fast.commands.pretrain.pretrain", fail)
    assert run(["pretrain"]) == 1
    assert capsys.readouterr().err.startswith("simclr-fast pretrain: rank 0, step 1: out of memory")


def test_sizes_are_rounded_to_the_safe_side():
    assert gigabytes(3.21e9) == "3.3GB"
    assert gigabytes(3.29e9, down=True) == "3.2GB"
    assert parse_size(gigabytes(24e9)) == 24e9
