"""Images that are not RGB: 1, 2, 4 … 16 channels as arrays and files, from views to export."""

import gc
import io
import re
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from odd_inputs import example, write, write_tar
from PIL import Image

from simclr_fast import TwoViewLoader, load_weights, reference
from simclr_fast.augment.channels import as_channels, shown
from simclr_fast.augment.params import Augmentation, draw_views
from simclr_fast.augment.preview import COLUMNS, contact_sheet
from simclr_fast.augment.views import SimCLRViews, apply_views
from simclr_fast.data.datasets import open_source
from simclr_fast.data.decode import CorruptImageError, decode_some
from simclr_fast.data.image_check import channel_pixels
from simclr_fast.data.loader import ImageLoader
from simclr_fast.models.encoders import build_encoder
from simclr_fast.models.export import export_encoder
from simclr_fast.models.weights import about_encoder
from simclr_fast.utils.checkpoint import save_encoder

COLOURLESS = {"saturation": 0, "hue": 0, "p_gray": 0}
rng = np.random.default_rng(0)


def images(channels, dtype=np.uint8, sizes=((23, 17), (9, 40), (64, 64), (1, 5))):
    arrays = [rng.random((*size, channels)) for size in sizes]
    if dtype == np.float32:
        return [array.astype(dtype) for array in arrays]
    return [np.rint(array * np.iinfo(dtype).max).astype(dtype) for array in arrays]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("spec", ["simclr", "torchvision"])
@pytest.mark.parametrize("channels", [1, 2, 4, 5, 16])
def test_views_equal_the_float64_reference_per_channel(channels, spec, dtype):
    """Each channel of a view is the view of that channel, made by the RGB steps that it has."""
    mean = tuple(0.1 * (c + 1) for c in range(channels))
    aug = Augmentation(20, spec, channels=channels, p_blur=0.7, mean=mean, std=mean, **COLOURLESS)
    pixels = images(channels, dtype)
    sizes = np.array([p.shape[:2] for p in pixels])
    for params in draw_views(aug, 3, 0, np.arange(len(pixels)), sizes):
        views = apply_views(pixels, params, aug)
        assert views.shape == (len(pixels), channels, 20, 20)
        for i, image in enumerate(pixels):
            for c in range(channels):
                # By hand: the reference's resize and blur, and the steps one after the other.
                wanted = one_channel(image[..., c], params, i, aug)
                shift, scale = mean[c], mean[c]
                error = views[i, c].double() - (wanted - shift) / scale
                assert error.abs().max() < 2e-6 / scale


def one_channel(plane, params, i, aug):
    y, x, h, w = params.box[i]
    top = 255 if plane.dtype == np.uint8 else 1
    crop = torch.from_numpy(plane[y : y + h, x : x + w].astype(np.float64) / top)
    clip = aug.spec == "torchvision"
    rows, columns = (reference.resize_matrix(n, aug.size, clip, False, crop) for n in (h, w))
    out = rows @ crop @ columns.T
    out = out.clamp(0, 1) if clip else out
    out = out.flip(-1) if params.flip[i] else out
    if params.jitter[i]:
        for step in params.order[i]:
            factor = float(params.factors[i, step])
            if step == 0:
                out = (out * factor).clamp(0, 1)
            if step == 1:
                out = (out.mean() + (out - out.mean()) * factor).clamp(0, 1)
    return reference.gaussian_blur(
        out.clamp(0, 1)[None], float(params.sigma[i]), reflect=clip
    ).clamp(0, 1)[0]


def test_rgb_with_the_colour_steps_off_keeps_its_numbers():
    """channels=3 with saturation=0 draws factors of exactly 1 and hues of 0."""
    aug = Augmentation(16, **COLOURLESS)
    (params, _) = draw_views(aug, 0, 0, np.arange(50), np.full((50, 2), 30))
    assert (params.factors[:, 2] == 1).all()
    assert (params.factors[:, 3] == 0).all()
    (plain, _) = draw_views(Augmentation(16, p_gray=0), 0, 0, np.arange(50), np.full((50, 2), 30))
    assert np.array_equal(params.factors[:, :2], plain.factors[:, :2])
    assert np.array_equal(params.box, plain.box)


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, "saturation=0, hue=0, p_gray=0"),
        ({"p_gray": 0}, "saturation=0, hue=0"),
        ({"hue": 0, "saturation": 0}, "p_gray=0"),
        ({"hue": 0, "p_gray": 0}, "saturation=0"),
        ({"s": 0}, "p_gray=0"),
    ],
)
def test_steps_that_need_rgb_are_refused_by_name(options, needed):
    with pytest.raises(ValueError, match=rf"channels=4 need {needed}, because.*--augmentation\."):
        Augmentation(channels=4, **options)


