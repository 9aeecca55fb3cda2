"""The loss of several ranks, on gloo, against one process with the whole batch in float64."""

import pytest
import torch
import torch.distributed as dist
from rank_runs import on_ranks
from torch.nn.parallel import DistributedDataParallel

from simclr_fast import (
    NTXentLoss,
    multi_view_nt_xent_loss,
    nt_xent_loss,
    reference,
    sup_con_loss,
)
from simclr_fast.losses import KeyQueue, queue_loss
from simclr_fast.utils.distributed import all_gather_rows

D, TAU = 12, 0.2
# Pairs of each rank: even, uneven, a single one. "two" are half of the four processes.
BATCHES = [("two", [(5, 5), (7, 2)]), ("four", [(3, 3, 3, 3), (1, 6, 2, 4), (2, 0, 3, 0)])]


def whole_batch(pairs, dtype):
    generator = torch.Generator().manual_seed(sum(pairs))
    z1, z2 = torch.randn(2, sum(pairs), D, dtype=torch.float64, generator=generator).to(dtype)
    return z1, z2


def check_loss(group, rank, pairs, dtype, reduction, two, decoupled=False):
    z1, z2 = whole_batch(pairs, dtype)
    own = slice(sum(pairs[:rank]), sum(pairs[: rank + 1]))
    leaves = [z1[own].clone().requires_grad_(), z2[own].clone().requires_grad_()]
    tau = torch.tensor(TAU, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    arguments = leaves if two else [torch.cat(leaves), None]
    options = {"decoupled": decoupled, "return_stats": True}
    options |= {"row_counts": [2 * n for n in pairs]} if decoupled else {}
    loss, stats = nt_xent_loss(*arguments, tau, reduction=reduction, group=group, **options)
    if decoupled:
        with pytest.raises(ValueError, match="row_counts must hold the numbers of rows of"):
            nt_xent_loss(*arguments, tau, group=group, row_counts=[1] * len(pairs))
    grads = torch.autograd.grad(loss * 3, [*leaves, tau])

    whole = [z.double().requires_grad_() for z in (z1, z2)]
    exact_tau = torch.tensor(TAU, dtype=torch.float64, requires_grad=True)
    rows = reference.nt_xent(*whole, exact_tau, decoupled)
    wanted = rows.mean() if reduction == "mean" else rows.sum()
    exact = torch.autograd.grad(wanted * 3, [*whole, exact_tau])
    _, one_process = nt_xent_loss(*(z.detach() for z in whole), TAU, **options)

    rtol = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    close = {"rtol": rtol, "atol": rtol, "check_dtype": False}
    torch.testing.assert_close(loss.detach(), wanted.detach(), **close)
    # Times the world size, so that DDP's average is the sum.
    for grad, expected in zip(grads[:2], exact[:2], strict=True):
        torch.testing.assert_close(grad, expected[own] * len(pairs), **close)
    dist.all_reduce(grads[2], group=group)
    torch.testing.assert_close(grads[2] / len(pairs), exact[2], **close)
    for actual, expected in zip(stats, one_process, strict=True):
        torch.testing.assert_close(actual, expected, **close)


def check_ddp(group, rank, pairs):
    """Weights and a learnable temperature under DDP get the gradients of one process."""

    # Without a group: all processes.
    gather = {"gather_distributed": True}
    gather |= {} if len(pairs) == dist.get_world_size() else {"group": group}

    def model():
        torch.manual_seed(0)
        return torch.nn.ModuleList(
            [torch.nn.Linear(D, 6), NTXentLoss(TAU, learnable=True, **gather)]
        ).double()

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.loss = model()

        def forward(self, x1, x2):
            return self.loss(self.encoder(x1), self.encoder(x2))

    x1, x2 = whole_batch(pairs, torch.float64)
    own = slice(sum(pairs[:rank]), sum(pairs[: rank + 1]))
    step = DistributedDataParallel(Step(), process_group=group)
    step(x1[own], x2[own]).backward()
    encoder, loss = model()
    tau = loss.log_temperature.exp()
    reference.nt_xent(encoder(x1), encoder(x2), tau).mean().backward()
    wanted = [*encoder.parameters(), loss.log_temperature]
    for actual, expected in zip(step.parameters(), wanted, strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-11, atol=1e-13)


def check_no_communication_in_backward(group, rank, pairs):
    z1, z2 = (z[: pairs[rank]].clone().requires_grad_() for z in whole_batch(pairs, torch.float32))
    loss = nt_xent_loss(z1, z2, group=group)
    if rank == 0:  # the others never come, so anything collective would wait forever
        loss.backward()


def check_double_backward_is_refused(group, rank, pairs):
    z1, z2 = (z[: pairs[rank]].clone().requires_grad_() for z in whole_batch(pairs, torch.float64))
    labels = torch.arange(pairs[rank])
    for loss in (nt_xent_loss(z1, z2, group=group), sup_con_loss(z1, labels, group=group)):
        (grad,) = torch.autograd.grad(loss, z1, create_graph=True)
        with pytest.raises(NotImplementedError, match="no double backward"):
            grad.sum().backward()


def check_sup_con(group, rank, pairs):
    z1, z2 = whole_batch(pairs, torch.float64)
    z = torch.cat((z1, z2))
    # Odd and even numbers of rows.
    rows = [p + rank_number % 2 if p else 0 for rank_number, p in enumerate(pairs)]
    z, labels = z[: sum(rows)], torch.arange(sum(rows)) % 3
    labels[-1] = 9  # alone in its class
    own = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    leaves = z[own].clone().requires_grad_(), torch.tensor(TAU, dtype=z.dtype, requires_grad=True)
    loss = sup_con_loss(leaves[0], labels[own], leaves[1], group=group)
    grads = torch.autograd.grad(loss * 3, leaves)
    whole = z.clone().requires_grad_(), torch.tensor(TAU, dtype=z.dtype, requires_grad=True)
    wanted = reference.sup_con(whole[0], labels, whole[1]).mean()
    exact = torch.autograd.grad(wanted * 3, whole)
    dist.all_reduce(grads[1], group=group)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(grads[0], exact[0][own] * len(pairs))
    torch.testing.assert_close(grads[1] / len(pairs), exact[1])
    own = slice(sum(pairs[:rank]), sum(pairs[: rank + 1]))
    crops = [z1, z2, z1 + z2.cos()]
    loss = multi_view_nt_xent_loss([crop[own] for crop in crops], group=group)
    torch.testing.assert_close(loss, multi_view_nt_xent_loss(crops))


def check_queue(group, rank, pairs):
    """The loss against a queue, and a queue that all ranks push to."""
    z, keys = whole_batch(pairs, torch.float64)
    own = slice(sum(pairs[:rank]), sum(pairs[: rank + 1]))
    torch.manual_seed(0)
    queue = KeyQueue(sum(pairs) + 4, D)
    leaves = z[own].clone().requires_grad_(), torch.tensor(TAU, dtype=z.dtype, requires_grad=True)
    loss = queue_loss(leaves[0], keys[own], queue, leaves[1], group=group, row_counts=pairs)
    grads = torch.autograd.grad(loss * 3, leaves)
    whole = z.clone().requires_grad_(), torch.tensor(TAU, dtype=z.dtype, requires_grad=True)
    wanted = reference.queue(whole[0], keys, queue.keys.double(), whole[1]).mean()
    exact = torch.autograd.grad(wanted * 3, whole)
    dist.all_reduce(grads[1], group=group)
    # The queue has unit vectors in float32.
    close = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(loss, wanted, **close)
    torch.testing.assert_close(grads[0], exact[0][own] * len(pairs), **close)
    torch.testing.assert_close(grads[1] / len(pairs), exact[1], **close)
    oldest = queue.keys[sum(pairs) :].clone()
    queue.push(keys[own], group)
    wanted = torch.nn.functional.normalize(keys.float())
    assert torch.equal(queue.keys, torch.cat([wanted, oldest]))


def check(group, rank, pairs):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check_loss(group, rank, pairs, dtype, "mean", two=True)
    check_loss(group, rank, pairs, torch.float64, "sum", two=False)
    check_loss(group, rank, pairs, torch.float32, "mean", two=False, decoupled=True)
    check_sup_con(group, rank, pairs)
    check_queue(group, rank, pairs)
    check_ddp(group, rank, pairs)
    check_no_communication_in_backward(group, rank, pairs)
    check_double_backward_is_refused(group, rank, pairs)


def worker(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
    everyone, two = dist.group.WORLD, dist.new_group([1, 3])
    for group, batches in BATCHES:
        for pairs in batches:
            if group == "four":
                check(everyone, rank, pairs)
            elif rank in (1, 3):
                check(two, rank // 2, pairs)
    for backend in ("gloo", "mpi"):  # mpi gathers into lists only
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "get_backend", lambda group, backend=backend: backend)
            gathered = all_gather_rows(torch.full((rank, 2), rank), everyone)
            equal = all_gather_rows(torch.full((2, 3), rank), everyone)
        assert gathered[:, 0].tolist() == [1, 2, 2, 3, 3, 3]
        assert equal[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    z = torch.ones(2, 3)
    with pytest.raises(ValueError, match="reduction='none' cannot be used with a group"):
        nt_xent_loss(z, z, reduction="none", group=everyone)
    for loss in (
        lambda z: nt_xent_loss(z, z, group=everyone),
        lambda z: sup_con_loss(z, torch.zeros(0, dtype=torch.int64), group=everyone),
    ):
        with pytest.raises(ValueError, match="rows on at least one rank"):
            loss(z[:0])
    z1, z2 = whole_batch((3, 3), torch.float32)
    if rank == 1:
        z1[0, 0] = float("nan")
    assert nt_xent_loss(z1, z2, group=everyone).isnan()
    dist.destroy_process_group()


def test_ranks_equal_one_process(tmp_path):
    on_ranks(worker, (tmp_path / "store",), 4)
