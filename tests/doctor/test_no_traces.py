"""The doctor changes no bit: neither what a watched loop computes, nor what `check` runs."""

import copy
import random

import numpy as np
import pytest
import torch
from doctor_cases import Steps, both_at_once, small_model, textbook, views
from torch import nn

from simclr_fast import doctor
from simclr_fast.optim import LARS, lars_param_groups


def bits(value):
    """A copy of nested values, tensors as bytes."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().view(torch.uint8) if value.dim() else value.item()
        return flat.numpy().tobytes() if isinstance(flat, torch.Tensor) else flat
    if isinstance(value, dict):
        return {str(key): bits(part) for key, part in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [bits(part) for part in value]
    return value


def everything(model, optimizer):
    numpy_state = np.random.get_state()  # noqa: NPY002
    return {
        "model": bits(model.state_dict()),
        "buffers": bits(dict(model.named_buffers())),
        "grads": {name: bits(p.grad) for name, p in model.named_parameters()},
        "training": [m.training for m in model.modules()],
        "optimizer": bits(optimizer.state_dict()),
        "random": [bits(torch.get_rng_state()), random.getstate(), bits(numpy_state)],
    }


class Noisy(nn.Module):
    """Uses every source of random numbers, and has buffers of its own."""

    def __init__(self):
        super().__init__()
        self.inner, self.drop = small_model(), nn.Dropout(0.2)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.seen = self.seen + 1
        random.random()
        np.random.rand()  # noqa: NPY002
        h, z = self.inner(x)
        return h, self.drop(z)


def optimizers(model):
    yield torch.optim.Adam(model.parameters(), lr=1e-2, amsgrad=True)
    yield torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    yield LARS(lars_param_groups(model), lr=0.1, capturable=True)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("warm", [False, True])
def test_check_restores_every_bit(number, warm):
    torch.manual_seed(0)
    model = Noisy()
    optimizer = list(optimizers(model))[number]
    steps = Steps(model=model, optimizer=optimizer, batch=views(16))
    if warm:
        steps(model, steps.batch)
    model.inner.projector.eval()
    before = everything(model, optimizer)
    objects = {name: id(t) for name, t in model.named_buffers()}
    grads = {name: id(p.grad) for name, p in model.named_parameters()}
    state = {id(p): {k: id(v) for k, v in s.items()} for p, s in optimizer.state.items()}

    def step(model, batch):
        steps(model, batch)
        model.train()
        optimizer.param_groups[0]["lr"] = 0.123

    doctor.check(step, model, steps.batch)
    assert everything(model, optimizer) == before
    assert {name: id(t) for name, t in model.named_buffers()} == objects
    assert {name: id(p.grad) for name, p in model.named_parameters()} == grads
    assert {
        id(p): {k: id(v) for k, v in s.items() if torch.is_tensor(v)}
        for p, s in optimizer.state.items()
    } == {p: {k: i for k, i in s.items() if not isinstance(i, float)} for p, s in state.items()}


def test_check_restores_a_loss_outside_of_the_model_and_after_an_error():
    torch.manual_seed(0)
    model, criterion = small_model(), nn.BatchNorm1d(16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = Steps(model=model, optimizer=optimizer, batch=views(16))
    steps.loss = lambda z: textbook(criterion(z))
    before = everything(model, optimizer), everything(criterion, optimizer)
    doctor.check(steps, model, steps.batch)
    assert (everything(model, optimizer), everything(criterion, optimizer)) == before

    def fails(model, batch):
        steps(model, batch)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        doctor.check(fails, model, steps.batch)
    assert (everything(model, optimizer), everything(criterion, optimizer)) == before


def test_a_watched_loop_computes_the_same_bits():
    torch.manual_seed(0)
    model = Noisy()
    results = []
    for watched in (False, True):
        own = copy.deepcopy(model)
        optimizer = LARS(lars_param_groups(own), lr=0.1)
        steps = Steps(model=own, optimizer=optimizer, batch=views(16))
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        if watched:
            with doctor.watch(own):
                for _ in range(4):
                    steps(own, steps.batch)
        else:
            for _ in range(4):
                steps(own, steps.batch)
        results.append(everything(own, optimizer))
    assert results[0] == results[1]


def test_nothing_stays_installed():
    backward, modules = torch.autograd.backward, nn.modules.module
    hooks = modules._global_forward_hooks, modules._global_forward_pre_hooks
    sizes = [len(found) for found in hooks]
    steps = Steps(batch=views(16))
    doctor.check(steps, steps.model, steps.batch)

    def fails():
        both_at_once(steps.model, steps.batch)
        raise KeyError

    with pytest.raises(KeyError), doctor.watch(steps.model):
        fails()
    assert torch.autograd.backward is backward
    assert [len(found) for found in hooks] == sizes
    assert not any(p._backward_hooks for p in steps.model.parameters())


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        doctor.check(lambda model, batch: None, "model", None)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        doctor.check(lambda model, batch: None, small_model(), None, steps=0)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got NoneType"):
        doctor.watch(None).__enter__()


def test_a_step_without_a_backward_pass_is_said_to_be_unchecked():
    report = doctor.check(lambda model, batch: None, small_model(), views(16))
    assert not report.findings
    assert "no backward pass" in str(report)
