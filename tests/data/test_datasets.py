"""torchvision's data sets by name: its own classes on small trees of the real layout."""

import json
import pickle
import warnings

import numpy as np
import pytest
import torchvision.datasets
from odd_inputs import write, write_tar
from PIL import Image
from scipy.io import savemat

from simclr_fast.data.datasets import TORCHVISION, named_source, open_source
from simclr_fast.evaluation.subsets import labelled_pair

KINDS = ("boxer", "siamese")


def write_image(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 7), (value, 0, 0)).save(path)


def write_text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def pixels(first, count):
    values = np.arange(first, first + count, dtype=np.uint8)
    return np.broadcast_to(values[:, None], (count, 3072))


def write_food101(root):
    for split, numbers in (("train", (1, 2)), ("test", (3,))):
        listed = {kind: [f"{kind}/{i}" for i in numbers] for kind in KINDS}
        write_text(root / f"food-101/meta/{split}.json", json.dumps(listed))
    for offset, kind in enumerate(KINDS):
        for i in (1, 2, 3):
            write_image(root / f"food-101/images/{kind}/{i}.jpg", 50 * offset + i)


def write_dtd(root):
    for i, split in enumerate(("train", "val", "test")):
        write_text(root / f"dtd/dtd/labels/{split}1.txt", *(f"{k}/{k}_{i}.jpg" for k in KINDS))
        for kind in KINDS:
            write_image(root / f"dtd/dtd/images/{kind}/{kind}_{i}.jpg", i)


def write_pets(root):
    for i, split in enumerate(("trainval", "test")):
        lines = (f"{kind}_{i} {label} 1 1" for label, kind in enumerate(KINDS, 1))
        write_text(root / f"oxford-iiit-pet/annotations/{split}.txt", *lines)
        for kind in KINDS:
            write_image(root / f"oxford-iiit-pet/images/{kind}_{i}.jpg", i)


def write_aircraft(root):
    data = root / "fgvc-aircraft-2013b/data"
    write_text(data / "variants.txt", *KINDS)
    for i, split in enumerate(("trainval", "test")):
        write_text(data / f"images_variant_{split}.txt", *(f"{i}{kind} {kind}" for kind in KINDS))
        for kind in KINDS:
            write_image(data / f"images/{i}{kind}.jpg", i)


def write_flowers102(root):
    folder = root / "flowers-102"
    for i in range(1, 7):
        write_image(folder / f"jpg/image_{i:05d}.jpg", i)
    savemat(folder / "imagelabels.mat", {"labels": [1, 2, 1, 2, 1, 2]})
    savemat(folder / "setid.mat", {"trnid": [1, 2], "valid": [3, 4], "tstid": [5, 6]})


def write_cars(root):
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array(KINDS, object)})
    for split, where in (
        ("train", folder / "devkit/cars_train_annos.mat"),
        ("test", folder / "cars_test_annos_withlabels.mat"),
    ):
        rows = [(f"{i}.jpg", i) for i in (1, 2)]
        kind = [("fname", object), ("class", object)]
        savemat(where, {"annotations": np.array(rows, kind)})
        for name, i in rows:
            write_image(folder / f"cars_{split}" / name, i)


def write_cifar(root, name, meta, files, key):
    folder = root / name
    folder.mkdir()
    for i, file in enumerate(files):
        content = {"data": pixels(2 * i, 2), key: [0, 1]}
        (folder / file).write_bytes(pickle.dumps(content))
    (folder / meta[0]).write_bytes(pickle.dumps({meta[1]: list(KINDS)}))


def write_cifar10(root):
    files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    write_cifar(root, "cifar-10-batches-py", ("batches.meta", "label_names"), files, "labels")


def write_cifar100(root):
    meta = ("meta", "fine_label_names")
    write_cifar(root, "cifar-100-python", meta, ["train", "test"], "fine_labels")


def write_stl10(root):
    folder = root / "stl10_binary"
    write_text(folder / "class_names.txt", *KINDS)
    for i, split in enumerate(("train", "test", "unlabeled")):
        values = np.full((2, 3, 96, 96), i, np.uint8)
        values.tofile(folder / f"{split}_X.bin")
        if split != "unlabeled":
            np.array([1, 2], np.uint8).tofile(folder / f"{split}_y.bin")


def write_svhn(root):
    for i, split in enumerate(("train", "test")):
        values = np.full((32, 32, 3, 2), i, np.uint8)
        savemat(root / f"{split}_32x32.mat", {"X": values, "y": np.array([[1], [10]])})


