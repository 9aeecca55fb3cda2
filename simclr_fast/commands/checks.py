"""The checks of `simclr-fast selfcheck`, in the order in which they run.

A check takes a device. It returns its text for the report, or a `Measured` with numbers to keep.
It raises Skip if it does not apply, and another exception if it fails. Expected values come from
`simclr_fast.reference` in float64.
"""

import contextlib
import io
import json
import logging
import math
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import simclr_fast
from simclr_fast import ops, reference
from simclr_fast.augment.params import Augmentation, draw_params
from simclr_fast.augment.views import apply_views
from simclr_fast.data.loader import TwoViewLoader
from simclr_fast.losses.nt_xent import nt_xent_loss
from simclr_fast.losses.sup_con import sup_con_loss
from simclr_fast.optim.lars import LARS
from simclr_fast.training.config import PRESETS, PretrainConfig
from simclr_fast.training.pretrain import pretrain
from simclr_fast.utils.extras import explain, installed_versions, missing, require


class Measured(NamedTuple):
    """text: for the text report. data: for the JSON report."""

    text: str
    data: Any


Check = Callable[[torch.device], str | Measured]

_TEMPERATURE = 0.1
# Numbers of pairs and features that are not multiples of any tile size.
_PAIRS, _FEATURES = 333, 100
# Numbers of features: each row of the GPU's launch table, and one that fills no block. Compiling
# for each of them takes about ten seconds on a GPU.
_ALL_FEATURES = (16, 64, 100, 256, 512, 2048)
# The compiler treats 1 specially, tiles have 16 or 32 rows, 250 and 1000 are multiples of neither.
_ALL_PAIRS = (1, 2, 3, 16, 32, 64, 250, 256, 1000)
# Up to so many pairs the error of one batch is chance. So many batches are judged together.
_FEW_PAIRS, _DRAWS = 32, 64
# Seconds that the tests and the benchmarks may take, so that all checks end within ten minutes.
_TESTS_LIMIT, _BENCH_LIMIT = 180, 180


class Skip(Exception):
    """The check does not apply here; the message says why."""


def quick_checks() -> Iterator[tuple[str, Check]]:
    """The checks that take a minute on any machine. They check each part once."""
    yield "versions", versions
    yield "devices", devices
    yield "native extension", extension
    yield "kernels chosen", kernels_chosen
    yield "CUDA kernels of LARS", cuda_lars
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        yield f"NT-Xent {_short(dtype)}", partial(nt_xent, dtype=dtype)
    for dtype in (torch.float32, torch.bfloat16):
        yield f"NT-Xent statistics {_short(dtype)}", partial(statistics, dtype=dtype)
        yield f"NT-Xent ties {_short(dtype)}", partial(ties, dtype=dtype)
    yield "NT-Xent decoupled", decoupled
    yield "NT-Xent learnable temperature", learnable_temperature
    yield "NT-Xent repeats bit for bit", nt_xent_repeats
    yield "NT-Xent in torch.compile", nt_xent_compiled
    for dtype in (torch.float32, torch.bfloat16):
        yield f"supervised loss {_short(dtype)}", partial(supervised, dtype=dtype)
    for dtype in (torch.float32, torch.bfloat16):
        yield f"LARS {_short(dtype)}", partial(lars, dtype=dtype)
    yield "LARS repeats bit for bit", lars_repeats
    for spec in ("simclr", "torchvision"):
        yield f"views, {spec}", partial(views, spec=spec)
    yield "two streams", two_streams
    yield "second GPU", second_gpu
    yield "two-view loader on 8 images", loader
    yield "two-view loader on an array", array_loader
    yield "10 steps of pretraining", ten_steps


def further_checks() -> Iterator[tuple[str, Check]]:
    """The checks that `--full` adds: all sizes, CUDA graphs, tests, the full batch, benchmarks."""
    for dtype in (torch.float32, torch.bfloat16):
        yield f"features 16 to 2048 {_short(dtype)}", partial(every_width, dtype=dtype)
        yield f"batch sizes 1 to 1000 {_short(dtype)}", partial(every_batch_size, dtype=dtype)
    yield "CUDA graph", cuda_graph
    yield "20 steps at batch 4096", full_batch
    yield "tests on the GPU", device_tests
    yield "benchmarks", benchmarks


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _need_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Skip("no GPU is checked")


