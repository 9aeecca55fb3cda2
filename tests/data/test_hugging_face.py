"""Data sets of Hugging Face's `datasets`: rows, class names, folders of save_to_disk, refusals."""

import pickle
import sys

import datasets_stand_in
import numpy as np
import pytest
from odd_inputs import number, picture

from simclr_fast.data.datasets import named_source, open_source
from simclr_fast.data.decode import CorruptImageError, FileReader
from simclr_fast.data.loader import TwoViewLoader

try:
    import datasets
except ImportError:
    datasets = datasets_stand_in
NAMES = ["ant", "cow"]


@pytest.fixture(autouse=True)
def library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", datasets)


def rows(numbers, labels, kind=None, column="image", label="label"):
    features = {
        column: datasets.Image(),
        label: kind or datasets.ClassLabel(names=NAMES),
    }
    images = [{"bytes": picture(i), "path": f"d/{i}.png"} for i in numbers]
    return datasets.Dataset.from_dict(
        {column: images, label: labels}, features=datasets.Features(features)
    )


def numbers(source):
    reader = FileReader(source, 1)
    return [number(reader.decoded(i)) for i in range(len(source))]


def test_rows_are_files_that_the_library_does_not_decode():
    data = rows([4, 2, 7], [1, 0, -1])
    source = open_source(data)
    assert source.encoded
    assert numbers(source) == [4, 2, 7]
    assert source.labels.tolist() == [1, 0, -1]
    assert source.classes == tuple(NAMES)
    assert source.account.line() == "3 images, 2 classes (ClassLabel label), 1 unlabelled"
    assert source.fingerprint() == open_source(data).fingerprint()
    assert source.fingerprint() != open_source(data.select([0, 2, 1])).fingerprint()
    assert numbers(pickle.loads(pickle.dumps(source))) == [4, 2, 7]
    ((_, _, index),) = TwoViewLoader(data, 3, 4, num_threads=1)
    assert sorted(index.tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("labels", "kind", "expected", "classes"),
    [
        ([3, 9], "int64", [3, 9], ()),
        (["cow", "ant"], "string", [1, 0], ("ant", "cow")),
        ([2.0, 1.0], "float32", [2, 1], ()),
        ([None, 1], "int64", [-1, 1], ()),
    ],
)
def test_labels_by_their_type(labels, kind, expected, classes):
    source = open_source(rows([1, 2], labels, datasets.Value(kind)))
    assert (source.labels.tolist(), source.classes) == (expected, classes)


def test_labels_that_are_none():
    source = open_source(rows([1, 2], [0.5, 1.0], datasets.Value("float32")))
    assert source.labels is None
    assert "got 0.5 for image 0" in source.account.line()


def test_several_columns_of_images_or_labels():
    one, two = rows([1, 2], [0, 1]), rows([5, 6], [1, 0])
    data = datasets.Dataset.from_dict(
        {
            "left": [{"bytes": picture(i), "path": None} for i in (1, 2)],
            "right": [{"bytes": picture(i), "path": None} for i in (5, 6)],
            "fine": [0, 1],
            "coarse": [1, 0],
        },
        features=datasets.Features(
            left=one.features["image"],
            right=two.features["image"],
            fine=one.features["label"],
            coarse=two.features["label"],
        ),
    )
    with pytest.raises(ValueError, match=r"2 columns of images \(left, right\)"):
        open_source(data)
    with pytest.raises(ValueError, match=r"must be a column \(left, right.*got middle"):
        open_source(data, image_key="middle")
    source = open_source(data, image_key="right")
    assert numbers(source) == [5, 6]
    assert source.labels is None
    assert "choose one of the columns fine, coarse by labels" in source.account.line()
    for labels in (list(data["coarse"]), "coarse"):
        chosen = open_source(data, labels, image_key="right")
        assert chosen.labels.tolist() == [1, 0]
    assert chosen.classes == tuple(NAMES)
    with pytest.raises(FileNotFoundError, match="medium"):
        open_source(data, "medium", image_key="right")


def test_files_and_bytes_without_a_type(tmp_path):
    (tmp_path / "3.png").write_bytes(picture(3))
    features = datasets.Features(image=datasets.Image())
    by_path = [{"path": str(tmp_path / "3.png"), "bytes": None}]
    assert numbers(open_source(datasets.Dataset.from_dict({"image": by_path}, features))) == [3]
    assert numbers(open_source(datasets.Dataset.from_dict({"img": [picture(8)]}))) == [8]
    empty = datasets.Dataset.from_dict({"image": [None]}, features)
    with pytest.raises(CorruptImageError, match="row 0 of the data set: a row without an image"):
        FileReader(open_source(empty), 1).read(np.array([0]))


def test_a_saved_folder_and_its_splits(tmp_path):
    rows([1, 2], [0, 1]).save_to_disk(tmp_path / "one")
    assert numbers(open_source(tmp_path / "one")) == [1, 2]
    assert named_source(str(tmp_path / "one"), "test") is None
    parts = {"train": rows([1, 2, 3], [0, 1, 1]), "test": rows([9], [1])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "two")
    train, test = (named_source(str(tmp_path / "two"), split) for split in ("train", "test"))
    assert (numbers(train), numbers(test)) == ([1, 2, 3], [9])
    assert train.classes == test.classes == tuple(NAMES)
    datasets.DatasetDict({"a": parts["test"], "b": parts["test"]}).save_to_disk(tmp_path / "three")
    with pytest.raises(ValueError, match="must have the split 'train', got a, b"):
        named_source(str(tmp_path / "three"))


def test_refusals(tmp_path, monkeypatch):
    data = rows([1], [0])
    with pytest.raises(ValueError, match="IterableDataset streams them"):
        open_source(data.to_iterable_dataset())
    with pytest.raises(ValueError, match="a dict of train: pass one"):
        open_source(datasets.DatasetDict(train=data))
    with pytest.raises(ValueError, match="0 columns of images, only x"):
        open_source(datasets.Dataset.from_dict({"x": [1]}))
    with pytest.raises(ValueError, match="got int"):
        open_source(datasets.Dataset.from_dict({"image": [1]})).read(0)
    data.save_to_disk(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        open_source(tmp_path / "saved")
