"""One conversion to upright 8-bit RGB: the same image through every door gives the same pixels.

The doors: files decoded by DALI and by Pillow, data sets of PIL images, arrays, and `SimCLRViews`
given PIL images, arrays or tensors.
"""

import io
import struct
import zlib
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from odd_inputs import write
from PIL import Image, ImageOps, features

from simclr_fast.augment.rgb import gray_levels, rgb_array
from simclr_fast.augment.views import SimCLRViews, as_images
from simclr_fast.compat.lightly import SimCLRTransform
from simclr_fast.data import decode, formats
from simclr_fast.data.datasets import open_source
from simclr_fast.data.decode import CorruptImageError, decode_some
from simclr_fast.data.image_check import in_common_format
from simclr_fast.data.loader import TwoViewLoader

HAS_DALI = find_spec("nvidia.dali") is not None
rng = np.random.default_rng(0)
RGB = rng.integers(0, 256, (7, 9, 3), np.uint8)
ALPHA = rng.integers(0, 256, (7, 9), np.uint8)
GRAY = rng.integers(0, 256, (7, 9), np.uint8)
DEEP = rng.integers(0, 65536, (7, 9)).astype(np.uint16)
PICTURE = Image.fromarray(RGB)
RGBA = Image.fromarray(np.dstack([RGB, ALPHA]))
LA = Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(ALPHA)])
PALETTE = PICTURE.convert("P", palette=Image.Palette.ADAPTIVE, colors=13)


def three(gray):
    return np.repeat(np.asarray(gray)[..., None], 3, axis=2)


def by_pillow(picture):
    return np.asarray(picture.convert("RGB"))


def with_info(picture, **info):
    picture = picture.copy()
    picture.info.update(info)
    return picture


def deep(mode):
    order = ">" if mode.endswith("B") else "<"
    return Image.frombytes(mode, (9, 7), DEEP.astype(order + "u2").tobytes())


# Mode → (image, the right pixels).
SCALED = np.rint(DEEP / 257).astype(np.uint8)
FLOAT = Image.fromarray((DEEP / 65535).astype(np.float32))
MODES = {
    "1": (Image.fromarray(GRAY > 99), three((GRAY > 99) * np.uint8(255))),
    "L": (Image.fromarray(GRAY), three(GRAY)),
    "LA": (LA, three(GRAY)),
    "La": (LA.convert("La"), by_pillow(LA.convert("La").convert("LA"))),
    "P": (PALETTE, by_pillow(PALETTE)),
    "P, transparent colour": (with_info(PALETTE, transparency=3), by_pillow(PALETTE)),
    "P, alphas": (with_info(PALETTE, transparency=bytes(range(13))), by_pillow(PALETTE)),
    "PA": (PALETTE.convert("PA"), by_pillow(PALETTE)),
    "RGB": (PICTURE, RGB),
    "RGB, transparent colour": (with_info(PICTURE, transparency=(1, 2, 3)), RGB),
    "RGBA": (RGBA, RGB),
    "RGBa": (RGBA.convert("RGBa"), by_pillow(RGBA.convert("RGBa").convert("RGBA"))),
    "RGBX": (PICTURE.convert("RGBX"), RGB),
    "CMYK": (PICTURE.convert("CMYK"), RGB),
    "YCbCr": (PICTURE.convert("YCbCr"), by_pillow(PICTURE.convert("YCbCr"))),
    "LAB": (PICTURE.convert("LAB"), by_pillow(PICTURE.convert("LAB"))),
    "HSV": (PICTURE.convert("HSV"), by_pillow(PICTURE.convert("HSV"))),
    "I": (Image.fromarray(DEEP.astype(np.int32)), three(SCALED)),
    **{mode: (deep(mode), three(SCALED)) for mode in ("I;16", "I;16L", "I;16B", "I;16N")},
    "F": (FLOAT, three(np.rint(np.asarray(FLOAT, np.float64) * 255).astype(np.uint8))),
}


def test_every_mode_of_pillow_is_here():
    from PIL import ImageMode

    known = set(ImageMode.getmode.__globals__["_modes"]) if hasattr(ImageMode, "_modes") else set()
    assert known <= set(MODES)
    assert {image.mode for image, _ in MODES.values()} == {name.partition(",")[0] for name in MODES}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", MODES)
