"""Ranks that die, stall or raise in mid-run, and what a resumed run makes of it."""

import io
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rank_runs import Run
from tiny_runs import TINY
from torch import nn

from simclr_fast.models.encoders import SimCLR
from simclr_fast.optim.lars import LARS
from simclr_fast.training import loop
from simclr_fast.training import pretrain as train
from simclr_fast.utils import distributed
from simclr_fast.utils.checkpoint import checkpoints, load_checkpoint
from simclr_fast.utils.distributed import World

pytest.importorskip("torchvision")
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def config(tmp_path):
    return make_config(tmp_path / "run")


def make_config(out):
    own = {"batch_size": 9, "steps": STEPS, "checkpoint_every": 2, "memory": "plain"}
    return replace(TINY, data="arrays", out=out, **own)


@pytest.fixture
def begin():
    runs = []

    def start(*arguments):
        runs.append(Run(*arguments))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def freeze():
    os.kill(os.getpid(), signal.SIGSTOP)


def hang():
    time.sleep(1000)


def refuse():
    raise ValueError("no such thing")


def exhaust():
    raise torch.OutOfMemoryError("CUDA out of memory")


@dataclass
class InStep:
    """On `ranks`: action() between forward and backward of `step`."""

    step: int
    action: Callable
    ranks: tuple[int, ...] = (0, 1, 2)
    double: bool = False

    def __call__(self, rank):
        if self.double:
            in_float64(rank)
        if rank not in self.ranks:
            return
        calls, compute = [], train.nt_xent_loss

        def patched(*arguments, **options):
            calls.append(1)
            if len(calls) == self.step:
                self.action()
            return compute(*arguments, **options)

        train.nt_xent_loss = patched


def die_in_checkpoint(rank):
    """Rank 0 dies with half of its second checkpoint written; the others a moment later."""
    save = torch.save

    def patched(state, path):
        whole = io.BytesIO()
        save(state, whole)
        half = state["step"] == 4
        path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2 if half else None])
        if half:
            die()

    torch.save = patched


def all_die_in_checkpoint(rank):
    """Like `die_in_checkpoint`, but the others die while rank 0 writes, in their next step."""
    if rank == 0:
        die_in_checkpoint(rank)
        return
    mark = World.mark

    def patched(world, step, doing):
        if step == 5:
            die()
        mark(world, step, doing)

    World.mark = patched


def in_float64(rank):
    torch.set_default_dtype(torch.float64)
    loader = train.MultiViewLoader

    class Wide(loader):
        def __iter__(self):
            for view1, view2, index in super().__iter__():
                yield view1.double(), view2.double(), index

    train.MultiViewLoader = Wide


slow = pytest.mark.slow
EXHAUSTED = "step 3: out of memory with --memory plain; next: --memory lockstep --gpu-memory"


@pytest.mark.parametrize(
    ("action", "who", "size", "says"),
    [
        (die, 1, 3, "rank 1 died or froze in step 3 (training)"),
        pytest.param(die, 0, 3, "rank 0, which hosts the store, died", marks=slow),
        pytest.param(freeze, 1, 2, "rank 1 died or froze in step 3 (training)", marks=slow),
        (hang, 1, 2, "rank 1 stalled in step 3 (training) for 4 s"),
        (refuse, 1, 2, "rank 1 ended in step 3 (training): ValueError: no such thing"),
        (exhaust, 0, 2, f"rank 0, {EXHAUSTED}"),
        pytest.param(exhaust, 1, 2, f"rank 1, {EXHAUSTED}", marks=slow),
    ],
)
def test_after_a_failure_all_ranks_end_and_name_rank_and_step(
    config, begin, action, who, size, says
):
    config = replace(config, timeout=4 if action in (hang, freeze) else 600)
    others = [rank for rank in range(size) if rank != who]
    run = begin(config, size, InStep(3, action, (who,)))
    assert run.wait(others) == [1] * len(others), [run.says(rank) for rank in others]
    for rank in others:
        assert says in run.says(rank)
        assert "step 3" in run.says(rank)
        assert "--resume" in run.says(rank)
    if action is exhaust:
        assert run.wait([who]) == [1]
        assert says in run.says(who)