# The machine and its software.


def found_versions() -> dict[str, str]:
    """Package → version, for this library and those that it uses."""
    return {"simclr_fast": simclr_fast.__version__, **installed_versions()}


def found_devices() -> dict[str, Any]:
    """The machine and its GPUs."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "driver": _driver(),
        "gpus": [],
    }
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found["gpus"].append(
            {
                "name": about.name,
                "architecture": f"sm_{about.major}{about.minor}",
                "memory_gib": round(about.total_memory / 2**30, 1),
                "multiprocessors": about.multi_processor_count,
            }
        )
    return found


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"\b\d{3,}\.\d[\d.]*", path.read_text()) if path.exists() else None
    return found[0] if found else None


def versions(_: torch.device) -> str:
    return ", ".join(f"{name} {number}" for name, number in found_versions().items())


def devices(device: torch.device) -> str:
    found = found_devices()
    parts = [f"{found['system']}, {found['threads']} threads"]
    for index, gpu in enumerate(found["gpus"]):
        memory = f"{gpu['memory_gib']:.0f} GiB"
        parts.append(f"cuda:{index} {gpu['name']} {gpu['architecture']} {memory}")
    if device.type == "cuda":
        built = f"ROCm {found['rocm']}" if found["rocm"] else f"CUDA {found['cuda']}"
        parts.append(f"{built}, driver {found['driver'] or 'unknown'}")
    else:
        parts.append("no GPU is checked")
    return "; ".join(parts)


def extension(_: torch.device) -> str:
    if isinstance(ops.EXTENSION_ERROR, ModuleNotFoundError):
        raise Skip(f"plain torch computes, slower: {ops.why_plain(torch.device('cpu'))}")
    if not ops.has_extension():
        raise RuntimeError(f"not loaded: {ops.EXTENSION_ERROR}")
    return f"instruction set {import_module('simclr_fast._C').instruction_set()}"


def kernels_chosen(device: torch.device) -> str:
    """Report the kernels in use. If it is plain torch, which is slow, report why."""
    reason = ops.why_plain(device)
    if reason is not None:
        raise Skip(f"plain torch computes here: {reason}")
    return ops.implementation_for(device).value


def cuda_lars(device: torch.device) -> str:
    _need_gpu(device)
    reason = ops.why_plain(device, on_cuda=ops.Implementation.CUDA)
    if reason is not None:
        raise Skip(f"plain torch computes LARS here: {reason}")
    optimizer = LARS([nn.Parameter(torch.ones(8, device=device))], lr=0.1, fused=True)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(8, device=device)
    optimizer.step()
    return "loaded"


# The losses.


def _pairs(
    dtype: torch.dtype, pairs: int = 0, features: int = 0, noise: float = 0.5, seed: int = 0
) -> Tensor:
    """Two views, [2N, D], view 1 first."""
    shape = (pairs or _PAIRS, features or _FEATURES)
    generator = torch.Generator().manual_seed(seed)
    z1 = torch.randn(shape, generator=generator)
    z2 = z1 + noise * torch.randn(shape, generator=generator)
    return torch.cat((z1, z2)).to(dtype)


def _loss_and_gradient(loss: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    value = loss(z)
    # The upstream gradient is not 1, so that a forgotten factor shows.
    (gradient,) = torch.autograd.grad(1.7 * value, z)
    return value.detach(), gradient


def _fused(z: Tensor) -> Tensor:
    return nt_xent_loss(z, temperature=_TEMPERATURE)


def _plain(z: Tensor) -> Tensor:
    return reference.nt_xent(z, None, _TEMPERATURE).mean()


def _relative(actual: Tensor, wanted: Tensor) -> float:
    difference = (actual.double().cpu() - wanted.double().cpu()).norm()
    return (difference / wanted.double().norm().cpu().clamp_min(1e-30)).item()


class _Errors(NamedTuple):
    """Relative errors: of our loss, of our gradient, and of plain torch's gradient."""

    loss: float
    gradient: float
    plain: float


