"""The doctor on two ranks (gloo): what only several ranks can do wrong."""

import json

import pytest
import torch
import torch.distributed as dist
from doctor_cases import Steps, both_at_once, small_model, textbook, views
from made_once import made_once
from rank_runs import on_ranks
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import simclr_fast
from simclr_fast import LargeBatch, doctor, nt_xent_loss
from simclr_fast.utils.distributed import all_gather_rows


def gathered(z, live):
    """The rows of both ranks, view 1 first; those of the other rank are constants.

    live: whether this rank's rows have a gradient.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    parts = list(all_gather_rows(z.detach(), dist.group.WORLD).chunk(ranks))
    if live:
        parts[rank] = z
    halves = [part.chunk(2) for part in parts]
    return torch.cat([first for first, _ in halves] + [second for _, second in halves])


def own_slot(z):
    """The loss of the whole batch on every rank, whose gradient DDP averages: off by 1 / ranks."""
    return textbook(gathered(z, live=True))


def anchors(z, live):
    """Rows of this rank against all rows; a gather without gradient."""
    keys = F.normalize(gathered(z, live), dim=1)
    n, total = len(z) // 2, len(keys) // 2
    place = dist.get_rank() * n + torch.arange(n)
    own = torch.cat((place, total + place))
    logits = F.normalize(z, dim=1) @ keys.T / 0.2
    logits[torch.arange(2 * n), own] = -torch.inf
    return F.cross_entropy(logits, own.roll(n))


def ours(z):
    return nt_xent_loss(z, temperature=0.2, group=dist.group.WORLD)


def lightly(z):
    from lightly.loss import NTXentLoss

    return NTXentLoss(0.2, gather_distributed=True)(*z.chunk(2))


LOSSES = {
    "ours": ours,
    "our module": lambda z: simclr_fast.NTXentLoss(0.2, gather_distributed=True)(z),
    "lightly": lightly,
    "own slot times ranks": lambda z: own_slot(z) * dist.get_world_size(),
    "local": textbook,
    "own slot": own_slot,
    "anchors": lambda z: anchors(z, True),
    "constant keys": lambda z: anchors(z, False),
}


def case(rank, loss="ours", norm=nn.GroupNorm, wrap=True, same=False, large=False, check=False):
    """The report of one case on this rank."""
    torch.manual_seed(0)
    model = small_model(norm)
    if large:
        step = LargeBatch(model, memory="plain", group=dist.group.WORLD)
    run = DistributedDataParallel(model) if wrap else model
    steps = Steps(model=model, batch=views(16, 0 if same else rank), loss=LOSSES[loss])
    steps.forward = lambda _, batch: both_at_once(run, batch)
    if check:
        before = [p.detach().clone() for p in model.parameters()]
        report = doctor.check(steps, model, steps.batch)
        assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
        return report
    with doctor.watch(model) as report:
        for _ in range(2):
            if large:
                steps.optimizer.zero_grad()
                step.backward(steps.batch, lambda outputs: steps.loss(outputs[1]))
                steps.optimizer.step()
            else:
                steps(model, steps.batch)
    return report


CASES = {
    "ours": ({}, []),
    "our module": ({"loss": "our module"}, []),
    "lightly": ({"loss": "lightly"}, []),
    "own slot times ranks": ({"loss": "own slot times ranks"}, []),
    "LargeBatch": ({"norm": nn.BatchNorm2d, "wrap": False, "large": True}, []),
    "local": ({"loss": "local"}, ["local-negatives"]),
    "own slot": ({"loss": "own slot"}, ["gradient-off-by-ranks"]),
    "anchors": ({"loss": "anchors"}, ["detached-gather"]),
    "constant keys": ({"loss": "constant keys"}, ["detached-gather"]),
    "not wrapped": ({"wrap": False}, ["ranks-not-averaged"]),
    "same batch": ({"same": True}, ["same-batch-on-ranks"]),
    "batch norm": ({"norm": nn.BatchNorm2d}, ["batch-norm-per-rank"]),
    "checked": ({"check": True}, []),
    "checked, own slot": ({"loss": "own slot", "check": True}, ["gradient-off-by-ranks"]),
    "checked, same batch": ({"same": True, "check": True}, ["same-batch-on-ranks"]),
}


def _run(rank, url, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=2)
    found = {}
    for name, (options, _) in CASES.items():
        report = case(rank, **options)
        found[name] = [report.names, str(report)]
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(folder):
    folder.mkdir()
    on_ranks(_run, (f"file://{folder / 'meet'}", folder), 2)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    pytest.importorskip("lightly")
    folder = made_once(tmp_path_factory, "doctor-ranks", run_ranks)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_on_two_ranks(reports, name):
    for report in reports:
        names, text = report[name]
        assert names == CASES[name][1], text
        assert "temperature of the loss: 0.2" in text


def test_the_factor_is_named(reports):
    assert "is 0.5 times the right one" in reports[0]["own slot"][1]
    assert "contrasts the 32 rows of this rank only, not the 64" in reports[1]["local"][1]
