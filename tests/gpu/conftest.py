"""Tests that need a GPU: pytest --device cuda tests/gpu. `selfcheck --full` runs them."""

import pytest
import torch


@pytest.fixture
def gpu(request):
    """The GPU of --device, with float32 products in float32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield torch.device(request.config.getoption("--device"))
    torch.backends.cudnn.allow_tf32 = before