@pytest.mark.parametrize("options", [COLOURLESS, {"p_jitter": 0, "p_gray": 0}])
def test_without_these_steps_any_number_of_channels_is_allowed(options):
    assert Augmentation(channels=4, **options).normalization == ([1.0] * 4, [0.0] * 4)
    with pytest.raises(ValueError, match="mean must be 4 finite numbers"):
        Augmentation(channels=4, mean=(0.5,) * 3, std=(0.5,) * 3, **options)
    with pytest.raises(ValueError, match="channels must be"):
        Augmentation(channels=0, **options)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_simclr_views_take_every_layout(channels):
    views = SimCLRViews(16, channels=channels, **COLOURLESS)
    last = np.stack(images(channels, sizes=((20, 30),) * 3))
    first = torch.from_numpy(last).movedim(-1, 1)
    expected = views(first, ids=range(3))
    for same in (first.permute(0, 2, 3, 1), last, list(first), list(last), first / 255):
        for view, wanted in zip(views(same, ids=range(3)), expected, strict=True):
            torch.testing.assert_close(view, wanted, atol=1e-6, rtol=0)
    sixteen = (first.int() * 257).to(torch.uint16)
    torch.testing.assert_close(views(sixteen, ids=range(3))[0], expected[0], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=rf"\[{channels}, H, W\]"):
        views(torch.zeros(2, 7, 8, 8))
    pictures = {1: "L", 2: "LA", 4: "RGBA"}
    picture = Image.fromarray(last[0].squeeze(), pictures[channels])
    torch.testing.assert_close(views([picture], ids=[0])[0], expected[0][:1])
    with pytest.raises(ValueError, match=f"must have {channels} channels, got mode RGB with 3"):
        views([Image.new("RGB", (5, 5))])


def files_of(pixels):
    """The same image [H, W, C] as files of every kind that holds this many channels."""

    def saved(picture, kind, **options):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        return buffer.getvalue()

    channels = pixels.shape[-1]
    files = {
        "last.npy": npy(pixels),
        "first.npy": npy(np.ascontiguousarray(pixels.transpose(2, 0, 1))),
    }
    if channels > 1:
        first, *others = [Image.fromarray(pixels[..., c]) for c in range(channels)]
        files["pages.tif"] = saved(first, "TIFF", save_all=True, append_images=others)
    mode = {1: "L", 2: "LA", 4: "RGBA"}.get(channels)
    if mode:
        picture = Image.fromarray(pixels.squeeze(), mode)
        files |= {
            f"a.{kind}": saved(picture, kind.upper().replace("TIF", "TIFF"))
            for kind in ("png", "tif")
        }
    return files


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_files_of_every_kind_give_the_same_channels(channels, tmp_path):
    (pixels,) = images(channels, sizes=((23, 17),))
    for name, data in files_of(pixels).items():
        write(tmp_path, {f"{name}/{name}": data})
        source = open_source(tmp_path / name, channels=channels)
        assert len(source) == 1
        assert np.array_equal(decode_some(source, [0])[0], pixels), name


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_sixteen_bits_are_kept(channels, tmp_path):
    (pixels,) = images(channels, np.uint16, sizes=((9, 8),))
    expected = (pixels / 65535).astype(np.float32)
    np.save(tmp_path / "a.npy", pixels)
    if channels == 1:
        Image.fromarray(pixels[..., 0]).save(tmp_path / "b.png")
    for i in range(1 + (channels == 1)):
        assert np.array_equal(
            decode_some(open_source(tmp_path, channels=channels), [i])[0], expected
        )
    assert np.array_equal(
        decode_some(open_source(pixels[None], channels=channels), [0])[0], expected
    )


def npy(array, version=None):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version)
    return buffer.getvalue()


