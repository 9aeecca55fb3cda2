"""Pinned memory of exactly the bytes asked for. The CUDA driver is a stand-in."""

import gc

import pytest
import torch

from simclr_fast.utils import pinned
from simclr_fast.utils.pinned import pinned_empty


@pytest.fixture
def driver(monkeypatch):
    """What is pinned: bytes by address."""
    held = {}
    monkeypatch.setattr(pinned, "_LARGE", 1 << 16)
    monkeypatch.setattr(pinned, "pin", held.__setitem__)
    monkeypatch.setattr(pinned, "unpin", held.pop)
    return held


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_tensors_pin_their_own_bytes(driver, dtype, layout):
    t = pinned_empty((70, 3, 23, 29), dtype=dtype, memory_format=layout)
    assert t.shape == (70, 3, 23, 29)
    assert t.dtype is dtype
    assert t.is_contiguous(memory_format=layout)
    assert driver == {t.data_ptr(): t.nbytes}
    part = t[3:5].fill_(2)
    del t
    gc.collect()
    # A part of it is still in use.
    assert len(driver) == 1
    assert (part == 2).all()
    del part
    gc.collect()
    assert not driver


def test_what_cannot_be_pinned_is_freed(driver, monkeypatch):
    def refuse(address, nbytes):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pinned, "pin", refuse)
    with pytest.raises(RuntimeError, match="out of memory"):
        pinned_empty((1 << 17,), dtype=torch.uint8)
    assert not driver


def test_small_tensors_are_left_to_torch(driver, monkeypatch):
    seen = []
    real = torch.empty

    def empty(*args, pin_memory=False, **options):
        seen.append(pin_memory)
        return real(*args, **options)

    monkeypatch.setattr(torch, "empty", empty)
    assert pinned_empty((5, 2), dtype=torch.float32).shape == (5, 2)
    assert seen == [False, True]
    assert not driver


def test_the_driver_is_asked_by_address(monkeypatch):
    """The names and arguments of torch's own binding of the CUDA runtime."""
    asked = []

    class Runtime:
        def cudaHostRegister(self, address, nbytes, flags):
            asked.append((address, nbytes, flags))
            return 0

        def cudaHostUnregister(self, address):
            asked.append(address)
            return 0

    binding = getattr(torch._C, "_cudart", None)
    for name in ("cudaHostRegister", "cudaHostUnregister"):
        assert binding is None or hasattr(binding, name)
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: asked.append("synchronized"))
    pinned.pin(4096, 10)
    pinned.unpin(4096)
    assert asked == [(4096, 10, 1), "synchronized", 4096]
