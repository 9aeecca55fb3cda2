"""The loaders: order, views, ranks, resume, corrupt files; DALI against the fused path."""

import copy
import io
import logging
import sys
import threading
import time
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_cuda import FakeCuda
from PIL import Image

from simclr_fast.augment.params import Augmentation, draw_params
from simclr_fast.augment.views import apply_views
from simclr_fast.data import decode, pipelines
from simclr_fast.data.loader import (
    CorruptImageError,
    ImageLoader,
    MultiViewLoader,
    OneViewLoader,
    TwoViewLoader,
)

DALI = pytest.param(
    "dali",
    marks=pytest.mark.skipif(find_spec("nvidia.dali") is None, reason="DALI is optional (Linux)"),
)
AUG = Augmentation(size=16, p_blur=0.5)
# Without jitter a DALI graph is built much faster: enough for tests of order and failures.
QUICK = Augmentation(size=16, p_jitter=0)


def write_images(folder, n=23, kinds=("JPEG", "PNG", "WEBP", "BMP")):
    rng = np.random.default_rng(0)
    for i in range(n):
        kind = kinds[i % len(kinds)]
        (folder / str(i % 3)).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (9 + i, 40 - i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / str(i % 3) / f"{i:02d}.{kind.lower()}", kind)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def run(loader):
    return [tuple(t.clone() for t in batch) for batch in loader]


def equal(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y)
        for one, two in zip(a, b, strict=True)
        for x, y in zip(one, two, strict=True)
    )


def test_shapes_layout_and_two_different_views(folder):
    loader = TwoViewLoader(folder, 5, 16, channels_last=True, dtype=torch.float16)
    batches = run(loader)
    assert len(batches) == len(loader) == 4
    view1, view2, index = batches[0]
    assert view1.shape == (5, 3, 16, 16)
    assert view1.dtype == torch.float16
    assert view1.is_contiguous(memory_format=torch.channels_last)
    assert index.dtype == torch.int64
    assert not torch.equal(view1, view2)
    assert len(set(torch.cat([b[2] for b in batches]).tolist())) == 20


def test_one_view_is_the_first_of_two(folder):
    one = run(OneViewLoader(folder, 5, AUG, seed=3))
    two = run(TwoViewLoader(folder, 5, augmentation=AUG, seed=3))
    assert equal(one, [(view1, index) for view1, _, index in two])


def test_epochs_differ_and_repeat_by_number(folder):
    loader = TwoViewLoader(folder, 5, augmentation=AUG, seed=3)
    first, second = run(loader), run(loader)
    assert loader.epoch == 2
    assert not torch.equal(first[0][2], second[0][2])
    loader.set_epoch(1)
    assert equal(run(loader), second)
    assert equal(run(TwoViewLoader(folder, 5, augmentation=AUG, seed=3, num_threads=1)), first)
    assert not equal(run(TwoViewLoader(folder, 5, augmentation=AUG, seed=4)), first)


def test_views_do_not_depend_on_the_batch_size(folder):
    def by_image(batch_size):
        loader = TwoViewLoader(folder, batch_size, augmentation=AUG, drop_last=False)
        rows = [row for batch in run(loader) for row in zip(*batch, strict=True)]
        return {int(i): (a, b) for a, b, i in rows}

    small, large = by_image(4), by_image(23)
    assert small.keys() == large.keys() == set(range(23))
    assert all(torch.equal(a, b) for i in small for a, b in zip(small[i], large[i], strict=True))


@pytest.mark.parametrize("backend", ["fused", DALI])
@pytest.mark.parametrize("stop", [1, 3])
def test_resume_in_mid_epoch_is_exact(folder, backend, stop):
    def make():
        return TwoViewLoader(folder, 5, augmentation=QUICK, backend=backend)

    whole = run(make()) + run(make())
    loader = make()
    head = []
    for batch in loader:
        head.append(tuple(t.clone() for t in batch))
        if len(head) == stop:
            break
    state = loader.state_dict()
    other = make()
    other.load_state_dict(state)
    tail = run(other)
    assert equal(head + tail, whole[:4])
    assert (other.epoch, other.state_dict()["position"]) == (1, 0)


