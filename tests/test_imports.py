"""Imports go one way, and importing the package stays light."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Each room may import from the rooms before it; modules of one room may import each other downward.
ROOMS = [
    {"interrupts", "locks", "prefetch", "rank_watch"},
    {"reference", "nt_xent_plain", "_lars_foreach", "extras", "augment_params", "image_check"},
    {"sup_con_plain", "kernels", "ops", "sources", "shards", "demo", "checkpoint"},
    {"_lars_native", "distributed", "losses", "optim", "augment", "dali_views", "models", "config"},
    {"sup_con", "global_batch_norm", "decode", "data", "datasets", "preview", "compat"},
    {"large_batch"},
    {"evaluation", "plots", "train", "weights"},
    {"ablate", "benchmarks", "export", "report", "selfcheck", "supervised"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, room in enumerate(ROOMS) for name in room}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "simclr_fast":
            names |= {alias.name for alias in node.names if alias.name in LEVEL}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("simclr_fast."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("simclr_fast.")}
    return names - {"_C", "kernels", "benchmarks"}


def modules():
    for path in sorted((ROOT / "simclr_fast").rglob("*.py")):
        relative = path.relative_to(ROOT / "simclr_fast")
        if relative.parts[0] not in ("kernels", "benchmarks", "__init__.py"):
            yield relative.parts[0].removesuffix(".py"), path


def test_every_module_has_a_room():
    assert {name for name, _ in modules()} == LEVEL.keys() - {"kernels", "benchmarks"}


def test_imports_go_one_way():
    graph = {}
    for name, path in modules():
        graph.setdefault(name, set()).update(imported(path) - {name})
    for name, targets in graph.items():
        for target in targets:
            assert LEVEL[target] <= LEVEL[name], f"{name} imports {target}"

    def reaches(start, goal, seen=()):
        return any(
            t == goal or (t not in seen and reaches(t, goal, (*seen, t))) for t in graph[start]
        )

    for name in graph:
        # shards is opened by sources when a shard is met, and builds on it.
        if name not in ("sources", "shards"):
            assert not reaches(name, name), f"{name} imports itself in a circle"


def test_evaluation_and_checkpoints_know_nothing_of_training():
    for name, path in modules():
        if name in ("evaluation", "checkpoint", "plots", "weights"):
            assert "train" not in imported(path)


def test_kernels_stand_alone():
    for path in (ROOT / "kernels").glob("*.py"):
        assert not any(
            "simclr_fast" in line and "import" in line and "kernels" not in line
            for line in path.read_text().splitlines()
        ), path


def test_importing_needs_torch_and_numpy_only(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"never decoded")
    optional = ("triton", "nvidia.dali", "torchvision", "PIL", "sklearn", "tyro", "tqdm")
    program = f"""
import sys
for name in {optional!r} + ("safetensors", "matplotlib", "scipy"):
    sys.modules[name] = None
import simclr_fast, torch
import simclr_fast.losses, simclr_fast.optim, simclr_fast.augment, simclr_fast.data
import simclr_fast.models, simclr_fast.config, simclr_fast.train, simclr_fast.evaluation.knn
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
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert 'pip install "simclr-fast[dali]"' in done.stdout
    assert 'pip install "simclr-fast[train]"' in done.stdout


def test_files_stay_short():
    for pattern in (
        "simclr_fast/**/*.py",
        "kernels/*.py",
        "csrc/*",
        "tests/*.py",
        "benchmarks/*.py",
    ):
        for path in ROOT.glob(pattern):
            if path.is_file():
                assert len(path.read_text().splitlines()) <= 400, path
