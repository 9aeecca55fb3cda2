"""Damaged files by the hundred, several threads at once, long runs, full disks."""

import ctypes
import io
import json
import logging
import os
import re
import resource
import struct
import sys
import threading
import time
import zlib
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import context
from PIL import Image
from rank_runs import on_ranks
from torch import nn

from simclr_fast import nt_xent_loss
from simclr_fast.augment.params import Augmentation
from simclr_fast.augment.views import SimCLRViews
from simclr_fast.commands.cli import run
from simclr_fast.data.loader import TwoViewLoader
from simclr_fast.optim.lars import LARS
from simclr_fast.utils.checkpoint import checkpoints, load_checkpoint, save_checkpoint

KINDS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")


def colour(i: int) -> tuple[int, int, int]:
    """Sample i's own colour: 9 levels per channel, 28 apart, more than any codec moves it."""
    return tuple(14 + 28 * ((i // 9**k) % 9) for k in range(3))


def encode(i: int) -> bytes:
    buffer = io.BytesIO()
    kind = KINDS[i % len(KINDS)]
    quality = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    Image.new("RGB", (20 + i % 13, 24 - i % 7), colour(i)).save(buffer, kind, **quality)
    return buffer.getvalue()


def png_of_claimed_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def damage(data: bytes, way: str, rng: np.random.Generator) -> bytes:
    if way == "cut":
        return data[: rng.integers(1, len(data) - 1)]
    if way == "bytes":
        changed = bytearray(data)
        for position in rng.integers(0, len(data), 4):
            changed[position] = rng.integers(256)
        return bytes(changed)
    if way == "noise":
        return rng.bytes(rng.integers(1, 400))
    if way == "bomb":
        return png_of_claimed_size(60_000, 60_000)
    if way == "short":
        # A right header and checksums over too few pixels.
        return png_of_claimed_size(100, 100)
    return b""


WAYS = ("cut", "bytes", "noise", "bomb", "short", "empty")


def show(rank: int, folder: Path, whole: set[int], backend: str) -> None:
    """Show an epoch. Each whole image that comes has a view of its own colour."""
    logging.disable(logging.WARNING)
    aug = Augmentation(16, p_jitter=0, p_gray=0, p_blur=0)
    loader = TwoViewLoader(folder, 32, augmentation=aug, backend=backend, on_error="skip")
    seen = rows = 0
    for view1, view2, index in loader:
        rows += len(index)
        for one, two, i in zip(view1, view2, index.tolist(), strict=True):
            if i in whole:
                seen += 1
                for view in (one, two):
                    off = np.abs(view.mean((1, 2)).numpy() * 255 - colour(i)).max()
                    assert off < 10, (i, off)
    assert not loader.skipped & whole, sorted(loader.skipped & whole)
    (folder / "counts.json").write_text(json.dumps([rows, seen, len(loader.skipped)]))


@pytest.mark.parametrize(
    ("backend", "n", "damaged"),
    [("fused", 640, 520), pytest.param("dali", 640, 520, marks=pytest.mark.slow)],
)
def test_no_damaged_file_crashes_hangs_or_moves_another(tmp_path, backend, n, damaged):
    """By path i, so that a label read from the path stays with its image."""
    pytest.importorskip("nvidia.dali", reason="decoding needs DALI (Linux)")
    rng = np.random.default_rng(0)
    broken = set(rng.choice(n, damaged, replace=False).tolist())
    for i in range(n):
        data = encode(i)
        if i in broken:
            data = damage(data, WAYS[int(rng.integers(len(WAYS)))], rng)
        # Half of the names lie about the format.
        suffix = KINDS[(i + int(rng.integers(2))) % len(KINDS)].lower()
        (tmp_path / f"{i:04d}.{suffix}").write_bytes(data)
    # In a process of its own, which may crash.
    on_ranks(show, (tmp_path, set(range(n)) - broken, backend), 1)
    rows, seen, skipped = json.loads((tmp_path / "counts.json").read_text())
    assert rows == n
    assert seen >= n - damaged
    # Zeroed, cut and faked files are always found; some changed bytes are pixels, and fine.
    assert skipped > 0.7 * damaged


def test_ops_give_the_same_from_several_threads():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (16, 40, 50, 3), dtype=torch.uint8, generator=generator)
    views = SimCLRViews(24)

    def work(seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(180, 32, generator=generator, requires_grad=True)
        p = nn.Parameter(torch.randn(300, 70, generator=generator))
        optimizer = LARS([p], lr=0.1)
        for _ in range(10):
            loss = nt_xent_loss(z)
            (gradient,) = torch.autograd.grad(loss, z)
            p.grad = gradient.sum() + p.detach()
            optimizer.step()
        return [loss.detach(), gradient, p.detach(), *views(images, ids=range(seed, seed + 16))]

    alone = [work(seed) for seed in range(4)]
    together: dict[int, list[torch.Tensor]] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: together.update({seed: work(seed)}))
        for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, results in enumerate(alone):
        assert all(torch.equal(a, b) for a, b in zip(results, together[seed], strict=True))


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_over_a_thousand_steps():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 32))
    optimizer = LARS(net.parameters(), lr=0.1)
    views = SimCLRViews(16)
    images = torch.randint(256, (32, 20, 20, 3), dtype=torch.uint8)
    sizes = []
    for step in range(1000):
        loss, _ = nt_xent_loss(net(torch.cat(views(images))), return_stats=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (300, 999):
            sizes.append(resident())
    assert sizes[1] - sizes[0] < 5, sizes


def run_limited(rank: int, words: list[str], errors: Path) -> None:
    """No file may pass 200 kB."""
    sys.stderr = errors.open("w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    assert run(words) == 1


def arguments(out: Path) -> list[str]:
    images = out.parent / "images"
    images.mkdir(exist_ok=True)
    for i in range(64):
        (images / f"{i}.{KINDS[i % len(KINDS)].lower()}").write_bytes(encode(i))
    options = ["pretrain", "--preset", "demo", "--data", str(images), "--out", str(out)]
    options += ["--model", "resnet10", "--augmentation.size", "20"]
    return [*options, "--batch-size", "16", "--steps", "4", "--checkpoint-every", "2"]


def test_a_full_disk_ends_the_run_with_its_cause_and_keeps_what_was_there(tmp_path):
    """The checkpoint does not fit."""
    pytest.importorskip("nvidia.dali", reason="decoding needs DALI (Linux)")
    out = tmp_path / "run"
    on_ranks(run_limited, (arguments(out), tmp_path / "errors.txt"), 1)
    errors = (tmp_path / "errors.txt").read_text()
    assert "Traceback" not in errors
    assert str(out / "checkpoints") in errors
    assert list((out / "checkpoints").iterdir()) == []
    assert len((out / "metrics.jsonl").read_text()) == 0
    # With room again, the same folder goes on.
    assert run([*arguments(out), "--resume"]) == 0
    assert (out / "encoder.safetensors").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    pytest.importorskip("nvidia.dali", reason="decoding needs DALI (Linux)")
    (tmp_path / "file").write_text("")
    assert run([*arguments(tmp_path / "run"), "--out", str(tmp_path / "file" / "run")]) == 1
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert str(tmp_path / "file") in errors


def drop_privileges() -> None:
    """Root may write anywhere, but for this."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if os.geteuid() == 0 and ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError("capset")


def save_into_read_only(rank: int, folder: Path) -> None:
    drop_privileges()
    with pytest.raises(OSError, match=re.escape(str(folder))):
        save_checkpoint(folder, 2, {"step": 2})


def save_forever(folder: Path, said: Connection) -> None:
    for step in range(1, 10_000):
        state = {"step": step, "model": {"w": torch.full((400_000,), float(step))}}
        save_checkpoint(folder, step, state)
        said.send(step)


def test_a_read_only_folder_is_named_and_keeps_its_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, {"step": 1})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    tmp_path.chmod(0o555)
    try:
        on_ranks(save_into_read_only, (tmp_path,), 1)
    finally:
        tmp_path.chmod(0o755)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_kill_at_any_moment_loses_no_checkpoint(tmp_path):
    """It is killed 3 times while it saves. Every checkpoint that it reported is there."""
    for moment in range(3):
        folder = tmp_path / str(moment)
        hears, says = context.Pipe(duplex=False)
        process = context.Process(target=save_forever, args=(folder, says))
        process.start()
        says.close()
        said = hears.recv()
        time.sleep(0.05 + 0.023 * moment)
        process.kill()
        # Until its end of the pipe is closed.
        with suppress(EOFError):
            while True:
                said = hears.recv()
        process.join()
        newest = load_checkpoint(checkpoints(folder)[-1])
        assert newest["step"] >= said
        assert (newest["model"]["w"] == newest["step"]).all()
