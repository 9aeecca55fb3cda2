"""SimCLRViews, lightly's signature, and the contact sheet."""

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch.utils.data import DataLoader, Dataset

from simclr_fast.augment.params import Augmentation, draw_params
from simclr_fast.augment.preview import COLUMNS, contact_sheet, save_sheet
from simclr_fast.augment.views import SimCLRViews, apply_views

CHINA = load_sample_image("china.jpg").copy()
PIL_CHINA = Image.fromarray(CHINA)


def by_hand(images, views, ids, epoch=0):
    sizes = np.array([i.shape[:2] for i in images])
    return [
        apply_views(images, draw_params(views.aug, 0, epoch, np.array(ids), v, sizes), views.aug)
        for v in (0, 1)
    ]


@pytest.mark.parametrize(
    "kind", ["uint8", "float32", "float64", "channels_last", "list", "pil", "numpy", "mixed"]
)
def test_every_input_gives_the_same_views(kind):
    hwc = torch.from_numpy(np.stack([CHINA[:90, :120], CHINA[100:190, 200:320]]))
    chw = hwc.permute(0, 3, 1, 2)
    given = {
        "uint8": chw,
        "float32": chw / 255,
        "float64": chw.double() / 255,
        "channels_last": hwc,
        "list": list(chw),
        "pil": [Image.fromarray(i.numpy()) for i in hwc],
        "numpy": hwc.numpy(),
        "mixed": [chw[0], Image.fromarray(hwc[1].numpy())],
    }[kind]
    views = SimCLRViews(32)
    outputs = views(given, ids=[5, 9], epoch=2)
    for out, expected in zip(outputs, by_hand(list(hwc), views, [5, 9], 2), strict=True):
        torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)


def test_one_image_gives_two_single_views():
    views = SimCLRViews(32, dtype=torch.float16)
    for one in (PIL_CHINA, torch.from_numpy(CHINA).permute(2, 0, 1), torch.from_numpy(CHINA)):
        first, second = views(one, ids=[3])
        assert first.shape == second.shape == (3, 32, 32)
        assert first.dtype == torch.float16
        expected = by_hand([CHINA], views, [3])
        assert (first - expected[0][0]).abs().max() < 1e-3
        assert (second - expected[1][0]).abs().max() < 1e-3


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return Image.open(buffer)


def test_images_with_exif_alpha_gray_or_16_bits():
    views = SimCLRViews(48, crop=False, p_flip=0, p_jitter=0, p_gray=0, p_blur=0)

    def view(image):
        return views(image)[0]

    upright = view(PIL_CHINA)
    luma = view(PIL_CHINA.convert("L"))
    assert torch.equal(luma[0], luma[1])
    torch.testing.assert_close(view(PIL_CHINA.convert("RGBA")), upright)
    torch.testing.assert_close(view(PIL_CHINA.convert("CMYK")), upright, atol=0.02, rtol=0)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 270° to stand upright
    rotated = saved(PIL_CHINA.rotate(90, expand=True), "PNG", exif=exif)
    torch.testing.assert_close(view(rotated), upright)
    sixteen = Image.fromarray(np.asarray(PIL_CHINA.convert("L")).astype(np.uint16) * 257)
    torch.testing.assert_close(view(saved(sixteen, "PNG")), luma, atol=2e-6, rtol=0)
    torch.testing.assert_close(view(np.array(PIL_CHINA.convert("L"))[None]), luma)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1)])
def test_images_of_one_pixel_in_a_direction(height, width):
    pixel = torch.tensor([10, 120, 250], dtype=torch.uint8)
    views = SimCLRViews(8, p_jitter=0, p_gray=0, p_blur=0)
    batch = pixel[None, :, None, None].expand(2, 3, height, width)
    expected = (pixel / 255)[:, None, None].expand(2, 3, 8, 8)
    for images in (batch, batch.permute(0, 2, 3, 1), list(batch), batch / 255):
        for view in views(images):
            torch.testing.assert_close(view, expected, atol=1e-6, rtol=0)


class OneImage(Dataset):
    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.stack(list(self.transform(PIL_CHINA)))


def test_workers_draw_different_views_and_seeds_repeat_them():
    views = pickle.loads(pickle.dumps(SimCLRViews(16)))

    def epoch(seed):
        torch.manual_seed(seed)
        return torch.cat(list(DataLoader(OneImage(views), batch_size=2, num_workers=2)))

    first = epoch(0)
    assert torch.equal(first, epoch(0))
    assert not torch.equal(first, epoch(1))
    flat = first.reshape(16, -1)
    assert len(flat.unique(dim=0)) == 16


def test_bad_images_are_named():
    views = SimCLRViews(16)
    with pytest.raises(ValueError, match="must be"):
        views(torch.zeros(2, 5, 8, 8))
    with pytest.raises(TypeError, match="uint8"):
        views(torch.zeros(2, 3, 8, 8, dtype=torch.int32))
    for value in (255.0, float("nan")):
        with pytest.raises(ValueError, match=f"must be in \\[0, 1\\], got one from {value:g}"):
            views(torch.full((2, 3, 8, 8), value))
    with pytest.raises(TypeError, match="PIL"):
        views(["a.jpg"])
    with pytest.raises(ValueError, match="ids"):
        views(torch.zeros(2, 3, 8, 8), ids=[1])


def test_the_contact_sheet_shows_each_step_alone():
    aug = Augmentation(24, mean=(0.5,) * 3, std=(0.5,) * 3)
    rows, lines = contact_sheet([CHINA, CHINA[:50, :80]], aug, seed=1)
    assert rows.shape == (2, len(COLUMNS), 24, 24, 3)
    assert len(lines) == 4
    assert lines[0].startswith("id 0 view 1: crop ")
    tiles = dict(zip(COLUMNS, rows[0], strict=True))
    assert np.array_equal(tiles["flip"], tiles["original"][:, ::-1])
    assert np.array_equal(tiles["gray"][..., 0], tiles["gray"][..., 2])
    for name in COLUMNS[1:]:
        assert not np.array_equal(tiles[name], tiles["original"]), name


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_the_sheets_picture_has_headings_and_is_small(tmp_path, name):
    crops = [CHINA[i * 10 : 300 + i * 10, :400] for i in range(8)]
    tiles, _ = contact_sheet(crops, Augmentation(224))
    save_sheet(tiles, tmp_path / name)
    picture = np.asarray(Image.open(tmp_path / name).convert("L"))
    heading = picture[:20]
    # Dark text on white over every column, and the tiles begin below it.
    assert all((part < 100).any() for part in np.array_split(heading, len(COLUMNS), axis=1))
    assert (heading > 250).mean() > 0.6
    assert picture.shape[0] == 20 + 8 * 131
    if name == "a.jpg":
        assert (tmp_path / name).stat().st_size <= 500_000
    with pytest.raises(ValueError, match=r"\.png or \.jpg file, got '.*a\.gif'"):
        save_sheet(tiles, tmp_path / "a.gif")
