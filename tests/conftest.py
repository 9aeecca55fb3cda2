"""Options of the whole suite; Ctrl-C works even if the suite was started with &."""

import gc
import os
import signal
from pathlib import Path

import pytest

# Kernels that run in Triton's interpreter, or natively with --device cuda.
INTERPRETED = Path(__file__).parent / "kernels" / "interpreted"
# Tests of which each needs a GPU.
GPU = Path(__file__).parent / "gpu"


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        help="cuda: run tests/kernels/interpreted natively, not in Triton's interpreter, and "
        "tests/gpu",
    )


def pytest_configure(config):
    # A shell that starts the suite with & makes it ignore Ctrl-C.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # OpenMP's threads would spin while they wait, on cores that other tests need. Read when torch
    # is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if _natively(config):
        config.pluginmanager.register(_NameFailures(config))
        return
    paths = [(config.invocation_params.dir / arg.partition("::")[0]) for arg in config.args]
    if paths and all(path.resolve().is_relative_to(INTERPRETED) for path in paths):
        # Triton reads it when a kernel is defined, so it holds for the whole process.
        os.environ["TRITON_INTERPRET"] = "1"
        # OpenBLAS's threads would wait for each other in small products.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported stays: not to search it for garbage saves seconds in every process."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


class _NameFailures:
    """Names a failed test at once: a run on a borrowed GPU may be cut off before its summary."""

    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            terminal.write(f"\nfailed: {report.nodeid}\n", flush=True)


def pytest_ignore_collect(collection_path, config):
    """Tests in the interpreter need a process of their own: it would break tests that compile.
    tests/gpu needs a GPU."""
    if _natively(config):
        return None
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if collection_path.is_relative_to(GPU):
        return True
    return True if collection_path.is_relative_to(INTERPRETED) and not interpreted else None


def pytest_report_header(config):
    if not _natively(config) and os.environ.get("TRITON_INTERPRET") != "1":
        return "left to a process of their own: pytest tests/kernels/interpreted"
    return None


def _natively(config) -> bool:
    return config.getoption("--device").startswith("cuda")
