"""Checkpoints. Each is written to a temporary file, synced, then renamed: a kill damages none."""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simclr_fast.utils.extras import need
from simclr_fast.utils.locks import lock

_KEEP = 2
# The prefix of checkpoints from which training cannot continue.
_ASIDE = "unusable-"
# The suffix of a file while it is being written.
_PART = ".simclr-part"
# An error names at most this many keys and counts the rest.
_NAMED = 5
# Training cannot continue from a checkpoint in which one of these is NaN or infinite.
_TRAINED = ("loss", "model", "optimizer")
# How torch's error names a class or function that weights_only refuses.
_FOREIGN = re.compile(r"GLOBAL ([\w.]+)")


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary path), sync the file and rename it to `path`: all or nothing.

    Also removes temporary files of killed processes from the folder. Locks tell those from files
    that are being written; where the system has no file locks, nothing is removed.

    Raises:
        OSError: writing failed, for example on a full disk. The message has `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path.parent)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", suffix=_PART, dir=path.parent)
    temporary = Path(name)
    is_locked = lock(handle)
    if not is_locked:
        # Windows cannot rename an open file.
        os.close(handle)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    # torch.save raises RuntimeError when it cannot write.
    except (OSError, RuntimeError) as error:
        raise OSError(f"could not write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
        if is_locked:
            os.close(handle)
    if hasattr(os, "O_DIRECTORY"):  # not on Windows
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """`write_atomic` of a text, in UTF-8."""
    write_atomic(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """`write_atomic` of JSON. What JSON does not know, such as a path, is written as text."""
    write_text(path, json.dumps(content, indent=indent, default=str) + "\n")


def _remove_abandoned(folder: Path) -> None:
    for part in folder.glob(f".*{_PART}"):
        with contextlib.suppress(OSError):
            handle = os.open(part, os.O_RDONLY)
            try:
                if lock(handle):
                    part.unlink(missing_ok=True)
            finally:
                os.close(handle)


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write folder/step-NNNNNNNN.pt and delete all but the newest two.

    Raises:
        FloatingPointError: the loss, a weight or a tensor of the optimizer is not finite. The state
            is then written to folder/unusable-step-NNNNNNNN.pt, and no checkpoint is deleted.
    """
    path = folder / f"step-{step:08d}.pt"
    if bad := _not_finite_training(state):
        aside = path.with_name(_ASIDE + path.name)
        write_atomic(aside, lambda temporary: torch.save(state, temporary))
        kept = checkpoints(folder)
        last = f"the last checkpoint is {kept[-1]}" if kept else "no checkpoint was written before"
        raise FloatingPointError(
            f"{_some(bad)} is NaN or infinite at step {step}; this step is kept apart, in {aside}: "
            f"lower the learning rate (--lr); {last}"
        )
    write_atomic(path, lambda temporary: torch.save(state, temporary))
    for old in checkpoints(folder)[:-_KEEP]:
        old.unlink()
    return path


def newest_good(
    folder: Path, map_location: torch.device | str = "cpu"
) -> tuple[Path | None, dict[str, Any], dict[Path, str]]:
    """The newest checkpoint in `folder` that is readable and finite, with its content.

    Returns:
        Its path (None if there is none), its content, and the newer ones with what is wrong.
    """
    bad: dict[Path, str] = {}
    for path in reversed(checkpoints(folder)):
        try:
            state = load_checkpoint(path, map_location)
        except ValueError as error:
            bad[path] = str(error)
            continue
        if names := _not_finite_training(state):
            bad[path] = f"{path}: {_some(names)} is NaN or infinite"
            continue
        return path, state, bad
    return None, {}, bad


def set_aside(path: Path) -> Path:
    """Rename a checkpoint that cannot be used, so that it does not count as the newest."""
    return path.replace(path.with_name(_ASIDE + path.name))


def _not_finite_training(state: dict[str, Any]) -> list[str]:
    return not_finite({name: state[name] for name in _TRAINED if name in state})


def not_finite(state: dict[Any, Any]) -> list[str]:
    """Names of the tensors in nested dicts that hold NaN or infinity. Syncs with a GPU once."""
    found: dict[str, Tensor] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                walk(f"{name}.{key}" if name else str(key), part)
        elif isinstance(value, Tensor) and value.is_floating_point():
            found[name] = value.detach().isfinite().all()

    walk("", state)
    if not found:
        return []
    device = next(iter(found.values())).device
    flags = torch.stack([flag.to(device) for flag in found.values()]).tolist()
    return [name for name, good in zip(found, flags, strict=True) if not good]


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def load_checkpoint(path: Path, map_location: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint. No code in it is run.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is unreadable, or holds objects
            other than tensors and plain Python values.
    """
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        if found := _FOREIGN.search(str(error)):
            raise ValueError(
                f"{path} holds objects other than tensors ({found[1]}), which could run code when "
                "they are read: save only its state_dict, with the program that wrote it"
            ) from error
        cause = str(error).partition("\n")[0]
        raise ValueError(f"not a readable checkpoint: {path}: {cause}") from error


def restore(state: dict[str, Any], path: Path, **parts: Any) -> None:
    """Load the checkpoint `state`, read from `path`, into each part (model, optimizer, …).

    Raises:
        ValueError: something is missing or does not fit; the message has it and `path`. `model` is
            unchanged then.
    """
    if missing := [name for name in (*parts, "step") if name not in state]:
        raise ValueError(
            f"{path} is not a checkpoint of this kind of run: missing {_some(missing)}"
        )
    if problems := misfits(parts["model"], state["model"]):
        raise ValueError(f"{path} does not fit this model: {'; '.join(problems)}")
    # The model last: it was checked above, so it stays unchanged if another part fails.
    for name in sorted(parts, key=lambda name: name == "model"):
        # A disabled GradScaler has no state.
        if not state[name]:
            continue
        try:
            parts[name].load_state_dict(state[name])
        except (KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} does not fit this run: {name}: {error}") from error


def load_strictly(module: nn.Module, state: dict[str, Any], path: Path) -> None:
    """Load all of `state` into `module`. If it does not fit, raise and change nothing.

    Raises:
        ValueError: keys are missing or unexpected, have another shape or dtype, or hold NaN or
            infinity. The message has the keys and `path`.
    """
    if problems := misfits(module, state):
        raise ValueError(f"{path} does not fit this model: {'; '.join(problems)}")
    module.load_state_dict(state)


def misfits(module: nn.Module, state: dict[str, Any]) -> list[str]:
    """The reasons why `state` cannot be loaded into `module`; [] if it fits and is finite."""
    own = module.state_dict()
    problems = []
    if missing := [key for key in own if key not in state]:
        problems.append(f"missing {_some(missing)}")
    if unexpected := [key for key in state if key not in own]:
        problems.append(f"unexpected {_some(unexpected)}")
    for key, mine in own.items():
        given = state.get(key)
        if key not in state or not isinstance(mine, Tensor):
            continue
        if not isinstance(given, Tensor):
            problems.append(f"{key} is a {type(given).__name__}, not a tensor")
        elif mine.shape != given.shape:
            problems.append(f"{key} is {list(given.shape)}, must be {list(mine.shape)}")
        elif mine.is_floating_point() != given.is_floating_point():
            problems.append(f"{key} is {given.dtype}, must be {mine.dtype}")
        elif bad := int((~torch.isfinite(given)).sum()):
            problems.append(f"{key} has {bad} of {given.numel()} values that are not finite")
    return problems[:_NAMED] + [f"{len(problems) - _NAMED} more"] * (len(problems) > _NAMED)


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(keys[:_NAMED]) + more


def save_encoder(path: Path, encoder: nn.Module, about: dict[str, str]) -> None:
    """Write the encoder's state_dict as safetensors.

    about: the file's metadata: the settings that rebuild the encoder.
    """
    safetensors = need("safetensors.torch")
    weights = {name: t.detach().cpu().contiguous() for name, t in encoder.state_dict().items()}
    # Its own functions for files refuse paths that are not UTF-8.
    packed = safetensors.save(weights, about)
    write_atomic(path, lambda temporary: temporary.write_bytes(packed))


def load_encoder(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights and the metadata of a file that `save_encoder` wrote."""
    safetensors = need("safetensors.torch")
    packed = path.read_bytes()
    try:
        # The header: its length, 8 bytes, then JSON.
        length = int.from_bytes(packed[:8], "little")
        weights = safetensors.load(packed)
        return weights, json.loads(packed[8 : 8 + length]).get("__metadata__", {})
    except Exception as error:
        raise ValueError(f"not a readable safetensors file: {path}: {error}") from error