@dataclass
class AsNccl:
    """Memory runs out on rank `who` in its third step, in `place`; the rest is as with NCCL.

    Collectives never return once a rank is lost, and destroy_process_group waits for them.
    """

    who: int
    place: str
    folder: Path

    def __call__(self, rank):
        dist.destroy_process_group = hang
        for name in ("all_gather", "all_gather_into_tensor", "all_gather_single", "all_reduce"):
            if hasattr(dist, name):
                setattr(dist, name, self.hanging(getattr(dist, name)))
        if rank == self.who:
            kind, name = {
                "loader": (train.MultiViewLoader, "_batch_ids"),
                "forward": (SimCLR, "forward"),
                "loss": (train, "nt_xent_loss"),
                "optimizer": (LARS, "step"),
            }[self.place]
            self.exhaust_third(kind, name)

    def hanging(self, collective):
        def patched(*arguments, **options):
            try:
                return collective(*arguments, **options)
            except RuntimeError:
                hang()

        return patched

    def exhaust_third(self, kind, name):
        calls, original = [], getattr(kind, name)

        def patched(*arguments, **options):
            calls.append(1)
            if len(calls) == 3:
                (self.folder / "failed").write_text("")
                exhaust()
            return original(*arguments, **options)

        setattr(kind, name, patched)


@slow
@pytest.mark.parametrize(
    ("who", "place"), [(1, "loss"), (0, "optimizer"), (1, "loader"), (0, "forward")]
)
def test_with_nccl_a_failure_ends_all_ranks_quickly(config, begin, tmp_path, who, place):
    run = begin(config, 2, AsNccl(who, place, tmp_path))
    assert run.wait() == [1, 1], [run.says(0), run.says(1)]
    # Half of it is what a rank may take to end by itself.
    assert time.time() - (tmp_path / "failed").stat().st_mtime < 15
    first = run.says(who).splitlines()
    assert any(line.startswith(f"simclr-fast: rank {who}: step 3") for line in first), first
    assert "out of memory with --memory plain" in run.says(who)
    assert f"rank {who} " in run.says(1 - who)
    assert "step 3" in run.says(1 - who)


@dataclass
class Gathering:
    """Eight ranks gather rows, of which rank 3 has none; rank 5 then runs out of memory."""

    folder: Path

    def __call__(self, rank):
        AsNccl(-1, "", self.folder)(rank)
        train.pretrain = lambda config: self.gather(rank)

    def gather(self, rank):
        with distributed.join_world("cpu", 60) as world:
            rows = torch.full((0 if rank == 3 else 2, 4), float(rank))
            found = distributed.all_gather_rows(rows, world.group)
            assert found[:, 0].tolist() == [r for r in range(8) if r != 3 for _ in range(2)]
            if rank == 5:
                (self.folder / "failed").write_text("")
                exhaust()
            distributed.all_gather_rows(rows, world.group)


@pytest.mark.slow
def test_eight_ranks_one_without_rows_one_without_memory(config, begin, tmp_path):
    run = begin(config, 8, Gathering(tmp_path))
    assert run.wait() == [1] * 8, [run.says(rank) for rank in range(8)]
    assert time.time() - (tmp_path / "failed").stat().st_mtime < 20
    for rank in range(8):
        assert "CUDA out of memory" in run.says(rank), (rank, run.says(rank))
        assert ("rank 5 ended" in run.says(rank)) == (rank != 5)


def absent(rank):
    if rank == 1:
        hang()


def test_a_rank_that_never_joins_ends_the_run(config, begin):
    run = begin(replace(config, timeout=1), 2, absent)
    assert run.wait([0]) == [1]
    assert "not all 2 ranks joined within 1 s" in run.says(0)


