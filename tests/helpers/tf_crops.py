"""Writes tf_crops.json beside it: the distributions of height, width, … of TensorFlow's crops.

    pip install tensorflow-cpu && python tests/helpers/tf_crops.py

The sampler is called as google-research/simclr calls it. Per image size and quantity: thresholds,
and the share of the draws that are at most each.
"""

import json
from pathlib import Path

import numpy as np

SIZES = [(375, 500), (500, 333), (32, 32), (64, 200)]
DRAWS = 50_000
WHERE = Path(__file__).with_suffix(".json")


def quantities(boxes: np.ndarray) -> dict[str, np.ndarray]:
    """boxes: [n, 4], y, x, height, width in pixels."""
    y, x, h, w = boxes.astype(np.float64).T
    return {"y": y, "x": x, "height": h, "width": w, "area": h * w, "aspect": w / h}


def main() -> None:
    import tensorflow as tf

    whole = tf.constant([[[0.0, 0.0, 1.0, 1.0]]])

    def draw(size: tf.Tensor) -> tf.Tensor:
        start, shape, _ = tf.image.sample_distorted_bounding_box(
            size,
            whole,
            min_object_covered=0.1,
            aspect_ratio_range=(3.0 / 4, 4.0 / 3),
            area_range=(0.08, 1.0),
            max_attempts=100,
            use_image_if_no_bounding_boxes=True,
        )
        return tf.concat([start[:2], shape[:2]], 0)

    @tf.function
    def draws(size: tf.Tensor) -> tf.Tensor:
        return tf.map_fn(lambda _: draw(size), tf.range(DRAWS))

    tf.random.set_seed(0)
    cases = []
    for size in SIZES:
        boxes = draws(tf.constant([*size, 3])).numpy()
        shares = {}
        for name, values in quantities(boxes).items():
            at = np.unique(np.quantile(values, np.linspace(0.04, 0.96, 24)))
            share = [float(np.mean(values <= t)) for t in at]
            shares[name] = {"at": at.tolist(), "share": share}
        cases.append({"size": size, "shares": shares})
    content = {"tensorflow": tf.__version__, "draws": DRAWS, "cases": cases}
    WHERE.write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
