"""What the pixels of a batch tell: which rows look like views of one image, and their colours."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Images that are converted to float64 at a time.
_CHUNK = 64
_ODD = 0x1E3779B97F4A7C15
# Upper ends of the rings in which `_spectrum` sums the power, in cycles per pixel.
_RINGS = (0.03, 0.06, 0.1, 0.2, 0.3, 0.5)


class Pictures(NamedTuple):
    """Statistics of some images, one row each, in float64 on the CPU.

    colour: [n, 2C], mean and standard deviation of each channel.
    layout: [n, 16], the brightness in a 4×4 grid, less its mean and scaled to length 1.
    spectrum: [n, 7], logarithms of the shares of power in rings of frequencies.
    chroma: [n, C], mean of each channel less the mean of all channels.
    colourful: the spread of chroma over the batch relative to that of the means; 0: all is gray.
    """

    colour: Tensor
    layout: Tensor
    spectrum: Tensor
    chroma: Tensor
    colourful: float


@torch.no_grad()
def describe(parts: Sequence[Tensor]) -> Pictures:
    """parts: images, [n, C, H, W] each, any floating dtype, any scale and shift per channel."""
    chunks = [_statistics(chunk) for images in parts for chunk in images.split(_CHUNK)]
    colour, layout, spectrum, chroma = map(torch.cat, zip(*chunks, strict=True))
    overall = float(colour[:, : chroma.size(1)].std(0).norm()) or 1.0
    colourful = float(chroma.std(0).norm()) / overall if len(chroma) > 1 else 0.0
    return Pictures(colour, layout, spectrum, chroma, colourful)


def prints(images: Tensor) -> Tensor:
    """A number per image, int64 [n]. Equal images have equal numbers, others very probably not."""
    bits = images.detach().to("cpu", torch.float64).flatten(1).view(torch.int64)
    # Sums of integers wrap around, and do not depend on their order.
    return (bits * (2 * torch.arange(bits.size(1)) + 1) * _ODD).sum(1)


def _statistics(images: Tensor) -> tuple[Tensor, ...]:
    x = images.detach().to("cpu", torch.float64)
    mean, spread = x.mean((-2, -1)), x.std((-2, -1))
    gray = x.mean(1, keepdim=True)
    layout = F.adaptive_avg_pool2d(gray, 4).flatten(1)
    layout = F.normalize(layout - layout.mean(1, keepdim=True), dim=1)
    chroma = mean - mean.mean(1, keepdim=True)
    return torch.cat((mean, spread), 1), layout, _spectrum(gray[:, 0]), chroma


def _spectrum(gray: Tensor) -> Tensor:
    power = torch.fft.rfft2(gray - gray.mean((-2, -1), keepdim=True)).abs().square()
    rows = torch.fft.fftfreq(gray.size(-2), dtype=gray.dtype)
    columns = torch.fft.rfftfreq(gray.size(-1), dtype=gray.dtype)
    ring = torch.bucketize((rows[:, None] ** 2 + columns**2).sqrt(), rows.new_tensor(_RINGS))
    sums = torch.stack([(power * (ring == k)).sum((-2, -1)) for k in range(len(_RINGS) + 1)], 1)
    return (sums / sums.sum(1, keepdim=True).clamp_min(1e-12) + 1e-6).log()


def likeness(pictures: Pictures, first: Tensor, second: Tensor) -> float:
    """How much more alike paired images are than random ones, in standard errors.

    first, second: [n], the rows of the pairs. For pairs of random images the value is about 0 ± 1.
    With the augmentations of the SimCLR paper it was 5 or more for 64 true pairs.

    Each image's partner gets a rank among the second images by distance. For random pairs the mean
    rank is one half.
    """
    total = 0.0
    n = len(first)
    for values in (pictures.colour, pictures.layout, pictures.spectrum):
        scaled = (values - values.mean(0)) / values.std(0).clamp_min(1e-9)
        distance = torch.cdist(scaled[first], scaled[second])
        own = distance.diagonal()[:, None]
        closer = (distance < own).double() + (distance == own).double() / 2
        rank = (closer.sum(1) - 0.5) / (n - 1)
        total += float(0.5 - rank.mean()) * (12 * n) ** 0.5
    return total / 3**0.5


def chroma_agreement(pictures: Pictures, first: Tensor, second: Tensor) -> float:
    """The correlation of mean colours between the two views of an image, over the batch.

    With the paper's jitter and gray it is about 0.4, without both 0.9 or more.
    """
    a, b = pictures.chroma[first], pictures.chroma[second]
    a, b = a - a.mean(0), b - b.mean(0)
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-30))