def test_every_rank_knows_the_rows_of_all(folder):
    loaders = [
        TwoViewLoader(folder, 10, augmentation=AUG, rank=rank, world_size=4) for rank in range(4)
    ]
    for batches in zip(*loaders, strict=True):
        rows = [2 * len(index) for *_, index in batches]
        assert [loader.row_counts() for loader in loaders] == [rows] * 4


def test_ranks_share_the_same_global_batch(folder):
    whole = run(TwoViewLoader(folder, 10, augmentation=AUG))
    for world in (2, 3):
        parts = [
            run(TwoViewLoader(folder, 10, augmentation=AUG, rank=r, world_size=world))
            for r in range(world)
        ]
        for step, batch in enumerate(whole):
            joined = [torch.cat([part[step][k] for part in parts]) for k in range(3)]
            assert all(torch.equal(a, b) for a, b in zip(joined, batch, strict=True))


@pytest.fixture
def no_dali(monkeypatch):
    """A machine without DALI."""

    def forget():
        decode.dali_import_error.cache_clear()
        decode._check_pillow.cache_clear()

    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    forget()
    yield
    monkeypatch.undo()
    forget()


def test_pillow_gives_what_dali_gives(folder, request):
    pytest.importorskip("nvidia.dali", reason="DALI is optional (Linux)")
    dali = run(TwoViewLoader(folder, 5, augmentation=AUG))
    request.getfixturevalue("no_dali")
    with pytest.warns(RuntimeWarning, match="Pillow decodes the image files, since DALI"):
        loader = TwoViewLoader(folder, 5, augmentation=AUG)
    assert "Pillow" in loader.describe()
    assert equal(run(loader), dali)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TwoViewLoader(folder, 5, augmentation=AUG)


@pytest.mark.filterwarnings("ignore:Pillow decodes")
@pytest.mark.parametrize("prefetch", [True, False])
def test_pillow_after_failures_and_early_stops(tmp_path, no_dali, prefetch):
    write_images(tmp_path)
    (tmp_path / "0" / "00.jpeg").write_bytes(b"no image")
    options = {"augmentation": QUICK, "prefetch": prefetch}
    loader = TwoViewLoader(tmp_path, 5, on_error="skip", **options)
    next(iter(loader))
    loader.set_epoch(0)
    epochs = run(loader) + run(loader)
    assert [len(batch[2]) for batch in epochs] == [5] * 8
    assert loader.skipped == {0}
    again = TwoViewLoader(tmp_path, 5, on_error="skip", **options)
    assert equal(run(again) + run(again), epochs)
    with pytest.raises(CorruptImageError, match=r"00\.jpeg"):
        run(TwoViewLoader(tmp_path, 5, **options))


@pytest.mark.filterwarnings("ignore:Pillow decodes")
def test_a_gpu_without_dali_gets_the_views_of_the_cpu(folder, no_dali, monkeypatch):
    monkeypatch.setattr(pipelines, "KEPT_ON_GPU", 0)
    pixels = np.random.default_rng(1).integers(0, 255, (23, 12, 10, 3), dtype=np.uint8)
    for source in (folder, pixels):
        options = {"augmentation": AUG, "channels_last": True, "dtype": torch.float16}
        exact = run(TwoViewLoader(source, 5, **options))
        with FakeCuda() as cuda:
            loader = TwoViewLoader(source, 5, device="cuda", **options)
            found = run(loader)
        assert equal(found, exact)
        assert not cuda.faults
        assert loader.describe().endswith("on the CPU, copied to cuda:0, one batch ahead")


