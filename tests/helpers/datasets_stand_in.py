"""A stand-in for Hugging Face's `datasets`, with the part of its surface that is used here.

The tests take the library itself where it is installed. Rows are in memory, and save_to_disk writes
the library's file names with contents of its own.
"""

import json
import pickle
from pathlib import Path


class Features(dict):
    pass


class Value:
    def __init__(self, dtype):
        self.dtype = dtype


class ClassLabel:
    def __init__(self, names):
        self.names = list(names)


class Image:
    def __init__(self, decode=True):
        self.decode = decode


class Dataset:
    def __init__(self, columns, features):
        self._columns, self.features = columns, features

    @classmethod
    def from_dict(cls, columns, features=None):
        columns = {name: list(values) for name, values in columns.items()}
        return cls(columns, features or Features({name: Value("any") for name in columns}))

    @property
    def column_names(self):
        return list(self._columns)

    def __len__(self):
        return len(next(iter(self._columns.values())))

    def __getitem__(self, key):
        if isinstance(key, str):
            return list(self._columns[key])
        return {name: self._shown(name, values[key]) for name, values in self._columns.items()}

    def _shown(self, name, value):
        feature = self.features[name]
        if isinstance(feature, Image) and feature.decode:
            raise AssertionError("the library would decode this image with Pillow")
        return value

    def with_format(self, kind):
        assert kind is None
        return self

    def select(self, rows):
        rows = list(rows)
        return Dataset({n: [v[i] for i in rows] for n, v in self._columns.items()}, self.features)

    def select_columns(self, names):
        features = Features({name: self.features[name] for name in names})
        return Dataset({name: self._columns[name] for name in names}, features)

    def cast_column(self, name, feature):
        return Dataset(self._columns, Features({**self.features, name: feature}))

    def to_iterable_dataset(self):
        return IterableDataset()

    def save_to_disk(self, folder):
        folder = Path(folder)
        folder.mkdir(parents=True)
        for name in ("dataset_info.json", "state.json"):
            (folder / name).write_text("{}")
        rows = pickle.dumps((self._columns, self.features))
        (folder / "data-00000-of-00001.arrow").write_bytes(rows)


class IterableDataset:
    pass


class DatasetDict(dict):
    def save_to_disk(self, folder):
        for name, part in self.items():
            part.save_to_disk(Path(folder) / name)
        (Path(folder) / "dataset_dict.json").write_text(json.dumps({"splits": list(self)}))


def load_from_disk(folder):
    folder = Path(folder)
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        return DatasetDict({name: load_from_disk(folder / name) for name in splits})
    return Dataset(*pickle.loads((folder / "data-00000-of-00001.arrow").read_bytes()))
