"""The arena of block inputs: bytes that are pinned, and tensors that come back bit for bit."""

import pytest
import torch
from fake_cuda import FakeCuda, FakeStream

from simclr_fast.large_batch import offload
from simclr_fast.large_batch.offload import Arena, powers_of_two

CPU = torch.device("cpu")


class PinnedAllocator:
    """torch.empty that counts as torch's pinned allocator: up to the next power of two."""

    def __init__(self, monkeypatch):
        self.bytes = 0
        self.real = torch.empty
        monkeypatch.setattr(torch, "empty", self)

    def __call__(self, size, *, dtype, pin_memory):
        assert pin_memory
        self.bytes += 1 << (size - 1).bit_length()
        return self.real(1, dtype=dtype)


@pytest.mark.parametrize("gigabytes", [90, 30, 2.2, 64, 0.001])
def test_pinned_are_the_bytes_asked_for(gigabytes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    allocator = PinnedAllocator(monkeypatch)
    arena = Arena(gigabytes, torch.device("cuda:0"))
    assert allocator.bytes == arena.capacity
    assert gigabytes * 1e9 - 256 < allocator.bytes <= gigabytes * 1e9


def test_one_piece_would_pin_more(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(offload, "powers_of_two", lambda size: [size])
    allocator = PinnedAllocator(monkeypatch)
    Arena(90, torch.device("cuda:0"))
    assert allocator.bytes == 1 << 37


def tensors():
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(n, 3, 5, 7, generator=generator) for n in (4, 1, 0, 9, 2)]
    made[0] = made[0].contiguous(memory_format=torch.channels_last)
    made[1] = made[1].bfloat16()
    made[3] = made[3].double().transpose(1, 3)
    made[4] = made[4].expand(3, 2, 3, 5, 7)
    return made


def test_tensors_come_back_across_chunks():
    kept = tensors()
    arena = Arena(1.3e-5, CPU)
    assert len(arena.chunks) == 3
    first, second = arena.store(kept[:2]), arena.store(kept[2:])
    assert any(len(place) > 1 for place in first.places + second.places)
    for stored, expected in ((second, kept[2:]), (first, kept[:2])):
        stored.fetch()
        for found, want in zip(stored.take(), expected, strict=True):
            assert torch.equal(found, want)
            assert found.dtype == want.dtype
    arena.clear()
    assert arena.used == 0


def test_it_is_full_to_the_last_byte():
    arena = Arena(powers_of_two(20_000)[0] * 1e-9 + 1024e-9, CPU)
    whole = torch.arange(arena.capacity // 8)
    assert arena.store([whole]).places is not None
    assert arena.used == arena.capacity
    more = torch.ones(1)
    assert arena.store([more]).take()[0] is more


def two_steps():
    """The arena on a stream of its own, beside a computing stream, on a GPU that is not there."""
    device = torch.device("cuda", 0)
    with FakeCuda() as cuda:
        arena = Arena(1e-5, device)
        for step in range(2):
            arena.clear()
            kept = [
                torch.full((8, n), step + n, dtype=torch.float32, device=device) for n in (3, 5)
            ]
            inputs = [t * 2 for t in kept]
            stored = arena.store(inputs)
            # Its tensors lie on the CPU.
            stored.device = device
            # What computes meanwhile, and then takes them back.
            sum(t.sum() for t in kept)
            stored.fetch()
            for found, want in zip(stored.take(), kept, strict=True):
                assert torch.equal(found * 1, want * 2)
    return cuda.faults


def test_copies_wait_for_what_they_read_and_are_waited_for():
    assert not two_steps()


@pytest.mark.parametrize("missing", ["wait_stream", "wait_event"])
def test_a_missing_wait_is_found(missing, monkeypatch):
    monkeypatch.setattr(FakeStream, missing, lambda self, other: None)
    assert any("writing to" in fault for fault in two_steps())


def test_memory_that_is_not_recorded_is_found(monkeypatch):
    monkeypatch.setattr(FakeCuda, "_record_stream", lambda self, tensor, stream: None)
    assert any("not recorded" in fault for fault in two_steps())