def test_arrays_are_read_as_numpy_reads_them():
    (pixels,) = images(2, sizes=((9, 8),))
    floats = (pixels / 255).astype(">f4")
    for array in (pixels, np.asfortranarray(pixels), floats, pixels > 99, pixels[:, :, 0]):
        for version in ((1, 0), (2, 0)):
            channels = array.shape[2] if array.ndim == 3 else 1
            found = channel_pixels(np.frombuffer(npy(array, version), np.uint8), channels)
            assert np.array_equal(found, as_channels(array, channels))
    whole = npy(pixels)
    empty, objects = npy(pixels[:0]), npy(np.array([[[1, None]]]))
    for bad in (whole[:-1], whole[:40], whole.replace(b"'|u1'", b"'|q9'"), objects):
        with pytest.raises(ValueError, match=r".") as numpys:
            np.load(io.BytesIO(bad))
        with pytest.raises(ValueError, match=re.escape(str(numpys.value))):
            channel_pixels(np.frombuffer(bad, np.uint8), 2)
    assert channel_pixels(np.frombuffer(empty, np.uint8), 2).shape == (0, 8, 2)


def test_threads_read_arrays_while_garbage_is_collected():
    """In Python 3.11 ast, by which np.load reads a header, says that some of them are damaged."""

    class Garbage:
        def __init__(self):
            self.me = self

        def __del__(self):
            sum(range(50))

    data, failed = np.frombuffer(npy(images(5, sizes=((12, 10),))[0]), np.uint8), []

    def read():
        for _ in range(1500):
            Garbage()
            try:
                channel_pixels(data, 5)
            except ValueError as error:
                failed.append(error)

    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    threads = [threading.Thread(target=read) for _ in range(4)]
    sys.setswitchinterval(1e-6)
    gc.set_threshold(20)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*thresholds)
    assert not failed


def test_channels_in_tars_and_tfrecords(tmp_path):
    (pixels,) = images(4, sizes=((9, 8),))
    data = files_of(pixels)["last.npy"]
    write_tar(tmp_path / "x.tar", [("0.npy", data), ("0.cls", "3")])
    write(tmp_path, {"x.tfrecord": example({"image/encoded": data, "image/class/label": 3})})
    for name, options in (("x.tar", {"image_key": "npy"}), ("x.tfrecord", {})):
        source = open_source(tmp_path / name, channels=4, **options)
        assert np.array_equal(decode_some(source, [0])[0], pixels)
        assert source.labels.tolist() == [3]


def test_a_tiff_of_many_samples_per_pixel(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    (pixels,) = images(6, np.uint16, sizes=((12, 10),))
    tifffile.imwrite(tmp_path / "last.tif", pixels, photometric="minisblack", planarconfig="contig")
    tifffile.imwrite(tmp_path / "first.tif", pixels.transpose(2, 0, 1), photometric="minisblack")
    found = decode_some(open_source(tmp_path, channels=6), [0, 1])
    assert all(np.array_equal(image, (pixels / 65535).astype(np.float32)) for image in found)


def test_images_of_other_channels_and_values_are_named(tmp_path):
    write(tmp_path, {"a.png": 3})
    np.save(tmp_path / "b.npy", np.zeros((8, 8, 5)))
    np.save(tmp_path / "c.npy", np.full((8, 8, 4), 1.5))
    np.save(tmp_path / "d.npy", np.zeros((8, 8, 4), complex))
    np.save(tmp_path / "e.npy", np.array([{}]), allow_pickle=True)
    write(tmp_path, {"f.npy": b"\x93NUMPY, but cut off"})
    source = open_source(tmp_path, channels=4)
    for i, says in enumerate(
        (
            "a.png: an image must have 4 channels, got mode RGB with 3",
            r"b.npy: an image must be \[H, W, 4\] or \[4, H, W\] for channels=4, got \[8, 8, 5\]",
            r"c.npy: pixels of float64 must lie in \[0, 1\], got 1.5",
            "d.npy: pixels must be uint8, uint16 or floating",
            "e.npy: ",
            "f.npy: ",
        )
    ):
        with pytest.raises(CorruptImageError, match=says):
            decode_some(source, [i])
    with pytest.raises(ValueError, match=r"1 or 3 channels.*channels=C"):
        open_source(np.zeros((2, 8, 8, 4), np.uint8))
    # Without channels, a .npy file is no image.
    assert open_source(tmp_path).account.left_out == {".npy": 5}


def test_the_loader_makes_views_of_mixed_files(tmp_path):
    aug = Augmentation(16, channels=4, **COLOURLESS)
    arrays = [*images(4), *images(4, np.uint16)]
    for i, array in enumerate(arrays):
        np.save(tmp_path / f"{i}.npy", array)
    loader = TwoViewLoader(tmp_path, 8, augmentation=aug, shuffle=False, num_threads=2)
    assert "files of 4 channels decoded on the CPU in 2 threads" in loader.describe()
    assert "views by the fused op on the CPU" in loader.describe()
    floats = [as_channels(a, 4) / (1 if a.dtype == np.uint16 else np.float32(255)) for a in arrays]
    sizes = np.array([array.shape[:2] for array in arrays])
    # The second pass takes kept images.
    for epoch in range(2):
        ((one, two, index),) = loader
        params = draw_views(aug, 0, epoch, np.arange(8), sizes)
        for view, p in zip((one, two), params, strict=True):
            torch.testing.assert_close(view, apply_views(floats, p, aug), atol=2e-6, rtol=0)
    same = TwoViewLoader(arrays, 8, augmentation=aug, shuffle=False)
    ((again, _, index),) = same
    same.set_epoch(1)
    ((again, _, index),) = same
    assert torch.equal(again, one)
    assert index.tolist() == list(range(8))
    with pytest.raises(ValueError, match="RGB images, got channels=4"):
        TwoViewLoader(tmp_path, 8, augmentation=aug, backend="dali")
    (whole, _), *_ = ImageLoader(tmp_path, 8, aug)
    assert whole.shape == (8, 4, 16, 16)


@pytest.mark.parametrize("channels", [1, 2, 4, 16])
def test_the_preview_shows_three_of_the_channels(channels):
    aug = Augmentation(16, channels=channels, **COLOURLESS)
    tiles, lines = contact_sheet(images(channels), aug)
    assert tiles.shape == (4, len(COLUMNS), 16, 16, 3)
    assert len(lines) == 8
    # Saturation, hue and gray leave the image alone.
    for step in ("saturation", "hue", "gray"):
        assert np.array_equal(tiles[:, COLUMNS.index(step)], tiles[:, 0])
    pixels = images(channels)[0]
    picture = shown(pixels)
    for c in range(3):
        wanted = pixels[..., min(c, channels - 1)] if channels != 2 or c < 2 else 0
        assert (picture[..., c] == wanted).all()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "timm:resnet10t"])
