"""Damaged files by the hundred, several threads at once, long runs, full disks."""

import io
import os
import resource
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from simclr_fast import nt_xent_loss
from simclr_fast.augment.views import SimCLRViews
from simclr_fast.commands.cli import run
from simclr_fast.optim.lars import LARS
from simclr_fast.utils.checkpoint import checkpoints, load_checkpoint, save_checkpoint

ROOT = Path(__file__).parents[2]
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
# Shows an epoch, and says of each whole image that came whether its view has its own colour.
PROGRAM = """
import sys, logging, numpy as np
from tests.training.test_robustness import colour
from simclr_fast.augment.params import Augmentation
from simclr_fast.data.loader import TwoViewLoader

folder, whole = sys.argv[1], set(map(int, sys.argv[2].split(",")))
logging.disable(logging.WARNING)
aug = Augmentation(16, p_jitter=0, p_gray=0, p_blur=0)
loader = TwoViewLoader(folder, 32, augmentation=aug, backend=sys.argv[3], on_error="skip")
seen = rows = 0
for view1, view2, index in loader:
    rows += len(index)
    for one, two, i in zip(view1, view2, index.tolist()):
        if i in whole:
            seen += 1
            for view in (one, two):
                off = np.abs(view.mean((1, 2)).numpy() * 255 - colour(i)).max()
                assert off < 10, (i, off)
assert not loader.skipped & whole, sorted(loader.skipped & whole)
print(rows, seen, len(loader.skipped))
"""


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
    whole = ",".join(str(i) for i in range(n) if i not in broken)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), whole, backend],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows, seen, skipped = map(int, done.stdout.split())
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


LIMITED = """
import resource, sys
from simclr_fast.commands.cli import run
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(run(sys.argv[2:]))
"""


def arguments(out: Path) -> list[str]:
    images = out.parent / "images"
    images.mkdir(exist_ok=True)
    for i in range(64):
        (images / f"{i}.{KINDS[i % len(KINDS)].lower()}").write_bytes(encode(i))
    options = ["pretrain", "--preset", "demo", "--data", str(images), "--out", str(out)]
    options += ["--model", "resnet10", "--augmentation.size", "20"]
    return [*options, "--batch-size", "16", "--steps", "4", "--checkpoint-every", "2"]


def test_a_full_disk_ends_the_run_with_its_cause_and_keeps_what_was_there(tmp_path):
    """No file may pass 200 kB: the checkpoint does not fit."""
    pytest.importorskip("nvidia.dali", reason="decoding needs DALI (Linux)")
    out = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, "200000", *arguments(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert str(out / "checkpoints") in done.stderr
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


# Root may write anywhere, but for this.
WITHOUT_PRIVILEGES = """
import ctypes, os
def drop_privileges():
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if os.geteuid() == 0 and ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError("capset")
"""
SAVE_INTO_READ_ONLY = """
import sys, pathlib, torch
from simclr_fast.utils.checkpoint import save_checkpoint
drop_privileges()
try:
    save_checkpoint(pathlib.Path(sys.argv[1]), 2, {"step": 2})
except OSError as error:
    print(error)
"""
SAVE_FOREVER = """
import sys, pathlib, torch
from simclr_fast.utils.checkpoint import save_checkpoint
for step in range(1, 10_000):
    state = {"step": step, "model": {"w": torch.full((400_000,), float(step))}}
    save_checkpoint(pathlib.Path(sys.argv[1]), step, state)
    print(step, flush=True)
"""


def test_a_read_only_folder_is_named_and_keeps_its_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, {"step": 1})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    tmp_path.chmod(0o555)
    try:
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_PRIVILEGES + SAVE_INTO_READ_ONLY, str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        tmp_path.chmod(0o755)
    assert str(tmp_path) in done.stdout
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_kill_at_any_moment_loses_no_checkpoint(tmp_path):
    """It is killed 3 times while it saves. Every checkpoint that it reported is there."""
    for moment in range(3):
        folder = tmp_path / str(moment)
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE
        )
        said = int(process.stdout.readline())
        time.sleep(0.05 + 0.023 * moment)
        process.kill()
        said = max([said, *map(int, process.stdout.read().split())])
        process.wait()
        newest = load_checkpoint(checkpoints(folder)[-1])
        assert newest["step"] >= said
        assert (newest["model"]["w"] == newest["step"]).all()
