"""What DALI's decoder makes of unusual files, beside Pillow, on a photograph."""

import io
import threading
import time
import warnings
from importlib.util import find_spec
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from simclr_fast.augment.params import Augmentation
from simclr_fast.augment.views import SimCLRViews
from simclr_fast.data import decode
from simclr_fast.data.datasets import open_source
from simclr_fast.data.decode import decode_some
from simclr_fast.data.loader import TwoViewLoader
from simclr_fast.data.sources import FileSource

HAS_DALI = find_spec("nvidia.dali") is not None
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="DALI is optional (Linux)")
CHINA = Image.fromarray(load_sample_image("china.jpg"))
GRAY = np.asarray(CHINA.convert("L"))
TRANSPARENT = CHINA.convert("RGBA")
TRANSPARENT.putalpha(Image.fromarray(255 - GRAY))
# Values that are no multiples of 257: the low byte counts.
SIXTEEN = Image.fromarray(GRAY.astype(np.uint16) * 251)
ROTATED = Image.Exif()
ROTATED[0x0112] = 6
FILES = {
    "gray.jpg": (Image.fromarray(GRAY), {}, None),
    "gray.png": (Image.fromarray(GRAY), {}, GRAY),
    "cmyk.jpg": (CHINA.convert("CMYK"), {"quality": 95}, None),
    "rgba.png": (TRANSPARENT, {}, CHINA),
    "rgba.webp": (TRANSPARENT, {"lossless": True, "exact": True}, CHINA),
    "palette.png": (CHINA.convert("P"), {}, CHINA.convert("P").convert("RGB")),
    "sixteen.png": (SIXTEEN, {}, np.rint(GRAY * (251 / 257))),
    "rgb.tif": (CHINA, {"compression": "tiff_lzw"}, CHINA),
    "pages.tiff": (CHINA, {"save_all": True, "append_images": [TRANSPARENT]}, CHINA),
    "cmyk.tif": (CHINA.convert("CMYK"), {}, None),
    "rgba.tiff": (TRANSPARENT, {}, CHINA),
    "sixteen.tif": (SIXTEEN, {}, np.rint(GRAY * (251 / 257))),
    "rgb.ppm": (CHINA, {}, CHINA),
    "sixteen.pgm": (SIXTEEN, {}, np.rint(GRAY * (251 / 257))),
    "gif.jpg": (CHINA.convert("P"), {"format": "GIF"}, CHINA.convert("P").convert("RGB")),
    "progressive.jpg": (CHINA, {"progressive": True}, None),
    "exif.jpg": (CHINA, {"exif": ROTATED}, None),
}


def decoded_by(decoder, source):
    reader = decode.FileReader(source, 2)
    decoder = decoder(reader, 1) if decoder is decode.DaliDecoder else decoder(reader)
    ((_, (image,)),) = ((part, [i.copy() for i in x]) for part, x in decoder.run([PART]))
    return image


PART = decode.Part(0, np.array([0]))
DECODERS = [
    pytest.param(decode.DaliDecoder, marks=needs_dali, id="dali"),
    pytest.param(decode.PillowDecoder, id="pillow"),
]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", FILES)
def test_unusual_files_decode_as_pillow_reads_them(name, decoder, tmp_path):
    image, options, expected = FILES[name]
    image.save(tmp_path / name, **options)
    decoded = decoded_by(decoder, open_source(tmp_path))
    assert decoded.dtype == np.uint8
    if expected is None:
        expected = ImageOps.exif_transpose(Image.open(tmp_path / name)).convert("RGB")
    expected = np.asarray(expected).astype(int)
    expected = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, axis=2)
    assert np.array_equal(decoded, expected)


# Of each subsampling its name for Pillow, and the luma's factors that are written into the file.
# Where these are not Pillow's, there are as many blocks: the file is sound, with another picture.
SAMPLINGS = {
    "444": ("4:4:4", 0x11),
    "422": ("4:2:2", 0x21),
    "440": ("4:2:2", 0x12),
    "420": ("4:2:0", 0x22),
    "411": ("4:2:0", 0x41),
    "1x4": ("4:2:0", 0x14),
}


def save_all_kinds(folder, rng):
    """JPEGs of every subsampling, also progressive or to be turned, and FILES cut small."""
    for name, (subsampling, factors) in SAMPLINGS.items():
        for i in range(40):
            # First those that are whole blocks for any factors.
            size = 64 * rng.integers(1, 3, 2) if i < 20 else rng.integers(1, 90, 2)
            if i == 20 and name in ("440", "411", "1x4"):
                break
            buffer = io.BytesIO()
            options = {"quality": 90, "progressive": i % 2 == 1, "subsampling": subsampling}
            CHINA.resize(size.tolist()).save(buffer, "JPEG", **options)
            data = bytearray(buffer.getvalue())
            data[data.find(b"\xff\xc2" if i % 2 else b"\xff\xc0") + 11] = factors
            (folder / f"{name}-{i}.jpg").write_bytes(data)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        CHINA.resize((70, 50)).save(folder / f"exif-{orientation}.jpg", exif=exif)
    for name, (image, options, _) in FILES.items():
        more = {"append_images": [TRANSPARENT]} if "append_images" in options else {}
        image.crop((20, 30, 121, 91)).save(folder / name, **options | more)


