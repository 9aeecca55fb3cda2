"""The benchmark harness: what its numbers mean, and that a wrong result is not timed."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from simclr_fast import ops
from simclr_fast.benchmarks import (
    augment_epochs,
    bench_augment,
    bench_lars,
    bench_nt_xent,
    bench_step,
    harness,
    machine,
    peers,
)
from simclr_fast.commands import bench, checks, selfcheck
from simclr_fast.commands.cli import run


def test_measure_takes_turns_after_warming_up():
    calls = []
    steps = {"a": lambda: calls.append("a"), "b": lambda: (calls.append("b"), time.sleep(0.01))}
    times = harness.measure(steps, 8)
    assert calls[:4] == ["a", "a", "b", "b"]
    rounds = ["".join(calls[start : start + 2]) for start in range(4, 20, 2)]
    assert set(rounds) == {"ab", "ba"}
    assert [len(times[name]) for name in "ab"] == [8, 8]
    assert min(times["b"]) >= 10


def test_ratios_are_medians_of_each_rounds_ratio():
    """So a round in which everything was slow does not change them."""
    table = harness.Table(
        "t", "ours", {"step": {"ours": [1.0, 10.0, 2.0], "peer": [2.0, 30.0, 6.0]}}, floors=()
    )
    assert table.ratio("step", "peer") == 3
    assert "| peer | 6 | 3.00 |" in table.text()
    assert table.names() == ["ours", "peer"]
    assert table.shares() == {"step": {}}


def test_a_table_says_which_share_of_the_floor_is_reached():
    times = {"step": {"ours": [4.0, 2.0], "floor: copy": [3.0, 1.5]}}
    table = harness.Table("t", "ours", times, floors=("floor: copy",))
    assert "Lower bounds as shares of our time: copy 75%." in table.text()
    assert table.to_json()["shares"] == {"step": {"floor: copy": 0.75}}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_other_processes_are_counted_and_this_one_is_not():
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    spin = "import time; end = time.time() + 1\nwhile time.time() < end: pass"
    try:
        others, start, cpu = harness.OtherProcesses(), time.perf_counter(), time.process_time()
        while time.perf_counter() < start + 0.4:
            pass
        # The core had nothing left for others.
        ours = (time.process_time() - cpu) / (time.perf_counter() - start)
        assert others.cores() < 1.1 - ours
        with subprocess.Popen([sys.executable, "-c", spin]):
            others = harness.OtherProcesses()
            time.sleep(0.4)
            assert others.cores() > 0.3
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.skipif(not ops.has_extension(), reason="no native extension")
def test_the_loss_has_a_floor_and_a_table_in_half_precision(monkeypatch):
    monkeypatch.setattr(
        bench_nt_xent, "nt_xent_peers", lambda n, notes=None: {"textbook": peers.textbook}
    )
    options = harness.Options(torch.device("cpu"), 1, 1, True, torch.bfloat16)
    full, half = bench_nt_xent.tables(options, (8,), 16, memory=False)
    assert bench_nt_xent.FMA in full.shares()["forward"]
    assert "bfloat16 inputs" in half.title
    names = set(half.times["forward"]) - {bench_nt_xent.OURS, bench_nt_xent.MATMUL}
    assert names in ({"textbook, bfloat16"}, {"textbook, float32"})


def test_lars_side_by_side_from_the_command_line(tmp_path, capsys, monkeypatch):
    pytest.importorskip("lightly")
    monkeypatch.setattr(bench.machine, "floors", lambda options: {"copy, GB/s": 1.0})
    monkeypatch.setattr(bench_lars, "shapes_of", lambda model: [(30, 40), (50,)] * 5)
    command = ["bench", "lars", "--quick", "--rounds", "1", "--out", str(tmp_path)]
    assert run([*command, "--device", "cpu", "--threads", "1"]) == 0
    assert "| lightly |" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())["lars"]
    assert path.stem == harness.machine_name(content["environment"])
    assert content["environment"]["versions"]["torch"]
    assert content["environment"]["threads"] == 1
    assert content["tables"][0]["ratios"]["step"]["simclr_fast"] == 1
    assert (tmp_path / "lars.png").stat().st_size > 5000


def test_lars_reads_twice_what_the_caches_do_not_keep(monkeypatch):
    """4 KB hold 512 weights with their gradients, so 688 of the 1,200 weights of a matrix do not
    fit."""
    monkeypatch.setattr(bench_lars, "shapes_of", lambda model: [(30, 40), (50,)] * 5)
    monkeypatch.setattr(bench_lars.machine, "second_level_cache", lambda: 4096)
    options = harness.Options(torch.device("cpu"), 1, 1, True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(bench_lars, "contenders", lambda *_: {bench_lars.OURS: time.monotonic})
    (table,) = bench_lars.tables(options, ("small",))
    assert set(bench_lars.FLOORS) == set(table.shares()["step"])
    arrays = 5 + 2 * 5 * 688 / (5 * 1250)
    assert any(f"LARS moves at least {arrays:.2f} arrays" in note for note in table.notes)
    monkeypatch.setattr(bench_lars.machine, "second_level_cache", lambda: 0)
    (table,) = bench_lars.tables(options, ("small",))
    assert set(bench_lars.FLOORS[:2]) == set(table.shares()["step"])


def test_a_wrong_result_is_not_timed(monkeypatch, capsys, tmp_path):
    right = checks.nt_xent_loss

    def wrong(z, *arguments, **options):
        found = right(z, *arguments, **options)
        return found if isinstance(found, tuple) else 1.01 * found

    monkeypatch.setattr(checks, "nt_xent_loss", wrong)
    assert run(["bench", "loss", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "loss is not timed, because its result is wrong: FAIL NT-Xent" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("subject", ["augment", "lars", "step"])
def test_every_subject_is_checked_before_it_is_timed(subject, monkeypatch, capsys, tmp_path):
    def fails(device):
        raise AssertionError("off by 1")

    names = [name for name, _ in checks.quick_checks()]
    last = [name for name in names if name.startswith(bench.SUBJECTS[subject][1])][-1]
    pretended = [(name, fails if name == last else lambda device: "") for name in names]
    monkeypatch.setattr(selfcheck, "quick_checks", lambda: iter(pretended))
    assert run(["bench", subject, "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert (
        f"{subject} is not timed, because its result is wrong: FAIL {last}"
        in capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_the_gpu_contenders_of_augment_run_an_epoch(monkeypatch):
    """The contenders of `bench augment --device cuda`, on the CPU."""
    pytest.importorskip("nvidia.dali", reason="decoding needs DALI (Linux)")
    monkeypatch.setattr(augment_epochs, "SIZE", 40)
    monkeypatch.setattr(augment_epochs, "jpegs", lambda n: bench_augment.jpegs(n, 50, 40))
    options = harness.Options(torch.device("cpu"), 1, 1, True)
    (table,) = augment_epochs.tables(options, 8)
    assert set(table.times["wall"]) >= {"simclr_fast, fused", "solo-learn's DALI pipeline"}
    assert table.names()[-1] == augment_epochs.FLOOR


def test_our_views_and_decoding_alone_are_timed():
    pytest.importorskip("nvidia.dali", reason="decoding needs DALI (Linux)")
    options = harness.Options(torch.device("cpu"), 1, 1, True)
    (table,) = bench_augment.tables(options, only=frozenset(["decode_only"]), modes=(False,))
    assert table.names() == ["fused", "decode_only"]


@pytest.mark.slow
def test_a_table_of_whole_steps_has_every_share_and_rate(monkeypatch):
    """The shares of the parts add up to 100%, and every rate is there."""
    pytest.importorskip("nvidia.dali", reason="decoding needs DALI (Linux)")
    pytest.importorskip("lightly")
    options = harness.Options(torch.device("cpu"), 1, 1, True, torch.bfloat16)
    table, half = bench_step.tables(options, (32,), 16)
    assert ", float32, " in table.title
    assert ", bfloat16, " in half.title
    assert "simclr_fast: autocast to bfloat16." in half.notes
    assert set(half.times["step"]) == set(table.times["step"])
    assert set(table.times["step"]) == {*bench_step.CONTENDERS, *table.floors}
    for name in bench_step.CONTENDERS:
        shares = [float(table.facts[part][name].rstrip("%")) for part in bench_step.PARTS]
        assert sum(shares) == pytest.approx(100, abs=0.5)
        model, hardware = (float(table.facts[f"{k} GFLOP/s"][name]) for k in ("model", "hardware"))
        assert hardware >= model > 0
    assert "GFLOP a step" in table.notes[0]


def test_memory_is_the_growth_of_the_peak():
    if harness.peak_memory(lambda: None, torch.device("cpu")) is None:
        pytest.skip("the operating system does not say")
    held = torch.ones(10_000_000)
    mb = harness.peak_memory(lambda: (held + 1).sum(), torch.device("cpu"))
    assert 38 < mb < 50


def test_recomputed_tiles_equal_the_textbook_loss():
    z = torch.randn(2, 37, 20, dtype=torch.float64)
    ours, plain = (
        torch.autograd.functional.vjp(lambda a, b, f=f: f(a, b, 0.2), tuple(z), torch.tensor(1.7))
        for f in (lambda *a: peers.tiles(*a, side=16), peers.textbook)
    )
    torch.testing.assert_close(ours, plain, check_dtype=False)


def test_the_floors_of_this_machine_are_measured():
    found = machine.floors(harness.Options(torch.device("cpu"), 1, 1, True))
    assert all(rate > 0 for rate in found.values())
    assert {"copy, GB/s", "exp, 1e9/s"} <= set(found)
    assert "copy, GB/s" in machine.text(found)


def test_the_floors_of_a_gpu_count_operations_and_bytes(monkeypatch):
    """Three kinds of rates, by their counts of operations and bytes."""
    monkeypatch.setattr(machine, "_GPU_SIDE", 64)
    monkeypatch.setattr(machine, "_GPU_ELEMENTS", 1 << 16)
    monkeypatch.setattr(machine, "_seconds", lambda steps, device: dict.fromkeys(steps, 0.5))
    assert machine._gpu(torch.device("cpu")) == {
        "matmul float32, TFLOP/s": 2 * 64**3 / 0.5 / 1e12,
        "matmul bfloat16, TFLOP/s": 2 * 64**3 / 0.5 / 1e12,
        "copy, GB/s": 2 * 4 * 65536 / 0.5 / 1e9,
        "exp, 1e9/s": 64 * 65536 / 0.5 / 1e9,
    }


def test_missing_libraries_are_named_in_the_notes(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightly.loss", None)
    notes = []
    assert "textbook eager" in peers.nt_xent_peers(256, notes)
    assert [note.partition(" left out")[0] for note in notes] == [
        "lightly",
        "pytorch-metric-learning",
    ]


def test_without_matplotlib_only_the_picture_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(bench.machine, "floors", lambda options: {"copy, GB/s": 1.0})
    table = harness.Table("a step", "simclr_fast", {"step": {"simclr_fast": [1.0]}})
    monkeypatch.setattr(bench_lars, "tables", lambda options: iter([table]))
    command = ["bench", "lars", "--quick", "--rounds", "1", "--out", str(tmp_path)]
    assert run([*command, "--device", "cpu", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    assert printed.index("pip install matplotlib") < printed.index("| simclr_fast |")
    (path,) = tmp_path.iterdir()
    assert list(json.loads(path.read_text())) == ["lars"]


@pytest.mark.parametrize("module", [bench_augment, augment_epochs, bench_step])
def test_a_table_without_our_time_says_why(monkeypatch, module):
    """As without DALI, where no image can be decoded."""

    def refuse(*_, **__):
        raise ImportError("no decoder")

    options = harness.Options(torch.device("cpu"), 1, 1, True)
    if module is bench_augment:
        refuse.__name__ = "fused"
        monkeypatch.setattr(module, "fused", refuse)
        monkeypatch.setattr(module, "SMALL_CASES", ())
        monkeypatch.setattr(module, "JPEG_CASES", (module.decode_only,))
        found = list(module.tables(options, modes=(False,)))
    elif module is bench_step:
        monkeypatch.setattr(module, "CONTENDERS", {module.OURS: refuse})
        found = list(module.tables(options, (32,), 16))
    else:
        monkeypatch.setattr(module, "CASES", {module.OURS: refuse})
        monkeypatch.setattr(module, "jpegs", lambda n: [])
        found = list(module.tables(options, 8))
    assert [table.times for table in found] == [{}] * len(found)
    assert found
    assert all("left out: no decoder" in table.text() for table in found)
    assert all("not timed" in table.text() for table in found)


def test_a_subject_that_cannot_run_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench.machine, "floors", lambda options: {"copy, GB/s": 1.0})
    monkeypatch.setattr(bench, "selfcheck", lambda *_: [])
    monkeypatch.setitem(sys.modules, "sklearn", None)

    class Fake:
        @staticmethod
        def tables(options):
            yield harness.Table("t", "ours", {"step": {"ours": [1.0]}})

    monkeypatch.setattr(bench, "import_module", lambda name: Fake)
    assert run(["bench", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "pip install scikit-learn" in printed.out
    assert printed.err.strip() == "simclr-fast bench: not timed: augment, step"
    (path,) = tmp_path.glob("*.json")
    assert sorted(json.loads(path.read_text())) == ["lars", "loss"]