def _errors(
    device: torch.device,
    z: Tensor,
    ours: Callable[[Tensor], Tensor],
    plain: Callable[[Tensor], Tensor],
) -> _Errors:
    """Our loss and gradient against plain torch in float64 on the CPU, and in z's dtype."""
    loss, gradient = _loss_and_gradient(plain, z.double())
    our_loss, our_gradient = _loss_and_gradient(ours, z.to(device))
    _, plain_gradient = _loss_and_gradient(plain, z.to(device))
    loss_error = abs(our_loss.item() - loss.item()) / max(abs(loss.item()), 1e-30)
    return _Errors(loss_error, *(_relative(g, gradient) for g in (our_gradient, plain_gradient)))


def _judge(draws: list[_Errors], dtype: torch.dtype) -> str:
    """Root mean squares over the draws: our gradient's error is at most twice plain torch's."""
    rms = _Errors(*(math.sqrt(sum(x * x for x in e) / len(e)) for e in zip(*draws, strict=True)))
    # In float64 the reference is no more exact than ours: allow for the order of summation.
    floor = torch.finfo(dtype).eps * (100 if dtype == torch.float64 else 1)
    detail = (
        f"loss off by {rms.loss:.1e}, gradient by {rms.gradient:.1e}; "
        f"plain torch's by {rms.plain:.1e}"
    )
    if not (rms.gradient <= max(2 * rms.plain, floor) and rms.loss <= max(4 * floor, 1e-6)):
        raise AssertionError(detail)
    return detail


def _compare(
    device: torch.device,
    z: Tensor,
    ours: Callable[[Tensor], Tensor],
    plain: Callable[[Tensor], Tensor],
) -> str:
    return _judge([_errors(device, z, ours, plain)], z.dtype)


def nt_xent(device: torch.device, dtype: torch.dtype) -> str:
    return _compare(device, _pairs(dtype), _fused, _plain)


def statistics(device: torch.device, dtype: torch.dtype) -> str:
    z = _pairs(dtype, noise=2.0)
    _, stats = nt_xent_loss(z.to(device), None, _TEMPERATURE, return_stats=True)
    wanted = _exact_statistics(z.double())
    # 16-bit rows are rounded to float16 before they are multiplied, an error of 2⁻¹¹ of a logit.
    # It may change whether one row of each view counts as correct.
    tolerance = (2e-6 if dtype == torch.float32 else 2e-4) / _TEMPERATURE
    errors = {}
    for name, exact in wanted.items():
        value = getattr(stats, name).item()
        allowed = tolerance * max(1.0, abs(exact))
        if "accuracy" in name and dtype != torch.float32:
            allowed = 1.01 / _PAIRS
        errors[name] = abs(value - exact) / allowed
        if not errors[name] <= 1:
            raise AssertionError(f"{name} is {value:.6g}, should be {exact:.6g}")
    return f"6 statistics, at most {max(errors.values()):.2g} of their tolerance off"


def _exact_statistics(z: Tensor) -> dict[str, float]:
    """`NTXentStats`, computed from its definition, for z [2N, D] in float64."""
    u = nn.functional.normalize(z, dim=1)
    cosine, pairs = u @ u.T, len(z) // 2
    rows = torch.arange(len(z))
    partner = rows.roll(pairs)
    logits = (cosine / _TEMPERATURE).fill_diagonal_(-math.inf)
    # Rows of view 1 against only those of view 2.
    across = logits[:pairs, pairs:]

    def scores(s: Tensor, positive: Tensor) -> tuple[float, float]:
        log_p = s.log_softmax(1)
        entropy = -torch.where(log_p == -math.inf, 0, log_p.exp() * log_p).sum(1)
        others = s.scatter(1, positive[:, None], -math.inf)
        wins = s.gather(1, positive[:, None])[:, 0] > others.amax(1)
        return wins.double().mean().item(), entropy.mean().item()

    contrastive = scores(across, rows[:pairs])
    both = scores(logits, partner)
    positive = cosine[rows, partner]
    negatives = cosine.sum() - cosine.diagonal().sum() - positive.sum()
    return {
        "contrastive_accuracy": contrastive[0],
        "contrastive_entropy": contrastive[1],
        "accuracy": both[0],
        "entropy": both[1],
        "positive_similarity": positive.mean().item(),
        "negative_similarity": (negatives / (len(z) * (len(z) - 2))).item(),
    }


