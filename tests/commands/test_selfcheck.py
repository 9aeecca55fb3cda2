"""simclr-fast selfcheck: its report, that each check can fail, its GPU code under stand-ins."""

import contextlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from replayed_graph import ReplayedGraph

from simclr_fast.commands import checks, selfcheck
from simclr_fast.commands.cli import run

CPU = torch.device("cpu")


@pytest.fixture
def brief(monkeypatch):
    """Only the checks that take no time, and one long check."""

    def some():
        yield "versions", checks.versions
        yield "native extension", checks.extension
        yield "second GPU", checks.second_gpu

    def more():
        yield "CUDA graph", checks.cuda_graph
        yield "benchmarks", lambda device: checks.Measured("loss: eager ×2.00", {"loss": [1, 2]})

    monkeypatch.setattr(selfcheck, "quick_checks", some)
    monkeypatch.setattr(selfcheck, "further_checks", more)


def test_this_machine_passes(capsys):
    assert run(["selfcheck", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("0 failed")
    statuses = {line[5:39].strip(): line.split()[0] for line in lines[:-1]}
    for name in ("NT-Xent bfloat16", "NT-Xent ties float32", "10 steps of pretraining"):
        assert statuses[name] == "ok"
    assert statuses["second GPU"] == "skip"
    assert "no GPU" in next(line for line in lines if "second GPU" in line)


def test_the_report_has_machine_checks_and_failures(brief, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["selfcheck", "--device", "cpu", "--full"]) == 0
    printed = capsys.readouterr().out
    text = (tmp_path / "selfcheck" / "report.txt").read_text()
    assert printed.startswith(text)
    assert "3 ok, 2 skipped, 0 failed" in text
    report = json.loads((tmp_path / "selfcheck" / "report.json").read_text())
    assert report["device"] == "cpu"
    assert report["versions"]["torch"] == torch.__version__
    assert report["machine"]["threads"] == torch.get_num_threads()
    assert [c["status"] for c in report["checks"]] == ["ok", "ok", "skip", "skip", "ok"]
    assert report["checks"][-1]["data"] == {"loss": [1, 2]}
    assert report["checks"][-1]["seconds"] >= 0


def test_a_check_that_ends_the_process_is_named_in_the_report(brief, tmp_path, monkeypatch):
    """A crash inside a driver kills the process: what was written before is all there is."""

    class Crash(BaseException):
        pass

    def crash(device):
        raise Crash

    def some():
        yield "versions", checks.versions
        yield "bad", crash
        yield "never", checks.versions

    monkeypatch.setattr(selfcheck, "quick_checks", some)
    with pytest.raises(Crash):
        selfcheck.run(["--device", "cpu", "--full", "--out", str(tmp_path)])
    text = (tmp_path / "report.txt").read_text().splitlines()
    assert text[0].startswith("ok   versions")
    assert text[1:] == ["not finished: bad", "1 ok, 0 skipped, 0 failed"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["running"] == "bad"
    assert report["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()]
)
def test_a_check_without_enough_memory_fails_and_the_next_runs(error, tmp_path, monkeypatch):
    def too_large(device):
        raise error

    some = [("bad", too_large), ("versions", checks.versions)]
    monkeypatch.setattr(selfcheck, "quick_checks", lambda: iter(some))
    assert selfcheck.run(["--device", "cpu", "--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert [c["status"] for c in report["checks"]] == ["FAIL", "ok"]
    assert type(error).__name__ in report["checks"][0]["detail"]
    assert report["running"] is None
    assert "not finished" not in (tmp_path / "report.txt").read_text()


def test_without_full_nothing_is_written(brief, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["selfcheck", "--device", "cpu"]) == 0
    assert not list(tmp_path.iterdir())
    assert run(["selfcheck", "--device", "cpu", "--out", "here"]) == 0
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == ["report.json", "report.txt"]


def test_a_wrong_loss_is_found_and_the_rest_still_checked(monkeypatch, capsys, tmp_path):
    def wrong(z, *arguments, **options):
        found = right(z, *arguments, **options)
        return found if isinstance(found, tuple) else 1.0001 * found

    right = checks.nt_xent_loss
    monkeypatch.setattr(checks, "nt_xent_loss", wrong)
    monkeypatch.setattr(checks, "ten_steps", lambda device: "left out here")
    assert run(["selfcheck", "--device", "cpu", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "FAIL NT-Xent float32" in out
    assert "loss off by 1.0e-04" in out
    assert "ok   LARS float32" in out
    assert "FAIL NT-Xent float32" in (tmp_path / "report.txt").read_text()


def test_an_unusable_device_is_refused(capsys):
    assert run(["selfcheck", "--device", "mps"]) == 1
    assert "device must be auto, cpu, cuda or cuda:N, got mps" in capsys.readouterr().err
    if not torch.cuda.is_available():
        for more in ([], ["--full"]):
            assert run(["selfcheck", "--device", "cuda", *more]) == 1
            assert "torch sees no GPU" in capsys.readouterr().err


def _changed(monkeypatch, change):
    """Make the statistics or the loss wrong."""
    right = checks.nt_xent_loss

    def wrong(*arguments, return_stats=False, **options):
        found = right(*arguments, return_stats=return_stats, **options)
        return (found[0], change(found[1])) if return_stats else change(found)

    monkeypatch.setattr(checks, "nt_xent_loss", wrong)


@pytest.mark.parametrize("name", ["contrastive_entropy", "accuracy", "negative_similarity"])
def test_wrong_statistics_are_found(name, monkeypatch):
    assert "6 statistics" in checks.statistics(CPU, torch.float32)
    _changed(monkeypatch, lambda s: s._replace(**{name: getattr(s, name) + 1e-2}))
    with pytest.raises(AssertionError, match=name):
        checks.statistics(CPU, torch.float32)


def test_an_accuracy_that_counts_ties_is_found(monkeypatch):
    one = torch.ones(())
    _changed(monkeypatch, lambda s: s._replace(contrastive_accuracy=one))
    with pytest.raises(AssertionError, match=r"accuracies \(1.0, 0.0\)"):
        checks.ties(CPU, torch.float32)


@pytest.mark.parametrize("check", [checks.decoupled, checks.learnable_temperature])
def test_wrong_gradients_are_found(check, monkeypatch):
    check(CPU)
    _changed(monkeypatch, lambda loss: 1.001 * loss)
    with pytest.raises(AssertionError, match=r"off by|should be"):
        check(CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_size_is_named(dtype, monkeypatch):
    monkeypatch.setattr(checks, "_ALL_FEATURES", (16, 33))
    monkeypatch.setattr(checks, "_ALL_PAIRS", (1, 2, 250))
    assert "2 widths" in checks.every_width(CPU, dtype)
    assert "3 batch sizes" in checks.every_batch_size(CPU, dtype)
    right = checks.nt_xent_loss

    def wrong(z, *arguments, **options):
        found = right(z, *arguments, **options)
        return found * 2 if z.shape in ((500, 100), (666, 33)) else found

    monkeypatch.setattr(checks, "nt_xent_loss", wrong)
    with pytest.raises(AssertionError, match=r"33 features: loss off by 1.0e"):
        checks.every_width(CPU, dtype)
    with pytest.raises(AssertionError, match=r"250 pairs: loss off by 1.0e"):
        checks.every_batch_size(CPU, dtype)


def test_few_pairs_are_judged_over_many_draws(monkeypatch):
    monkeypatch.setattr(checks, "_ALL_PAIRS", (2, 64))
    batches = []

    def errors(device, z, ours, plain):
        batches.append(z)
        unlucky = len(batches) == 1
        return checks._Errors(0.0, gradient=3e-6 if unlucky else usual, plain=4e-7)

    monkeypatch.setattr(checks, "_errors", errors)
    usual = 6e-7
    assert "2 batch sizes" in checks.every_batch_size(CPU, torch.float32)
    assert [len(z) for z in batches] == [4] * 64 + [128]
    assert not any(torch.equal(batches[0], z) for z in batches[1:64])
    usual = 9e-7
    with pytest.raises(AssertionError, match=r"^2 pairs: .*gradient by 9\..e-07"):
        checks.every_batch_size(CPU, torch.float32)


def test_wrong_views_of_an_array_are_found(monkeypatch):
    assert "6 batches" in checks.array_loader(CPU)
    images = checks._images

    def one_darker(n):
        monkeypatch.setattr(checks.TwoViewLoader, "__iter__", lambda self: iter([(-noise, noise)]))
        return images(n)

    noise = torch.full((8, 3, 40, 40), torch.nan)
    monkeypatch.setattr(checks, "_images", one_darker)
    with pytest.raises(AssertionError):
        checks.array_loader(CPU)


# The lines that only a GPU runs, with stand-ins for torch.cuda.


@pytest.fixture
def pretended_cuda(monkeypatch):
    """The checks believe that the CPU is a GPU."""

    class Stream:
        def __init__(self, device=None):
            self.waited = 0

        def wait_stream(self, other):
            assert isinstance(other, Stream)
            self.waited += 1

    monkeypatch.setattr(checks, "_need_gpu", lambda device: None)
    for name, value in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda device=None: None,
        "device_count": lambda: 1,
        "get_device_properties": lambda index: SimpleNamespace(
            name="Pretended", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132
        ),
        "CUDAGraph": ReplayedGraph,
        "graph": lambda graph: graph.capture(),
        "reset_peak_memory_stats": lambda device: None,
        "max_memory_allocated": lambda device: 5e9,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


def test_the_gpus_are_listed(pretended_cuda):
    text = checks.devices(SimpleNamespace(type="cuda"))
    assert "cuda:0 Pretended sm_90 80 GiB" in text
    assert "driver" in text
    assert checks.found_devices()["gpus"][0]["architecture"] == "sm_90"


def test_every_check_runs_where_there_is_a_gpu(pretended_cuda, monkeypatch, tmp_path):
    """No check meets a name or an argument for the first time on somebody's GPU."""
    monkeypatch.setattr(checks, "_ALL_FEATURES", (16, 33))
    monkeypatch.setattr(checks, "_ALL_PAIRS", (1, 2, 17))
    small = checks.replace(checks.PRESETS["demo"](), batch_size=64)
    monkeypatch.setitem(checks.PRESETS, "imagenet", lambda: small)

    def bounded(command, folder, seconds):
        if command[3] == "bench":
            result = {"tables": [{"ratios": {"step": {"eager": 2.0}}}]}
            (Path(command[-1]) / "machine.json").write_text(json.dumps({"loss": result}))
        return 0, ["3 passed"]

    monkeypatch.setattr(checks, "_bounded", bounded)
    # Dynamo asks the real driver.
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    assert selfcheck.run(["--device", "cpu", "--full", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    statuses = {c["name"]: c["status"] for c in report["checks"]}
    assert list(statuses) == [n for n, _ in [*checks.quick_checks(), *checks.further_checks()]]
    # test_a_second_gpu runs the one that is skipped.
    assert [name for name, status in statuses.items() if status != "ok"] == ["second GPU"]


def test_a_result_that_differs_between_streams_is_found(pretended_cuda, monkeypatch):
    assert checks.two_streams(CPU) == "20 runs on 2 streams are equal"
    counts = iter(range(100))
    right = checks._fused
    # One of twenty results differs.
    monkeypatch.setattr(checks, "_fused", lambda z: right(z) * (1 + (next(counts) == 7)))
    with pytest.raises(AssertionError):
        checks.two_streams(CPU)


def test_a_second_gpu_is_checked(pretended_cuda, monkeypatch):
    with pytest.raises(checks.Skip, match="one GPU"):
        checks.second_gpu(CPU)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    real = torch.device

    class Device:
        def __call__(self, kind, index=None):
            return real("cpu")

    monkeypatch.setattr(checks.torch, "device", Device())
    assert checks.second_gpu(real("cpu")) == "cpu agrees with cpu"


def test_a_cuda_graph_is_replayed_and_checked(pretended_cuda, monkeypatch):
    assert checks.cuda_graph(CPU) == "a replay with other values equals eager"
    monkeypatch.setattr(ReplayedGraph, "replay", lambda self: None)
    with pytest.raises(AssertionError):
        checks.cuda_graph(CPU)


def test_the_lars_check_needs_cuda_kernels(pretended_cuda, monkeypatch):
    monkeypatch.setattr(checks.ops, "why_plain", lambda *_, **__: "too old")
    with pytest.raises(checks.Skip, match="plain torch computes LARS here: too old"):
        checks.cuda_lars(CPU)
    monkeypatch.setattr(checks.ops, "why_plain", lambda *_, **__: None)
    assert checks.cuda_lars(CPU) == "loaded"


@pytest.mark.parametrize("reason", ["this torch is built for ROCm", "compute capability 8.0"])
def test_a_gpu_without_kernels_is_told_why(reason, monkeypatch):
    assert checks.kernels_chosen(CPU) == "the extension's C++ kernels"
    monkeypatch.setattr(checks.ops, "why_plain", lambda device: reason)
    with pytest.raises(checks.Skip, match=reason):
        checks.kernels_chosen(CPU)


def test_twenty_steps_of_the_full_batch(pretended_cuda, monkeypatch):
    made = checks.PRESETS["imagenet"]()
    assert (made.batch_size, made.model, made.augmentation.size) == (4096, "resnet50", 224)
    small = checks.replace(checks.PRESETS["demo"](), batch_size=64)
    monkeypatch.setitem(checks.PRESETS, "imagenet", lambda: small)
    text, data = checks.full_batch(CPU)
    assert "memory plain" in text
    assert "peak 5.0 GB" in text
    assert data["peak_bytes"] == 5_000_000_000
    assert len(data["steps"]) == 20
    monkeypatch.setattr(checks, "pretrain", lambda config: _run_of(config, [1.0, math.nan]))
    with pytest.raises(AssertionError, match="2 of 20 steps"):
        checks.full_batch(CPU)
    monkeypatch.setattr(checks, "pretrain", lambda config: _run_of(config, [math.nan] * 20))
    with pytest.raises(AssertionError, match="losses"):
        checks.full_batch(CPU)


def _run_of(config, losses):
    config.out.mkdir()
    rows = [json.dumps({"loss": loss, "images_per_second": 1.0}) for loss in losses]
    (config.out / "metrics.jsonl").write_text("\n".join(rows))
    return config.out


def test_a_gpu_too_small_for_the_full_batch_is_no_failure(pretended_cuda, monkeypatch):
    def refuse(config):
        raise ValueError(f"batch_size 4096 {why}")

    monkeypatch.setattr(checks, "pretrain", refuse)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    why = "fits in no mode: --memory lockstep would need 9.1 GB of 7.6"
    with pytest.raises(checks.Skip, match=r"too small: .*9\.1 GB of 7\.6"):
        checks.full_batch(torch.device("cuda", 0))
    why = "is odd"
    with pytest.raises(ValueError, match="is odd"):
        checks.full_batch(torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 2023",
            "535.129.03",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release",
            "580.65.06",
        ),
        ("NVRM version: 390.1", "390.1"),
        ("something else", None),
    ],
)
def test_the_driver_is_read_however_it_is_written(text, found, monkeypatch, tmp_path):
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(checks, "Path", lambda path: tmp_path / "version")
    assert checks._driver() == found


def test_the_suite_has_tests_for_a_gpu():
    command = [sys.executable, "-m", "pytest", "--co", "-q", "-p", "no:cacheprovider"]
    one = "tests/kernels/interpreted/test_nt_xent_kernels.py"
    command += ["--device", "cuda:0", one, "tests/gpu"]
    status, lines = checks._bounded(command, Path(__file__).parents[2], 100)
    assert status == 0, lines
    assert any("test_nt_xent_kernels" in line for line in lines)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the test would pass on a GPU")
def test_a_failed_test_on_a_gpu_is_named_at_once():
    case = "tests/kernels/interpreted/test_norm_act_kernel.py::test_a_nan_stays"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    status, lines = checks._bounded(
        [*command, "--device", "cuda:0", case], Path(__file__).parents[2], 100
    )
    assert status == 1
    named = lines.index(f"failed: {case}")
    assert named < min(i for i, line in enumerate(lines) if "FAILURES" in line)


def test_a_command_that_takes_too_long_says_which_tests_had_failed(tmp_path):
    code = "import time; print('..F\\nfailed: tests/x.py::y', flush=True); time.sleep(60)"
    with pytest.raises(AssertionError, match=r"not done after 1 s; failed: tests/x\.py::y$"):
        checks._bounded([sys.executable, "-c", code], tmp_path, 1)


def test_the_tests_run_in_a_process_of_their_own(pretended_cuda, monkeypatch, tmp_path):
    calls = []

    def bounded(command, folder, seconds):
        calls.append((command, folder))
        return results.pop(0)

    monkeypatch.setattr(checks, "_bounded", bounded)
    results = [(0, ["== 12 passed in 3 s =="]), (1, ["FAILED tests/x.py::y", "1 failed"])]
    folder = tmp_path / "tests" / "kernels" / "interpreted"
    monkeypatch.setattr(checks.simclr_fast, "__file__", str(tmp_path / "simclr_fast" / "x.py"))
    with pytest.raises(checks.Skip, match="no tests folder"):
        checks.device_tests(torch.device("cuda", 0))
    folder.mkdir(parents=True)
    conftest = tmp_path / "tests" / "conftest.py"
    conftest.write_text("")
    with pytest.raises(checks.Skip, match="no option --device"):
        checks.device_tests(torch.device("cuda", 0))
    conftest.write_text('parser.addoption("--device")')
    assert checks.device_tests(torch.device("cuda", 0)) == "12 passed in 3 s"
    command, folder = calls[0]
    assert command[-4:] == ["--device", "cuda:0", "tests/kernels/interpreted", "tests/gpu"]
    assert (folder / "tests" / "kernels").is_dir()
    with pytest.raises(AssertionError, match=r"FAILED tests/x\.py::y"):
        checks.device_tests(torch.device("cuda", 0))


def test_the_benchmark_results_are_kept(monkeypatch):
    result = {"tables": [{"ratios": {"forward": {"ours": 1.0, "eager": 2.5}}}]}

    def bounded(command, folder, seconds):
        assert command[1:6] == ["-m", "simclr_fast", "bench", "all", "--quick"]
        out = checks.Path(command[-1])
        if status != 1:
            (out / "machine.json").write_text(json.dumps({"loss": result}))
        if status == 2:
            raise AssertionError("not done after 180 s")
        return status, ["some output"]

    status = 0
    monkeypatch.setattr(checks, "_bounded", bounded)
    text, data = checks.benchmarks(CPU)
    assert text == "loss: ours ×1.00, eager ×2.50"
    assert data == {"loss": result}
    status = 1
    with pytest.raises(AssertionError, match="nothing was timed: some output"):
        checks.benchmarks(CPU)
    status = 2
    text, data = checks.benchmarks(CPU)
    assert text.endswith("not all were timed: not done after 180 s")
    assert data == {"loss": result}


def test_what_takes_too_long_is_stopped(tmp_path):
    status, lines = checks._bounded([sys.executable, "-c", "print(3)"], tmp_path, 60)
    assert (status, lines) == (0, ["3"])
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(AssertionError, match="not done after 0 s"):
        checks._bounded(sleep, tmp_path, 0.2)


def test_a_gpu_that_stops_working_ends_the_checks(monkeypatch):
    def illegal(device):
        monkeypatch.setattr(torch.cuda, "synchronize", broken)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def broken(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def never(device):
        raise NotImplementedError

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    some = [("good", lambda device: "fine"), ("bad", illegal), ("next", never)]
    monkeypatch.setattr(selfcheck, "quick_checks", lambda: iter(some))
    outcomes = list(selfcheck.selfcheck(torch.device("cuda")))
    assert [o.status for o in outcomes] == ["ok", "FAIL", "FAIL"]
    assert "illegal memory access" in outcomes[1].detail
    assert outcomes[2].detail == "not run: the GPU has stopped working in 'bad'"
