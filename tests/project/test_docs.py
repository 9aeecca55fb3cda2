"""The documents: examples run, commands exist, links lead somewhere, the site builds."""

import contextlib
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simclr_fast.augment.params import Augmentation
from simclr_fast.commands.cli import COMMANDS, run
from simclr_fast.models.encoders import build_encoder
from simclr_fast.models.weights import about_encoder
from simclr_fast.utils.checkpoint import save_encoder

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_example(code, tmp_path, monkeypatch):
    pytest.importorskip("nvidia.dali", reason="decoding needs DALI (Linux)")
    for name in ("lightly", "timm", "pytorch_metric_learning"):
        if name in code and "compat" not in code:
            pytest.importorskip(name)
    (tmp_path / "photos").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.jpg")
    if "runs/photos" in code:
        about = about_encoder("resnet50", 1, None, Augmentation())
        path = tmp_path / "runs" / "photos" / "encoder.safetensors"
        save_encoder(path, build_encoder("resnet50")[0], about)
    monkeypatch.chdir(tmp_path)
    assert len(code.splitlines()) <= 10
    exec(compile(code.replace("batch_size=256", "batch_size=2"), "example", "exec"), {})


def test_there_are_examples():
    assert sum("README" in param.id for param in EXAMPLES) >= 3


WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


@pytest.mark.parametrize("page", [*PAGES, WORKFLOW], ids=lambda page: page.stem)
def test_commands_exist(page):
    for command in re.findall(r"simclr-fast ([a-z]+)", page.read_text()):
        assert command in COMMANDS, f"{page.name}: simclr-fast {command}"
    for module in re.findall(r"python -m (benchmarks\.\w+)", page.read_text()):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), f"{page.name}: {module}"
    targets = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:run: |`)make ([a-z-]+)", page.read_text()):
        assert f"\n{target}:" in targets, f"{page.name}: make {target}"


def lines_of_commands():
    """command (with eval's protocol) → the options that the documents give it, but for make's."""
    found = {}
    for page in [*PAGES, WORKFLOW]:
        for line in page.read_text().splitlines():
            for words in re.findall(r"(?:simclr-fast|-m simclr_fast) ([a-z][^`#|;]*)", line):
                name, *rest = words.split()
                if name == "eval":
                    name += " " + (rest[0] if rest and rest[0].isalpha() else "linear")
                found.setdefault(name, set()).update(w.split("=")[0] for w in rest if w[:2] == "--")
    return found


@pytest.mark.parametrize(("command", "options"), sorted(lines_of_commands().items()))
def test_options_exist(command, options, capsys):
    also = ["pretrain"] if command in ("ablate", "preview") else []
    for name in (command, *also):
        with contextlib.suppress(SystemExit):
            assert run([*name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    for option in options:
        assert re.search(rf"{re.escape(option)}\b", text), f"simclr-fast {command} {option}"


def test_hooks_run_the_versions_of_the_constraints():
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    hooks = re.findall(r"dependencies: \[(.+)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(hooks) == 3
    assert set(hooks) <= set(pinned)


def test_links_lead_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            folder = page.resolve().parent if page.parent != ROOT / "docs" else ROOT / "docs"
            assert (folder / link).exists(), f"{page.name}: {link}"


def test_the_reference_names_what_exists():
    """mkdocstrings leaves a member that does not exist out without a word."""
    page = (ROOT / "docs" / "reference.md").read_text()
    blocks = re.findall(r"::: ([\w.]+)\n(?:    .*\n)*?      members: \[(.*?)\]", page)
    assert len(blocks) == page.count(":::")
    for module, members in blocks:
        found = import_module(module)
        for name in members.split(", "):
            assert getattr(found, name).__doc__, f"{module}.{name}"


def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "site" / "reference" / "index.html").read_text()
    assert "trust_coefficient" in text
    assert "contrastive_entropy" in text
