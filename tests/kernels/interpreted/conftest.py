"""The same cases in Triton's interpreter and, with --device cuda, natively."""

import os

import pytest
import torch
from interpreter import BROKEN, FAULT, remember_builtins


@pytest.fixture(autouse=True)
def device(request):
    """Where tensors are made that name no device."""
    if BROKEN and request.config.getoption("--device") == "cpu":
        pytest.skip(FAULT)
    with torch.device(request.config.getoption("--device")) as device:
        yield device


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1" and not BROKEN:
        remember_builtins()
    yield
    torch.set_num_threads(before)
