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
from simclr_fast.data.loader import TwoViewLoader
from simclr_fast.large_batch import LargeBatch, planner
from simclr_fast.large_batch.planner import Setting, Workload, parse_size
from simclr_fast.large_batch.simulate import Meter, Phase, Step
from simclr_fast.losses.nt_xent import nt_xent_loss
from simclr_fast.models.encoders import SimCLR, build_encoder, build_projector
from simclr_fast.optim.lars import LARS
from simclr_fast.training.pretrain import pretrain

pytest.importorskip("torchvision")
SIZE, ROWS, MICRO = 32, 48, 10


def make():
    encoder, dim = build_encoder("resnet10", width=0.25, image_size=SIZE)
    return SimCLR(encoder, build_projector("nonlinear", dim))


def loss(outputs):
    return nt_xent_loss(outputs[1], return_stats=True)


def step(dtype=None):
    return Step(make, (3, SIZE, SIZE), loss, dtype)


def peak(phases):
    return max(phase.peak for phase in phases.values())


def work(batch_size=ROWS // 2, **options):
    options = {"dtype": None, "cuda": False, **options}
    return Workload(make, SIZE, batch_size, **options)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("memory", ["plain", "replay", "lockstep", "grad-cache"])
def test_simulated_is_what_a_real_step_takes(memory, dtype):
    found, real = (step(dtype).run(memory, ROWS, MICRO, fake=fake) for fake in (True, False))
    assert found.keys() == real.keys()
    for key, phase in found.items():
        assert phase.peak == pytest.approx(real[key].peak, rel=1e-3), key
        assert phase.flops == real[key].flops
        assert phase.stored == real[key].stored


def test_dali_is_counted_by_the_size_of_the_views():
    """Beside what CUDA itself takes, which is the same for all sizes."""
    at_32, at_224 = (
        Workload(make, size, 8, dtype=None, cuda=True).bytes_outside_step("plain")
        - Workload(make, size, 8, dtype=None, cuda=False).bytes_outside_step("plain")
        for size in (32, 224)
    )
    assert at_32 > dali_bytes(32)
    assert at_224 - at_32 == dali_bytes(224) - dali_bytes(32) > 1e9


def test_plain_is_its_saved_tensors():
    """Independently of the meter: storages that autograd's hooks see, and what was there before."""
    model, views = make(), torch.randn(ROWS, 3, SIZE, SIZE)
    storages = {}

    def keep(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        # Two views are joined first.
        _, z = model.train()(torch.cat(views.chunk(2)))
    before = [views, *model.parameters(), *model.buffers()]
    storages.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in before})
    at_loss = step().run("plain", ROWS, MICRO)["step", 0].peak
    assert at_loss == pytest.approx(sum(storages.values()) + z.nbytes, rel=0.02)


def test_many_micro_batches_lie_on_the_line():
    for memory in ("lockstep", "grad-cache"):
        whole = step().run(memory, 56, 8)
        found = work(28)._phases(memory, 8)
        assert peak(found) == pytest.approx(peak(whole), rel=0.01)
        for name in ("flops", "stored"):
            sums = [sum(getattr(p, name) for p in phases.values()) for phases in (found, whole)]
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


def test_settings_need_less_and_compute_more():
    plain, replay, lockstep = (
        work().setting(m, s) for m, s in (("plain", None), ("replay", None), ("lockstep", 8))
    )
    assert plain.device_bytes > replay.device_bytes > lockstep.device_bytes
    assert plain.compute == pytest.approx(1, rel=0.01)
    assert 1.25 < replay.compute < 1.4
    assert 1.25 < lockstep.compute < 1.4
    sparse = work().setting("lockstep", 8, 2)
    assert sparse.device_bytes < lockstep.device_bytes
    assert 1.4 < sparse.compute < 1.55
    assert sparse.flags == "--memory lockstep --micro-batch 8 --keep-every 2"
    # What lies beside a step: momentum, and the next batch's views.
    momentum = sum(p.nbytes for p in make().parameters())
    assert work().bytes_outside_step("plain") == momentum + ROWS * 3 * SIZE**2 * 4
    assert (
        work(ranks=2).bytes_outside_step("replay") - work(ranks=2).bytes_outside_step("lockstep")
        == momentum
    )