def ties(device: torch.device, dtype: torch.dtype) -> str:
    """A collapsed encoder: all rows are equal, so no positive is above the negatives."""
    z = _pairs(dtype)[:1].to(device).repeat(2 * _PAIRS, 1)
    _, stats = nt_xent_loss(z, None, _TEMPERATURE, return_stats=True)
    accuracies = stats.contrastive_accuracy.item(), stats.accuracy.item()
    if accuracies != (0, 0):
        raise AssertionError(f"equal rows give accuracies {accuracies}, should be (0, 0)")
    entropy, wanted = stats.entropy.item(), math.log(2 * _PAIRS - 1)
    if not math.isclose(entropy, wanted, rel_tol=1e-3):
        raise AssertionError(f"equal rows give entropy {entropy}, should be {wanted}")
    return "equal rows count as wrong"


def decoupled(device: torch.device) -> str:
    return _compare(
        device,
        _pairs(torch.float32),
        lambda z: nt_xent_loss(z, temperature=_TEMPERATURE, decoupled=True),
        lambda z: reference.nt_xent(z, None, _TEMPERATURE, decoupled=True).mean(),
    )


def learnable_temperature(device: torch.device) -> str:
    z = _pairs(torch.float32)

    def gradient(loss: Callable[[Tensor], Tensor], dtype: torch.dtype, where: Any) -> float:
        tau = torch.tensor(_TEMPERATURE, dtype=dtype, device=where, requires_grad=True)
        (grad,) = torch.autograd.grad(loss(tau), tau)
        return grad.item()

    exact = gradient(
        lambda tau: reference.nt_xent(z.double(), None, tau).mean(), torch.float64, "cpu"
    )
    here = z.to(device)
    ours = gradient(lambda tau: nt_xent_loss(here, None, tau), torch.float32, device)
    error = abs(ours / exact - 1)
    if not error < 1e-4:
        raise AssertionError(f"the temperature's gradient is {ours:.6g}, should be {exact:.6g}")
    return f"the temperature's gradient is off by {error:.1e}"


def nt_xent_repeats(device: torch.device) -> str:
    z = _pairs(torch.float32).to(device)
    first = _loss_and_gradient(_fused, z)
    for _ in range(5):
        again = _loss_and_gradient(_fused, z)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    return "6 runs are equal"


def nt_xent_compiled(device: torch.device) -> str:
    z = _pairs(torch.float32).to(device)
    torch._dynamo.reset()
    compiled = torch.compile(_fused, fullgraph=True, backend="aot_eager")
    plain, ours = _loss_and_gradient(_fused, z), _loss_and_gradient(compiled, z)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    return "fullgraph, equal to eager"


def supervised(device: torch.device, dtype: torch.dtype) -> str:
    z = _pairs(dtype)
    labels = torch.arange(len(z)) % 50
    # A class of one row: it has no positive.
    labels[0] = 50
    return _compare(
        device,
        z,
        lambda z: sup_con_loss(z, labels.to(z.device), _TEMPERATURE),
        lambda z: reference.sup_con(z, labels.to(z.device), _TEMPERATURE).mean(),
    )


def every_width(device: torch.device, dtype: torch.dtype) -> str:
    for features in _ALL_FEATURES:
        _named(f"{features} features", device, [_pairs(dtype, features=features)])
    return f"{len(_ALL_FEATURES)} widths: gradients within twice plain torch's error"