def test_a_pil_image_of_every_mode_is_the_same_in_data_sets_and_views(name):
    image, expected = MODES[name]
    before = image.copy()
    assert np.array_equal(rgb_array(image), expected)
    assert np.array_equal(decode_some(open_source([image, image]), [1])[0], expected)
    assert np.array_equal(decode_some(open_source([(image, 3)]), [0])[0], expected)
    assert np.array_equal(as_images([image])[0], expected)
    assert np.array_equal(as_images([image], upright=False)[0], expected)
    # The caller's image is left as it was.
    assert image == before
    assert image.info == before.info


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(pixels, color):
    """A PNG of 16 bits. Pillow writes only grayscale ones."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels.reshape(height, -1))
    header = struct.pack(">IIBBBBB", width, height, 16, color, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def tiff(pixels):
    """A TIFF of 16-bit colour, uncompressed, which Pillow does not write."""
    height, width, _ = pixels.shape
    entries = [
        *((256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 122), (259, 3, 1, 1)),
        *((262, 3, 1, 2), (273, 4, 1, 128), (277, 3, 1, 3), (278, 3, 1, height)),
        (279, 4, 1, pixels.size * 2),
    ]
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    head += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    head = head.ljust(122, b"\0") + struct.pack("<3H", 16, 16, 16)
    return head + pixels.astype("<u2").tobytes()


DEEP_RGB = rng.integers(0, 65536, (7, 9, 3)).astype(np.uint16)
DEEP_RGBA = rng.integers(0, 65536, (7, 9, 4)).astype(np.uint16)
DEEP_LA = rng.integers(0, 65536, (7, 9, 2)).astype(np.uint16)
OS2 = struct.pack("<2sIIIIHHHH", b"BM", 26 + 28 * 7, 0, 26, 12, 9, 7, 1, 24) + b"".join(
    row[:, ::-1].tobytes() + b"\0" for row in RGB[::-1]
)
TOP_DOWN = bytearray(saved(PICTURE, "BMP"))
TOP_DOWN[22:26] = struct.pack("<i", -7)
SMOOTH = Image.fromarray(RGB).resize((61, 43), Image.Resampling.BICUBIC)
# Name → (file, the right pixels; None: those of Pillow, as the file is lossy).
FILES = {
    "1.png": (saved(MODES["1"][0], "PNG"), MODES["1"][1]),
    "l.png": (saved(MODES["L"][0], "PNG"), three(GRAY)),
    "la.png": (saved(LA, "PNG"), three(GRAY)),
    "p.png": (saved(PALETTE, "PNG"), by_pillow(PALETTE)),
    "p2.png": (saved(PALETTE.quantize(4), "PNG", bits=2), by_pillow(PALETTE.quantize(4))),
    "p_transparent.png": (saved(PALETTE, "PNG", transparency=3), by_pillow(PALETTE)),
    "p_alphas.png": (saved(PALETTE, "PNG", transparency=bytes(range(13))), by_pillow(PALETTE)),
    "rgb.png": (saved(PICTURE, "PNG"), RGB),
    "rgb_transparent.png": (saved(PICTURE, "PNG", transparency=tuple(RGB[0, 0].tolist())), RGB),
    "rgba.png": (saved(RGBA, "PNG"), RGB),
    "apng.png": (saved(PICTURE, "PNG", save_all=True, append_images=[RGBA]), RGB),
    "i16.png": (saved(MODES["I;16"][0], "PNG"), three(SCALED)),
    "rgb16.png": (png(DEEP_RGB, 2), DEEP_RGB >> 8),
    "rgba16.png": (png(DEEP_RGBA, 6), DEEP_RGBA[..., :3] >> 8),
    "la16.png": (png(DEEP_LA, 4), three(DEEP_LA[..., 0] >> 8)),
    "rgb.bmp": (saved(PICTURE, "BMP"), RGB),
    "p.bmp": (saved(PALETTE, "BMP"), by_pillow(PALETTE)),
    "1.bmp": (saved(MODES["1"][0], "BMP"), MODES["1"][1]),
    "l.bmp": (saved(MODES["L"][0], "BMP"), three(GRAY)),
    "rgba.bmp": (saved(RGBA, "BMP"), RGB),
    "os2.bmp": (OS2, RGB),
    "top_down.bmp": (bytes(TOP_DOWN), RGB[::-1]),
    "rgb.webp": (saved(PICTURE, "WEBP", lossless=True), RGB),
    "rgba.webp": (saved(RGBA, "WEBP", lossless=True, exact=True), RGB),
    "animated.webp": (
        saved(PICTURE, "WEBP", lossless=True, save_all=True, append_images=[PALETTE]),
        RGB,
    ),
    "lossy.webp": (saved(SMOOTH, "WEBP"), None),
    "rgb.tif": (saved(PICTURE, "TIFF"), RGB),
    "rgba.tif": (saved(RGBA, "TIFF", compression="tiff_lzw"), RGB),
    "lab.tif": (saved(MODES["LAB"][0], "TIFF"), MODES["LAB"][1]),
    "cmyk.tif": (saved(MODES["CMYK"][0], "TIFF"), RGB),
    "ycbcr.tif": (saved(MODES["YCbCr"][0], "TIFF"), MODES["YCbCr"][1]),
    "1.tif": (saved(MODES["1"][0], "TIFF"), MODES["1"][1]),
    "i16.tif": (saved(MODES["I;16"][0], "TIFF"), three(SCALED)),
    "i.tif": (saved(MODES["I"][0], "TIFF"), three(SCALED)),
    "f.tif": (saved(FLOAT, "TIFF"), MODES["F"][1]),
    "rgb16.tif": (tiff(DEEP_RGB), DEEP_RGB >> 8),
    "big.tif": (saved(PICTURE, "TIFF", big_tiff=True), RGB),
    "big.TIFF": (saved(LA, "TIFF", big_tiff=True), three(GRAY)),
    "pages.tiff": (saved(PICTURE, "TIFF", save_all=True, append_images=[RGBA]), RGB),
    "p.gif": (saved(PALETTE, "GIF"), by_pillow(PALETTE)),
    "animated.gif": (saved(PALETTE, "GIF", save_all=True, append_images=[PICTURE]),
                     by_pillow(PALETTE)),
    "transparent.gif": (saved(PALETTE, "GIF", transparency=3), by_pillow(PALETTE)),
    "gray.ppm": (saved(MODES["L"][0], "PPM"), three(GRAY)),
    "rgb.pnm": (saved(PICTURE, "PPM"), RGB),
    "1.pbm": (saved(MODES["1"][0], "PPM"), MODES["1"][1]),
    "i16.pgm": (saved(MODES["I;16"][0], "PPM"), three(SCALED)),
    "rgb.jp2": (saved(PICTURE, "JPEG2000"), RGB),
    "rgba.j2k": (saved(RGBA, "JPEG2000", no_jp2=True), RGB),
    "rgb.jpg": (saved(SMOOTH, "JPEG"), None),
    "420.jpg": (saved(PICTURE, "JPEG", subsampling=2), None),
    "progressive.jpeg": (saved(SMOOTH, "JPEG", progressive=True), None),
    "l.jpe": (saved(MODES["L"][0], "JPEG"), None),
    "cmyk.jpg": (saved(MODES["CMYK"][0], "JPEG"), None),
    "unconverted.jpg": (saved(PICTURE, "JPEG", keep_rgb=True), None),
    "rgb.jfif": (saved(SMOOTH, "JPEG"), None),
    "png.jpg": (saved(PICTURE, "PNG"), RGB),
    "mpo.jpg": (saved(SMOOTH, "MPO", save_all=True, append_images=[PICTURE]), None),
}  # fmt: skip
if features.check("avif"):
    FILES["rgb.avif"] = (saved(SMOOTH, "AVIF"), None)
    FILES["rgba.avif"] = (saved(RGBA, "AVIF"), None)


def through_every_door(data, name, folder):
    """The pixels of a file through every door, by the door's name."""
    source = open_source(write(folder, {name: data}) / name)
    reader = decode.FileReader(source, 1)
    part = decode.Part(0, np.array([0]))
    doors = {
        "Pillow": next(iter(decode.PillowDecoder(reader).run([part])))[1][0],
        "data set": decode_some(open_source([Image.open(io.BytesIO(data))]), [0])[0],
        "views": as_images([Image.open(io.BytesIO(data))])[0].numpy(),
        "default": decode_some(source, [0])[0],
    }
    if HAS_DALI:
        runs = decode.DaliDecoder(reader, 1).run([part])
        (doors["DALI"],) = (np.array(image) for _, images in runs for image in images)
        size = in_common_format(np.frombuffer(data, np.uint8))[1]
        assert size == doors["DALI"].shape[:2]
    return doors


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_every_kind_is_the_same_through_every_door(name, tmp_path):
    data, expected = FILES[name]
    if expected is None:
        expected = by_pillow(Image.open(io.BytesIO(data)))
    for door, pixels in through_every_door(data, name, tmp_path).items():
        assert pixels.dtype == np.uint8
        assert np.array_equal(pixels, expected), door