@needs_dali
def test_regions_equal_those_of_whole_images(tmp_path):
    rng = np.random.default_rng(0)
    save_all_kinds(tmp_path, rng)

    def boxes(ids, sizes):
        extents = np.ceil(sizes * rng.uniform(0.01, 1, (len(ids), 2)) ** 2).astype(int)
        corners = np.floor(rng.random((len(ids), 2)) * (sizes - extents + 1)).astype(int)
        # Some at the edges, where the chroma has no neighbours to be interpolated with.
        corners *= rng.random(corners.shape) > 0.3
        drawn.append(np.concatenate([corners, extents], axis=1))
        return drawn[-1]

    source, drawn, cut = open_source(tmp_path), [], 0
    part = decode.Part(0, np.arange(len(source)))
    reader = decode.FileReader(source, 2)
    runs = decode.DaliDecoder(reader, len(source)).run([part])
    (whole,) = ([image.copy() for image in images] for _, images in runs)
    regions = decode.DaliDecoder(reader, len(source), boxes)
    for _, found in regions.run([part] * 8):
        for i, (y, x, h, w) in enumerate(drawn.pop(0)):
            y0, x0 = 0, 0
            if isinstance(found[i], decode.Cut):
                pixels, (y0, x0), size = found[i]
                assert size == whole[i].shape[:2]
                assert len(pixels) == h
                cut += 1
            else:
                pixels = found[i]
            same = pixels[y - y0 : y - y0 + h, x - x0 : x - x0 + w]
            assert np.array_equal(same, whole[i][y : y + h, x : x + w]), source.name(i)
    assert cut > 7 * len(source)


@needs_dali
@pytest.mark.parametrize("spec", ["simclr", "torchvision"])
def test_views_from_regions_equal_those_of_whole_images(spec, tmp_path, monkeypatch):
    """Whole images are decoded until it is known that they are too large to be kept."""
    for i in range(12):
        CHINA.crop((0, 0, 300 - i, 200 + i)).save(tmp_path / f"{i:02d}.jpg")

    def epoch():
        """The views of an epoch, and of each batch whether the images are cut."""
        loader = TwoViewLoader(tmp_path, 2, augmentation=Augmentation(32, spec=spec))
        write, cut = loader._pipeline.write, []

        def noted(part, outputs, views):
            cut.append([isinstance(image, decode.Cut) for image in outputs])
            write(part, outputs, views)

        loader._pipeline.write = noted
        return [view.clone() for *views, _ in loader for view in views], cut

    whole, cut = epoch()
    assert not np.any(cut)
    monkeypatch.setattr(decode, "_KEPT_BYTES", 0)
    views, cut = epoch()
    assert not np.any(cut[0])
    assert np.all(cut[-2:])
    assert all(torch.equal(a, b) for a, b in zip(views, whole, strict=True))


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_floating_tiff_is_named(decoder, tmp_path):
    Image.fromarray(GRAY.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(decode.CorruptImageError, match=r"float\.tif: pixels of mode F must lie in"):
        decoded_by(decoder, open_source(tmp_path))


def test_decode_some_gives_the_pixels_of_every_source(tmp_path):
    pixels = np.stack([np.asarray(CHINA.resize((20, 10)))] * 2)
    Image.fromarray(pixels[0]).save(tmp_path / "a.png")
    (one,) = decode_some(open_source(tmp_path), [0])
    assert np.array_equal(one, pixels[0])
    assert np.array_equal(np.stack(decode_some(open_source(pixels), [1, 0])), pixels)


@pytest.mark.parametrize("backend", ["fused", pytest.param("dali", marks=needs_dali)])
def test_files_of_8_to_4000_pixels_equal_their_arrays(backend, tmp_path):
    """Files of very different sizes in one batch, beside the same pixels given as arrays."""
    for i, size in enumerate([(8, 8), (4000, 3000), (9, 300), (640, 427), (300, 8)]):
        CHINA.resize(size).save(tmp_path / f"{i}.jpg", quality=90)
    aug = Augmentation(64)
    loader = TwoViewLoader(tmp_path, 5, augmentation=aug, backend=backend, shuffle=False)
    ((view1, view2, index),) = loader
    pixels = [
        np.array(Image.open(io.BytesIO((tmp_path / f"{i}.jpg").read_bytes()))) for i in range(5)
    ]
    expected = SimCLRViews(64)(pixels, ids=index.numpy())
    for view, exact in zip((view1, view2), expected, strict=True):
        assert torch.isfinite(view).all()
        assert ((view - exact).abs() * 255).max() < (1 if backend == "dali" else 1e-3)


@pytest.mark.parametrize("kept", [0, 23 * 9 * 300 * 3 - 1, 1 << 30])
def test_small_sets_are_decoded_once(tmp_path, monkeypatch, kept):
    """Also in batches of kept and new images, after interrupted epochs, and with deleted files."""

    def batches(loader, stop=None):
        return [(a.clone(), b.clone(), i) for a, b, i in islice(loader, stop)]

    for i in range(23):
        CHINA.resize((9 + i, 300 - i)).save(tmp_path / f"{i}.jpg")
    options = {"augmentation": Augmentation(16), "batch_size": 6, "num_threads": 1}
    monkeypatch.setattr(decode, "_KEPT_BYTES", 0)
    plain = TwoViewLoader(tmp_path, **options)
    expected = [batches(plain) for _ in range(6)]
    monkeypatch.setattr(decode, "_KEPT_BYTES", kept)
    loader = TwoViewLoader(tmp_path, **options)
    loader.set_epoch(0)
    batches(loader, 1)
    loader.set_epoch(0)
    for epoch, wanted in enumerate(expected):
        if epoch == 5 and kept == 1 << 30:
            for file in tmp_path.iterdir():
                file.unlink()
        found = batches(loader)
        assert len(found) == 3
        for batch, other in zip(found, wanted, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True)), epoch


