"""The command line. One module of simclr_fast.commands per command, its `run(arguments)`."""

import logging
import os
import sys
from importlib import import_module

import torch

from simclr_fast import __version__

# Name → what `simclr-fast --help` says of it.
COMMANDS = {
    "pretrain": """[--preset demo|cifar10|imagenet100|imagenet] [--data ...] [options]
                       an encoder from images without labels; --help: all options, with
                       the preset's values""",
    "plan": """[--model resnet50] [--width 1] [--batch-size 4096] [--gpus 1]
                       [--gpu-memory 80GB] [--host-memory 128GB] [options]
                       what a batch needs in each mode (predicted), and the flags to use""",
    "eval": """linear|knn|finetune|layers|embed --encoder FILE [--data ...] [options]
                       what an encoder has learnt: tables, JSON and pictures""",
    "preview": """[--data ...] [--images 8] [--to preview.png] [options]
                       what the augmentation does to some of the images""",
    "ablate": """[--operations crop colour blur flip] [--batch-sizes ...]
                       [--temperatures ...] [--projectors ...] [--seeds ...] [options]
                       a grid of pretrained and probed runs: one JSONL and a heat map""",
    "supervised": """[--preset ...] [--data ...] [options of pretrain]
                       the baseline with labels: same encoder, data, views and optimizer""",
    "export": """--encoder FILE --to DIR --format torchvision|timm|safetensors|torch-export|onnx
                       an encoder (ours, torchvision's, timm's, lightly's, solo-learn's) for
                       other programs, written once its outputs there equal ours""",
    "bench": """{loss,augment,lars,step,all} [--quick] [--device cuda] [--threads 2]
                       ours beside the peers: tables, JSON, pictures""",
    "selfcheck": """[--device cuda]
                       every op on this machine against float64: a report to paste""",
}

# What a command's message says better than a traceback.
_SAID = (ValueError, TypeError, OSError, ImportError, FloatingPointError, MemoryError)


def usage() -> str:
    """What `simclr-fast --help` prints."""
    commands = "".join(f"  simclr-fast {name} {text}\n" for name, text in COMMANDS.items())
    return f"simclr-fast: SimCLR in PyTorch\n\n{commands}  simclr-fast --version\n"


def run(arguments: list[str]) -> int:
    """Run one command; the process's exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"simclr_fast {__version__}, torch {torch.__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        print(f"simclr-fast: no command {arguments[0]!r}\n\n{usage()}", end="", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return import_module(f"simclr_fast.commands.{arguments[0]}").run(arguments[1:])
    except _SAID as error:
        if os.environ.get("SIMCLR_FAST_TRACEBACK"):
            raise
        print(f"simclr-fast {arguments[0]}: {error or 'out of memory'}", file=sys.stderr)
        return 1
