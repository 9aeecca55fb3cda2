"""The README's Python examples run."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number, tmp_path, monkeypatch):
    pytest.importorskip("nvidia.dali", reason="decoding needs DALI (Linux)")
    (tmp_path / "photos").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.jpg")
    monkeypatch.chdir(tmp_path)
    assert len(EXAMPLES[number].splitlines()) <= 10
    code = EXAMPLES[number].replace("batch_size=256", "batch_size=2")
    exec(compile(code, f"README example {number}", "exec"), {})


def test_there_are_examples():
    assert len(EXAMPLES) >= 3