def test_offload_takes_the_first_inputs_until_it_fits(monkeypatch):
    kept, forward, backward = (0, 10, 20, 30), (5, 15, 35, 70), (20, 40, 60, 75)
    phases = {("forward", i): Phase(forward[i], stored=kept[i]) for i in range(4)}
    phases.update({("backward", i): Phase(backward[i]) for i in range(4)})
    monkeypatch.setattr(Workload, "_phases", lambda *_: phases)
    monkeypatch.setattr(Workload, "bytes_outside_step", lambda *_: 100)
    found = [work().offloaded(Setting("lockstep", 8, 175), limit) for limit in (165, 100)]
    # In the last block's backward the input before its own is on its way back.
    assert [(s.device_bytes, s.offload_bytes) for s in found] == [(165, 10), (165, 60)]
    assert found[0].flags == "--memory lockstep --micro-batch 8 --offload-gb 0.1"


def test_choice_follows_memory():
    task = work()
    plain, replay = task.setting("plain"), task.setting("replay")
    assert planner.choose(task, 2 * plain.device_bytes).memory == "plain"
    assert planner.choose(task, replay.device_bytes * 1.06).memory == "replay"
    lockstep = task.setting("lockstep", 32)
    assert planner.choose(task, lockstep.device_bytes * 1.06).memory == "lockstep"
    with pytest.raises(ValueError, match="fits in no mode"):
        planner.choose(task, 1e6)


def test_grad_cache_is_chosen_for_a_model_without_batch_norms(monkeypatch):
    ways = [Setting("plain", None, 900), Setting("grad-cache", 32, 100)]
    monkeypatch.setattr(planner, "settings", lambda *_: ways)
    monkeypatch.setattr(Workload, "setting", lambda *_: ways[0])
    monkeypatch.setattr(Workload, "offloaded", lambda *_: ways[0])
    for task, expected in ((replace(work(), make=_Plain), ways[1]), (work(), None)):
        if expected is None:
            with pytest.raises(ValueError, match="fits in no mode: --memory plain"):
                planner.choose(task, 200)
        else:
            assert planner.choose(task, 200) == expected
        assert planner.next_smaller(task, "plain", None) == expected


def test_a_model_that_a_mode_cannot_run_is_said():
    task = replace(work(), make=lambda: _Plain())
    found = task.setting("replay")
    assert math.isinf(found.device_bytes)
    assert "_Plain has none" in found.refusal


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
    assert printed.splitlines()[-1].endswith(" --memory plain")
    assert run(["plan", *small, "--gpu-memory", "80"]) == 1
    assert "80GB or 24GiB" in capsys.readouterr().err
    assert run(["plan", *small, "--gpus", "0"]) == 1
    assert "gpus" in capsys.readouterr().err
    assert run(["plan", "--width", "0"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "width must be positive" in printed.err


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
    monkeypatch.setattr(planner, "next_smaller", lambda *_, **__: Setting("replay", None, 1.5e9))
    says = f"rank 0, step {step}: out of memory with --memory plain; next: --memory replay"
    with pytest.raises(planner.OutOfMemory, match=says):
        pretrain(replace(config, memory="plain", steps=2))


def test_what_comes_after_a_setting_needs_less(monkeypatch):
    assert planner.next_smaller(work(), "plain", None).memory == "replay"
    monkeypatch.setattr(planner, "settings", lambda *_: [])
    monkeypatch.setattr(Workload, "setting", lambda *_: Setting("lockstep", 256, 100))
    for moved, helps in ((95, False), (60, True)):
        offloaded = Setting("lockstep", 256, moved, offload_bytes=40)
        monkeypatch.setattr(Workload, "offloaded", lambda *_, found=offloaded: found)
        assert planner.next_smaller(work(), "lockstep", 256) == (offloaded if helps else None)


def test_other_errors_stay_what_they_are():
    assert not planner.is_out_of_memory(RuntimeError("shapes do not match"))
    assert not planner.is_out_of_memory(ValueError("out of memory"))


def test_the_command_says_it_in_a_line(monkeypatch, capsys):
    def fail(config):
        raise planner.OutOfMemory("rank 0, step 1: out of memory with --memory plain; next: ...")

    monkeypatch.setattr("simclr_fast.commands.pretrain.pretrain", fail)
    assert run(["pretrain"]) == 1
    assert capsys.readouterr().err.startswith("simclr-fast pretrain: rank 0, step 1: out of memory")


def test_flags_of_a_setting():
    assert Setting("lockstep", 64, 1, offload_bytes=3.21e9).flags == (
        "--memory lockstep --micro-batch 64 --offload-gb 3.3"
    )
