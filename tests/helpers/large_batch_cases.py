"""Models, data and comparisons that the large-batch tests share."""

import torch
from torch import nn

from simclr_fast.losses.nt_xent import nt_xent_loss
from simclr_fast.models.encoders import SimCLR, build_encoder, build_projector
from simclr_fast.optim.lars import LARS, lars_param_groups

PAIRS = 7
MODES = [
    {"memory": "plain"},
    {"memory": "replay"},
    {"memory": "lockstep", "micro_batch": 7},
    {"memory": "lockstep", "micro_batch": 5},
    {"memory": "lockstep", "micro_batch": 4, "offload_gb": 1e-4},
    {"memory": "lockstep", "micro_batch": 5, "keep_every": 2},
    {"memory": "lockstep", "micro_batch": 7, "keep_every": 3, "offload_gb": 1e-4},
]


def mode_name(mode):
    return "-".join(map(str, mode.values()))


def views(first=0, last=PAIRS, size=16):
    """Pairs first to last of one batch: [2 (last - first), 3, size, size], view 1's rows first."""
    generator = torch.Generator().manual_seed(3)
    both = torch.randn(2, PAIRS, 3, size, size, generator=generator, dtype=torch.float64)
    return both[:, first:last].flatten(0, 1)


def lively(model):
    """The model in float64. No two channels have the same norm weight or bias."""
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 1, 0.3)
    return model.double().train()


def simclr(name, stem="cifar-stride2", width=0.0625):
    torch.manual_seed(1)
    encoder, dim = build_encoder(name, width=width, image_size=16, stem=stem)
    return lively(SimCLR(encoder, build_projector("nonlinear", dim, 8)))


def loss_fn(outputs, group=None):
    z = outputs[1] if isinstance(outputs, tuple) else outputs
    return nt_xent_loss(z, temperature=0.3, group=group)


def plain_autograd(model, x=None):
    loss = loss_fn(model(views() if x is None else x))
    loss.backward()
    return loss.detach()


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
