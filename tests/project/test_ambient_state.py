"""Every public function under the modes of other people's code, and after they ended.

Each mode has a process of its own, where nothing was called before: what a function keeps for
later calls would come from the mode. Inside, a call is right or an error. Outside, it has the same
bits as in a process without modes.
"""

import contextlib
import os
import tempfile
import threading
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import context
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map

from simclr_fast import (
    LARS,
    LargeBatch,
    NTXentLoss,
    SimCLRViews,
    load_weights,
    multi_view_nt_xent_loss,
    nt_xent_loss,
    sup_con_loss,
)
from simclr_fast.compat import lightly
from simclr_fast.losses import queue_loss
from simclr_fast.models.encoders import build_encoder
from simclr_fast.optim.lars import lars_param_groups
from simclr_fast.utils.checkpoint import save_encoder


def numbers(*shape, seed=0):
    """The same in every mode: real float32 tensors on the CPU."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


class Inputs:
    """Made before the mode begins."""

    def __init__(self):
        self.z = torch.from_numpy(numbers(16, 24))
        self.labels = torch.arange(16) % 5
        self.images = torch.from_numpy(
            np.random.default_rng(1).integers(0, 255, (4, 20, 24, 3), dtype=np.uint8)
        )
        self.x = torch.from_numpy(numbers(8, 3, 8, 8, seed=2))
        self.models = {mode: net() for mode in MODES}
        self.params = [nn.Parameter(torch.from_numpy(numbers(5, 7, seed=s))) for s in (3, 4)]
        for p in self.params:
            p.grad = torch.from_numpy(numbers(5, 7, seed=5))
        self.folder = Path(tempfile.mkdtemp())
        torch.manual_seed(0)
        encoder, _ = build_encoder("resnet10", width=0.125, image_size=16, stem="cifar")
        about = {"model": "resnet10", "width": "0.125", "stem": "cifar", "image_size": "16"}
        save_encoder(self.folder / "encoder.safetensors", encoder, about)


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), norm(4)

    def forward(self, x):
        return x + torch.relu(self.norm(self.conv(x)))


MODES = ["plain", "replay", "lockstep", "grad-cache"]


def net(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    blocks = nn.Sequential(Block(norm), Block(norm), Block(norm))
    return nn.Sequential(nn.Conv2d(3, 4, 1), blocks, nn.Flatten(), nn.Linear(256, 6))


def with_gradient(loss):
    def call(inputs):
        z = inputs.z.detach().clone().requires_grad_()
        made = loss(z, inputs)
        total = made[0] if isinstance(made, tuple) else made
        if torch.is_grad_enabled():
            (3 * total.sum()).backward()
        return made, z.grad

    return call


def large_batch(mode):
    def call(inputs):
        model = inputs.models[mode]
        model.zero_grad(set_to_none=True)
        if mode == "grad-cache":
            model.eval()
        step = LargeBatch(model, memory=mode, **{} if mode in MODES[:2] else {"micro_batch": 3})
        loss = step.backward(inputs.x, lambda z: nt_xent_loss(z, temperature=0.3))
        return loss, [p.grad for p in model.parameters()]

    return call


def lars(**options):
    def call(inputs):
        params = [nn.Parameter(p.detach().clone()) for p in inputs.params]
        for p, q in zip(params, inputs.params, strict=True):
            p.grad = q.grad.clone()
        optimizer = LARS(params, lr=0.1, weight_decay=1e-4, **options)
        for _ in range(2):
            optimizer.step()
        return [p.detach() for p in params]

    return call


def module(inputs):
    loss = NTXentLoss(0.2, learnable=True)
    value = loss(inputs.z)
    return value.detach()


CALLS = {
    "nt_xent_loss": with_gradient(lambda z, i: nt_xent_loss(z, temperature=0.1)),
    "two tensors": with_gradient(lambda z, i: nt_xent_loss(z[:8], z[8:], 0.2)),
    "statistics": with_gradient(lambda z, i: nt_xent_loss(z, return_stats=True)),
    "per row": with_gradient(lambda z, i: nt_xent_loss(z, reduction="none")),
    "decoupled": with_gradient(lambda z, i: nt_xent_loss(z, decoupled=True)),
    "NTXentLoss": module,
    "sup_con_loss": with_gradient(lambda z, i: sup_con_loss(z, i.labels)),
    "multi_view": with_gradient(lambda z, i: multi_view_nt_xent_loss(z, 4)),
    "lightly": with_gradient(lambda z, i: lightly.NTXentLoss()(z[:8], z[8:])),
    "SimCLRViews": lambda i: SimCLRViews(16)(i.images, ids=range(4)),
    "SimCLRViews of an image": lambda i: SimCLRViews(16)(i.images[0], ids=3),
    "LARS": lars(),
    "LARS in torch": lars(fused=False),
    "LARS one by one": lars(foreach=False),
    "LARS groups": lambda i: [len(g["params"]) for g in lars_param_groups(i.models["plain"])],
    **{f"LargeBatch {mode}": large_batch(mode) for mode in MODES},
    "load_weights": lambda i: list(load_weights(i.folder).encoder.state_dict().values()),
}


@contextlib.contextmanager
def default(setting, before, value):
    setting(value)
    try:
        yield
    finally:
        setting(before)


def default_device():
    return default(torch.set_default_device, None, "meta")


def default_dtype(dtype):
    return default(torch.set_default_dtype, torch.float32, dtype)


@contextlib.contextmanager
def nested():
    with torch.device("meta"), default_dtype(torch.float64), torch.autocast("cpu", torch.bfloat16):
        yield


MODE = {
    "nothing": contextlib.nullcontext,
    "torch.device": lambda: torch.device("meta"),
    "default device": lambda: default(torch.set_default_device, None, "meta"),
    "default float64": lambda: default_dtype(torch.float64),
    "default float16": lambda: default_dtype(torch.float16),
    "fake tensors": FakeTensorMode,
    "fake inputs": FakeTensorMode,
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": lambda: default(torch.use_deterministic_algorithms, False, True),
    "anomaly": lambda: torch.autograd.detect_anomaly(check_nan=False),
    "nested": nested,
    "thread": contextlib.nullcontext,
    "fork": contextlib.nullcontext,
}
LARGE_BATCH = {f"LargeBatch {mode}" for mode in MODES}
# Calls that are an error in a mode, and what it says. FakeTensorMode takes no real tensors.
REAL = "convert all Tensors to FakeTensors"
ERRORS = {
    "torch.device": {"NTXentLoss": "Cannot copy out of meta tensor"},
    "default device": {"NTXentLoss": "Cannot copy out of meta tensor"},
    "nested": {"NTXentLoss": "Cannot copy out of meta tensor"},
    "fake tensors": dict.fromkeys(CALLS.keys() - {"LARS groups"}, REAL),
    "fake inputs": dict.fromkeys(
        [*LARGE_BATCH, "LARS", "LARS in torch", "LARS one by one", "load_weights"], REAL
    ),
    **dict.fromkeys(("inference", "no_grad"), dict.fromkeys(LARGE_BATCH, "leave torch.no_grad")),
}
# Where only the shapes are those of a normal call: no values, or a model in another dtype.
SHAPES = {
    "fake inputs": set(CALLS),
    "autocast": LARGE_BATCH,
    "nested": LARGE_BATCH,
}


def described(made, values=True):
    """The bits of a result, or its shapes."""

    def one(t):
        if not isinstance(t, torch.Tensor):
            return t
        bits = t.detach().contiguous().numpy().tobytes() if values else b""
        return (str(t.dtype), tuple(t.shape), bits)

    return tree_map(one, tree_leaves(made))


def call_all(inputs):
    return {name: described(call(inputs)) for name, call in CALLS.items()}


def as_fake(inputs, mode):
    """The inputs as tensors of the mode."""
    made = object.__new__(Inputs)
    made.__dict__ = dict(inputs.__dict__)
    for name in ("z", "labels", "images", "x"):
        setattr(made, name, mode.from_tensor(getattr(inputs, name)))
    return made


def in_threads():
    """Every call in four threads at once."""
    results, errors = {}, []
    # Made before, because threads share torch's random numbers.
    inputs = [Inputs() for _ in range(4)]

    def work(number):
        try:
            results[number] = call_all(inputs[number])
        except BaseException:
            errors.append(traceback.format_exc())

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors, errors[0]
    return list(results.values())


def in_fork(inputs):
    """In a forked process, after the parent's threads have worked."""
    torch.set_num_threads(2)
    call_all(inputs)
    path = inputs.folder / "forked.pt"
    child = os.fork()
    if child == 0:
        try:
            # As DataLoader's workers do: after a fork OpenMP's threads hang, torch's own as well.
            torch.set_num_threads(1)
            torch.save(call_all(Inputs()), path)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    torch.set_num_threads(1)
    assert path.exists(), "the forked process died"
    return [torch.load(path, weights_only=False)]


