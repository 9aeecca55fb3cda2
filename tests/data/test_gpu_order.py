"""What a GPU's streams do to a loader's batches, on GPUs that are not there."""

import ctypes
import io
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda, FakeEvent
from fake_dali import FakePipeline

from simclr_fast.augment.params import Augmentation
from simclr_fast.augment.views import _unpack_params, apply_views
from simclr_fast.data import decode, pipelines, prefetch
from simclr_fast.data.loader import TwoViewLoader
from simclr_fast.data.sources import Source
from simclr_fast.kernels import augment as kernels

PIXELS = np.random.default_rng(0).integers(0, 255, (22, 12, 10, 3), dtype=np.uint8)
AUG = Augmentation(size=8)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    """Also small sets take the way of large ones."""
    monkeypatch.setattr(pipelines, "KEPT_ON_GPU", 0)


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


def copied(views):
    """What a step does with views in host memory."""
    return [view.to("cuda", non_blocking=True) * 1.0 for view in views]


def views_by_address(where, as_bytes, ints, floats, *steps):
    """Stands in for the kernels: the same views, of the images at these addresses."""
    assert as_bytes
    *_, out = steps
    params = _unpack_params(ints.numpy(force=True), floats.numpy(force=True))
    images = []
    for address, row, (y, x, height, width) in zip(
        *where.tolist(), params.box.tolist(), strict=True
    ):
        # Up to the end of the box.
        end = (y + height - 1) * row + 3 * (x + width)
        flat = np.frombuffer((ctypes.c_uint8 * end).from_address(address), np.uint8)
        shape = y + height, x + width, 3
        images.append(np.lib.stride_tricks.as_strided(flat, shape, (row, 3, 1)).copy())
    out.copy_(apply_views(images, params, AUG))


@pytest.mark.parametrize("prefetch", [True, False])
def test_kept_images_have_every_wait(prefetch, monkeypatch):
    monkeypatch.setattr(pipelines, "KEPT_ON_GPU", PIXELS.nbytes)
    monkeypatch.setattr(kernels, "augment_views", views_by_address)
    exact = TwoViewLoader(PIXELS, 4, augmentation=AUG)
    with gpus() as cuda:
        loader = TwoViewLoader(PIXELS, 4, augmentation=AUG, device="cuda", prefetch=prefetch)
        assert loader.describe().startswith("pixels in memory, kept on cuda:0; views by Triton")
        for stop in (None, 2, None):
            assert equal(train(loader, stop), train(exact, stop))
            loader.set_epoch(3)
            exact.set_epoch(3)
    assert not cuda.faults


@pytest.mark.parametrize("prefetch", [True, False])
def test_views_in_host_memory_have_every_wait(prefetch):
    exact = TwoViewLoader(PIXELS, 4, augmentation=AUG)
    with gpus() as cuda:
        loader = TwoViewLoader(
            PIXELS, 4, augmentation=AUG, device="cuda", prefetch=prefetch, views_on_host=True
        )
        assert "kept in host memory" in loader.describe()
        for _ in range(2):
            seen = [(*copied(views), index) for *views, index in loader]
            assert equal(seen, train(exact))
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


@pytest.mark.parametrize("step", ["begin", "read", "done", "end"])
def test_a_missing_wait_for_views_in_host_memory_is_found(step, monkeypatch, encoded, dali):
    monkeypatch.setattr(prefetch.Slot, step, nothing)
    with gpus() as cuda:
        for *views, _ in TwoViewLoader(
            PIXELS, 4, augmentation=AUG, device="cuda", views_on_host=True
        ):
            copied(views)
    faults = cuda.faults
    with dali() as cuda:
        for *views, _ in loader_of(encoded, views_on_host=True):
            copied(views)
    assert faults or cuda.faults


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


SIZE = 64


@pytest.fixture
def encoded():
    """A source of files, of one colour each."""
    pytest.importorskip("nvidia.dali", reason="DALI is optional (Linux)")
    pytest.importorskip("PIL")
    from PIL import Image

    class Encoded(Source):
        def __len__(self):
            return len(PIXELS)

        def read(self, i):
            buffer = io.BytesIO()
            Image.new("RGB", (12, 10), (i, i, i)).save(buffer, "BMP")
            return np.frombuffer(buffer.getvalue(), np.uint8)

        def name(self, i):
            return f"image {i}"

    return Encoded()