# How to write it; training images and labels; labels of the test images.
DATA_SETS = {
    "food101": (write_food101, 4, [0, 0, 1, 1], [0, 1]),
    "dtd": (write_dtd, 4, [0, 1, 0, 1], [0, 1]),
    "pets": (write_pets, 2, [0, 1], [0, 1]),
    "aircraft": (write_aircraft, 2, [0, 1], [0, 1]),
    "flowers102": (write_flowers102, 4, [0, 1, 0, 1], [0, 1]),
    "cars": (write_cars, 2, [0, 1], [0, 1]),
    "cifar10": (write_cifar10, 10, [0, 1] * 5, [0, 1]),
    "cifar100": (write_cifar100, 2, [0, 1], [0, 1]),
    "stl10": (write_stl10, 4, [0, 1, -1, -1], [0, 1]),
    "svhn": (write_svhn, 2, [1, 0], [1, 0]),
}


@pytest.fixture
def any_bytes(monkeypatch):
    """torchvision checks the published files' MD5, which small ones cannot have."""
    for module in ("cifar", "flowers102", "stl10", "svhn"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *_: True)


@pytest.mark.usefixtures("any_bytes")
@pytest.mark.parametrize("name", DATA_SETS)
def test_images_and_labels_of_a_data_set(name, tmp_path):
    write, count, labels, test_labels = DATA_SETS[name]
    write(tmp_path)
    train, test = (named_source(f"{name}:{tmp_path}", split) for split in ("train", "test"))
    assert len(train) == count
    assert train.labels.tolist() == labels
    assert test.labels.tolist() == test_labels
    assert train.fingerprint() != test.fingerprint()
    # These data sets give pixels. The others give files, which are decoded later.
    assert train.encoded == (name not in ("cifar10", "cifar100", "stl10", "svhn"))
    assert len(train.read(count - 1)) > 0
    pair = labelled_pair(f"{name}:{tmp_path}", None)
    assert pair.train_labels.tolist() == [label for label in labels if label >= 0]


def test_every_data_set_name_is_tested():
    assert sorted(DATA_SETS) == sorted(TORCHVISION)


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_data_set_that_is_not_there_is_named(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no {name} in '.*{tmp_path.name}'"):
        named_source(f"{name}:{tmp_path}")


@pytest.mark.usefixtures("any_bytes")
def test_the_test_images_of_a_data_set(tmp_path):
    """--test NAME means the test images of NAME; the training images are refused."""
    write_food101(tmp_path)
    data = f"food101:{tmp_path}"
    assert labelled_pair(data, data).test_labels.tolist() == [0, 1]
    folder = str(tmp_path / "food-101/images")
    with pytest.raises(ValueError, match="holds the training images"):
        labelled_pair(folder, folder)


def test_a_data_set_object_keeps_its_labels(tmp_path):
    from simclr_fast.data.datasets import open_source

    write_food101(tmp_path)
    source = open_source(torchvision.datasets.Food101(tmp_path))
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert source.classes == KINDS
    assert source.read(2).shape == (7, 9, 3)


@pytest.mark.parametrize(
    ("names", "warned"),
    [
        (["train/a/0.png", "val/a/1.png", "test/a/2.png"], "train, val, test"),
        (["Train/0.png", "Test/1.png"], "Train, Test"),
        (["train/a/0.png", "train/b/1.png"], "train"),
        (["train-000.tar", "train-001.tar", "val-000.tar"], "train, val"),
        (["x/train_0.tar", "x/test_0.tar.gz"], "train, test"),
        (["train/0.png", "bus/1.png"], None),  # vehicles
        (["a/train/0.png", "b/test/1.png"], None),
        (["train-000.tar", "train-001.tar"], None),
        (["testament/0.png", "trainer/0.png"], None),
    ],
)
def test_several_parts_of_a_data_set_are_named(tmp_path, names, warned):
    for name in names:
        if ".tar" in name:
            write_tar(tmp_path / name, [("0.png", 0)])
        else:
            write(tmp_path, {name: 0})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(open_source(tmp_path)) == len(names)
    said = [str(one.message) for one in caught]
    if warned is None:
        assert not said
        return
    (text,) = said
    assert f"({warned})" in text
    choice = text.split("'")[1]
    assert 0 < len(open_source(choice)) <= len(names)
    assert warned.partition(",")[0] in choice
