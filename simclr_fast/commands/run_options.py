"""The options of pretrain, which ablate, preview and supervised have as well."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar, cast

import tyro

from simclr_fast.training.config import PRESETS, PretrainConfig, read_config, with_settings

Preset = Literal[
    "demo",
    "cifar10",
    "cifar10-resnet50",
    "cifar100",
    "stl10",
    "imagenet100",
    "imagenet-256",
    "imagenet",
    "simclr-v2",
]
DEMO_DATA = ("demo", "demo-grain", "demo-held-out")


@dataclass(frozen=True)
class RunOptions:
    """The options of pretrain. A subclass adds those of its command."""

    config: Annotated[PretrainConfig, tyro.conf.arg(name="")]
    preset: Preset = "demo"
    """The recipe that all other options start from. By default: demo for the demo data, imagenet
    for other data."""
    settings: Annotated[Path | None, tyro.conf.arg(name="config")] = None
    """A file of settings (YAML or JSON), such as the config.json of a run. Other options replace
    those of the file."""


T = TypeVar("T", bound=RunOptions)


def parse_run(kind: type[T], arguments: Sequence[str], command: str) -> T:
    """Parse options that change a preset: --preset, else demo for the demo data, else imagenet.

    The settings of a file (--config) stand between the two."""
    path = _value(arguments, "--config")
    named, settings = read_config(Path(path)) if path else (None, {})
    given = _value(arguments, "--preset") or named
    data = _value(arguments, "--data") or settings.get("data") or "demo"
    preset = given if given in PRESETS else "demo" if data in DEMO_DATA else "imagenet"
    other = "demo" if preset == "imagenet" else "imagenet"
    own = "\n\n".join(" ".join(part.split()) for part in (kind.__doc__ or "").split("\n\n"))
    about = (
        f"{own}\n\nThe defaults shown are those of --preset {preset}"
        f"{'' if given else f', which is chosen for --data {data}'}. Without --preset, the demo "
        f"data use demo, all other data imagenet. To see another preset's defaults: "
        f"simclr-fast {command} --preset {other} --help"
    )
    return tyro.cli(
        kind,
        args=arguments,
        default=kind(with_settings(PRESETS[preset](), settings), cast(Preset, preset)),
        prog=f"simclr-fast {command}",
        description=about,
    )


def _value(arguments: Sequence[str], option: str) -> str | None:
    """The last value of `option` in `arguments`, given as "--x value" or "--x=value"."""
    found = None
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, equals, value = argument.partition("=")
        if name == option:
            found = value if equals else following
    return found
