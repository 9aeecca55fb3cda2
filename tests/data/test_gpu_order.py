"""What a GPU's streams do to a loader's batches, on GPUs that are not there."""

import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda, FakeEvent

from simclr_fast.augment.params import Augmentation
from simclr_fast.data import decode, prefetch
from simclr_fast.data.loader import TwoViewLoader

PIXELS = np.random.default_rng(0).integers(0, 255, (22, 12, 10, 3), dtype=np.uint8)
AUG = Augmentation(size=8)


@contextmanager
def gpus(**options):
    with FakeCuda(**options) as cuda:
        yield cuda
        torch.cuda.synchronize()


def train(loader, stop=None):
    """Read batches on the current stream, and give what was read."""
    seen = []
    for view1, view2, index in loader:
        seen.append((view1 * 1.0, view2 * 1.0, index))
        if len(seen) == stop:
            break
    return seen


def equal(one, two):
    return len(one) == len(two) and all(
        torch.equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("prefetch", [True, False])
def test_two_epochs_and_early_stops_have_every_wait(prefetch):
    exact = TwoViewLoader(PIXELS, 4, augmentation=AUG)
    with gpus() as cuda:
        loader = TwoViewLoader(PIXELS, 4, augmentation=AUG, device="cuda", prefetch=prefetch)
        assert equal(train(loader), train(exact))
        assert equal(train(loader), train(exact))
        for stop in (1, 2, 3, 5):
            loader.set_epoch(stop)
            exact.set_epoch(stop)
            assert equal(train(loader, stop), train(exact, stop))
        loader.set_epoch(9)
        exact.set_epoch(9)
        assert equal(train(loader), train(exact))
    assert not cuda.faults


def test_a_batch_that_is_read_after_its_loop_is_not_overwritten():
    with gpus() as cuda:
        loader = TwoViewLoader(PIXELS, 4, augmentation=AUG, device="cuda")
        for stop in (2, None):
            for step, batch in enumerate(loader):
                last = batch
                if step == stop:
                    break
            last[0].sum()
        train(loader)
    assert not cuda.faults


def test_the_reader_may_change_its_stream_between_epochs():
    with gpus() as cuda:
        loader = TwoViewLoader(PIXELS, 4, augmentation=AUG, device="cuda")
        for _ in range(3):
            with torch.cuda.stream(torch.cuda.Stream()):
                train(loader)
    assert not cuda.faults


@pytest.mark.parametrize("prefetch", [True, False])
def test_an_exception_of_the_producer_leaves_every_wait(prefetch, monkeypatch):
    read, failed = decode.PixelReader.read, set()

    def fail_once(self, ids):
        if 7 in ids and 7 not in failed:
            failed.add(7)
            raise decode.CorruptImageError(self.source, {7: "planted"})
        return read(self, ids)

    monkeypatch.setattr(decode.PixelReader, "read", fail_once)
    with gpus() as cuda:
        loader = TwoViewLoader(
            PIXELS, 4, augmentation=AUG, device="cuda", prefetch=prefetch, on_error="skip"
        )
        seen = torch.cat([index for *_, index in train(loader) + train(loader)])
        assert failed
        assert 7 not in seen
        assert len(seen) == 40
        failed.clear()
        loader = TwoViewLoader(PIXELS, 4, augmentation=AUG, device="cuda", prefetch=prefetch)
        with pytest.raises(decode.CorruptImageError, match="planted"):
            train(loader)
        train(loader)
    assert not cuda.faults
    assert not [t for t in threading.enumerate() if t.name == "next-batch"]


def nothing(*_):
    pass


@pytest.mark.parametrize("step", ["begin", "read", "done", "end"])
def test_a_missing_wait_is_found(step, monkeypatch):
    monkeypatch.setattr(prefetch.Slot, step, nothing)
    with gpus() as cuda:
        train(TwoViewLoader(PIXELS, 4, augmentation=AUG, device="cuda"))
    assert any("writing to" in fault for fault in cuda.faults)


def test_a_missing_wait_for_pinned_memory_is_found(monkeypatch):
    monkeypatch.setattr(FakeEvent, "synchronize", nothing)
    with gpus() as cuda:
        train(TwoViewLoader(PIXELS, 4, augmentation=AUG, device="cuda"))
    assert any("augment_views.default: stream -1" in fault for fault in cuda.faults)


def test_memory_that_is_not_recorded_is_found(monkeypatch):
    with gpus() as cuda:
        monkeypatch.setattr(torch.Tensor, "record_stream", nothing)
        train(TwoViewLoader(PIXELS, 4, augmentation=AUG, device="cuda"))
    assert any("not recorded" in fault for fault in cuda.faults)


def test_epochs_that_forget_each_other_are_found(monkeypatch):
    """A new stream per epoch, whose first fills wait for nothing."""
    with gpus() as cuda:
        loader = TwoViewLoader(PIXELS, 4, augmentation=AUG, device="cuda")
        train(loader)
        loader._stream = None
        for slot in loader._slots._slots:
            slot._read_by.clear()
        loader._slots._in_hand = None
        train(loader)
    assert cuda.faults


def test_a_loop_left_with_a_batch_in_hand_that_is_forgotten_is_found():
    with gpus() as cuda:
        loader = TwoViewLoader(PIXELS, 4, augmentation=AUG, device="cuda")
        train(loader, stop=2)
        loader._slots._in_hand = None
        train(loader)
    assert cuda.faults


def test_cuda_means_the_current_gpu_in_every_thread():
    with gpus(devices=4, current=3) as cuda:
        loader = TwoViewLoader(PIXELS, 4, augmentation=AUG, device="cuda")
        assert loader.device == torch.device("cuda:3")
        train(loader)
    assert {name for name, _ in cuda.used_devices} == {"MainThread", "next-batch"}
    assert {device for _, device in cuda.used_devices} == {3}
