"""CPU time to decode a JPEG of 500 × 375 pixels with Pillow and with DALI; what regions save.

python -m benchmarks.decode_time

One thread each, in turns. The views are those of `HostViews`, 224² and with the default
augmentation, which decodes of each image the region that both crops need.
"""

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from simclr_fast.augment.params import Augmentation, ViewParams, covering, draw_views
from simclr_fast.benchmarks.bench_augment import HEIGHT, SIZE, WIDTH, jpegs
from simclr_fast.data import decode
from simclr_fast.data.datasets import open_source
from simclr_fast.data.pipelines import HostViews
from simclr_fast.data.sources import Source

FILES, ROUNDS = 128, 24
IDS = np.arange(FILES)


def draw(ids: np.ndarray, sizes: np.ndarray) -> list[ViewParams]:
    """The same views in every round."""
    return draw_views(Augmentation(SIZE), 0, 0, ids, sizes)


def needed(ids: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return covering(draw(ids, sizes))


def decoding(decoder: decode.ImageDecoder) -> Callable[[], None]:
    def step() -> None:
        for _ in decoder.run([decode.Part(0, IDS)]):
            pass

    return step


def viewing(source: Source, decoder: decode.ImageDecoder) -> Callable[[], None]:
    pipeline = HostViews(source, FILES, 1, [Augmentation(SIZE)] * 2, draw)
    # The pipeline's own would keep so few images.
    pipeline.decoder = decoder
    views = [torch.empty(FILES, 3, SIZE, SIZE) for _ in range(2)]

    def step() -> None:
        for part, images in pipeline.run([decode.Part(0, IDS)]):
            pipeline.write(part, images, views)

    return step


def milliseconds(steps: dict[str, Callable[[], None]]) -> dict[str, np.ndarray]:
    """CPU milliseconds per image of each round. A round before them checks the files."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS + 1):
        for name in random.sample(list(steps), len(steps)):
            start = time.process_time()
            steps[name]()
            times[name].append((time.process_time() - start) / FILES * 1e3)
    return {name: np.array(found[1:]) for name, found in times.items()}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for i, file in enumerate(jpegs(FILES)):
            (Path(folder) / f"{i:03d}.jpg").write_bytes(file)
        source = open_source(folder)

        def dali(regions: decode.Regions | None = None) -> decode.ImageDecoder:
            return decode.DaliDecoder(decode.FileReader(source, 1), FILES, regions)

        times = milliseconds(
            {
                "Pillow": decoding(decode.PillowDecoder(decode.FileReader(source, 1))),
                "DALI": decoding(dali()),
                "DALI, regions": decoding(dali(needed)),
                "two views": viewing(source, dali()),
                "two views, regions": viewing(source, dali(needed)),
            }
        )
    for name, found in times.items():
        print(f"{name}: {found.min():.2f} ms of CPU per image, median {np.median(found):.2f}")
    boxes = needed(IDS, np.tile([[HEIGHT, WIDTH]], (FILES, 1)))
    share = (boxes[:, 2] * boxes[:, 3]).mean() / (HEIGHT * WIDTH)
    print("\nIn the median of the rounds:")
    print(f"Pillow takes {np.median(times['Pillow'] / times['DALI']):.1f} times as long as DALI")
    print(f"regions have {share:.0%} of the pixels")
    for name in ("DALI", "two views"):
        saved = 1 - np.median(times[f"{name}, regions"] / times[name])
        print(f"{name}: regions save {saved:.0%}")


if __name__ == "__main__":
    main()
