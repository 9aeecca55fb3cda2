"""Find the images of a folder, in the order and with the classes of torchvision's ImageFolder.

Links are followed. Hidden and system files and folders are left out, and what is left out is
counted. No file is opened or asked for its size.
"""

import os
import re
import stat
import unicodedata
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np

from simclr_fast.data.account import Account, printable

# What systems and programs put beside images. Names that start with a dot are hidden anyway.
_SYSTEM = frozenset(
    {
        "__macosx",
        "__pycache__",
        "@eadir",
        "#recycle",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
    }
)
# TensorFlow's data sets end in .tfrecord-00000-of-00010.
_TFRECORD = re.compile(r"\.tfrecords?(-\d+-of-\d+)?$")
HIDDEN = "hidden or system"
_Directories = tuple[tuple[int, int], ...]


class FolderImages(NamedTuple):
    """paths: of the images; labels: int64 [n] or None, -1 for images outside of class folders;
    classes: the names of the class folders; archives: other files that may hold images."""

    paths: list[str]
    labels: np.ndarray | None
    classes: tuple[str, ...]
    archives: list[str]


def suffix_of(name: str) -> str:
    """The part of a name from its last dot on, in lower case; "" without a dot."""
    dot = name.rfind(".")
    return name[dot:].lower() if dot >= 0 else ""


def archive_kind(name: str) -> str:
    """ "tar", "tfrecord" or "rec" for the name of such a file, else ""."""
    name = name.lower()
    for ending in (".gz", ".bz2", ".xz", ".zst"):
        name = name.removesuffix(ending)
    if name.endswith((".tar", ".tgz", ".tbz2", ".txz")):
        return "tar"
    if _TFRECORD.search(name):
        return "tfrecord"
    return "rec" if name.endswith(".rec") else ""


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden or made by the system."""
    return name.startswith(".") or name.lower() in _SYSTEM


def find_images(folder: str, account: Account, suffixes: Collection[str]) -> FolderImages:
    """The images below `folder`, whose folders are the classes.

    Names of folders that differ only in Unicode's normal form are one class. Images outside of
    class folders come last. account: counts what is left out. suffixes: of image files.

    Raises:
        ValueError: a folder cannot be read or a link leads to no image, unless account.on_error is
            "skip".
    """
    walk = _Walk(account, suffixes)
    top = walk.list(folder, ())
    paths: list[str] = []
    labels: list[int] = []
    classes: dict[str, int] = {}
    for name in sorted(top.folders, key=lambda name: (_composed(name), name)):
        before = len(paths)
        for directory, names in sorted(walk.below(os.path.join(folder, name), top.above)):
            prefix = os.path.join(directory, "")
            paths += [prefix + file for file in sorted(names)]
        if len(paths) > before:
            number = classes.setdefault(printable(_composed(name)), len(classes))
            labels += [number] * (len(paths) - before)
        else:
            account.leave_out("folders without images", os.path.join(folder, name))
    prefix = os.path.join(folder, "")
    paths += [prefix + file for file in sorted(top.names)]
    labels += [-1] * len(top.names)
    numbers = np.array(labels, np.int64) if classes else None
    return FolderImages(paths, numbers, tuple(classes), sorted(walk.archives))


class _Listed(NamedTuple):
    """names: image files of a folder; folders: folders in it; above: the ids of it and of the
    folders that lead to it."""

    names: list[str]
    folders: list[str]
    above: _Directories


class _Walk:
    def __init__(self, account: Account, suffixes: Collection[str]) -> None:
        self.account, self.suffixes = account, suffixes
        self.archives: list[str] = []

    def below(self, folder: str, above: _Directories) -> Iterator[tuple[str, list[str]]]:
        """The images of `folder` and of all folders below it, by folder."""
        names, folders, above = self.list(folder, above)
        if names:
            yield folder, names
        for name in folders:
            yield from self.below(os.path.join(folder, name), above)

    def list(self, folder: str, above: _Directories) -> _Listed:
        names: list[str] = []
        folders: list[str] = []
        try:
            status = os.stat(folder)
            above = (*above, (status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = entry.name
                    is_file = entry.is_file(follow_symlinks=False)
                    kind = "file" if is_file else self._kind(entry, above)
                    if kind == "folder":
                        if is_hidden(name):
                            self._count_hidden(entry.path, above)
                        else:
                            folders.append(name)
                    elif kind == "file":
                        if name[name.rfind(".") :].lower() not in self.suffixes:
                            self._leave_out(entry)
                        elif name[0] == ".":
                            self.account.leave_out(HIDDEN, entry.path)
                        else:
                            names.append(name)
        except OSError as error:
            cause = error.strerror or str(error)
            self.account.damage(f"the folder {printable(folder)} cannot be read: {cause}")
        return _Listed(names, folders, above)

    def _kind(self, entry: "os.DirEntry[str]", above: _Directories) -> str:
        """ "folder" or "file", of a link that of its target. "" for what is left out."""
        if entry.is_dir(follow_symlinks=False):
            return "folder"
        try:
            status = os.stat(entry.path)
        except OSError as error:
            if suffix_of(entry.name) in self.suffixes and not is_hidden(entry.name):
                cause = error.strerror or str(error)
                self.account.damage(f"the link {printable(entry.path)} leads nowhere: {cause}")
            else:
                self.account.leave_out("broken links", entry.path)
            return ""
        if stat.S_ISREG(status.st_mode):
            return "file"
        if not stat.S_ISDIR(status.st_mode):
            self.account.leave_out("neither a file nor a folder", entry.path)
        elif (status.st_dev, status.st_ino) not in above:
            return "folder"
        else:
            self.account.leave_out("links to a folder above", entry.path)
        return ""

    def _count_hidden(self, folder: str, above: _Directories) -> None:
        """Count the images in a hidden folder. One that cannot be read has none of ours."""
        inside = _Walk(Account("skip"), self.suffixes)
        for directory, names in inside.below(folder, above):
            self.account.leave_out(HIDDEN, directory, len(names))

    def _leave_out(self, entry: "os.DirEntry[str]") -> None:
        name = entry.name
        if is_hidden(name):
            self.account.leave_out(HIDDEN, entry.path)
        elif archive_kind(name):
            self.archives.append(entry.path)
        else:
            self.account.leave_out(suffix_of(name) or "without a suffix", entry.path)


def _composed(name: str) -> str:
    return name if name.isascii() else unicodedata.normalize("NFC", name)
