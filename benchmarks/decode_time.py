"""CPU time to decode a JPEG of 500 × 375 pixels with Pillow and with DALI.

python -m benchmarks.decode_time
"""

import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

from simclr_fast.data import decode
from simclr_fast.data.datasets import open_source

FILES, PART, ROUNDS = 128, 32, 5


def milliseconds(decoder: decode.ImageDecoder) -> float:
    """CPU milliseconds per image, the least of several rounds; the first one checks the files."""
    parts = [decode.Part(0, np.arange(i, i + PART)) for i in range(0, FILES, PART)]
    times = []
    for _ in range(ROUNDS + 1):
        start = time.process_time()
        for _ in decoder.run(parts):
            pass
        times.append((time.process_time() - start) / FILES * 1e3)
    return min(times[1:])


def main() -> None:
    photo = Image.fromarray(load_sample_image("china.jpg")).resize((500, 375))
    with tempfile.TemporaryDirectory() as folder:
        for i in range(FILES):
            photo.save(Path(folder) / f"{i:03d}.jpg", quality=90)
        source = open_source(folder)
        pillow = milliseconds(decode.PillowDecoder(decode.FileReader(source, 1)))
        dali = milliseconds(decode.DaliDecoder(decode.FileReader(source, 1), PART))
    print(f"Pillow {pillow:.2f} ms, DALI {dali:.2f} ms of CPU per image: {pillow / dali:.1f} times")


if __name__ == "__main__":
    main()
