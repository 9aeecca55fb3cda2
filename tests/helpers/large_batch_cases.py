"""Models, data and comparisons that the large-batch tests share."""

import torch
from torch import nn

from simclr_fast.large_batch import LargeBatch
from simclr_fast.large_batch.graph import Graph
from simclr_fast.large_batch.schedule import Schedule, Stage
from simclr_fast.losses.nt_xent import nt_xent_loss
from simclr_fast.losses.sup_con import multi_view_nt_xent_loss
from simclr_fast.models.encoders import SimCLR, build_encoder, build_projector
from simclr_fast.optim.lars import LARS, lars_param_groups

PAIRS = 7
MODES = [
    {"memory": "plain"},
    {"memory": "replay"},
    {"memory": "lockstep", "micro_batch": 7},
    {"memory": "lockstep", "micro_batch": 5},
    {"memory": "lockstep", "micro_batch": 4, "choices": {"turn": "mask", "input": "again"}},
    {"memory": "lockstep", "micro_batch": 5, "choices": {"output": "once", "sizes": (1, 4)}},
    {"memory": "lockstep", "micro_batch": 7, "choices": {"bytes": (600_000, 10**8)}},
]


def mode_name(mode):
    values = [v if isinstance(v, dict) else {"": v} for v in mode.values()]
    return "-".join(
        f"{name}{'=' if name else ''}{v}" for found in values for name, v in found.items()
    )


def in_stages(model, micro_batch=5, gram=True, sizes=(), bytes=(None, 0), **choices):
    """A schedule: stages of the given numbers of blocks, then of one block each."""
    blocks = len(Graph(model).blocks)
    sizes = [*sizes, *[1] * (blocks - sum(sizes))]
    return Schedule(micro_batch, tuple(Stage(n, **choices) for n in sizes), gram, *bytes)


def large_batch(model, *, choices=None, micro_batch=None, **mode):
    """LargeBatch; choices: of a schedule, see `in_stages`."""
    if choices is None:
        return LargeBatch(model, micro_batch=micro_batch, **mode)
    schedule = in_stages(model, micro_batch or 5, **choices)
    return LargeBatch(model, schedule=schedule, **mode)


def views(first=0, last=PAIRS, size=16):
    """Pairs first to last of one batch: [2 (last - first), 3, size, size], view 1's rows first."""
    generator = torch.Generator().manual_seed(3)
    both = torch.randn(2, PAIRS, 3, size, size, generator=generator, dtype=torch.float64)
    return both[:, first:last].flatten(0, 1)


def crops(first=0, last=PAIRS):
    """Two views of 16×16 and three of 10×10 of images first to last, [last - first, ...] each."""
    generator = torch.Generator().manual_seed(5)
    small = torch.randn(3, PAIRS, 3, 10, 10, generator=generator, dtype=torch.float64)
    return [*views(first, last).chunk(2), *small[:, first:last]]


def crop_loss(outputs, group=None):
    z = outputs[1] if isinstance(outputs, tuple) else outputs
    return multi_view_nt_xent_loss(z, 5, 0.3, group=group)


def plain_autograd_of_crops(model):
    """Each size by itself, as in SwAV."""
    first, *more = crops()
    outputs = [model(torch.cat([first, more[0]])), model(torch.cat(more[1:]))]
    loss = crop_loss(torch.cat([o[1] if isinstance(o, tuple) else o for o in outputs]))
    loss.backward()
    return loss.detach()


def lively(model):
    """The model in float64. No two channels have the same norm weight or bias."""
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 1, 0.3)
    return model.double().train()


# Encoders with every kind of block and shortcut of these, in five blocks.
SHORT = {"basic": "resnet18", "bottleneck": "resnet50"}


def simclr(name, stem="cifar-stride2", width=0.0625):
    """name: of an encoder, or of one in SHORT."""
    torch.manual_seed(1)
    whole = SHORT.get(name, name)
    encoder, dim = build_encoder(whole, width=width, image_size=16, stem=stem)
    if name in SHORT:
        for stage, blocks in enumerate((1, 2, 1, 1), 1):
            setattr(encoder, f"layer{stage}", getattr(encoder, f"layer{stage}")[:blocks])
    return lively(SimCLR(encoder, build_projector("nonlinear", dim, 8)))


def expanding():
    """1×1 convolutions to more channels: with stride, bias, frozen weight, and norms of every
    option. In one and two dimensions, with ReLU and without."""
    torch.manual_seed(1)
    frozen = nn.Conv2d(16, 40, 1)
    frozen.weight.requires_grad_(False)
    return lively(
        nn.Sequential(
            *(nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 16, 1, stride=(2, 3)), nn.BatchNorm2d(16, affine=False), nn.ReLU()),
            *(frozen, nn.BatchNorm2d(40, momentum=None), nn.ReLU()),
            *(nn.Conv2d(40, 4, 1, groups=2), nn.BatchNorm2d(4), nn.Flatten(2)),
            *(nn.Conv1d(4, 8, 1), nn.BatchNorm1d(8, track_running_stats=False), nn.Hardtanh(-9, 9)),
            *(nn.Flatten(), nn.Linear(384, 8), nn.BatchNorm1d(8)),
        )
    )


def loss_fn(outputs, group=None):
    z = outputs[1] if isinstance(outputs, tuple) else outputs
    return nt_xent_loss(z, temperature=0.3, group=group)


def plain_autograd(model, x=None):
    loss = loss_fn(model(views() if x is None else x))
    loss.backward()
    return loss.detach()


def with_norms():
    """A small network with batch norms of images and of rows."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)
    head = nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(72, 8), nn.BatchNorm1d(8)
    return lively(nn.Sequential(*layers, *head))


def step(model, backward):
    """(loss, gradients, buffers, parameters after a step of LARS) of `backward(model)`."""
    optimizer = LARS(lars_param_groups(model, 1e-4), lr=0.5, momentum_order="tf", norm="joint")
    loss = backward(model)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    stepped = {n: p.detach().clone() for n, p in model.named_parameters()}
    return loss, gradients, dict(model.named_buffers()), stepped


def assert_equal(found, expected, tolerance=1e-12):
    """Compare every tensor of two results of `step`, by the norm of the difference."""
    assert abs(found[0] - expected[0]) <= tolerance * abs(expected[0])
    for have, want in zip(found[1:], expected[1:], strict=True):
        assert have.keys() == want.keys()
        scale = max((t.double().norm() for t in want.values()), default=0)
        for name, t in want.items():
            error = (have[name] - t).double().norm()
            # A gradient that is zero except for rounding is compared with the size of the others.
            assert error <= tolerance * max(t.double().norm(), 1e-3 * scale), (name, error)
