"""Run once on a new machine: is everything there, and is every op right, against float64?"""

import argparse
import contextlib
import io
import json
import math
import platform
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from simclr_fast import __version__, ops, reference
from simclr_fast.augment.params import Augmentation, draw_params
from simclr_fast.augment.views import apply_views
from simclr_fast.data.loader import TwoViewLoader
from simclr_fast.losses.nt_xent import nt_xent_loss
from simclr_fast.optim.lars import LARS
from simclr_fast.training.config import PRESETS
from simclr_fast.training.pretrain import pretrain
from simclr_fast.utils.extras import require

_PACKAGES = ("numpy", "torchvision", "triton", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
_TEMPERATURE = 0.1
# Rows and features that no tile divides.
_PAIRS, _FEATURES = 333, 100


class Skip(Exception):
    """The check does not apply here; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """One line of the report."""

    status: Literal["ok", "skip", "FAIL"]
    name: str
    detail: str

    def __str__(self) -> str:
        return f"{self.status:<5}{self.name:<34}{self.detail}"


def run(arguments: list[str]) -> int:
    """One line per check; 1 if one failed."""
    parser = argparse.ArgumentParser(prog="simclr-fast selfcheck", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args(arguments).device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {device}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch sees no GPU")
    counts = {"ok": 0, "skip": 0, "FAIL": 0}
    for outcome in selfcheck(device):
        print(outcome, flush=True)
        counts[outcome.status] += 1
    print(f"{counts['ok']} ok, {counts['skip']} skipped, {counts['FAIL']} failed")
    return int(counts["FAIL"] > 0)


def selfcheck(device: torch.device, about: str = "") -> Iterator[Outcome]:
    """Run the checks in order; each is reported as soon as it is done, and none stops the next.

    about: how the names of the wanted ones begin.
    """
    for name, check in _checks():
        if not name.startswith(about):
            continue
        try:
            yield Outcome("ok", name, check(device))
        except Skip as reason:
            yield Outcome("skip", name, str(reason))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            cause = " ".join(str(error).split()) or "assertion failed"
            place = f"{Path(where.filename).name}:{where.lineno}"
            yield Outcome("FAIL", name, f"{type(error).__name__}: {cause} ({place})")


def _checks() -> Iterator[tuple[str, Callable[[torch.device], str]]]:
    yield "versions", _versions
    yield "devices", _devices
    yield "native extension", _extension
    yield "CUDA kernels of LARS", _cuda_lars
    yield "Triton", _triton
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        yield f"NT-Xent {_short(dtype)}", partial(_nt_xent, dtype=dtype)
    yield "NT-Xent repeats bit for bit", _nt_xent_repeats
    yield "NT-Xent in torch.compile", _nt_xent_compiled
    for dtype in (torch.float32, torch.bfloat16):
        yield f"LARS {_short(dtype)}", partial(_lars, dtype=dtype)
    yield "LARS repeats bit for bit", _lars_repeats
    for spec in ("simclr", "torchvision"):
        yield f"views, {spec}", partial(_views, spec=spec)
    yield "two streams", _two_streams
    yield "second GPU", _second_gpu
    yield "two-view loader on 8 images", _loader
    yield "10 steps of pretraining", _ten_steps


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _versions(_: torch.device) -> str:
    found = [f"simclr_fast {__version__}", f"python {platform.python_version()}"]
    found.append(f"torch {torch.__version__}")
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def _devices(device: torch.device) -> str:
    parts = [f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        parts.append(
            f"cuda:{index} {about.name} sm_{about.major}{about.minor} "
            f"{about.total_memory / 2**30:.0f} GiB"
        )
    if device.type == "cuda":
        parts.append(f"CUDA {torch.version.cuda}, driver {_driver()}")
    else:
        parts.append("no GPU is checked")
    return "; ".join(parts)


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0].split("  ")[1].strip() if path.exists() else "unknown"


def _extension(_: torch.device) -> str:
    if not ops.has_extension():
        raise RuntimeError(f"not loaded: {ops.EXTENSION_ERROR}")
    return f"instruction set {import_module('simclr_fast._C').instruction_set()}"


def _cuda_lars(device: torch.device) -> str:
    if device.type != "cuda":
        raise Skip("no GPU is checked")
    optimizer = LARS([nn.Parameter(torch.ones(8, device=device))], lr=0.1, fused=True)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(8, device=device)
    optimizer.step()
    return "loaded"


def _triton(device: torch.device) -> str:
    if device.type != "cuda":
        raise Skip("no GPU is checked")
    if reason := ops.why_plain(device):
        raise RuntimeError(reason)
    return f"triton {import_module('triton').__version__}"


def _views_of_pairs(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    z1 = torch.randn(_PAIRS, _FEATURES, generator=generator)
    z2 = z1 + 0.5 * torch.randn(_PAIRS, _FEATURES, generator=generator)
    return torch.cat((z1, z2)).to(dtype)


def _loss_and_gradient(loss: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    value = loss(z)
    # An upstream gradient other than one.
    (gradient,) = torch.autograd.grad(1.7 * value, z)
    return value.detach(), gradient


def _fused(z: Tensor) -> Tensor:
    return nt_xent_loss(z, temperature=_TEMPERATURE)


def _plain(z: Tensor) -> Tensor:
    return reference.nt_xent(z, None, _TEMPERATURE).mean()


def _relative(actual: Tensor, wanted: Tensor) -> float:
    return ((actual.double().cpu() - wanted.double()).norm() / wanted.double().norm()).item()


def _nt_xent(device: torch.device, dtype: torch.dtype) -> str:
    z = _views_of_pairs(dtype)
    loss, gradient = _loss_and_gradient(_plain, z.double())
    our_loss, our_gradient = _loss_and_gradient(_fused, z.to(device))
    _, plain_gradient = _loss_and_gradient(_plain, z.to(device))
    error, plain = _relative(our_gradient, gradient), _relative(plain_gradient, gradient)
    loss_error = abs(our_loss.item() / loss.item() - 1)
    # float64's own reference is no more exact than it: the order of summation shows.
    floor = torch.finfo(dtype).eps * (100 if dtype == torch.float64 else 1)
    detail = f"loss off by {loss_error:.1e}, gradient by {error:.1e}; plain torch's by {plain:.1e}"
    if not (error <= max(2 * plain, floor) and loss_error <= max(4 * floor, 1e-6)):
        raise AssertionError(detail)
    return detail


def _nt_xent_repeats(device: torch.device) -> str:
    z = _views_of_pairs(torch.float32).to(device)
    first = _loss_and_gradient(_fused, z)
    for _ in range(5):
        again = _loss_and_gradient(_fused, z)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    return "6 runs are equal"


def _nt_xent_compiled(device: torch.device) -> str:
    z = _views_of_pairs(torch.float32).to(device)
    torch._dynamo.reset()
    compiled = torch.compile(_fused, fullgraph=True, backend="aot_eager")
    plain, ours = _loss_and_gradient(_fused, z), _loss_and_gradient(compiled, z)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    return "fullgraph, equal to eager"


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


def _lars(device: torch.device, dtype: torch.dtype) -> str:
    error = max(_relative(*pair) for pair in _lars_run(device, dtype))
    detail = f"weights off by {error:.1e} after 5 steps"
    # Each step rounds the weight and the buffer once.
    if not error <= 10 * torch.finfo(dtype).eps:
        raise AssertionError(detail)
    return detail


def _lars_repeats(device: torch.device) -> str:
    first, second = (_lars_run(device, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return "2 runs are equal"


def _images(n: int) -> Tensor:
    """Smooth colours with some noise, [n, 61, 83, 3] uint8."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 5, 7, generator=generator)
    smooth = nn.functional.interpolate(coarse, (61, 83), mode="bicubic").clamp(0, 1)
    noise = 0.05 * torch.randn(n, 3, 61, 83, generator=generator)
    return ((smooth + noise).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous()


def _views(device: torch.device, spec: Literal["simclr", "torchvision"]) -> str:
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


def _two_streams(device: torch.device) -> str:
    if device.type != "cuda":
        raise Skip("no GPU is checked")
    z = _views_of_pairs(torch.float32).to(device)
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


def _second_gpu(device: torch.device) -> str:
    if device.type != "cuda":
        raise Skip("no GPU is checked")
    if torch.cuda.device_count() < 2:
        raise Skip("one GPU")
    other = torch.device("cuda", 1 - (device.index or 0))
    z = _views_of_pairs(torch.float32)
    # The current device stays the first one.
    first, second = (_loss_and_gradient(_fused, z.to(d)) for d in (device, other))
    assert first[0].device != second[0].device
    assert math.isclose(first[0].item(), second[0].item(), rel_tol=1e-6)
    _lars(other, torch.float32)
    return f"{other} agrees with {device}"


def _loader(device: torch.device) -> str:
    try:
        require(["PIL", "nvidia.dali"])
    except ImportError as error:
        raise Skip(str(error)) from error
    image = import_module("PIL.Image")
    with tempfile.TemporaryDirectory() as folder:
        for i, pixels in enumerate(_images(8)):
            image.fromarray(pixels.numpy()).save(f"{folder}/{i}.jpg", quality=95)
        first, second = (
            next(iter(TwoViewLoader(folder, 8, 40, device=device, backend=backend)))
            for backend in ("dali", "fused")
        )
        assert first[0].shape == (8, 3, 40, 40)
        assert first[0].device.type == device.type
        assert torch.isfinite(first[0]).all()
        difference = (first[0] - second[0]).abs().mean().item() * 255
        assert difference < 1, f"DALI and the fused op differ by {difference:.2f}/255 on average"
    return f"DALI alone and the fused op on {device.type} differ by {difference:.1e}/255"


def _ten_steps(device: torch.device) -> str:
    try:
        require(["nvidia.dali", "tqdm", "torchvision", "safetensors"])
    except ImportError as error:
        raise Skip(str(error)) from error
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            PRESETS["demo"](),
            steps=10,
            batch_size=64,
            device=str(device),
            out=Path(folder) / "run",
            log_every=1,
        )
        with contextlib.redirect_stderr(io.StringIO()):  # the progress bar
            out = pretrain(config)
        lines = (out / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 10
    assert all(math.isfinite(loss) for loss in losses)
    return f"loss {losses[0]:.3f} → {losses[-1]:.3f}"