def every_batch_size(device: torch.device, dtype: torch.dtype) -> str:
    for pairs in _ALL_PAIRS:
        draws = _DRAWS if pairs <= _FEW_PAIRS else 1
        batches = [_pairs(dtype, pairs=pairs, seed=seed) for seed in range(draws)]
        _named(f"{pairs} pairs", device, batches)
        z = batches[0]
        _, stats = nt_xent_loss(z.to(device), None, _TEMPERATURE, return_stats=True)
        assert stats.entropy.isfinite(), f"{pairs} pairs: entropy {stats.entropy.item()}"
        sup_con_loss(z.to(device), torch.zeros(len(z), dtype=torch.int64, device=device))
    return f"{len(_ALL_PAIRS)} batch sizes: gradients within twice plain torch's error"


def _named(what: str, device: torch.device, batches: list[Tensor]) -> None:
    try:
        _judge([_errors(device, z, _fused, _plain) for z in batches], batches[0].dtype)
    except Exception as error:
        raise AssertionError(f"{what}: {error}") from error


# LARS and the views.


def _lars_run(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Weights after five steps, and the float64 reference's."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 3, 7, 7), (129, 33), (17,), (1,)]
    start = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    params = [nn.Parameter(p.to(device, copy=True)) for p in start]
    arguments: dict[str, Any] = {"lr": 0.4, "momentum": 0.9, "weight_decay": 1e-2, "eps": 0.0}
    optimizer = LARS(params, momentum_order="tf", norm="joint", **arguments)
    exact: list[tuple[Tensor, Tensor | None]] = [(p.double(), None) for p in start]
    for _ in range(5):
        grads = [0.3 * torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.to(device)
        optimizer.step()
        exact = [
            reference.lars_step(p, g, v, "google", **arguments)
            for (p, v), g in zip(exact, grads, strict=True)
        ]
    pairs = zip(params, exact, strict=True)
    return [torch.stack((p.detach().double().cpu(), e)) for p, (e, _) in pairs]


def lars(device: torch.device, dtype: torch.dtype) -> str:
    error = max(_relative(*pair) for pair in _lars_run(device, dtype))
    detail = f"weights off by {error:.1e} after 5 steps"
    # Each step rounds the weight and the buffer once.
    if not error <= 10 * torch.finfo(dtype).eps:
        raise AssertionError(detail)
    return detail


def lars_repeats(device: torch.device) -> str:
    first, second = (_lars_run(device, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return "2 runs are equal"


def _images(n: int) -> Tensor:
    """Smooth colours with some noise, uint8 [n, 61, 83, 3]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 5, 7, generator=generator)
    smooth = nn.functional.interpolate(coarse, (61, 83), mode="bicubic").clamp(0, 1)
    noise = 0.05 * torch.randn(n, 3, 61, 83, generator=generator)
    return ((smooth + noise).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous()


def views(device: torch.device, spec: Literal["simclr", "torchvision"]) -> str:
    images, aug = _images(24), Augmentation(40, spec)
    sizes = np.tile([[61, 83]], (len(images), 1))
    params = draw_params(aug, 0, 0, np.arange(len(images)), 0, sizes)
    ours = apply_views(images.to(device), params, aug).double().cpu()
    worst = 0.0
    drawn = ("box", "flip", "jitter", "order", "factors", "gray", "sigma")
    for i, image in enumerate(images):
        one = {name: getattr(params, name)[i] for name in drawn}
        wanted = reference.augment_view(image, size=40, spec=spec, **one)
        worst = max(worst, (ours[i] - wanted).abs().max().item() * 255)
    detail = f"at most {worst:.3f}/255 off"
    if not worst < 1:
        raise AssertionError(detail)
    return detail


# Streams, devices, graphs.


def two_streams(device: torch.device) -> str:
    _need_gpu(device)
    z = _pairs(torch.float32).to(device)
    wanted = _loss_and_gradient(_fused, z)
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    results = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream(device))
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(_loss_and_gradient(_fused, z))
    torch.cuda.synchronize(device)
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(wanted, result, strict=True))
    return "20 runs on 2 streams are equal"


def second_gpu(device: torch.device) -> str:
    _need_gpu(device)
    if torch.cuda.device_count() < 2:
        raise Skip("one GPU")
    other = torch.device("cuda", 1 - min(device.index or 0, 1))
    z = _pairs(torch.float32)
    # The current device stays the first one.
    first, second = (_loss_and_gradient(_fused, z.to(d)) for d in (device, other))
    assert second[0].device == other
    assert math.isclose(first[0].item(), second[0].item(), rel_tol=1e-6)
    lars(other, torch.float32)
    return f"{other} agrees with {device}"


def cuda_graph(device: torch.device) -> str:
    """Forward and backward pass with statistics, captured once and replayed with other values."""
    _need_gpu(device)
    z = _pairs(torch.float32).to(device).requires_grad_()

    def step() -> tuple[Tensor, ...]:
        loss, stats = nt_xent_loss(z, temperature=_TEMPERATURE, return_stats=True)
        (gradient,) = torch.autograd.grad(1.7 * loss, z)
        return loss.detach(), gradient, stats.entropy

    # Compile kernels and fill memory pools before the capture.
    warm_up = torch.cuda.Stream(device)
    warm_up.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            step()
    torch.cuda.current_stream(device).wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        z.copy_(_pairs(torch.float32, noise=1.0))
    graph.replay()
    torch.cuda.synchronize(device)
    wanted = step()
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))
    return "a replay with other values equals eager"


# Loading and training.


def loader(device: torch.device) -> str:
    if absent := missing(["PIL", "nvidia.dali"]):
        raise Skip(explain(absent))
    image = import_module("PIL.Image")
    with tempfile.TemporaryDirectory() as folder:
        for i, pixels in enumerate(_images(8)):
            image.fromarray(pixels.numpy()).save(f"{folder}/{i}.jpg", quality=95)
        first, second = (
            next(iter(TwoViewLoader(folder, 8, 40, device=device, backend=backend)))
            for backend in ("dali", "fused")
        )
        _check_batch(first[0], device)
        difference = (first[0] - second[0]).abs().mean().item() * 255
        assert difference < 1, f"DALI and the fused op differ by {difference:.2f}/255 on average"
    return f"DALI alone and the fused op on {device.type} differ by {difference:.1e}/255"


def array_loader(device: torch.device) -> str:
    """Views from an array equal those made on the CPU, in two epochs. No decoder is involved."""
    images = _images(24).numpy()
    here, on_cpu = (TwoViewLoader(images, 8, 40, device=d) for d in (device, "cpu"))
    worst, batches = 0.0, 0
    for _ in range(2):
        for ours, wanted in zip(here, on_cpu, strict=True):
            _check_batch(ours[0], device)
            worst = max(worst, (ours[0].cpu() - wanted[0]).abs().max().item() * 255)
            batches += 1
    assert worst < 1, f"views on {device} differ by {worst:.2f}/255 from the CPU's"
    return f"{batches} batches, at most {worst:.1e}/255 from the CPU's"


def _check_batch(view: Tensor, device: torch.device) -> None:
    assert view.shape == (8, 3, 40, 40), f"shape {tuple(view.shape)}"
    assert view.device.type == device.type, f"views are on {view.device}"
    assert torch.isfinite(view).all()


def ten_steps(device: torch.device) -> str:
    losses, _ = _train(replace(PRESETS["demo"](), steps=10, batch_size=64), device)
    return f"loss {losses[0]:.3f} → {losses[-1]:.3f}"


def full_batch(device: torch.device) -> Measured:
    """The paper's model and batch size, in the memory mode that fits this GPU."""
    _need_gpu(device)
    config = replace(
        PRESETS["imagenet"](), data="demo", steps=20, epochs=100, warmup_epochs=0, lr=0.1
    )
    torch.cuda.reset_peak_memory_stats(device)
    try:
        losses, rows = _train(config, device)
    except ValueError as error:
        if "fits in no mode" in str(error):
            raise Skip(f"this GPU is too small: {error}") from error
        raise
    peak = torch.cuda.max_memory_allocated(device) / 1e9
    speed = sorted(row["images_per_second"] for row in rows)[len(rows) // 2]
    text = (
        f"ResNet-50, 224 pixels, memory {rows[0]['memory']}: {speed:.0f} images/s, "
        f"peak {peak:.1f} GB, loss {losses[0]:.3f} → {losses[-1]:.3f}"
    )
    return Measured(text, {"peak_bytes": round(peak * 1e9), "steps": rows})


def _train(config: PretrainConfig, device: torch.device) -> tuple[list[float], list[Any]]:
    """The losses of a run, and the lines of its metrics with the memory mode."""
    try:
        require(["tqdm", "torchvision", "safetensors"])
    except ImportError as error:
        raise Skip(str(error)) from error
    with (
        _Messages() as said,
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stderr(io.StringIO()),  # the progress bar
    ):
        config = replace(config, device=str(device), out=Path(folder) / "run", log_every=1)
        out = pretrain(config)
        rows = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    assert len(losses) == config.steps, f"{len(losses)} of {config.steps} steps"
    assert all(math.isfinite(loss) for loss in losses), f"losses {losses}"
    return losses, [row | {"memory": said.memory} for row in rows]


class _Messages(logging.Handler):
    """Keeps the log of a run out of the report, and finds the memory mode in it."""

    memory = "unknown"

    def __enter__(self) -> "_Messages":
        self._logger = logging.getLogger("simclr_fast")
        self._before = self._logger.level, self._logger.propagate
        self._logger.addHandler(self)
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._logger.level, self._logger.propagate = self._before

    def emit(self, record: logging.LogRecord) -> None:
        for line in record.getMessage().splitlines():
            if line.strip().startswith("memory"):
                self.memory = line.split(maxsplit=1)[1]


# The tests and the benchmarks, each in a separate process.


def device_tests(device: torch.device) -> str:
    """Run tests/gpu, and on the GPU those tests of the kernels that run in an interpreter without.

    The other tests of the kernels only compile, which takes minutes and needs no GPU.
    """
    _need_gpu(device)
    root = Path(simclr_fast.__file__).resolve().parents[1]
    if not (root / "tests" / "kernels" / "interpreted").is_dir():
        raise Skip("no tests folder here; a clone of the repository has one")
    if "--device" not in (root / "tests" / "conftest.py").read_text():
        raise Skip("these tests have no option --device")
    if find_spec("pytest") is None or find_spec("pytest_timeout") is None:
        raise Skip("pytest is missing: pip install pytest pytest-timeout")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["--device", str(device), "tests/kernels/interpreted", "tests/gpu"]
    status, lines = _bounded(command, root, _TESTS_LIMIT)
    if status != 0:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        raise AssertionError("; ".join((failed or lines)[-5:]))
    return lines[-1].strip("= ")


def benchmarks(device: torch.device) -> Measured:
    """The quick benchmarks of ours and of the other libraries that are installed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "simclr_fast", "bench", "all", "--quick"]
        command += ["--device", str(device), "--out", folder]
        try:
            status, lines = _bounded(command, Path.cwd(), _BENCH_LIMIT)
        except AssertionError as late:
            # Keep the parts that were timed before.
            status, lines = 1, [str(late)]
        written = list(Path(folder).glob("*.json"))
        results = json.loads(written[0].read_text()) if written else {}
    if not results:
        raise AssertionError(f"nothing was timed: {' '.join(lines[-3:])}")
    rows = [f"{name}: {_ratios(result)}" for name, result in results.items()]
    left_out = [] if status == 0 else [f"not all were timed: {lines[-1]}"]
    return Measured("; ".join(rows + left_out), results)


def _ratios(result: dict[str, Any]) -> str:
    """The ratios in the first table: each contender's time over ours."""
    table = result["tables"][0]
    ratios = next(iter(table["ratios"].values()))
    return ", ".join(f"{name} ×{ratio:.2f}" for name, ratio in ratios.items())


def _bounded(command: list[str], folder: Path, seconds: float) -> tuple[int, list[str]]:
    """Run a command; return its exit status and its output without empty lines.

    Raises:
        AssertionError: it took longer than `seconds`. The message has the tests that had failed.
    """
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        # What a killed command had printed is bytes even with text=True.
        printed = (error.stdout or b"").decode(errors="replace").splitlines()
        failed = [line for line in printed if line.startswith("failed: ")]
        raise AssertionError("; ".join((f"not done after {seconds:.0f} s", *failed))) from error
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return done.returncode, lines or ["nothing was printed"]