def worker(mode, out):
    torch.set_num_threads(1)
    tempfile.tempdir = str(out.parent)  # what is made here goes with the test's folder
    inputs, made, errors, runs = Inputs(), {}, {}, []
    if mode == "thread":
        runs = in_threads()
    elif mode == "fork":
        runs = in_fork(inputs)
    for name in CALLS if not runs else ():
        try:
            with MODE[mode]() as context:
                found = CALLS[name](as_fake(inputs, context) if mode == "fake inputs" else inputs)
            made[name] = described(found, name not in SHAPES.get(mode, ()))
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    torch.save({"made": made, "errors": errors, "runs": runs, "after": call_all(Inputs())}, out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("modes")


def run(folder, mode):
    path = folder / f"{mode}.pt"
    if not path.exists():
        process = context.Process(target=worker, args=(mode, path))
        process.start()
        process.join(100)
        if process.is_alive():
            process.kill()
            pytest.fail(f"{mode} hangs")
        assert process.exitcode == 0
    # Written by the worker above.
    return torch.load(path, weights_only=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("mode", MODE)
def test_a_mode_changes_nothing_and_leaves_nothing_behind(folder, mode):
    expected = run(folder, "nothing")["after"]
    found = run(folder, mode)
    assert [name for name in CALLS if found["after"][name] != expected[name]] == []
    for each in found["runs"]:
        assert [name for name in CALLS if each[name] != expected[name]] == []
    errors = ERRORS.get(mode, {})
    assert found["errors"].keys() == errors.keys()
    for name, says in errors.items():
        assert says in found["errors"][name]
    for name, values in found["made"].items():
        want = expected[name]
        if name in SHAPES.get(mode, ()):
            want = [(*v[:2], b"") if isinstance(v, tuple) else v for v in want]
        if mode in ("inference", "no_grad"):
            # There is no gradient, which comes last.
            values, want = (v[:-1] if want[-1] != values[-1] else v for v in (values, want))
        assert values == want, name


def tangent(loss, z, direction):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(z, direction))).tangent