class SlowFiles(FileSource):
    """Takes 10 ms to read a file, as a network file system does, and counts the reads at once."""

    def __init__(self, paths):
        super().__init__(paths)
        self.lock, self.now, self.most = threading.Lock(), 0, 0

    def read(self, i):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.01)
        with self.lock:
            self.now -= 1
        return super().read(i)


@pytest.mark.parametrize("dali", [pytest.param(True, marks=needs_dali), False])
def test_slow_files_are_read_ahead_in_the_same_order(tmp_path, monkeypatch, dali):
    if not dali:
        monkeypatch.setattr(decode, "dali_import_error", lambda: ImportError("no DALI"))
        decode._check_pillow.cache_clear()
    monkeypatch.setattr(decode, "_KEPT_BYTES", 0)
    for i in range(300):
        Image.new("RGB", (8, 8), (i % 256, i // 256, 0)).save(tmp_path / f"{i:03}.png")
    (tmp_path / "200.png").write_bytes(b"no image")
    paths = sorted(tmp_path.iterdir())
    options = {"augmentation": Augmentation(8), "batch_size": 20, "num_threads": 2}
    options |= {"on_error": "skip"}
    slow = SlowFiles(paths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        plain, loader = (TwoViewLoader(files, **options) for files in (FileSource(paths), slow))
        expected, found = (
            [(a.clone(), b.clone(), i) for a, b, i in batches] for batches in (plain, loader)
        )
    assert loader.skipped == {200}
    assert 2 < slow.most <= decode._READERS + 2
    assert len(found) == len(expected) == 15
    for batch, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))


@pytest.mark.parametrize(("images", "size", "most"), [(64, 1 << 20, 80), (256, 1, 20)])
def test_reading_ahead_takes_a_bounded_memory(tmp_path, monkeypatch, images, size, most):
    monkeypatch.setattr(decode, "_READ_IMAGES", images)
    monkeypatch.setattr(decode, "_READ_BYTES", size)
    (tmp_path / "a").write_bytes(bytes(100))
    ahead = decode.ReadAhead(SlowFiles([tmp_path / "a"] * 400))
    ahead.read(0)
    numbers = np.arange(400).reshape(20, 20)
    handed_out, reads = [], []
    for part in ahead.parts(decode.Part(step, ids) for step, ids in enumerate(numbers)):
        handed_out.append(part.step)
        reads.append(len(ahead._coming))
        assert all(len(ahead.read(i)) == 100 for i in part.ids.tolist())
        if part.step == 15:
            break
    assert handed_out == list(range(16))
    assert max(reads) == most
    # The next run drops what the last one left.
    assert len(list(ahead.parts([]))) == 0
    assert not ahead._coming


def test_fast_files_are_not_read_ahead(tmp_path):
    CHINA.resize((8, 8)).save(tmp_path / "a.png")
    ahead = decode.ReadAhead(FileSource([tmp_path / "a.png"]))
    parts = [PART] * 40
    handed_out = []
    for part in ahead.parts(iter(parts)):
        ahead.read(0)
        handed_out.append(part)
        assert not ahead._coming
    assert handed_out == parts
    assert ahead._pool is None
