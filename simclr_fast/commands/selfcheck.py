"""simclr-fast selfcheck."""

import argparse

import torch

from simclr_fast.selfcheck import selfcheck


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
