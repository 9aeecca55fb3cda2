"""Predicted: bytes and microseconds of the views on a GPU, and the decodes that feed it.

    python -m benchmarks.augment_gpu_model

Nothing here ran on a GPU. Every kernel of these pipelines is bound by memory, so a step's time is
the bytes that it reads and writes over the memory's bandwidth, times 1 / EFFICIENCY. Decoding is
left out of the bytes: an A100's decoders are units of their own. Consumer rates are published
training rates of ResNet-50; each source image is decoded once and seen twice.
"""

from typing import NamedTuple

from simclr_fast.benchmarks.gpu_model import GPUS

EFFICIENCY = 0.6
SIZE = 224
# A source image of ImageNet's mean size, of which a crop takes about half.
SOURCE_PIXELS, CROP_SHARE = 400 * 350, 0.5
P_JITTER, P_GRAY, P_BLUR = 0.8, 0.2, 0.5
# ResNet-50 with mixed precision, views per second (published).
TRAINING_RATE = {"A100": 2470}
# Batched hardware JPEG decoding, images per second (pytorch/vision#8496).
DECODE_RATE = {"A100": 7800}


class Views(NamedTuple):
    """Per source image: bytes moved for its two views, and the time at one GPU's bandwidth."""

    gpu: str
    backend: str
    bytes: float
    microseconds: float


def crop_bytes(crops: bool) -> float:
    """Cut, margins, resize; then multiply by the gain, and round to bytes for `crops`."""
    values = 3 * SIZE * SIZE
    cut = 4 * 3 * SOURCE_PIXELS * CROP_SHARE
    resize = 3 * SOURCE_PIXELS * CROP_SHARE + 4 * values
    return cut + resize + (13 * values if crops else 0)


def dali_bytes() -> float:
    """Each arithmetic operator of augment/dali.py reads and writes whole float planes."""
    plane = 4 * SIZE * SIZE
    # Planes that each jitter step's operators read and write, one operator after the other.
    steps = 18 + 27 + 46 + 107  # brightness, contrast, HSV saturation, hue
    split, gray, stack, blur, normalise = 3 * (3 + 1 + 3), 8, 6, 3 * (2 + 4 + 2), 6
    planes = split + P_JITTER * steps + P_GRAY * gray
    return crop_bytes(False) + plane * (planes + stack + P_BLUR * blur + normalise)


def fused_bytes(output_bytes: int = 2) -> float:
    """The uint8 crop twice, planes for blurred views only, the output once."""
    values = 3 * SIZE * SIZE
    mean, blur = P_JITTER * values, P_BLUR * values * 4 * 4
    return crop_bytes(True) + mean + values + blur + values * output_bytes


def rows() -> list[Views]:
    """Both backends on every GPU of the model."""
    result = []
    for gpu in GPUS.values():
        for backend, per_view in (("dali", dali_bytes()), ("fused", fused_bytes())):
            seconds = 2 * per_view / (gpu.bandwidth * EFFICIENCY)
            result.append(Views(gpu.name, backend, 2 * per_view, seconds * 1e6))
    return result


def main() -> None:
    print("Predicted from bytes moved; never run on a GPU. Per source image, two views:")
    for row in rows():
        print(f"{row.gpu:10} {row.backend:6} {row.bytes / 1e6:6.1f} MB {row.microseconds:7.1f} µs")
    for gpu, rate in TRAINING_RATE.items():
        decodes = rate / 2
        shares = ", ".join(
            f"{row.backend} {row.microseconds * decodes / 1e4:.1f}%"
            for row in rows()
            if row.gpu == gpu
        )
        print(
            f"{gpu}: {rate} views/s need {decodes:.0f} decodes/s of {DECODE_RATE[gpu]} that its "
            f"hardware decoder gives; the views take {shares} of the GPU's time"
        )


if __name__ == "__main__":
    main()