def exif(value, endian="<", kind=3, tag=0x0112, count=1):
    letter = {1: "B", 3: "H", 4: "I"}[kind]
    entry = struct.pack(endian + "HHI" + letter, tag, kind, count, value).ljust(12, b"\0")
    head = (b"II" if endian == "<" else b"MM") + struct.pack(endian + "HI", 42, 8)
    return b"Exif\0\0" + head + struct.pack(endian + "H", 1) + entry + bytes(4)


XMP = b'http://ns.adobe.com/xap/1.0/\0<rdf tiff:Orientation="%d"/>'
NORMAL = np.array(SMOOTH)


def jpeg(*segments):
    data = saved(SMOOTH, "JPEG")
    return (
        data[:2]
        + b"".join(struct.pack(">BBH", 0xFF, 0xE1, len(s) + 2) + s for s in segments)
        + data[2:]
    )


def kinds_of_orientation():
    for value in range(10):
        yield f"{value}", jpeg(exif(value)), value
        options = {"exif": exif(value)[6:]}
        yield f"{value}, PNG", saved(SMOOTH, "PNG", **options), value
        yield f"{value}, WebP", saved(SMOOTH, "WEBP", lossless=True, **options), value
        yield f"{value}, TIFF", saved(SMOOTH, "TIFF", tiffinfo={274: value}), value
    yield "big-endian", jpeg(exif(6, ">")), 6
    yield "a long number", jpeg(exif(8, kind=4)), 8
    # As Pillow reads them.
    yield "a byte", jpeg(exif(3, kind=1)), 1
    yield "two numbers", jpeg(exif(6, count=2)), 6
    yield "XMP", jpeg(XMP % 6), 6
    yield "XMP after EXIF without an orientation", jpeg(exif(6, tag=0x0110), XMP % 8), 8
    yield "XMP after EXIF", jpeg(exif(6), XMP % 8), 6
    yield "EXIF after XMP", jpeg(XMP % 8, exif(5)), 5
    yield "two EXIF segments", jpeg(exif(6), exif(8)), 6
    yield "EXIF cut off", jpeg(exif(6)[:16]), 1
    yield "EXIF of nonsense", jpeg(b"Exif\0\0nonsense, but long enough"), 1
    yield "EXIF without content", jpeg(b"Exif\0\0"), 1
    yield "upright after JFIF", saved(SMOOTH, "JPEG", exif=exif(1)[6:]), 1
    if features.check("avif"):
        yield "AVIF", saved(SMOOTH, "AVIF", exif=exif(6)[6:]), 6


