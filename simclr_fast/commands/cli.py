"""The command line: runs the module of a command and returns its exit status.

0: success. 1: an expected error, printed in one line. 2: wrong usage. 128 + n: ended by signal n.
"""

import contextlib
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from typing import Any, NamedTuple

from simclr_fast import __version__
from simclr_fast.utils.extras import explain, missing, require
from simclr_fast.utils.interrupts import Interrupted, exit_status, raise_sigterm
from simclr_fast.utils.rank_failure import RankFailure

log = logging.getLogger(__name__)

_FILES = ("nvidia.dali", "PIL")
_RUN = ("tyro", "tqdm", "torchvision", "safetensors")
_PICTURES = ("matplotlib", "sklearn")
_GO_ON = "the same command goes on where it stopped"


class Command(NamedTuple):
    """A command. about: its line in `simclr-fast --help`. needs: optional packages that it
    requires. also: optional packages that it uses if they are installed. interrupted: what the user
    can do after Ctrl-C."""

    about: str
    needs: tuple[str, ...] = ("tyro",)
    also: tuple[str, ...] = ()
    interrupted: str = ""


COMMANDS = {
    "pretrain": Command(
        "train an encoder on images without labels", (*_RUN, *_PICTURES), also=_FILES
    ),
    "eval": Command(
        "measure what an encoder has learnt: linear, k-NN, fine-tuning, pictures",
        (*_RUN, *_PICTURES),
        also=_FILES,
        interrupted=_GO_ON,
    ),
    "report": Command(
        "write a page about a finished run, or compare several", (*_RUN, *_PICTURES), also=_FILES
    ),
    "preview": Command(
        "draw some images and their random views", ("tyro", "PIL"), also=("nvidia.dali",)
    ),
    "plan": Command(
        "predict which batch fits which GPU, and print the command to use", ("tyro", "torchvision")
    ),
    "ablate": Command(
        "pretrain and evaluate a grid of settings, and draw a heat map",
        (*_RUN, *_PICTURES),
        also=_FILES,
        interrupted=_GO_ON,
    ),
    "supervised": Command(
        "train the baseline: the same encoder, with labels",
        _RUN,
        also=_FILES,
        interrupted="--resume goes on from the last checkpoint",
    ),
    "doctor": Command(
        "say what is wrong with a run, from the files in its folder",
        ("tyro", "torchvision", "safetensors"),
        also=_FILES,
    ),
    "export": Command(
        "write an encoder for torchvision, timm, torch.export or ONNX",
        ("tyro", "torchvision", "safetensors"),
    ),
    "completion": Command("print a script that completes commands and options in a shell"),
    "bench": Command("time each part and other libraries on this machine", ("tyro",)),
    "selfcheck": Command("check every part on this machine against float64", ("tyro",)),
}

# Errors whose message is for the user. All others are bugs and keep their traceback.
EXPECTED_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    FloatingPointError,
    MemoryError,
    RankFailure,
)


def usage() -> str:
    """The text of `simclr-fast --help`."""
    width = max(map(len, COMMANDS))
    lines = "".join(f"  {name:<{width}}  {command.about}\n" for name, command in COMMANDS.items())
    return (
        "usage: simclr-fast COMMAND [OPTIONS]\n\n"
        "SimCLR in PyTorch: train an image encoder without labels.\n\n"
        f"commands:\n{lines}\n"
        "simclr-fast COMMAND --help   the command's options\n"
        "simclr-fast --version        the versions of simclr_fast and torch\n"
    )


def run(arguments: list[str]) -> int:
    """Run one command; return the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        import torch

        print(f"simclr_fast {__version__}, torch {torch.__version__}")
        return 0
    if name not in COMMANDS:
        print(f"simclr-fast: no command {name!r}\n\n{usage()}", end="", file=sys.stderr)
        return 2
    # https://no-color.org: tyro writes no colours to such a terminal.
    if os.environ.get("NO_COLOR"):
        os.environ["TERM"] = "dumb"
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Names of files may have characters that the terminal's encoding lacks.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    with _plain_warnings():
        return _run(name, rest)


def _run(name: str, arguments: list[str]) -> int:
    command = COMMANDS[name]
    try:
        if {"-h", "--help"} & set(arguments):
            if missing(["tyro"]):
                print(_short_help(name, command), end="")
                return 0
        else:
            require(command.needs, command.also)
        module = import_module(f"simclr_fast.commands.{name}")
        # Pretraining handles signals itself, between two steps.
        with contextlib.nullcontext() if name == "pretrain" else raise_sigterm():
            status: int = module.run(arguments)
            return status
    except SystemExit as end:
        # tyro exits after --help (0) and after wrong options (2).
        return end.code if isinstance(end.code, int) else 0
    except (Interrupted, KeyboardInterrupt) as stop:
        said = f"interrupted; {command.interrupted}" if command.interrupted else "interrupted"
        # An ablation is resumed as a whole, so the message of its single run would mislead.
        if isinstance(stop, Interrupted) and command.interrupted != _GO_ON:
            said = str(stop)
        _complain(name, said)
        return 128 + stop.signal_number if isinstance(stop, Interrupted) else exit_status(stop)
    except BrokenPipeError:
        # The reader of our output is gone, as after `| head`. Nothing more can be printed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except EXPECTED_ERRORS as error:
        if os.environ.get("SIMCLR_FAST_TRACEBACK"):
            raise
        _complain(name, str(error) or "out of memory")
        if isinstance(error, RankFailure):
            _leave_lost_ranks()
        return 1


def _short_help(name: str, command: Command) -> str:
    """The help of a command where tyro, which lists its options, is missing."""
    return (
        f"usage: simclr-fast {name} [OPTIONS]\n\n{command.about}\n\n"
        f"The list of options needs a package: {explain(['tyro'])}\n"
    )


def _complain(name: str, message: str) -> None:
    print(f"simclr-fast {name}: {message}", file=sys.stderr, flush=True)


def _leave_lost_ranks() -> None:
    """End this process now if NCCL is in use: its threads may still wait for the lost rank."""
    import torch

    if torch.cuda.is_initialized():
        os._exit(1)


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Log only the message of a warning, without its file name and line."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        log.warning("warning: %s", message)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
