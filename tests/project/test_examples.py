"""The examples in docs/examples run, are short, and train an encoder that load_weights reads."""

import ast
import importlib.util
import json
import math
import os
import socket
import sys
import types
from pathlib import Path

import pytest
import torch
from rank_runs import on_ranks
from tiny_runs import write_photos

from simclr_fast import load_weights

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
TINY = {"model": "resnet18", "size": 32, "batch_size": 8}


def example(name):
    """The module of an example. Its own name: a folder on the path would offer the others too."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def photos(tmp_path):
    return str(write_photos(tmp_path / "photos", 16))


def check(path, data):
    """The file holds an encoder that was trained: its batch norms have seen 2 batches."""
    encoder = load_weights(path).encoder
    assert encoder.bn1.num_batches_tracked == 2
    assert encoder.bn1.running_mean.abs().sum() > 0


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_to_run_it(path):
    text = path.read_text()
    assert len(text.splitlines()) < 60
    assert f"docs/examples/{path.name} photos/" in ast.get_docstring(ast.parse(text))
    assert path.name in (ROOT / "docs" / "examples.md").read_text()


def _rank(rank, name, port, data, out):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    loss = example(name).main(data, f"{out}.pt", epochs=1, **TINY)
    Path(f"{out}-{rank}.json").write_text(json.dumps(loss))


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_examples_of_several_processes(name, photos, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    on_ranks(_rank, (name, port, photos, str(tmp_path / "out")), 2)
    losses = [json.loads((tmp_path / f"out-{rank}.json").read_text()) for rank in (0, 1)]
    # Every process returns the loss of the whole batch: 8 images, not 4.
    assert losses[0] == losses[1]
    assert math.log(7) < losses[0] < 2 * math.log(15)
    check(tmp_path / "out.pt", photos)


@pytest.mark.parametrize(
    ("name", "library", "options"),
    [
        (
            "with_lightning",
            "lightning",
            {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False,
             "enable_checkpointing": False, "enable_progress_bar": False},
        ),
        ("with_fabric", "lightning", {"epochs": 1, "accelerator": "cpu", "devices": 1}),
        ("with_accelerate", "accelerate", {"epochs": 1}),
        ("with_datasets", "datasets", {"epochs": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_examples_of_other_libraries(name, library, options, photos, tmp_path, monkeypatch):
    pytest.importorskip(library)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    value = example(name).main(photos, str(tmp_path / "out.pt"), **TINY, **options)
    assert math.isfinite(value)
    check(tmp_path / "out.pt", photos)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """Its cells in order, with few steps; the file holds the outputs of a whole run."""
    notebook = json.loads((EXAMPLES / "demo.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    sources = ["".join(cell["source"]) for cell in cells]
    assert sources[0].startswith("%pip install")
    assert [s for s in sources if "STEPS = " in s]
    monkeypatch.chdir(tmp_path)
    shown = []
    notebooks = types.SimpleNamespace(Image=Path, display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython.display", notebooks)
    names = {"__name__": "__main__"}
    for source in sources[1:]:
        exec(source.replace("STEPS = 200", "STEPS = 2"), names)
    assert names["accuracy"].value > 0.1
    assert [path.is_file() for path in shown] == [True, True]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output["output_type"] == "error"]
    # Nothing of the machine that ran it.
    text = (EXAMPLES / "demo.ipynb").read_text()
    assert str(Path(sys.prefix)) not in text
