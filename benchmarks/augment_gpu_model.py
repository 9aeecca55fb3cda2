"""Predict the bytes and microseconds of the views on a GPU, and the decoding rate that it needs.

    python -m benchmarks.augment_gpu_model

Nothing here ran on a GPU. Memory limits every kernel of these pipelines. So its time is the bytes
that it reads and writes, divided by EFFICIENCY times the memory's bandwidth. The time of a launch
is added, divided by the number of images that go through together. Decoding is left out. The rates
of training are published ones of ResNet-50; each source image is decoded once and seen twice.
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
# Images that go through a pipeline together, and what an operator's launch costs besides its bytes.
PART, LAUNCH = 128, 4e-6
# The operators of a graph of two views. tests/augment/test_augment_dali.py counts DALI's.
OPERATORS = {"dali": 240, "fused": 28}


class Views(NamedTuple):
    """Per source image: bytes moved for its two views, and the time at one GPU's bandwidth."""

    gpu: str
    backend: str
    bytes: float
    microseconds: float


def crop_bytes(crops: bool) -> float:
    """Bytes of a view's cut, margins and resize; with `crops` also of its gain and rounding."""
    values = 3 * SIZE * SIZE
    cut = 4 * 3 * SOURCE_PIXELS * CROP_SHARE
    resize = 3 * SOURCE_PIXELS * CROP_SHARE + 4 * values
    return cut + resize + (13 * values if crops else 0)


def dali_bytes() -> float:
    """Bytes that the operators of augment/dali.py read and write for one view."""
    # Bytes of a pixel: of three floats, one float, three 16-bit numbers and one.
    p, q, u, v = 12, 4, 6, 2
    gain = p + q + p
    linear = p + 2 * p + 2 * p + 2 * p  # mean, factor, pivot, clip
    extremes = 2 * (p + q) + 3 * q
    hue = 2 * (p + q) + 3 * q + 4 * q + (q + v) + 2 * v  # two axes, angle, number, table
    turned = (v + u) + (u + p)
    chroma = 5 * q
    joined = (q + p + p) + 3 * q + (p + q + p)
    hsv = extremes + hue + turned + chroma + joined
    # Half of the 24 orders begin with an hsv step. In a third, saturation and hue share a slot.
    first, slots = 1 / 2, 1 / 3 * 1 + 2 / 3 * 2
    jitter = 2 * linear + slots * hsv + first * (2 * q + 2 * p)
    gray, clip, blur, final = 2 * p, 2 * p, 2 * p + 2 * 2 * p, 2 * p
    per_pixel = gain + P_JITTER * jitter + P_GRAY * gray + clip + P_BLUR * blur + final
    return crop_bytes(False) + per_pixel * SIZE * SIZE


def fused_bytes(output_bytes: int = 2) -> float:
    """Bytes of the fused kernels for one view: the crop twice, planes for the blur, the output."""
    values = 3 * SIZE * SIZE
    mean, blur = P_JITTER * values, P_BLUR * values * 4 * 4
    return crop_bytes(True) + mean + values + blur + values * output_bytes


def rows() -> list[Views]:
    """Both backends on every GPU of the model."""
    result = []
    for gpu in GPUS.values():
        for backend, per_view in (("dali", dali_bytes()), ("fused", fused_bytes())):
            seconds = 2 * per_view / (gpu.bandwidth * EFFICIENCY)
            seconds += OPERATORS[backend] * LAUNCH / PART
            result.append(Views(gpu.name, backend, 2 * per_view, seconds * 1e6))
    return result


def main() -> None:
    print("Predicted from bytes moved; never run on a GPU. Per source image, two views:")
    for row in rows():
        print(f"{row.gpu:10} {row.backend:6} {row.bytes / 1e6:6.1f} MB {row.microseconds:7.1f} µs")
    for gpu, rate in TRAINING_RATE.items():
        shares = ", ".join(
            f"{row.backend} {row.microseconds * rate / 2 / 1e4:.1f}%"
            for row in rows()
            if row.gpu == gpu
        )
        print(f"{gpu}: of a step at {rate} views/s the views take {shares}")


if __name__ == "__main__":
    main()