@pytest.mark.parametrize("channels", [1, 4])
def test_encoders_have_a_stem_of_that_many_channels(name, channels):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    encoder, dim = build_encoder(name, channels=channels)
    assert encoder.eval()(torch.zeros(2, channels, 64, 64)).shape == (2, dim)
    first = next(m for m in encoder.modules() if isinstance(m, torch.nn.Conv2d))
    assert first.in_channels == channels
    assert sum(p.numel() for p in encoder.parameters()) == (
        sum(p.numel() for p in build_encoder(name)[0].parameters())
        + (channels - 3) * first.weight[:, 0].numel()
    )


def test_a_model_without_a_convolution_of_rgb_is_named():
    with pytest.raises(ValueError, match="channels must be"):
        build_encoder("resnet18", channels=0)


def test_weights_and_export_carry_the_number(tmp_path):
    aug = Augmentation(32, channels=5, **COLOURLESS)
    encoder, _ = build_encoder("resnet10", width=0.25, stem="cifar", channels=5)
    save_encoder(tmp_path / "e.safetensors", encoder, about_encoder("resnet10", 0.25, "cifar", aug))
    weights = load_weights(tmp_path / "e.safetensors")
    assert weights.augmentation == aug
    x = torch.randn(2, 5, 32, 32)
    assert torch.equal(weights.encoder(x), encoder.eval()(x))
    assert weights.build()(x).shape == (2, weights.feature_dim)
    for form in ("safetensors", "torch-export"):
        export_encoder(weights, tmp_path, form)
    assert load_weights(tmp_path / "encoder.safetensors").augmentation.channels == 5
    for form in ("torchvision", "timm"):
        with pytest.raises(ValueError, match="is for RGB; this encoder is for 5 channels: use saf"):
            export_encoder(replace(weights, width=1, stem="imagenet"), tmp_path, form)
    # Of other libraries' files, the first convolution tells.
    torch.save(build_encoder("resnet18", channels=2)[0].state_dict(), tmp_path / "foreign.pth")
    foreign = load_weights(tmp_path / "foreign.pth")
    assert foreign.augmentation.channels == 2
    assert foreign.encoder(torch.zeros(1, 2, 64, 64)).shape == (1, 512)
