"""LARS on DTensors, on gloo: equal to one process that has the whole tensors."""

import copy
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lars_cases import gradients, parameters
from rank_runs import on_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from simclr_fast import LARS
from simclr_fast.compat import lightly, solo_learn, timm
from simclr_fast.optim import lars_param_groups

# Uneven over 2 and over 4 ranks; with fewer rows than ranks; of size zero; a scalar.
SHAPES = [(8, 6), (7, 5), (3,), (1, 9), (0, 4), (130, 33), ()]
KWARGS = {"lr": 2.0, "momentum": 0.9, "weight_decay": 1e-2}
OPTIMIZERS = {
    "split": lambda ps: LARS(ps, **KWARGS),
    "joint, tf": lambda ps: LARS(ps, norm="joint", momentum_order="tf", eps=0.0, **KWARGS),
    "nesterov, maximize": lambda ps: LARS(ps, nesterov=True, maximize=True, **KWARGS),
    "one by one": lambda ps: LARS(ps, foreach=False, **KWARGS),
    "no momentum": lambda ps: LARS(ps, **KWARGS | {"momentum": 0.0}),
    "tensor lr": lambda ps: LARS(ps, **KWARGS | {"lr": torch.tensor(2.0), "dampening": 0.1}),
    "lightly": lambda ps: lightly.LARS(ps, **KWARGS),
    "timm": lambda ps: timm.Lars(ps, trust_clip=True, **KWARGS),
    "solo": lambda ps: solo_learn.LARS(ps, exclude_bias_n_norm=True, clip_lr=True, **KWARGS),
}
REDUCTIONS = ["split", "joint, tf", "one by one"]


def placements_of(layout, shape):
    """One placement per dimension of the mesh; tensors without that dimension are replicated."""
    return [
        Replicate() if p is None or p >= len(shape) else Shard(p)
        for p in {
            "rows": [0],
            "columns": [1],
            "replicated": [None],
            "hybrid": [None, 0],
            "both": [0, 1],
            "rows twice": [0, 0],
        }[layout]
    ]


def sharded(t, mesh, layout):
    return distribute_tensor(t.detach().clone(), mesh, placements_of(layout, t.shape))


def check_steps(mesh, layout, name, dtype, plain=(), grad_layout=None):
    """Four steps; the tensors at `plain` are no DTensors. The reference is in float64."""
    whole = parameters(SHAPES, dtype)
    whole[2].data.zero_()
    exact = [nn.Parameter(p.detach().double()) for p in whole]
    params = [
        nn.Parameter(p.detach().clone() if i in plain else sharded(p, mesh, layout))
        for i, p in enumerate(whole)
    ]
    one, two = OPTIMIZERS[name](exact), OPTIMIZERS[name](params)
    for t in range(4):
        for i, (p, q, g) in enumerate(zip(params, exact, gradients(whole, t), strict=True)):
            g = g * (t != 2 or i != 0)
            q.grad = g.double()
            p.grad = g if i in plain else sharded(g, mesh, layout)
            if grad_layout == "partial" and i not in plain:
                part = [Partial()] * mesh.ndim
                p.grad = DTensor.from_local(g / mesh.size(), mesh, part, run_check=False)
        with counted_reductions() as count:
            two.step()
        assert len(count) <= 1 or layout in ("both", "rows twice") or name == "one by one"
        one.step()
    bound = {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, 4e-2)
    for p, q in zip(params, exact, strict=True):
        full = p.full_tensor() if isinstance(p, DTensor) else p
        torch.testing.assert_close(full.double(), q.detach(), rtol=bound, atol=bound)
        if isinstance(p, DTensor) and two.param_groups[0]["momentum"]:
            assert two.state[p]["momentum_buffer"].placements == p.placements


class counted_reductions:
    def __enter__(self):
        self.calls, self.real = [], dist.all_reduce
        dist.all_reduce = lambda *args, **kwargs: (self.calls.append(1), self.real(*args, **kwargs))
        return self.calls

    def __exit__(self, *_):
        dist.all_reduce = self.real


def check_scaler(mesh, layout):
    """An overflow on one rank skips the step on all."""
    whole = parameters([(8, 6), (7, 5)])
    params = [nn.Parameter(sharded(p, mesh, layout)) for p in whole]
    one, two = LARS(whole, **KWARGS), LARS(params, **KWARGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for t, bad in enumerate((False, True, False)):
        for p, q, g in zip(params, whole, gradients(whole, t), strict=True):
            q.grad = g.clone()
            g = g * scaler.scale(torch.ones(()))
            g[0, 0] = float("inf") if bad else g[0, 0]
            p.grad = sharded(g, mesh, layout)
        scaler.step(two)
        scaler.update()
        if not bad:
            one.step()
    assert scaler.get_scale() == 32.0
    for p, q in zip(params, whole, strict=True):
        torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=2e-6, atol=2e-6)


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 9, 7), nn.Linear(7, 3)
    ).double()


def train(net, optimizer, steps, start=0):
    for t in range(start, start + steps):
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(8, 3, 5, 5, dtype=torch.float64, generator=generator)
        # Batch norm would see other batches, so every rank has the whole batch.
        optimizer.zero_grad()
        net(x).square().sum(1).mean().backward()
        optimizer.step()