ORIENTATIONS = {name: (data, value) for name, data, value in kinds_of_orientation()}
UPRIGHT = {
    2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1), 8: np.rot90,
}  # fmt: skip


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_images_are_turned_upright_through_every_door(name, tmp_path):
    data, value = ORIENTATIONS[name]
    stored = Image.open(io.BytesIO(data))
    suffix = stored.format.lower().replace("jpeg", "jpg")
    upright = UPRIGHT.get(value, np.asarray)
    expected = by_pillow(stored)
    # Pillow itself turns TIFF files.
    expected = expected if suffix == "tiff" else upright(expected)
    if value in UPRIGHT:
        assert suffix == "avif" or expected.shape == upright(NORMAL).shape
        by_pil = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert np.array_equal(by_pillow(by_pil), expected)
    for door, pixels in through_every_door(data, f"a.{suffix}", tmp_path).items():
        assert np.array_equal(pixels, expected), door


def test_random_exif_is_read_the_same_by_both_decoders(tmp_path):
    random = np.random.default_rng(1)
    for i in range(60):
        segment = bytearray(exif(int(random.integers(2, 9)), "<>"[i % 2]))
        for _ in range(1 + i % 3):
            segment[random.integers(6, len(segment))] = random.choice([0, 1, 2, 3, 6, 8, 42, 255])
        doors = through_every_door(jpeg(bytes(segment)), f"{i}.jpg", tmp_path)
        assert len({pixels.tobytes() for pixels in doors.values()}) == 1, segment