def colours(feed):
    """The number of each image, as the views of a stand-in."""
    numbers = torch.tensor([float(file[-1]) for file in feed[0]])
    view = numbers[:, None, None, None].expand(-1, 3, SIZE, SIZE)
    return [view.contiguous(), view + 1000]


@pytest.fixture
def dali(monkeypatch):
    """`gpus` with a stand-in for DALI."""

    @contextmanager
    def gpus_with_dali(**options):
        with gpus(**options) as cuda:
            monkeypatch.setattr(
                pipelines.DaliViews,
                "build",
                lambda self: FakePipeline(cuda, self, colours, self.device),
            )
            yield cuda

    return gpus_with_dali


def loader_of(source, **options):
    loader = TwoViewLoader(source, 4, SIZE, device="cuda", backend="dali", **options)
    assert isinstance(loader._pipeline, pipelines.DaliViews)
    return loader


def check_colours(seen):
    for view1, view2, index in seen:
        number = index[:, None, None, None].expand_as(view1)
        assert torch.equal(view1, number.float())
        assert torch.equal(view2, number + 1000.0)


@pytest.mark.parametrize("prefetch", [True, False])
def test_what_dali_hands_over_is_taken_in_time(encoded, dali, prefetch, monkeypatch):
    monkeypatch.setattr(pipelines, "PART", 3)
    with dali(devices=4, current=3) as cuda:
        loader = loader_of(encoded, prefetch=prefetch)
        check_colours(train(loader) + train(loader))
        for stop in (1, 2, 4):
            check_colours(train(loader, stop))
        check_colours(train(loader))
    assert not cuda.faults
    assert {device for _, device in cuda.used_devices} == {3}


def test_what_dali_makes_may_stay_in_host_memory(encoded, dali, monkeypatch):
    monkeypatch.setattr(pipelines, "PART", 3)
    with dali() as cuda:
        loader = loader_of(encoded, views_on_host=True)
        for _ in range(2):
            check_colours([(*copied(views), index) for *views, index in loader])
    assert not cuda.faults


def test_dali_after_an_exception_of_the_producer(encoded, dali):
    with dali() as cuda:
        loader = loader_of(encoded, on_error="skip")
        draw, failed = loader._draw, []

        def fail_once(ids, sizes):
            if 7 in ids and not failed:
                failed.append(7)
                raise decode.CorruptImageError(encoded, {7: "planted"})
            return draw(ids, sizes)

        loader._draw = fail_once
        seen = train(loader) + train(loader)
        check_colours(seen)
        assert failed
        assert 7 not in torch.cat([index for *_, index in seen])
    assert not cuda.faults


def test_dali_on_another_stream_is_found(encoded, dali, monkeypatch):
    def default_stream(self, pipeline):
        return pipeline.run(torch.cuda.default_stream(self.device))

    monkeypatch.setattr(pipelines.DaliViews, "run_pipeline", default_stream)
    with dali(), pytest.raises(AssertionError, match="another stream"):
        train(loader_of(encoded))


def test_views_that_are_kept_instead_of_copied_are_found(encoded, dali, monkeypatch):
    """On a stream that DALI was not told of."""

    def copied_late(self, part, outputs, views):
        with torch.cuda.stream(elsewhere):
            for made, view in zip(outputs, views, strict=True):
                view.copy_(made)

    monkeypatch.setattr(pipelines.DaliViews, "write", copied_late)
    with dali() as cuda:
        elsewhere = torch.cuda.Stream()
        train(loader_of(encoded))
    assert any("fill_" in fault and "writing to" in fault for fault in cuda.faults)


def test_an_output_of_an_earlier_run_is_poisoned(encoded, dali, monkeypatch):
    kept = []

    def one_part_late(self, part, outputs, views):
        kept.append(list(outputs))
        for made, view in zip(kept[max(0, len(kept) - 2)], views, strict=True):
            view.copy_(made)

    monkeypatch.setattr(pipelines.DaliViews, "write", one_part_late)
    with dali():
        seen = train(loader_of(encoded))
    assert torch.isnan(seen[1][0]).all()
