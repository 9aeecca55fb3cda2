"""Adds versions and machine to every pytest-benchmark result."""

import os

import torch

import simclr_fast
from simclr_fast import ops


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["simclr_fast"] = simclr_fast.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["native_extension"] = ops.has_extension()
    machine_info["instruction_set"] = os.environ.get("SIMCLR_FAST_ISA", "best")
    if torch.cuda.is_available():
        machine_info["gpu"] = torch.cuda.get_device_name()