def fully_sharded(mesh, ignored):
    net = model()
    chosen = {net[4].weight, net[1].bias} if ignored else set()
    fully_shard(net[0], mesh=mesh)
    fully_shard(net, mesh=mesh, ignored_params=chosen)
    return net


def check_fully_shard(mesh, ignored, folder):
    alone, net = model(), fully_sharded(mesh, ignored)
    one = LARS(lars_param_groups(alone, 1e-2), lr=2.0)
    two = LARS(lars_param_groups(net, 1e-2), lr=2.0)
    train(alone, one, 3)
    train(net, two, 3)

    def compare(other):
        for p, q in zip(other.parameters(), alone.parameters(), strict=True):
            full = p.full_tensor() if isinstance(p, DTensor) else p
            torch.testing.assert_close(full.detach(), q.detach(), rtol=1e-12, atol=1e-12)

    compare(net)
    # Saved here, loaded by a model and an optimizer that have not made a step, in three ways.
    states = {}
    for how in ("nested", "flat", "full"):
        options = StateDictOptions(
            flatten_optimizer_state_dict=how == "flat", full_state_dict=how == "full"
        )
        states[how] = (get_optimizer_state_dict(net, two, options=options), options)
    saved_model = get_model_state_dict(net)
    dcp.save({"model": saved_model, "optimizer": states["nested"][0]}, checkpoint_id=folder)
    start = copy.deepcopy(saved_model)
    train(alone, one, 3, start=3)
    for how, (state, options) in states.items():
        other = fully_sharded(mesh, ignored)
        fresh = LARS(lars_param_groups(other, 0.5), lr=9.0, momentum=0.1)
        if how == "nested":
            empty = {
                "model": get_model_state_dict(other),
                "optimizer": get_optimizer_state_dict(other, fresh),
            }
            dcp.load(empty, checkpoint_id=folder)
            start, state = copy.deepcopy(empty["model"]), empty["optimizer"]
        set_model_state_dict(other, copy.deepcopy(start))
        set_optimizer_state_dict(other, fresh, copy.deepcopy(state), options=options)
        train(other, fresh, 3, start=3)
        compare(other)


def check_wrappers(mesh):
    """What shards optimizers or models in other ways."""
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kwargs = {"lr": 1.0, "weight_decay": 0.1}

    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double()

    def trained(net, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
        return [p.full_tensor() if isinstance(p, DTensor) else p for p in net.parameters()]

    alone = network()
    expected = trained(alone, LARS(alone.parameters(), **kwargs))
    ddp = DistributedDataParallel(network())
    zero = ZeroRedundancyOptimizer(ddp.parameters(), LARS, **kwargs)
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    tensor_parallel = parallelize_module(network(), mesh, plan)
    for net, optimizer in (
        (ddp, zero),
        (tensor_parallel, LARS(tensor_parallel.parameters(), **kwargs)),
    ):
        torch.testing.assert_close(trained(net, optimizer), expected, rtol=1e-13, atol=1e-13)


def check_refusals(mesh):
    p = nn.Parameter(sharded(torch.ones(4, 3), mesh, "rows"))
    p.grad = sharded(torch.ones(4, 3), mesh, "rows")
    with pytest.raises(RuntimeError, match="not a DTensor"):
        LARS([p], lr=0.1, fused=True).step()
    optimizer = LARS([p], lr=0.1)
    optimizer.state[p]["momentum_buffer"] = torch.ones(4, 3)
    with pytest.raises(ValueError, match="must be sharded as its parameter is"):
        optimizer.step()
    p = nn.Parameter(DTensor.from_local(torch.ones(2), mesh, [Partial()] * mesh.ndim))
    p.grad = DTensor.from_local(torch.ones(2), mesh, [Partial()] * mesh.ndim)
    with pytest.raises(ValueError, match="cannot update a parameter with placements"):
        LARS([p], lr=0.1).step()
    for original in (True, False):
        flat = FullyShardedDataParallel(
            nn.Linear(4, 4), use_orig_params=original, device_id=torch.device("cpu")
        )
        with pytest.raises(ValueError, match=r"torch\.distributed\.fsdp\.fully_shard"):
            LARS(flat.parameters(), lr=0.1)


def one_rank(rank, size, folder):
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    try:
        line = init_device_mesh("cpu", (size,))
        for layout in ("rows", "columns", "replicated"):
            # All on 4 ranks; on 2, with further layouts, those that reduce in other ways.
            for name in OPTIMIZERS if size == 4 or layout == "rows" else REDUCTIONS:
                check_steps(line, layout, name, torch.float64, plain=(1, 6))
            for dtype in (torch.float32, torch.bfloat16):
                check_steps(line, layout, "split", dtype)
                check_steps(line, layout, "joint, tf", dtype, plain=(0,))
        check_steps(line, "rows", "split", torch.float64, grad_layout="partial")
        check_scaler(line, "rows")
        check_refusals(line)
        check_wrappers(line)
        if size == 4:
            square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
            for layout in ("hybrid", "both", "rows twice"):
                for name in ("split", "joint, tf", "solo"):
                    check_steps(square, layout, name, torch.float64, plain=(1,))
            check_fully_shard(square, True, f"{folder}/hybrid")
        for ignored in (False, True):
            check_fully_shard(line, ignored, f"{folder}/{ignored}")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sharded_parameters_equal_one_process(size, tmp_path):
    on_ranks(one_rank, (size, str(tmp_path)), size)