def test_crops_of_a_turned_file_are_those_of_the_upright_image(tmp_path):
    write(tmp_path / "turned", {"a.jpg": jpeg(exif(6))})
    upright = np.ascontiguousarray(np.rot90(by_pillow(Image.open(io.BytesIO(jpeg()))), -1))
    ((a, b, _),) = TwoViewLoader(tmp_path / "turned", 1, 16, num_threads=1)
    expected = SimCLRViews(16)([upright], ids=[0])
    assert torch.equal(a, expected[0])
    assert torch.equal(b, expected[1])
    if HAS_DALI:
        ((a, b, _),) = TwoViewLoader(tmp_path / "turned", 1, 16, num_threads=1, backend="dali")
        assert (a - expected[0]).abs().max() < 1 / 255
        assert (b - expected[1]).abs().max() < 1 / 255


def test_lightlys_transform_does_not_turn_images():
    turned = Image.open(io.BytesIO(ORIENTATIONS["6, PNG"][0]))
    assert np.array_equal(as_images([turned], upright=False)[0], by_pillow(SMOOTH))
    assert len(SimCLRTransform(16)(turned)) == 2


ARRAYS = {
    "uint8": (RGB, RGB),
    "gray": (GRAY, three(GRAY)),
    "gray with a channel": (GRAY[..., None], three(GRAY)),
    "uint16": (DEEP_RGB, np.rint(DEEP_RGB / 257).astype(np.uint8)),
    "gray uint16": (DEEP, three(SCALED)),
    "float32": ((RGB / 255).astype(np.float32), RGB),
    "float64": (RGB / 255, RGB),
    "float16": ((RGB / 255).astype(np.float16), RGB),
    "gray float": (GRAY / 255, three(GRAY)),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_every_dtype(name):
    array, expected = ARRAYS[name]
    assert np.array_equal(decode_some(open_source(np.stack([array, array])), [1])[0], expected)
    assert np.array_equal(decode_some(open_source([array]), [0])[0], expected)
    first = np.moveaxis(array, -1, 0) if array.ndim == 3 else array[None]
    assert np.array_equal(decode_some(open_source(first[None]), [0])[0], expected)
    assert np.array_equal(decode_some(open_source(torch.from_numpy(first)[None]), [0])[0], expected)
    # Floating images keep their precision in SimCLRViews.
    (image,) = as_images([np.ascontiguousarray(first)])
    if image.dtype == torch.float32:
        image = (image.double() * 255).round().to(torch.uint8)
    assert np.array_equal(image, expected)


def floating(*values):
    return Image.fromarray(np.array([values], np.float32))


REFUSED = {
    "F above 1": (floating(0, 255), r"mode F must lie in \[0, 1\], got 0 to 255"),
    "F below 0": (floating(-0.5, 1), r"got -0.5 to 1"),
    "F with NaN": (floating(0, np.nan), "nan"),
    "F with infinity": (floating(0, np.inf), "inf"),
    "I above 65535": (Image.fromarray(np.array([[70000]], np.int32)), r"mode I .*\[0, 65535\]"),
    "I below 0": (Image.fromarray(np.array([[-1]], np.int32)), "got -1"),
    "float array above 1": (np.full((2, 2, 3), 1.5), r"float64 must lie in \[0, 1\], got 1.5"),
    "float array with NaN": (np.full((2, 2, 3), np.nan), "nan"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_out_of_range_are_refused_by_name(name, tmp_path):
    image, says = REFUSED[name]
    with pytest.raises(CorruptImageError, match=rf"(?s)(sample|image) 0.*{says}"):
        decode_some(open_source([image]), [0])
    if isinstance(image, Image.Image):
        with pytest.raises(ValueError, match=says):
            SimCLRViews(8)(image)
        image.save(tmp_path / "a.tif")
        with pytest.raises(CorruptImageError, match=rf"(?s)a\.tif.*{says}"):
            decode_some(open_source(tmp_path), [0])
    else:
        assert np.isnan(image).any() or as_images([image]) is not None


@pytest.mark.parametrize(("low", "high"), [(0, 255), (-2.1, 1), (0, float("nan"))])
def test_floating_tensors_out_of_range_are_refused(low, high):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        SimCLRViews(8)(torch.tensor([low, high], dtype=torch.float64).expand(3, 2, 2))


@pytest.mark.parametrize("dtype", [np.int64, np.complex64, np.uint32])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match=np.dtype(dtype).name):
        gray_levels(np.zeros((2, 2), dtype), "pixels")
    with pytest.raises((TypeError, RuntimeError)):
        SimCLRViews(8)(np.zeros((3, 2, 2), dtype))


CUT = ["rgb.png", "rgb.jpg", "rgb.webp", "rgb.bmp", "rgb.tif", "big.tif", "p.gif", "rgb.pnm",
       "rgb.jp2", "rgb.avif", "os2.bmp", "animated.webp", "i16.png"]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in CUT if name in FILES])
