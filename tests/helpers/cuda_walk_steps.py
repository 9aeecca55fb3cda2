"""Run whole steps on device "cuda" without a GPU.

`main` writes JSON: for each case what `cuda_walk` recorded in the third step. The first step
creates the optimizer's state. In the first two, replay and grad-cache compare both runs of a layer,
which waits for the device. Case "graph": what the capture of a step holds.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cuda_walk
import numpy as np
import torch
import torch.distributed as dist
from cuda_walk import DEVICE, walk
from large_batch_cases import large_batch
from torch import Tensor, nn

from simclr_fast.augment.params import Augmentation, draw_views
from simclr_fast.augment.views import finish_crops, pack_params
from simclr_fast.evaluation.features import Inference
from simclr_fast.large_batch.global_batch_norm import WholeBatch
from simclr_fast.large_batch.replay import global_norms
from simclr_fast.losses.nt_xent import nt_xent_loss
from simclr_fast.models.encoders import SimCLR, build_encoder, build_projector
from simclr_fast.optim.lars import LARS, lars_param_groups
from simclr_fast.optim.schedule import warmup_cosine
from simclr_fast.training import cuda_graph
from simclr_fast.training.cuda_graph import step_graph

ROWS, SIZE = 8, 64
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "replay": {},
    "lockstep": {"choices": {"output": "kept", "inner": "kept", "wide": "kept"}},
    "lean": {"memory": "lockstep", "choices": {"turn": "mask", "input": "once"}},
    "host": {"memory": "lockstep"},
    "grad-cache": {"allow_ghost_bn": True},
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
# Bytes on the GPU for which mode "host" must keep something in host memory.
SCARCE = {"bf16": 4_400_000, "fp16": 4_400_000, "fp32": 8_700_000}
# Faults that a walk must see, put into the loss of a plain step.
FAULTS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda z: z.sum().item(),
    "bool": lambda z: bool(z.sum() > 0),
    "tolist": lambda z: z[0].tolist(),
    "nonzero": lambda z: z.nonzero(),
    "mask": lambda z: z[z[:, 0] > 0],
    "to the CPU": lambda z: z.cpu(),
    "from pageable memory": lambda z: z + torch.ones(1, 1).to(DEVICE, non_blocking=True),
    "made on the CPU": lambda z: z + torch.tensor([1.0], device=DEVICE),
    "wrong device": lambda z: z + torch.ones(len(z), 1),
}
# Faults in the loss of a step that is captured. A copy from pinned memory waits for nothing, but a
# replay would copy again from memory that belongs to others by then.
GRAPH_FAULTS = {
    "graph item": FAULTS["item"],
    "graph copy": lambda z: z + torch.ones(1, 1).pin_memory().to(DEVICE, non_blocking=True),
}


def model(name: str) -> nn.Module:
    with DEVICE:
        encoder, dim = build_encoder(name)
        made = SimCLR(encoder, build_projector("nonlinear", dim))
    return made.to(memory_format=torch.channels_last).train()


def views(dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Two views of crops on the device, as DALI's loader makes them."""
    augmentation = Augmentation(SIZE)
    crops = torch.empty(ROWS, SIZE, SIZE, 3, dtype=torch.uint8, device=DEVICE)
    sizes = np.full((ROWS, 2), SIZE)
    made = []
    for params in draw_views(augmentation, 0, 0, np.arange(ROWS), sizes):
        ints, floats = (torch.from_numpy(a).pin_memory() for a in pack_params(params))
        ints, floats = (t.to(DEVICE, non_blocking=True) for t in (ints, floats))
        out = torch.empty(
            (ROWS, 3, SIZE, SIZE),
            dtype=dtype or torch.float32,
            device=DEVICE,
            memory_format=torch.channels_last,
        )
        made.append(finish_crops(crops, ints, floats, augmentation, out))
    return made[0], made[1]


def train(
    mode: str,
    dtype: str,
    world: int,
    fault: Callable[[Tensor], Any] | None = None,
    untold: bool = False,
) -> Any:
    group = dist.group.WORLD if world > 1 else None
    autocast = DTYPES[dtype]
    trained = model("resnet10")
    options = MODES[mode]
    if mode == "host":
        options = options | {"choices": {"bytes": (SCARCE[dtype], 10**9)}}
    step = large_batch(
        trained,
        micro_batch=ROWS,
        **{"memory": mode, "group": group, "autocast": autocast} | options,
    )
    optimizer = LARS(lars_param_groups(trained, 1e-6), lr=0.1)
    scheduler = warmup_cosine(optimizer, 1, 10)
    scaler = torch.amp.GradScaler("cuda", enabled=autocast is torch.float16)
    cuda_walk.INVENTED = 2 * ROWS
    # Without the numbers of rows, the ranks ask each other.
    row_counts = None if untold else [2 * ROWS] * world
    seen: dict[str, Any] = {}

    def loss_fn(outputs: Any) -> Any:
        h, z = outputs
        seen["outputs"] = [str(t.dtype).removeprefix("torch.") for t in (h, z)]
        if fault is not None:
            fault(z)
        loss, statistics = nt_xent_loss(
            z, temperature=0.1, group=group, return_stats=True, row_counts=row_counts
        )
        return scaler.scale(loss), loss.detach(), statistics

    for _ in range(3 if fault is None else 1):
        cuda_walk.RECORD.clear()
        batch = views(autocast)
        seen["views"] = cuda_walk.RECORD.launches
        optimizer.zero_grad(set_to_none=True)
        step.backward(batch, loss_fn, row_counts)
        seen["gradient"] = cuda_walk.RECORD.launches - seen["views"]
        seen["wrong gradients"] = [
            name
            for name, p in trained.named_parameters()
            if p.requires_grad and (p.grad is None or described(p.grad) != described(p))
        ]
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
    return seen


