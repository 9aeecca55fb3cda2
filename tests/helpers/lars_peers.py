"""The optimizers that LARS and its drop-ins are compared with."""

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from simclr_fast.compat import lightly as our_lightly
from simclr_fast.compat import solo_learn as our_solo_learn
from simclr_fast.compat import timm as our_timm
from simclr_fast.optim import LARS

# The names of the last two options of solo-learn's LARS, newest first.
SOLO_NAMES = [
    ("clip_lr", "exclude_bias_n_norm"),
    ("clip_lars_lr", "exclude_bias_n_norm"),
    ("clip_lars_lr", "exclude_bias_n_norm_lars"),
]


class SoloLearn(Optimizer):
    """solo-learn's LARS by its formula, with the groups and the state that its versions save."""

    names = SOLO_NAMES[0]

    def __init__(self, params, lr, momentum=0, dampening=0, weight_decay=0, nesterov=False, **rest):
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening}
        defaults |= {"weight_decay": weight_decay, "nesterov": nesterov, "eta": 1e-3, "eps": 1e-8}
        super().__init__(params, defaults | dict.fromkeys(self.names, False) | rest)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            clip, exclude = (group[name] for name in self.names)
            for p in group["params"]:
                if p.grad is not None:
                    self._step_one(p, group, clip, p.ndim == 1 and exclude)

    def _step_one(self, p, group, clip, excluded):
        d, w, g = p.grad, p.norm(), p.grad.norm()
        if not excluded and w != 0 and g != 0:
            ratio = group["eta"] * w / (g + w * group["weight_decay"] + group["eps"])
            ratio = min(ratio / group["lr"], 1) if clip else ratio
            d = (d + group["weight_decay"] * p) * ratio
        if group["momentum"] != 0:
            state = self.state[p]
            if "momentum_buffer" in state:
                v = state["momentum_buffer"]
                v.mul_(group["momentum"]).add_(d, alpha=1 - group["dampening"])
            else:
                v = state["momentum_buffer"] = d.clone()
            d = d + group["momentum"] * v if group["nesterov"] else v
        p.sub_(group["lr"] * d)


def solo_learn_version(names):
    return type("LARS", (SoloLearn,), {"names": names})


def ours_of(peer):
    """The drop-in for a peer, called as that peer is."""
    if peer.startswith("solo"):
        return our_solo_learn.LARS
    return {"timm": our_timm.Lars, "lightly": our_lightly.LARS, "sgd": LARS}[peer]


def theirs_of(peer):
    if peer == "timm":
        return pytest.importorskip("timm.optim.lars").Lars
    if peer == "lightly":
        return pytest.importorskip("lightly.utils.lars").LARS
    if peer == "sgd":
        return torch.optim.SGD
    return solo_learn_version(SOLO_NAMES[int(peer[-1])])


PEERS = ["timm", "lightly", "solo0", "solo1", "solo2"]
SHAPES = [(7, 5), (3,), (4, 4), (0, 3), (16, 3, 3, 3), (1,)]


def model_parameters(dtype=torch.float64):
    """Parameters of a small model. One tensor is zero, where the libraries differ."""
    generator = torch.Generator().manual_seed(3)
    params = [
        nn.Parameter(torch.randn(s, dtype=torch.float64, generator=generator).to(dtype))
        for s in SHAPES
    ]
    params[2].data.zero_()
    return params


def train(pairs, steps, start=0):
    """Take `steps` steps with the same gradients for each (params, optimizer)."""
    for t in range(start, start + steps):
        generator = torch.Generator().manual_seed(t)
        grads = [torch.randn(s, dtype=torch.float64, generator=generator) for s in SHAPES]
        if t in (0, 5):
            grads[0].zero_()
        for params, optimizer in pairs:
            for p, g in zip(params, grads, strict=True):
                p.grad = g.to(p.dtype)
            optimizer.step()