def test_cut_files_are_named_or_skipped(name, tmp_path):
    data = FILES[name][0]
    suffix = name.rpartition(".")[2]
    for i, share in enumerate((0, 0.1, 0.5)):
        (tmp_path / f"{i}.{suffix}").write_bytes(data[: int(share * len(data))])
    write(tmp_path, {"9.png": 9})
    with pytest.raises(CorruptImageError, match=rf"0\.{suffix}: an empty file"):
        decode_some(open_source(tmp_path), [0])
    for i in (1, 2):
        with pytest.raises(CorruptImageError, match=rf"{i}\.{suffix}: "):
            decode_some(open_source(tmp_path), [i])
    loader = TwoViewLoader(tmp_path, 4, 4, on_error="skip", num_threads=1)
    ((_, _, index),) = loader
    assert set(index.tolist()) == {3}
    assert loader.skipped == {0, 1, 2}


def without(monkeypatch, *modules):
    # Pillow keeps what an earlier test taught it.
    for name in ("HEIF", "JXL"):
        monkeypatch.delitem(Image.OPEN, name, raising=False)
    installed = formats.missing
    monkeypatch.setattr(
        formats,
        "missing",
        lambda names: (
            installed(n for n in names if n not in modules) + [n for n in names if n in modules]
        ),
    )
    for function in (formats.suffixes, formats._reads, formats._register):
        function.cache_clear()


@pytest.fixture
def fresh_formats(monkeypatch):
    yield
    monkeypatch.undo()
    for function in (formats.suffixes, formats._reads, formats._register):
        function.cache_clear()


HEIC = bytes(4) + b"ftypheic" + bytes(30)
JXL = b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(30)


@pytest.mark.usefixtures("fresh_formats")
def test_a_missing_reader_is_named(monkeypatch, tmp_path):
    without(monkeypatch, "pillow_heif", "pillow_jxl")
    write(tmp_path, {"a.heic": HEIC, "b.jxl": JXL, "c.png": 1})
    with pytest.warns(UserWarning, match=r"1 \.heic \(pip install 'pillow-heif'\), 1 \.jxl \(pip"):
        source = open_source(tmp_path)
    assert source.account.left_out == {".heic": 1, ".jxl": 1}
    with pytest.raises(ValueError, match=r"got \.heic \(pip install 'pillow-heif'\)"):
        open_source(tmp_path / "a.heic")
    # Under another suffix.
    write(tmp_path, {"c.jpg": HEIC, "d.png": JXL})
    for name, says in (
        ("c.jpg", "a HEIC file, which needs: pip install 'pillow-heif'"),
        ("d.png", "a JPEG XL file, which needs"),
    ):
        with pytest.raises(CorruptImageError, match=says):
            decode_some(open_source(tmp_path / name), [0])


@pytest.mark.parametrize("kind", ["pillow_heif", "pillow_jxl"])
def test_files_of_an_optional_reader(kind, tmp_path):
    module = pytest.importorskip(kind)
    formats._register()
    suffix = {"pillow_heif": "heic", "pillow_jxl": "jxl"}[kind]
    if kind == "pillow_heif":
        module.register_heif_opener()
        data = saved(SMOOTH.resize((64, 48)), "HEIF", quality=90)
    else:
        data = saved(SMOOTH, "JXL", lossless=True)
    doors = through_every_door(data, f"a.{suffix}", tmp_path)
    expected = by_pillow(Image.open(io.BytesIO(data)))
    assert all(np.array_equal(pixels, expected) for pixels in doors.values())
    if kind == "pillow_jxl":
        assert np.array_equal(expected, NORMAL)


@pytest.mark.skipif(not HAS_DALI, reason="compares DALI with Pillow")
def test_without_dali_the_views_of_files_are_the_same(monkeypatch, tmp_path):
    write(tmp_path, {name: data for name, (data, _) in FILES.items()})

    def views():
        ((a, b, _),) = TwoViewLoader(tmp_path, len(FILES), 8, num_threads=1)
        return a.clone(), b.clone()

    with_dali = views()
    monkeypatch.setattr(decode, "dali_import_error", lambda: ImportError("not for this system"))
    monkeypatch.setattr(decode, "_check_pillow", lambda: None)
    for a, b in zip(views(), with_dali, strict=True):
        assert torch.equal(a, b)