def captured(dtype: str, fault: Callable[[Tensor], Any] | None = None) -> Any:
    """What the capture of a step of plain holds, and the gradients that a replay leaves."""
    autocast = DTYPES[dtype]
    trained = model("resnet10")
    step = large_batch(trained, memory="plain", autocast=autocast)
    scaler = torch.amp.GradScaler("cuda", enabled=autocast is torch.float16)

    def loss_fn(outputs: Any) -> Any:
        h, z = outputs
        if fault is not None:
            fault(z)
        loss = nt_xent_loss(z, temperature=0.1)
        return scaler.scale(loss), loss.detach(), h.detach()

    with step_graph(trained, DEVICE) as graph:
        graph.capture(lambda batch: step.backward(batch, loss_fn), views(autocast))
        graph.run(lambda batch: step.backward(batch, loss_fn), False, views(autocast))
    wrong = [n for n, p in trained.named_parameters() if p.requires_grad and p.grad is None]
    assert isinstance(graph.graph, cuda_walk.Graph)
    return {"captured": graph.graph.record, "wrong gradients": wrong}


def layer(world: int) -> Any:
    """Launches and collectives of one batch norm, forward and backward."""
    batch = WholeBatch(dist.group.WORLD if world > 1 else None)
    batch.rows = [2 * ROWS] * world
    with DEVICE:
        norm = nn.BatchNorm2d(64)
    x = torch.empty(2 * ROWS, 64, 8, 8, dtype=torch.bfloat16, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    record, seen = cuda_walk.RECORD, {}
    for _ in range(2):
        record.clear()
        with global_norms(norm, batch, False):
            y = norm(x)
            seen["forward"] = record.launches, sum(record.collectives.values())
        record.clear()
        y.backward(torch.empty_like(y))
        seen["backward"] = record.launches, sum(record.collectives.values())
        norm.zero_grad()
        x.grad = None
    return seen


def described(t: Tensor) -> tuple[Any, ...]:
    return t.dtype, t.device, t.stride()


def evaluate() -> Any:
    """Features of a second batch. The dtype is checked with the first one."""
    with DEVICE:
        encoder, _ = build_encoder("resnet18")
    inference = Inference(encoder, DEVICE)
    for _ in range(2):
        cuda_walk.RECORD.clear()
        features = inference(torch.empty(ROWS, 3, SIZE, SIZE).pin_memory())
    return {"features": [str(features.dtype), features.device.type]}


def stand_ins() -> None:
    """For what runs below the dispatcher: the launch of the views' kernel."""
    import simclr_fast.kernels.augment as kernels
    from simclr_fast.ops import library

    library._triton_unusable = lambda initialized: None  # type: ignore[assignment]
    kernels.augment_crops = lambda *args: args[-1].zero_()


def main(rank: int, world: int, cases: Sequence[str], out: Path) -> None:
    """To be called in a process of its own."""
    torch.set_num_threads(1)
    cuda_walk.pretend(world)
    stand_ins()
    # One eager step suffices where nothing is compiled.
    cuda_graph.WARM_UP = 1
    results = {}
    for case in cases:
        mode, _, dtype = case.partition(" ")
        with walk() as record:
            try:
                if case == "evaluate":
                    seen = evaluate()
                elif case == "layer":
                    seen = layer(world)
                elif mode == "graph":
                    fault = GRAPH_FAULTS.get(case)
                    seen = captured("bf16" if fault else dtype, fault)
                elif case in FAULTS:
                    seen = train("plain", "bf16", world, FAULTS[case])
                else:
                    dtype, _, untold = dtype.partition(" ")
                    seen = train(mode, dtype, world, untold=bool(untold))
            except Exception as error:
                seen = {"error": f"{type(error).__name__}: {error}"[:500]}
        results[case] = {name: dict(counter) for name, counter in vars(record).items()} | seen
    out.write_text(json.dumps(results))
