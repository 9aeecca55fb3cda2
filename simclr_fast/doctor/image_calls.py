"""Which images went into the network, in order.

An augmentation or a normalisation may sit inside of the model. So the images are taken from the
innermost module with parameters that gets them, usually the first convolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

# Older calls are forgotten beyond this number of images: an evaluation may come first.
_MOST = 4096


@dataclass(eq=False)
class ImageCall:
    """The input of one call. trained: autograd was on."""

    images: Tensor
    trained: bool


@dataclass
class Opened:
    """A module that is running. outputs: how many outputs there were before. calls: those that it
    began; the first `refined` of them were already seen further inside."""

    module: nn.Module
    outputs: int = 0
    calls: list[ImageCall] = field(default_factory=list)
    refined: int = 0


class ImageCalls:
    """The calls since the last backward pass."""

    def __init__(self) -> None:
        self._calls: list[ImageCall] = []

    def clear(self) -> None:
        self._calls = []

    def see(self, running: Sequence[Opened], opened: Opened, given: Sequence[Tensor]) -> None:
        """Look at the inputs of a module that begins. running: those around it."""
        given = [t.detach() for t in given if not t.requires_grad and t.dim() > 1 and len(t)]
        if not given or next(opened.module.parameters(), None) is None:
            return
        outer = next((o for o in reversed(running) if o.calls), None)
        if outer is not None:
            self._refine(outer, opened, given[0])
            return
        for images in given:
            if not self._calls or self._calls[0].images.shape[1:] == images.shape[1:]:
                self._add(opened, images)

    def _add(self, opened: Opened, images: Tensor) -> None:
        call = ImageCall(images, torch.is_grad_enabled())
        opened.calls.append(call)
        self._calls.append(call)
        while sum(len(c.images) for c in self._calls[1:]) > _MOST:
            del self._calls[0]

    def _refine(self, outer: Opened, opened: Opened, images: Tensor) -> None:
        """Take `images` for a call of `outer`, if that is what they are."""
        known = outer.calls
        if images.dim() != known[0].images.dim():
            return
        total = sum(len(call.images) for call in known)
        if not outer.refined and len(known) > 1 and len(images) == total:
            # The parts were concatenated.
            self._calls = [call for call in self._calls if call not in known[1:]]
            del known[1:]
        if outer.refined < len(known):
            call = known[outer.refined]
            if len(images) == len(call.images) or len(known) == 1:
                call.images = images
                opened.calls.append(call)
                outer.refined += 1
            return
        again = any(_same(images, call.images) for call in known)
        if not again and images.shape[1:] == known[-1].images.shape[1:]:
            self._add(opened, images)
            known += opened.calls
            outer.refined += 1

    def of(self, rows: int) -> list[Tensor]:
        """The images of a loss with that many rows, one tensor per call; [] if that is not clear.

        Without a call that autograd saw, as in gradient caching, those are the last calls.
        """
        place = next((i for i, call in enumerate(self._calls) if call.trained), None)
        if place is None:
            options = [self._calls[first:] for first in range(len(self._calls))]
        else:
            options = [[call for call in self._calls if call.trained], self._calls[place:]]
        for option in options:
            if sum(len(call.images) for call in option) == rows:
                return [call.images for call in option]
        return []


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.data_ptr() == b.data_ptr()