def test_arrays_need_no_decoder(no_dali, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    pixels = np.zeros((4, 12, 10, 3), np.uint8)
    assert len(run(TwoViewLoader(pixels, 2, augmentation=AUG))) == 2
    monkeypatch.setattr(pipelines, "KEPT_ON_GPU", 0)
    with FakeCuda():
        assert len(run(TwoViewLoader(pixels, 2, augmentation=AUG, device="cuda"))) == 2
    with pytest.raises(ImportError, match=r"pip install nvidia-dali-cuda"):
        TwoViewLoader(pixels, 2, augmentation=AUG, backend="dali")


class Random(torch.utils.data.Dataset):
    """A data set that may give another image at every read."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return Image.new("RGB", (12, 10))


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("files", {"size": 224, "device": "cpu"}, pipelines.HostViews),
        ("files", {"size": 224}, pipelines.KeptViews),
        ("pixels", {"size": 32, "backend": "fused"}, pipelines.KeptViews),
        ("data set", {"size": 32}, pipelines.HostViews),
        ("files", {"size": 224, "backend": "dali"}, pipelines.DaliViews),
        ("pixels", {"size": 32, "backend": "dali"}, pipelines.DaliViews),
    ],
)
def test_small_sets_stay_on_the_gpu(folder, kind, options, expected, monkeypatch):
    pytest.importorskip("nvidia.dali", reason="DALI is optional (Linux)")
    source = {"files": folder, "pixels": np.zeros((4, 12, 10, 3), np.uint8), "data set": Random()}
    with FakeCuda():
        loader = TwoViewLoader(source[kind], 4, **{"device": "cuda", **options})
        assert type(loader._pipeline) is expected
        most = 3 * decode.largest_image(loader.source, 64) * len(loader.source)
        if expected is pipelines.KeptViews:
            # A whole batch, or as many views as have the pixels of 128 of 224².
            parts = {(4096, 32): 4096, (4096, 64): 1568, (4096, 224): 128, (4096, 448): 128}
            for (rows, size), part in parts.items():
                aug = [Augmentation(size)]
                given = loader.source, rows, 1, aug, loader._draw, loader.device, None
                made = pipelines.make_pipeline(*given, dtype=torch.float32, channels_last=False)
                assert made.part_size == part
            monkeypatch.setattr(pipelines, "KEPT_ON_GPU", most - 1)
            loader = TwoViewLoader(source[kind], 4, **{"device": "cuda", **options})
            assert type(loader._pipeline) is not expected


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("files", {"size": 224}, pipelines.DaliCrops),
        ("files", {"size": 32}, pipelines.DaliCrops),
        ("files", {"size": 32, "backend": "fused"}, pipelines.DaliCrops),
        ("files", {"size": 224, "backend": "dali"}, pipelines.DaliViews),
        ("files", {"size": 224, "device": "cpu"}, pipelines.HostViews),
        ("files", {"size": 224, "device": "cpu", "backend": "dali"}, pipelines.DaliViews),
        ("pixels", {"size": 224}, pipelines.HostViews),
        ("pixels", {"size": 32, "backend": "fused"}, pipelines.HostViews),
        ("pixels", {"size": 32, "backend": "dali"}, pipelines.DaliViews),
    ],
)
def test_larger_sets_get_their_pipeline(folder, kind, options, expected, monkeypatch):
    pytest.importorskip("nvidia.dali", reason="DALI is optional (Linux)")
    monkeypatch.setattr(pipelines, "KEPT_ON_GPU", 0)
    source = folder if kind == "files" else np.zeros((4, 12, 10, 3), np.uint8)
    with FakeCuda():
        loader = TwoViewLoader(source, 4, **{"device": "cuda", **options})
    assert type(loader._pipeline) is expected


def test_large_images_go_through_dali_in_smaller_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(pipelines, "KEPT_ON_GPU", 0)
    pytest.importorskip("nvidia.dali", reason="DALI is optional (Linux)")
    sizes = [(400, 475), (10, 10), (4000, 3000)]
    for number, (height, width) in enumerate(sizes):
        folder = tmp_path / str(number)
        folder.mkdir()
        for i in range(4):
            Image.new("RGB", (width, height)).save(folder / f"{i}.bmp")
        (folder / "corrupt.png").write_bytes(b"")
    parts = {}
    with FakeCuda():
        for number, size in enumerate(sizes):
            for side in (64, 224):
                loader = TwoViewLoader(tmp_path / str(number), 5, side, device="cuda")
                largest = decode.largest_image(loader.source, 64)
                assert largest == size[0] * size[1]
                assert loader._pipeline.part_size <= 5
                part = pipelines.dali_part(loader._pipeline.reader, side)
                used = pipelines.dali_bytes(side, largest, part)
                assert used <= pipelines.dali_bytes(side)
                parts[size, side] = part
    assert parts[sizes[0], 224] == parts[sizes[1], 224] == 128
    assert parts[sizes[2], 224] == 7
    assert parts[sizes[2], 64] == 2


def test_on_rocm_views_are_made_without_dali(folder, monkeypatch):
    monkeypatch.setattr(pipelines, "KEPT_ON_GPU", 0)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with FakeCuda():
        loader = TwoViewLoader(folder, 4, 64, device="cuda")
        assert type(loader._pipeline) is pipelines.HostViews
        with pytest.raises(ValueError, match=r'backend="dali" needs .* NVIDIA GPU, got .*cuda:0'):
            TwoViewLoader(folder, 4, 64, device="cuda", backend="dali")


def test_dali_and_fused_agree(folder):
    pytest.importorskip("nvidia.dali", reason="DALI is optional (Linux)")
    fused = run(TwoViewLoader(folder, 6, augmentation=AUG, backend="fused"))
    dali = run(TwoViewLoader(folder, 6, augmentation=AUG, backend="dali"))
    for a, b in zip(fused, dali, strict=True):
        assert torch.equal(a[2], b[2])
        for one, two in zip(a[:2], b[:2], strict=True):
            assert (one - two).abs().max() < 2 / 255
            assert (one - two).abs().mean() < 0.3 / 255


def test_arrays_give_the_same_views_as_files(folder, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 255, (8, 12, 10, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    for backend in ("fused", *(["dali"] if find_spec("nvidia.dali") else [])):
        files = run(TwoViewLoader(tmp_path, 4, augmentation=AUG, backend=backend))
        memory = run(TwoViewLoader(pixels, 4, augmentation=AUG, backend=backend))
        assert equal(files, memory)


def test_image_loader_shows_every_image_once_in_order(folder):
    loader = ImageLoader(folder, 10, Augmentation(size=16))
    batches = run(loader)
    assert torch.cat([b[1] for b in batches]).tolist() == list(range(23))
    path = loader.source.paths[4]
    expected = np.asarray(
        Image.open(path).convert("RGB").resize((16, 16), Image.Resampling.NEAREST)
    )
    shown = batches[0][0][4].permute(1, 2, 0).numpy() * 255
    assert np.corrcoef(shown.ravel(), expected.ravel())[0, 1] > 0.5


def corrupt(path, how):
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "half": data[: len(data) // 2], "text": b"hello" * 99}[how])


@pytest.mark.parametrize("backend", ["fused", DALI])
@pytest.mark.parametrize("how", ["empty", "half", "text"])
def test_corrupt_images_raise_or_are_skipped(tmp_path, caplog, backend, how):
    write_images(tmp_path, 12)
    bad = sorted(tmp_path.rglob("*.*"))[7]
    corrupt(bad, how)
    with pytest.raises(CorruptImageError, match=str(bad)):
        run(TwoViewLoader(tmp_path, 4, augmentation=QUICK, backend=backend))
    loader = TwoViewLoader(tmp_path, 4, augmentation=QUICK, backend=backend, on_error="skip")
    with caplog.at_level(logging.WARNING):
        first = run(loader)
    assert loader.skipped == {7}
    assert str(bad) in caplog.text
    assert [len(b[2]) for b in first] == [4, 4, 4]
    assert 7 not in torch.cat([b[2] for b in first])
    # A loader that knows the corrupt image from the start gives the same batches.
    informed = TwoViewLoader(tmp_path, 4, augmentation=QUICK, backend=backend, on_error="skip")
    informed.skipped = {7}
    assert equal(run(informed), first)


def test_damaged_pixels_are_replaced_or_decoded_but_never_crash(tmp_path):
    rng = np.random.default_rng(0)
    write_images(tmp_path, 40)
    for path in sorted(tmp_path.rglob("*.*"))[::2]:
        data = bytearray(path.read_bytes())
        for position in rng.integers(len(data) // 2, len(data) - 2, 3):
            data[position] = rng.integers(256)
        path.write_bytes(bytes(data))
    loader = TwoViewLoader(tmp_path, 8, augmentation=AUG, on_error="skip")
    assert sum(len(b[2]) for b in run(loader)) == 40


def test_a_folder_of_only_corrupt_images_is_an_error(tmp_path):
    write_images(tmp_path, 2)
    for path in tmp_path.rglob("*.*"):
        corrupt(path, "text")
    with pytest.raises(ValueError, match="every image"):
        run(TwoViewLoader(tmp_path, 2, 16, on_error="skip"))


def test_a_file_that_vanished_is_named(tmp_path):
    write_images(tmp_path, 3)
    loader = TwoViewLoader(tmp_path, 3, 16)
    Path(loader.source.paths[1]).unlink()
    with pytest.raises(CorruptImageError, match=str(loader.source.paths[1])):
        run(loader)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 24}, "at most 23, the number of images, got 24"),
        ({"batch_size": 0}, "got 0"),
        ({"rank": 2, "world_size": 2}, "got 2"),
        ({"batch_size": 2, "world_size": 3}, "at least 3, the number of ranks, got 2"),
        ({"on_error": "ignore"}, "ignore"),
        ({"backend": "pil"}, "pil"),
        ({"size": 8}, "contradicts"),
    ],
)
def test_bad_arguments_are_named(folder, options, says):
    with pytest.raises(ValueError, match=says):
        TwoViewLoader(folder, **{"batch_size": 4, "augmentation": AUG, **options})


@pytest.mark.parametrize("backend", ["fused", DALI])
def test_views_have_the_dtype_asked_for(folder, backend):
    def view(dtype):
        loader = TwoViewLoader(folder, 4, augmentation=QUICK, backend=backend, dtype=dtype)
        return next(iter(loader))[0].clone()

    exact = view(torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        rounded = view(dtype)
        assert rounded.dtype == dtype
        assert torch.equal(rounded, exact.to(dtype))
    with pytest.raises(TypeError, match=r"dtype must be .*got torch\.float64"):
        TwoViewLoader(folder, 4, 16, backend=backend, dtype=torch.float64)


@pytest.mark.parametrize("backend", ["fused", DALI])
def test_views_do_not_depend_on_parts_and_threads(folder, backend, monkeypatch):
    def epochs(**options):
        loader = TwoViewLoader(
            folder, 7, augmentation=QUICK, backend=backend, drop_last=False, **options
        )
        return run(loader) + run(loader)

    plain = epochs(prefetch=False)
    assert equal(epochs(prefetch=True), plain)
    monkeypatch.setattr("simclr_fast.data.pipelines.PART", 3)
    assert equal(epochs(prefetch=False), plain)
    assert equal(epochs(prefetch=True), plain)


def test_a_batch_in_use_is_not_overwritten_by_the_thread(folder):
    """And its state counts only what was handed out."""
    loader = TwoViewLoader(folder, 5, augmentation=QUICK, prefetch=True)
    for step, (view1, _, _) in enumerate(loader):
        before = view1.clone()
        time.sleep(0.05)
        assert torch.equal(view1, before)
        assert loader.state_dict()["position"] == step + 1
        if step == 2:
            break
    assert not [t for t in threading.enumerate() if t.name == "next-batch"]


def test_prefetch_skips_corrupt_images_alike(folder, tmp_path):
    write_images(tmp_path)
    (tmp_path / "0" / "00.jpeg").write_bytes(b"no image")

    def epochs(prefetch):
        loader = TwoViewLoader(tmp_path, 5, augmentation=QUICK, on_error="skip", prefetch=prefetch)
        return run(loader) + run(loader)

    assert equal(epochs(True), epochs(False))
    with pytest.raises(CorruptImageError, match=r"00\.jpeg"):
        run(TwoViewLoader(tmp_path, 5, augmentation=QUICK, prefetch=True))


def test_state_of_another_loader_is_refused(folder):
    state = TwoViewLoader(folder, 5, 16, seed=1).state_dict()
    with pytest.raises(ValueError, match="seed=1"):
        TwoViewLoader(folder, 5, 16).load_state_dict(state)


def test_the_crop_is_drawn_for_the_upright_size(tmp_path):
    image = Image.new("RGB", (30, 10))
    exif = image.getexif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    sizes = []
    loader = TwoViewLoader(tmp_path, 1, 16)
    draw = loader._draw
    loader._draw = lambda ids, given: (sizes.append(given.tolist()), draw(ids, given))[1]
    run(loader)
    assert sizes == [[[30, 10]]]


def test_more_views_begin_with_those_of_the_two_view_loader():
    images = np.random.default_rng(0).integers(0, 255, (10, 20, 20, 3), dtype=np.uint8)
    two = TwoViewLoader(images, 4, 16, seed=3)
    four = MultiViewLoader(images, 4, 16, seed=3, n_views=4)
    assert four.row_counts() == [16]
    for (*pair, index), (*views, same_index) in zip(two, copy.deepcopy(four), strict=True):
        assert torch.equal(index, same_index)
        assert len(views) == 4
        assert all(torch.equal(a, b) for a, b in zip(pair, views[:2], strict=True))
        assert not any(torch.equal(views[i], views[j]) for i in range(4) for j in range(i))
    with pytest.raises(ValueError, match="n_views must be"):
        MultiViewLoader(images, 4, 16, n_views=1)


def test_small_crops_are_further_views_of_their_own_size():
    images = np.random.default_rng(0).integers(0, 255, (10, 40, 40, 3), dtype=np.uint8)
    aug = Augmentation(16)
    small = replace(aug, size=8, area=(0.05, 0.14), min_covered=0)
    options = {"seed": 3, "augmentation": aug, "channels_last": True}
    two = TwoViewLoader(images, 4, **options)
    crops = MultiViewLoader(images, 4, n_views=2, small_crops=3, small=small, **options)
    sizes, found = np.full((4, 2), 40), []
    for (*pair, index), (*views, same_index) in zip(two, copy.deepcopy(crops), strict=True):
        assert torch.equal(index, same_index)
        assert all(torch.equal(a, b) for a, b in zip(pair, views[:2], strict=True))
        for number, view in enumerate(views[2:], start=2):
            params = draw_params(small, 3, 0, index.numpy(), number, sizes)
            area = params.box[:, 2] * params.box[:, 3] / 40**2
            assert ((area >= 0.05) & (area <= 0.14)).all()
            found.append(area)
            expected = apply_views(images[index.numpy()], params, small)
            assert torch.equal(view, expected)
            assert view.is_contiguous(memory_format=torch.channels_last)
    assert np.min(found) < 0.07
    assert np.max(found) > 0.12
    assert crops.row_counts() == [20]
    with pytest.raises(ValueError, match="small may differ from the augmentation in size, area"):
        MultiViewLoader(
            images, 4, n_views=2, small_crops=1, small=replace(small, p_gray=0), **options
        )
    with pytest.raises(ValueError, match="small_crops and small go together, got small_crops=1"):
        MultiViewLoader(images, 4, n_views=2, small_crops=1, **options)
