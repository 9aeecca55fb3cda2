"""Imports go one way, from package to package, and importing the package stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "simclr_fast"
# Each package may import from those on the lines before it. A package's own files may import each
# other, without a circle.
ORDER = [
    {"utils", "kernels", "reference"},
    {"ops"},
    {"losses", "optim", "augment"},
    {"data", "large_batch"},
    {"models"},
    {"evaluation", "compat", "weights"},
    {"training"},
    {"benchmarks", "doctor"},
    {"commands"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.relative_to(PACKAGE).parts[0] not in ("kernels", "benchmarks")
}


def imported(path: Path) -> set[str]:
    """The modules of this project that a file imports, wherever in the file it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("simclr_fast"):
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                names.add(deeper if deeper in MODULES else node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("simclr_fast.")}
    return names


GRAPH = {name: imported(path) - {name} for name, path in MODULES.items()}


def package(module: str) -> str:
    return module.split(".")[1]


def test_every_package_has_its_place():
    found = {package(name) for name in MODULES if name != "simclr_fast"}
    assert found == LEVEL.keys() - {"kernels", "benchmarks"}


@pytest.mark.parametrize("name", [name for name in MODULES if name != "simclr_fast"])
def test_imports_go_one_way(name):
    for target in GRAPH[name] - {"simclr_fast"}:
        same = package(target) == package(name)
        assert same or LEVEL[package(target)] < LEVEL[package(name)], f"{name} imports {target}"


def test_no_module_imports_itself_in_a_circle():
    def reaches(start: str, goal: str, seen: set[str]) -> bool:
        for target in GRAPH.get(start, ()):
            if target == goal:
                return True
            if target not in seen:
                seen.add(target)
                if reaches(target, goal, seen):
                    return True
        return False

    for name in GRAPH.keys() - {"simclr_fast"}:
        assert not reaches(name, name, {"simclr_fast"}), f"{name} imports itself in a circle"


def test_kernels_stand_alone():
    for path in (ROOT / "kernels").glob("*.py"):
        assert not any(
            "simclr_fast" in line and "import" in line and "kernels" not in line
            for line in path.read_text().splitlines()
        ), path


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_public_names():
    names = "LARS LargeBatch NTXentLoss SimCLRViews TwoViewLoader load_weights"
    names += " multi_view_nt_xent_loss nt_xent_loss sup_con_loss"
    program = f"""
import simclr_fast, sys
assert not any(name.startswith("simclr_fast.") for name in sys.modules), "eager import"
from simclr_fast import {", ".join(names.split())}
assert set({names.split()!r}) < set(simclr_fast.__all__)
assert set({names.split()!r}) < set(dir(simclr_fast))
try:
    simclr_fast.no_such_name
except AttributeError as error:
    print(error)
from simclr_fast.augment import SimCLRViews as a
from simclr_fast.data import TwoViewLoader as b
from simclr_fast.large_batch import LargeBatch as c
from simclr_fast.optim import LARS as d
from simclr_fast.weights import load_weights as e
assert (a, b, c, d, e) == (SimCLRViews, TwoViewLoader, LargeBatch, LARS, load_weights)
"""
    assert "no_such_name" in run(program)


def test_importing_needs_torch_and_numpy_only(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"never decoded")
    optional = ("triton", "nvidia.dali", "torchvision", "PIL", "sklearn", "tyro", "tqdm")
    program = f"""
import sys
for name in {optional!r} + ("safetensors", "matplotlib", "scipy"):
    sys.modules[name] = None
import simclr_fast, torch
import simclr_fast.losses, simclr_fast.optim, simclr_fast.augment, simclr_fast.data
import simclr_fast.models, simclr_fast.training.pretrain, simclr_fast.evaluation.knn
assert not torch.cuda.is_initialized()
z = torch.randn(8, 4)
simclr_fast.nt_xent_loss(z)
try:
    simclr_fast.data.TwoViewLoader({str(tmp_path)!r}, 1)
except ImportError as error:
    print(error)
try:
    simclr_fast.models.build_encoder("resnet50")
except ImportError as error:
    print(error)
"""
    printed = run(program)
    assert "pip install pillow nvidia-dali-cuda" in printed
    assert "pip install torchvision" in printed