def transforms(loss):
    """Ways of torch.func to call a loss, and the same by autograd."""

    def gradient(z):
        z = z.clone().requires_grad_()
        return torch.autograd.grad(loss(z), z)[0]

    def many(z):
        return torch.stack([z, 2 * z])

    return {
        "grad": (lambda z: torch.func.grad(loss)(z), gradient),
        "vjp": (lambda z: torch.func.vjp(loss, z)[1](torch.tensor(1.0))[0], gradient),
        "jacrev": (lambda z: torch.func.jacrev(loss)(z), gradient),
        "hessian": (lambda z: torch.func.hessian(loss)(z), None),
        "vmap": (
            lambda z: torch.func.vmap(loss)(many(z)),
            lambda z: torch.stack([loss(part) for part in many(z)]),
        ),
        "vmap of grad": (
            lambda z: torch.func.vmap(torch.func.grad(loss))(many(z)),
            lambda z: torch.stack([gradient(part) for part in many(z)]),
        ),
        "grad of vmap": (
            lambda z: torch.func.grad(lambda two: torch.func.vmap(loss)(two).sum())(many(z)),
            None,
        ),
        # Along z itself the derivative is 0: the losses do not depend on the lengths of the rows.
        "jvp": (
            lambda z: torch.func.jvp(loss, (z,), (z.roll(1, 0),))[1],
            lambda z: (gradient(z) * z.roll(1, 0)).sum(),
        ),
        "jacfwd": (lambda z: torch.func.jacfwd(loss)(z), gradient),
        "dual numbers": (
            lambda z: tangent(loss, z, z.roll(1, 0)),
            lambda z: (gradient(z) * z.roll(1, 0)).sum(),
        ),
        "jacobian": (lambda z: torch.autograd.functional.jacobian(loss, z), gradient),
    }