def finished(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    last = load_checkpoint(checkpoints(out / "checkpoints")[-1])
    assert last["step"] == STEPS
    return [line["loss"] for line in lines], last


@pytest.fixture(scope="module")
def uninterrupted(folder):
    config = make_config(folder / "whole")
    assert Run(config, 2).wait() == [0, 0]
    return finished(config.out)


@pytest.mark.parametrize(
    "plan",
    [InStep(4, die), die_in_checkpoint, all_die_in_checkpoint],
    ids=["step", "checkpoint", "all_in_checkpoint"],
)
def test_resume_after_kill_is_bit_for_bit(config, begin, uninterrupted, plan):
    killed = begin(config, 2, plan).wait()
    assert killed[0] == -signal.SIGKILL
    if plan is not die_in_checkpoint:
        assert killed[1] == -signal.SIGKILL
    (left,) = checkpoints(config.out / "checkpoints")
    assert load_checkpoint(left)["step"] == 2
    assert begin(replace(config, resume=True), 2).wait() == [0, 0]
    losses, last = finished(config.out)
    assert losses == uninterrupted[0]
    for key, value in uninterrupted[1]["model"].items():
        assert torch.equal(value, last["model"][key]), key


def test_resume_with_other_numbers_of_ranks(config, begin):
    """In float64. Two ranks are killed, then one goes on, then three. One rank does the same."""
    whole = replace(config, out=config.out.parent / "whole")
    assert begin(whole, 1, in_float64).wait() == [0]
    losses, last = finished(whole.out)
    assert begin(config, 2, InStep(4, die, double=True)).wait() == [-signal.SIGKILL] * 2
    for size in (1, 3):
        resumed = replace(config, out=config.out.parent / f"resumed{size}", resume=True)
        shutil.copytree(config.out, resumed.out)
        assert begin(resumed, size, in_float64).wait() == [0] * size
        found, end = finished(resumed.out)
        assert found == pytest.approx(losses, rel=1e-12)
        for key, value in last["model"].items():
            torch.testing.assert_close(end["model"][key], value, rtol=1e-9, atol=1e-11, msg=key)


def in_small_messages(rank):
    distributed._CHUNK = 10_000


def test_resume_without_a_shared_disk(config, begin, tmp_path, uninterrupted):
    """Rank 1's machine has an older checkpoint only; then none at all. Rank 0's counts."""
    outs = [config.out, tmp_path / "other"]
    assert begin(config, 2, InStep(6, die), outs).wait() == [-signal.SIGKILL] * 2
    assert load_checkpoint(checkpoints(config.out / "checkpoints")[-1])["step"] == 4
    (outs[1] / "checkpoints").mkdir(parents=True)
    shutil.copy(checkpoints(config.out / "checkpoints")[0], outs[1] / "checkpoints")
    assert begin(replace(config, resume=True), 2, in_small_messages, outs).wait() == [0, 0]
    losses, last = finished(config.out)
    assert losses == uninterrupted[0]
    assert not (outs[1] / "encoder.safetensors").exists()
    for key, value in uninterrupted[1]["model"].items():
        assert torch.equal(value, last["model"][key]), key


def test_a_bad_checkpoint_ends_every_rank(config, begin):
    folder = config.out / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "step-00000002.pt").write_bytes(b"not one")
    run = begin(replace(config, resume=True), 2)
    assert run.wait() == [1, 1]
    for rank in range(2):
        assert "not a readable checkpoint" in run.says(rank)


def with_other_weights_on_rank_1(rank):
    if rank == 1:
        # LargeBatch gives all ranks the weights of rank 0. What changes them afterwards is seen.
        build = loop.build_optimizer

        def changed(model, config):
            nn.init.normal_(next(model.parameters()))
            return build(model, config)

        loop.build_optimizer = changed


def test_ranks_with_other_weights_are_named(config, begin):
    run = begin(config, 2, with_other_weights_on_rank_1)
    assert run.wait() == [1, 1]
    for rank in range(2):
        assert "rank 1 has other weights than rank 0" in run.says(rank)


def as_srun_starts_it(rank):
    for name, value in {"PROCID": rank, "LOCALID": rank, "STEP_ID": 0, "NTASKS": 2}.items():
        os.environ[f"SLURM_{name}"] = str(value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]


def test_srun_tasks_are_one_run(config, begin, uninterrupted):
    assert begin(config, 2, as_srun_starts_it).wait() == [0, 0]
    assert finished(config.out)[0] == uninterrupted[0]


def save_slowly(rank):
    save = torch.save

    def patched(state, path):
        time.sleep(2)
        save(state, path)

    torch.save = patched


@pytest.mark.parametrize(
    ("number", "who"), [(signal.SIGTERM, 1), pytest.param(signal.SIGUSR1, 0, marks=slow)]
)
def test_a_signal_on_one_rank_stops_all_and_saves(config, begin, number, who):
    """No log line is due, at which the ranks would meet anyway."""
    config = replace(config, steps=100_000, log_every=100_000, checkpoint_every=100_000)
    run = begin(config, 2, save_slowly)
    end = time.monotonic() + 60
    while not (config.out / "metrics.jsonl").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.2)
    os.kill(run.processes[who].pid, number)
    sent = time.monotonic()
    assert run.wait([1]) == [1]
    # A launcher ends the other ranks as soon as one is gone.
    (saved,) = checkpoints(config.out / "checkpoints")
    assert run.wait() == [1, 1]
    assert time.monotonic() - sent < 10
    for rank in range(2):
        assert "Interrupted" in run.says(rank)
        assert "--resume" in run.says(rank)
    assert load_checkpoint(saved)["step"] >= 1
