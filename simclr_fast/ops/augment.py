"""The op that writes views of images on the CPU. csrc/augment_cpu.cpp has its schema and kernel."""

import torch

from simclr_fast.ops.library import has_extension


def augment_views(*arguments: object) -> None:
    """Write views of images into the last argument, as csrc/augment_cpu.cpp describes."""
    torch.ops.simclr_fast.augment_views(*arguments)


if has_extension():
    torch.library.register_fake("simclr_fast::augment_views", lambda *arguments: None)