KEYS = torch.eye(4)
LOSSES = {
    "nt_xent_loss": lambda z: nt_xent_loss(z, temperature=0.3),
    "statistics": lambda z: nt_xent_loss(z, return_stats=True)[0],
    "module": lambda z: NTXentLoss(0.3)(z),
    "sup_con_loss": lambda z: sup_con_loss(z, torch.arange(8) % 3),
    "multi_view": lambda z: multi_view_nt_xent_loss(z, 4),
    "temperature": lambda z: nt_xent_loss(z.detach(), temperature=z.abs().mean()),
    "queue_loss": lambda z: queue_loss(z, z.detach().roll(1, 1), KEYS),
}


@pytest.mark.parametrize("way", transforms(None))
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_are_right_or_refused(name, way):
    z = torch.from_numpy(numbers(8, 4))
    loss = LOSSES[name]
    before = loss(z)
    transformed, plain = transforms(loss)[way]
    try:
        found = transformed(z)
    except RuntimeError as error:
        # The second is torch's own.
        says = str(error)
        assert any(w in says for w in ("torch.func.grad and its kin", "functorch", "vmap: "))
    else:
        torch.testing.assert_close(found, plain(z))
    assert torch.equal(loss(z), before)


REACHED, GO_ON = threading.Event(), threading.Event()


@pytest.mark.parametrize("place", range(3))
def test_a_meta_tensor_among_others_is_refused(place):
    """torch would call the op's shape function, and its result has arbitrary values."""
    z1, z2 = torch.from_numpy(numbers(2, 6, 4))
    arguments = [z1, z2, torch.tensor(0.3)]
    arguments[place] = arguments[place].to("meta")
    with pytest.raises((RuntimeError, ValueError), match="one device"):
        torch.ops.simclr_fast.nt_xent(*arguments, 1, False, False)
    p = nn.Parameter(torch.ones(3, 3))
    p.grad = torch.ones(3, 3)
    optimizer = LARS([p], lr=0.1)
    optimizer.state[p]["momentum_buffer"] = torch.zeros(3, 3, device="meta")
    with pytest.raises((RuntimeError, ValueError), match="one device"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3, 3))


class Slow(nn.Linear):
    """Waits in the middle of its forward."""

    def forward(self, x):
        REACHED.set()
        GO_ON.wait(20)
        return super().forward(x)


def test_modules_that_another_thread_calls_during_a_trace():
    """torch.fx replaces nn.Module.__call__ for all threads while it traces."""
    made = []
    other = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    x = torch.from_numpy(numbers(3, 4))
    expected = other(x)
    thread = threading.Thread(target=lambda: made.append(LargeBatch(Slow(4, 4))))
    thread.start()
    assert REACHED.wait(20)
    assert torch.equal(other(x), expected)
    GO_ON.set()
    thread.join()
    assert isinstance(made[0], LargeBatch)
    assert torch.equal(other(x), expected)


def test_random_numbers_that_another_thread_draws_during_a_trace():
    """As a thread that makes batches does. They are not the model's."""
    stop = threading.Event()

    def draw():
        while not stop.is_set():
            torch.rand(3)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        step = LargeBatch(net(), memory="lockstep", micro_batch=4)
        step.backward(torch.from_numpy(numbers(8, 3, 8, 8)), lambda z: z.square().mean())
    finally:
        stop.set()
        thread.join()
    with pytest.raises(ValueError, match="draws random numbers"):
        LargeBatch(nn.Sequential(Drawing(), nn.Linear(4, 4)), memory="lockstep")


class Drawing(nn.Module):
    def forward(self, x):
        return x * 2 if torch.rand(()).item() < 2 else x
