"""Data as people have them: every image is counted and every label read, in every format.

A case is a few small files and the right answer. `Case` in tests/helpers/odd_inputs.py describes
its fields.
"""

import bz2
import gzip
import json
import lzma
import os
import pickle
import socket
import tarfile
import unicodedata

import numpy as np
import pytest
import torch
from odd_inputs import (
    Case,
    example,
    number,
    picture,
    recordio,
    tfrecord,
    write,
    write_tar,
)
from PIL import Image
from torchvision.datasets import ImageFolder

from simclr_fast.augment.params import Augmentation
from simclr_fast.data.datasets import named_source, open_source
from simclr_fast.data.decode import FileReader, PixelReader
from simclr_fast.data.loader import ImageLoader, TwoViewLoader

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
# Latin-1, not UTF-8: as Python shows such a name.
LATIN = os.fsdecode("caf\xe9".encode("latin-1"))


def folder(files, also=lambda folder: None):
    def make(path):
        write(path, files)
        also(path)
        return path

    return make


def link(name, target):
    return lambda folder: (folder / name).symlink_to(folder / target)


def both(*steps):
    return lambda folder: [step(folder) for step in steps]


AB = {"a/0.png": 0, "b/1.png": 1}
FOLDERS = [
    Case("classes", folder(AB), [0, 1], [0, 1], ("a", "b")),
    Case("no classes", folder({"1.png": 1, "0.png": 0}), [0, 1]),
    Case("nested", folder({"a/z/0.png": 0, "a/z-1/1.png": 1, "a/z/y/2.png": 2, "a/3.png": 3}),
         [3, 0, 1, 2], [0] * 4, ("a",)),
    Case("a link to a class", folder(AB | {"x/2.png": 2}, link("c", "x")),
         [0, 1, 2, 2], [0, 1, 2, 3], ("a", "b", "c", "x")),
    Case("a link within a class", folder(AB, link("a/more", "b")), [0, 1, 1], [0, 0, 1],
         ("a", "b")),
    Case("linked files", folder(AB, link("a/2.png", "b/1.png")), [0, 1, 1], [0, 0, 1], ("a", "b")),
    Case("a link to the folder itself", folder(AB, link("a/up", ".")), [0, 1], [0, 1], ("a", "b"),
         {"links to a folder above": 1}),
    Case("links in a circle", folder(AB, both(link("a/to_b", "b"), link("b/to_a", "a"))),
         [0, 1, 1, 0], [0, 0, 1, 1], ("a", "b"), {"links to a folder above": 2}),
    Case("a link to itself", folder(AB, link("a/self", "a/self")), [0, 1], [0, 1], ("a", "b"),
         {"broken links": 1}),
    Case("a broken link to an image", folder(AB, link("a/2.png", "gone.png")), [0, 1], [0, 1],
         ("a", "b"), error="2.png leads nowhere"),
    Case("a broken link to something else", folder(AB, link("a/notes", "gone")), [0, 1], [0, 1],
         ("a", "b"), {"broken links": 1}),
    *(
        Case(f"{name} is no class", folder(AB | {f"{name}/9.png": 9}), [0, 1], [0, 1], ("a", "b"),
             {"hidden or system": 1})
        for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found",
                     ".git", "System Volume Information", "a/.ipynb_checkpoints", "b/@eaDir/1.png")
    ),
    *(
        Case(f"{name} is no image", folder(AB | {name: 9}), [0, 1], [0, 1], ("a", "b"),
             {"hidden or system": 1})
        for name in ("a/._0.png", "._a.png", "a/.hidden.jpg", ".DS_Store", "a/Thumbs.db",
                     "a/desktop.ini")
    ),
    *(
        Case(f"{name} changes nothing", folder(AB | {name: "x"}), [0, 1], [0, 1], ("a", "b"),
             {reason: 1})
        for name, reason in (
            ("dataset_dict.json", ".json"), ("state.json", ".json"),
            ("README.md", ".md"),
            ("x.tfrecord_index", ".tfrecord_index"), ("labels.csv", ".csv"), ("backup.tar", ".tar"),
            ("old.rec", ".rec"), ("a/notes.txt", ".txt"), ("LICENSE", "without a suffix"),
            ("a/0.jpg.part", ".part"), ("x.tfrecord-00000-of-00001", ".tfrecord-00000-of-00001"),
            ("data.tar.gz", ".gz"),
        )
    ),
    Case("a picture beside class folders", folder(AB | {"2.png": 2}), [0, 1, 2], [0, 1, -1],
         ("a", "b")),
    Case("an empty class", folder(AB, lambda f: (f / "c").mkdir()), [0, 1], [0, 1], ("a", "b"),
         {"folders without images": 1}),
    Case("files of many formats", folder({"a/0.gif": picture(0, "GIF"),
         "a/1.bmp": picture(1, "BMP"), "b/2.TIFF": picture(2, "TIFF"),
         "b/3.jp2": picture(3, "JPEG2000"),
         "b/4.pnm": picture(4, "PPM")}), [0, 1, 2, 3, 4], [0, 0, 1, 1, 1], ("a", "b")),
    Case("files of other formats than their names say", folder({"0.jpg": picture(0, "GIF"),
         "1.png": picture(1, "TIFF"), "2.tif": picture(2, "BMP")}), [0, 1, 2]),
    Case("an array without a word on its channels", folder(AB | {"a/0.npy": "x"}), [0, 1], [0, 1],
         ("a", "b"), {".npy": 1}),
    Case("suffixes in capitals", folder({"a/0.PNG": 0, "b/1.Png": 1}), [0, 1], [0, 1], ("a", "b")),
    Case("names with dots and spaces", folder({"a b/0.v1.png": 0, "c.d/ 1 .png": 1}), [0, 1],
         [0, 1], ("a b", "c.d")),
    Case("a name with a line break", folder({"a\nb/0.png": 0}), [0], [0], (r"a\nb",)),
    Case("a class called -1", folder({"-1/0.png": 0, "a/1.png": 1}), [0, 1], [0, 1], ("-1", "a")),
    Case("numbers as classes", folder({"10/0.png": 0, "2/1.png": 1}), [0, 1], [0, 1], ("10", "2")),
    Case("a link to a folder", lambda f: (folder(AB)(f / "x"), link("y", "x")(f), f / "y")[2],
         [0, 1], [0, 1], ("a", "b")),
    Case("train and test folders", folder({"test/a/0.png": 0, "train/a/1.png": 1}), [0, 1], [0, 1],
         ("test", "train")),
    Case("an empty file", folder(AB | {"a/2.png": ""}), error="empty"),
    Case("a half-written file", folder(AB | {"a/2.png": picture(2)[:60]}), error="cut|checksum"),
    Case("a name that is not UTF-8", folder({f"{LATIN}/{LATIN}.png": 0, "x/1.png": 1}), [0, 1],
         [0, 1], (r"caf\xe9", "x")),
    Case("one class in two normal forms", folder({f"{NFC}/0.png": 0, f"{NFD}/1.png": 1,
         "cafz/2.png": 2}), [2, 1, 0], [0, 1, 1], ("cafz", NFC)),
    Case("one file name in two normal forms", folder({f"a/{NFC}.png": 0, f"a/{NFD}.png": 1}),
         [1, 0], [0, 0], ("a",)),
    Case("a fifo", folder(AB, lambda f: os.mkfifo(f / "a/2.png")), [0, 1], [0, 1], ("a", "b"),
         {"neither a file nor a folder": 1}),
    Case("archives in a folder of folders", folder({}, both(
         lambda f: write_tar(f / "x/1.tar", [("1.png", 1)]),
         lambda f: write_tar(f / "w/0.tar", [("0.png", 0)]))), [0, 1],
         left_out={"folders without images": 2}),
    Case("pictures and archives", folder({"0.png": 0}, lambda f: write_tar(f / "1.tar", [])),
         error=r"both images .1. and archives .*/\*.png' or '.*/\*.tar'$"),
    Case("pictures chosen beside archives",
         lambda f: f"{folder({'0.png': 0, '1.tar': 'x'})(f)}/*.png", [0]),
    Case("hard links", folder(AB, lambda f: os.link(f / "a/0.png", f / "a/2.png")), [0, 0, 1],
         [0, 0, 1], ("a", "b")),
    Case("a socket", folder(AB, lambda f: socket_in(f)), [0, 1], [0, 1], ("a", "b"),
         {"neither a file nor a folder": 1}),
    Case("folders that are called like images", folder({"a.png/0.png": 0, "b.jpg/1.png": 1}),
         [0, 1], [0, 1], ("a.png", "b.jpg")),
    Case("names that end in a dot or ~", folder(AB | {"a/2.png.": 2, "b/3.png~": 3}), [0, 1],
         [0, 1], ("a", "b"), {".": 1, ".png~": 1}),
    Case("a suffix alone", folder(AB | {"a/.png": 9}), [0, 1], [0, 1], ("a", "b"),
         {"hidden or system": 1}),
    Case("a pointer of Git LFS", folder(AB | {"a/2.jpg": "version https://git-lfs.github.com/s"}),
         error="git lfs pull"),
    Case("a web page", folder(AB | {"a/2.jpg": "\n<!DOCTYPE html><html>404</html>"}),
         error="a web page"),
    Case("bytes behind the end of an image", folder({"0.png": picture(0) + b"more" * 99,
         "1.bmp": picture(1, "BMP") + b"more"}), [0, 1]),
    Case("bytes before an image", folder({"0.png": b"\0" + picture(0)}), error="damaged, or"),
    Case("an image of a format that is not read", folder({"0.png": picture(0, "TGA")}),
         error="damaged, or neither"),
    Case("a camera's raw file", folder(AB | {"a/2.CR2": "II*"}), [0, 1], [0, 1], ("a", "b"),
         {".cr2": 1}),
    Case("no path", lambda f: "", error="empty text"),
    Case("a path in bytes", lambda f: os.fsencode(folder(AB)(f)), error="got bytes"),
    Case("a path of another library", lambda f: next(os.scandir(folder({"x/0.png": 0})(f))), [0]),
    *(
        Case(f"{url}", lambda f, url=url: url, error="must be on this machine, got")
        for url in ("pipe:cat x.tar",)
    ),
    Case("an unknown protocol", lambda f: "nosuch://a/b", error="Protocol not known: nosuch"),
    *(
        Case(f"a {suffix} file", lambda f, s=suffix: write(f, {f"x{s}": "x"}) / f"x{s}",
             error=hint)
        for suffix, hint in ((".npy", "np.load"), (".npz", "np.load"), (".csv", "as labels"),
                             (".txt", "as a list"), (".parquet", "load_dataset"),
                             (".zip", "unpack it"), (".h5", "a suffix of"))
    ),
    Case("an array of paths", lambda f: np.array([str(folder(AB)(f) / "a/0.png")]), [0]),
    Case("a generator of paths", lambda f: iter([f]), error="got list_iterator"),
    Case("a table of paths", lambda f: type("DataFrame", (), {"iloc": 1})(), error="one column"),
    Case("no images", folder({"a/notes.txt": "x"}), error="no images in .* 1 .txt"),
    Case(
        "only arrays",
        folder({"a/0.npy": "x"}),
        error=r"1 \.npy.*\.npy files are read with --augmentation\.channels N",
    ),
    Case("only hidden images", folder({".a/0.png": 0}), error="no images in .* 1 hidden"),
]  # fmt: skip


def socket_in(folder):
    with socket.socket(socket.AF_UNIX) as one:
        # The path of a socket is short.
        at = os.open(folder / "a", os.O_RDONLY)
        one.bind(f"/proc/self/fd/{at}/2.png")
        os.close(at)


def tar(members, name="x.tar", **options):
    return lambda folder: write_tar(folder / name, members, **options)


def changed(make, change):
    """The file of `make`, with its bytes changed."""

    def changing(folder):
        path = make(folder)
        path.write_bytes(change(path.read_bytes()))
        return path

    return changing


TWO = [("0.png", 0), ("0.cls", "5"), ("1.png", 1), ("1.cls", "7")]
LONG = "d" * 90 + "/" + "e" * 120
TARS = [
    Case("number classes", tar(TWO), [0, 1], [5, 7]),
    Case("class names", tar([("0.png", 0), ("0.cls", "cow"), ("1.png", 1), ("1.cls", "ant\n")]),
         [0, 1], [1, 0], ("ant", "cow")),
    Case("class names in .txt",
         tar([("0.png", 0), ("0.txt", "cow"), ("1.png", 1), ("1.txt", "ant")]),
         [0, 1], [1, 0], ("ant", "cow")),
    Case("captions are no labels", tar([("0.png", 0), ("0.txt", "a long story " * 9)]), [0]),
    Case("whole floats", tar([("0.png", 0), ("0.cls", "2.0")]), [0], [2]),
    Case("a broken number", tar([("0.png", 0), ("0.cls", "0.9")]), [0]),
    Case("unlabelled", tar([("0.png", 0), ("0.cls", "-1"), ("1.png", 1), ("1.cls", "3"),
         ("2.png", 2)]), [0, 1, 2], [-1, 3, -1]),
    Case("a byte-order mark", tar([("0.png", 0), ("0.cls", "\ufeff4")]), [0], [4]),
    Case("json without end", tar([("0.png", 0), ("0.json", "[" * 100_000)]), [0]),
    Case("json", tar([("0.png", 0), ("0.json", {"label": 3, "w": 6}), ("1.png", 1),
         ("1.json", {"label": 4})]), [0, 1], [3, 4]),
    Case("json with names", tar([("0.png", 0), ("0.json", {"cls": "b"}), ("1.png", 1),
         ("1.json", {"cls": "a"})]), [0, 1], [1, 0], ("a", "b")),
    Case("json without a label", tar([("0.png", 0), ("0.json", {"width": 3})]), [0]),
    Case("json of a number alone", tar([("0.png", 0), ("0.json", "7")]), [0], [7]),
    Case("json of true and false", tar([("0.png", 0), ("0.json", {"label": True}), ("1.png", 1),
         ("1.json", {"label": False})]), [0, 1], [1, 0]),
    Case("json of a list", tar([("0.png", 0), ("0.json", {"label": [1, 2]})]), [0]),
    Case("json that is no text", tar([("0.png", 0), ("0.json", b"\xff\xfe")]), [0]),
    Case("json with half a character", tar([("0.png", 0), ("0.json", r'{"cls": "\ud800"}')]),
         [0], [0], (r"\ud800",)),
    Case("an empty image", tar([("0.png", ""), ("1.png", 1)]), error="empty"),
    Case("a damaged json", tar([("0.png", 0), ("0.json", '{"label":')]), [0]),
    Case("a label far from its image", tar([("0.png", 0), ("1.png", 1), ("0.cls", "4"),
         ("1.cls", "2")]), [0, 1], [4, 2]),
    Case("one key in two folders", tar([("a/0.png", 0), ("a/0.cls", "1"), ("b/0.png", 1),
         ("b/0.cls", "2")]), [0, 1], [1, 2]),
    Case("folders as members", lambda f: tar_of_a_folder(f), [0], [1]),
    Case("dots in folders", tar([("v1.0/0.png", 0), ("v1.0/0.cls", "1")]), [0], [1]),
    Case("./ before every name", tar([("./0.png", 0), ("./0.cls", "3")]), [0], [3]),
    Case("a dot in the field", tar([("0.orig.png", 0), ("0.cls", "3")]), [0], [3]),
    Case("names with dots are one sample", tar([("cat.0.png", 0), ("cat.1.png", 1)]),
         error=r"cat has 2 images: 0.png, 1.png.*--image-key 0.png"),
    Case("every image of a sample", tar([("cat.0.png", 0), ("cat.1.png", 1), ("cat.cls", "2")]),
         [0, 1], [2, 2], options={"image_key": "*.png"}),
    Case("an image and its mask", tar([("0.jpg", picture(0)), ("0.png", 200)]),
         error="0 has 2 images: jpg, png"),
    Case("an image and its named mask", tar([("0.png", 0), ("0.mask.png", 200)]),
         error="0 has 2 images: png, mask.png"),
    Case("the image by its field", tar([("0.mask.png", 200), ("0.png", 0), ("1.png", 1)]), [0, 1],
         left_out={".mask.png": 1}, options={"image_key": "png"}),
    Case("the first field that a sample has", tar([("0.png", 0), ("1.jpg", picture(1)),
         ("1.png", 200)]), [0, 1], left_out={".png": 1}, options={"image_key": "jpg;png"}),
    Case("a field without a suffix", tar([("0.image", picture(0)), ("0.cls", "1")]), [0], [1],
         options={"image_key": "image"}),
    Case("a sample without the field", tar([("0.png", 0), ("1.jpg", picture(1))]), [0],
         left_out={".jpg": 1, "without png": 1}, options={"image_key": "png"}),
    Case("fields in capitals", tar([("0.PNG", 0), ("0.CLS", "2")]), [0], [2]),
    Case("a label twice", tar([("0.png", 0), ("0.cls", "1"), ("0.cls", "2")]), [0], [2],
         error="0.cls twice"),
    Case("a field twice", tar([("0.png", 0), ("0.png", 1)]), [1], error="0.png twice"),
    Case("a field in two cases", tar([("0.png", 0), ("0.PNG", 1)]), [1], error="0.PNG twice"),
    Case("hidden members", tar([*TWO, ("._0.png", 9), ("__MACOSX/0.png", 9), (".DS_Store", "x"),
         ("d/.ipynb_checkpoints/0.png", 9)]), [0, 1], [5, 7], left_out={"hidden or system": 4}),
    Case("other members", tar([*TWO, ("0.npy", "x"), ("1.seg.npz", "x"), ("README", "x"),
         ("3.cls", "9")]), [0, 1], [5, 7],
         left_out={".npy": 1, ".seg.npz": 1, "without a suffix": 1, "samples without an image": 1}),
    Case("a hard link", tar([("0.png", 0), ("1.png", ("hard", "0.png"))]), [0, 0]),
    Case("a link", tar([("d/0.png", 0), ("e/1.png", ("link", "../d/0.png"))]), [0, 0]),
    Case("a link to a link", tar([("2.png", ("link", "1.png")), ("1.png", ("hard", "./0.png")),
         ("./0.png", 0)]), [0, 0, 0]),
    Case("a link to nothing", tar([("0.png", 0), ("1.png", ("link", "9.png"))]), [0],
         left_out={"samples without an image": 1}, error="link to 9.png, which"),
    Case("a link to itself", tar([("0.png", 0), ("1.png", ("link", "1.png"))]), [0],
         left_out={"samples without an image": 1}, error="link to 1.png, which"),
    Case("pax names", tar([(f"{LONG}{NFC}.png", 0), (f"{LONG}{NFC}.cls", "1")], format=2), [0],
         [1]),
    Case("GNU names", tar([(f"{LONG}{NFC}.png", 0), (f"{LONG}{NFC}.cls", "1")], format=1), [0],
         [1]),
    Case("ustar names", tar([("d" * 90 + "/0.png", 0)], format=0), [0]),
    Case("a global pax header", tar(TWO, format=2, pax_headers={"comment": "x" * 700}), [0, 1],
         [5, 7]),
    Case("absolute names", tar([("/d/0.png", 0), ("/d/0.cls", "1")]), [0], [1]),
    Case("names above the archive", tar([("../0.png", 0), ("../0.cls", "1")]), [0], [1]),
    Case("a sparse member", lambda f: sparse_tar(f), [1],
         left_out={"sparse or special files": 1}),
    Case("numbers and nan", tar([("0.png", 0), ("0.cls", "nan"), ("1.png", 1), ("1.cls", "2")]),
         [0, 1]),
    Case("compressed by lz4", lambda f: write(f, {"x.tar.lz4": "x"}) / "x.tar.lz4", error=".lz4"),
    Case("a member that is not UTF-8", tar([(f"{LATIN}.png", 0)], format=1), [0]),
    *(
        Case(f"compressed by {name}", changed(tar(TWO, suffix), pack), [0, 1], [5, 7])
        for name, suffix, pack in (
            ("gzip", "x.tar.gz", gzip.compress), ("gzip, called .tar", "x.tar", gzip.compress),
            ("gzip, called .tgz", "x.tgz", gzip.compress), ("bzip2", "x.tar.bz2", bz2.compress),
            ("xz", "x.tar.xz", lzma.compress),
        )
    ),
    Case("compressed by zstd", changed(tar(TWO), lambda data: b"\x28\xb5\x2f\xfd" + data),
         error="zstd"),
    Case("damaged within a gzip", changed(tar(TWO, "x.tgz"), lambda d: gzip.compress(d[:4096])),
         [0, 1], [5, 7], error="data/x.tgz ends without the mark"),
    Case("a damaged gzip", changed(tar(TWO, "x.tgz"), lambda d: gzip.compress(d)[:-9]), [0, 1],
         [5, 7], error="x.tgz is damaged"),
    Case("no mark of the end", changed(tar(TWO), lambda data: data[:4096]), [0, 1], [5, 7],
         error="ends without the mark"),
    Case("cut within a header", changed(tar(TWO), lambda data: data[:1024 + 100]), [0],
         error="ends within the header at byte 1024"),
    Case("cut within an image", changed(tar(TWO), lambda data: data[:2048 + 550]), [0], [5],
         error="cannot be read as a tar|ends"),
    Case("cut at the first byte of a header", changed(tar(TWO), lambda data: data[:2048]), [0],
         [5], error="ends without the mark"),
    Case("a damaged header", changed(tar(TWO), lambda d: d[:2050] + b"?" + d[2051:]), [0], [5],
         error="damaged header at byte 2048"),
    Case("two tars joined", changed(tar(TWO), lambda data: data + data), [0, 1], [5, 7],
         error="goes on for"),
    Case("a lone block of zeros", changed(tar(TWO), lambda data: data[: 4096 + 512]), [0, 1],
         [5, 7]),
    Case("an empty tar file", lambda f: write(f, {"x.tar": ""}) / "x.tar", error="cannot be read"),
    Case("a tar that is none", lambda f: write(f, {"x.tar": "no tar" * 99}) / "x.tar",
         error="cannot be read"),
    Case("a tar without images", tar([("0.cls", "1")]), error="no images in"),
    Case("a shard without images", lambda f: [tar(TWO)(f), tar([], "y.tar")(f)], [0, 1], [5, 7],
         left_out={"shards without images": 1}),
    *(
        Case(f"the pattern {pattern}", lambda f, p=pattern: shards(f, p), [0, 1, 2])
        for pattern in ("{000..002}.tar", "*.tar", "00[0-2].tar", "00{0,1,2}.tar", "00?.tar",
                        "{000..001}.tar::DIR/002.tar")
    ),
    Case("a pattern with a shard too many", lambda f: shards(f, "{000..003}.tar"),
         error="no such file or folder: .*003.tar"),
    Case("a pattern of nothing", lambda f: shards(f, "*.rec"), error="no file matches"),
    Case("a pattern of images", lambda f: str(write(f, AB) / "*/*.png"), [0, 1]),
    Case("a file whose name looks like a pattern",
         lambda f: str(write(f, {"[0].png": 0}) / "[0].png"),
         [0]),
]  # fmt: skip


def tar_of_a_folder(folder):
    write(folder / "d", {"0.png": 0, "0.cls": "1"})
    with tarfile.open(folder / "x.tar", "w") as out:
        out.add(folder / "d", "d")
    return folder / "x.tar"


def sparse_tar(folder):
    """As GNU tar writes a file with holes."""
    header = tarfile.TarInfo("0.png")
    header.type, header.size = tarfile.GNUTYPE_SPARSE, 0
    path = write_tar(folder / "x.tar", [("1.png", 1)])
    path.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + path.read_bytes())
    return path


def shards(folder, pattern):
    for i in range(3):
        write_tar(folder / f"{i:03d}.tar", [(f"{i}.png", i)])
    return f"{folder}/{pattern.replace('DIR', str(folder))}"


def records(*features, name="x.tfrecord"):
    return lambda folder: write(folder, {name: b"".join(map(example, features))}) / name


def labelled(*labels, key="image/class/label"):
    return records(*({"image/encoded": picture(i), key: v} for i, v in enumerate(labels)))


def recs(*items, name="x.rec"):
    return lambda folder: write(folder, {name: b"".join(recordio(*i) for i in items)}) / name


R = "image/encoded"
RECORDS = [
    Case("TFRecord, integers", labelled(3, 1), [0, 1], [3, 1]),
    Case("TFRecord, label", labelled(3, 1, key="label"), [0, 1], [3, 1]),
    Case("TFRecord, names", labelled(b"cow", b"ant", b"cow"), [0, 1, 2], [1, 0, 1], ("ant", "cow")),
    Case("TFRecord, whole floats", labelled(3.0, 1.0), [0, 1], [3, 1]),
    Case("TFRecord, broken floats", labelled(0.5, 1.0), [0, 1]),
    Case("TFRecord, class names as text", labelled(b"cow", b"ant", key="image/class/text"), [0, 1],
         [1, 0], ("ant", "cow")),
    Case("TFRecord, -1", labelled(-1, 4), [0, 1], [-1, 4]),
    Case("TFRecord, -2", labelled(-2, 4), [0, 1]),
    Case("TFRecord, mixed types", labelled(b"cow", 4), [0, 1]),
    Case("TFRecord, one label missing", labelled(3, []), [0, 1], [3, -1]),
    Case("TFRecord, several labels", labelled([1, 2], 4), [0, 1]),
    Case("TFRecord, no labels", records({R: picture(0)}), [0]),
    Case("TFRecord of TensorFlow's data sets", records({"image": picture(0), "label": 2},
         name="x-train.tfrecord-00000-of-00001"), [0], [2]),
    Case("TFRecord, another feature", records({"jpeg": picture(0), "label": 2}), [0], [2],
         options={"image_key": "jpeg"}),
    Case("TFRecord, an unknown feature", records({"jpeg": picture(0)}),
         error="features are jpeg: choose"),
    Case("TFRecord, one without an image", records({R: picture(0)}, {"label": 1}), [0],
         left_out={"records without an image": 1}),
    Case("TFRecord, several images", records({R: [picture(0), picture(1)]}), error="got 2 values"),
    Case("TFRecord, numbers as an image", records({R: [1, 2]}), error="of bytes"),
    Case("TFRecord, a damaged record", changed(records({R: picture(0)}), lambda data: data
         + tfrecord(b"\x0a\xff\xff\xff\x7f") + data), [0, 0],
         left_out={"records without an image": 1}, error="record 1 is not a tf.train.Example"),
    Case("TFRecord, whole floats and -1", labelled(-1.0, 2.0), [0, 1], [-1, 2]),
    Case("TFRecord, cut", changed(labelled(3, 1), lambda data: data[:-40]), [0], [3],
         error="within record 1"),
    Case("TFRecord, cut in a header", changed(labelled(3), lambda data: data + b"abc"), [0], [3],
         error="within the header of record 1"),
    Case("TFRecord, gzip", changed(labelled(3, 1), gzip.compress), [0, 1], [3, 1]),
    Case("RecordIO", recs((3.0, picture(0)), (1.0, picture(1))), [0, 1], [3, 1]),
    Case("RecordIO, label 0.9", recs((0.9, picture(0))), [0]),
    Case("RecordIO, -1", recs((-1.0, picture(0)), (2.0, picture(1))), [0, 1], [-1, 2]),
    Case("RecordIO, a list of one label", recs(([4.0], picture(0))), [0], [4]),
    Case("RecordIO, two labels", recs(([4.0, 1.0], picture(0))), [0]),
    Case("RecordIO, a record without an image", recs(([1.0, 9.0], b""), (2.0, picture(0))), [0],
         [2],
         left_out={"records without an image": 1}),
    Case("RecordIO, cut", changed(recs((3.0, picture(0)), (1.0, picture(1))), lambda d: d[:-9]),
         [0],
         [3], error="record 1 is cut off"),
    Case("RecordIO, a wrong magic number", changed(recs((3.0, picture(0)), (1.0, picture(1))),
         lambda d: d[: len(d) // 2] + b"?" + d[len(d) // 2 + 1 :]), [0], [3], error="magic number"),
    Case("RecordIO, fewer than its index", lambda f: (write(f, {"x.idx": "0\t0\n1\t99\n"}),
         recs((3.0, picture(0)))(f))[1], [0], [3], error="1 records, but x.idx lists 2"),
    Case("shards of two kinds", lambda f: [labelled(1)(f), recs((1.0, picture(0)))(f)],
         error="one suffix"),
]  # fmt: skip


def pixels(count):
    return np.stack([np.asarray(Image.new("RGB", (6, 5), (i, 0, 0))) for i in range(count)])


def array(labels, count=2):
    return {"make": lambda folder: pixels(count), "options": {"labels": labels}}


def csv(text, files=None, name="labels.csv", options=None):
    """Images and a file of labels, whose path is that of the options' labels."""

    def make(folder):
        write(folder.parent, {f"{folder.name}.{name}": text})
        return write(folder, files or {"a/0.png": 0, "a/1.png": 1, "b/2.png": 2})

    return {"make": make, "options": {"labels": f"DIR.{name}", **(options or {})}}


LABELS = [
    Case("integers", **array([3, 0]), images=[0, 1], labels=[3, 0]),
    Case("strings", **array(["cow", "ant"]), images=[0, 1], labels=[1, 0], classes=("ant", "cow")),
    Case("bytes", **array([b"cow", b"ant"]), images=[0, 1], labels=[1, 0], classes=("ant", "cow")),
    Case("an array of strings", **array(np.array(["cow", "ant"])), images=[0, 1], labels=[1, 0],
         classes=("ant", "cow")),
    Case("strings in two normal forms", **array([NFC, NFD]), images=[0, 1], labels=[0, 0],
         classes=(NFC,)),
    Case("strings, one unlabelled", **array(["cow", "-1"]), images=[0, 1], labels=[0, -1],
         classes=("cow",)),
    Case("None", **array([None, 2]), images=[0, 1], labels=[-1, 2]),
    Case("booleans", **array([True, False]), images=[0, 1], labels=[1, 0]),
    Case("an array of booleans", **array(np.array([True, False])), images=[0, 1], labels=[1, 0]),
    Case("whole floats", **array([2.0, 1.0]), images=[0, 1], labels=[2, 1]),
    Case("an array of whole floats", **array(np.float32([2, 1])), images=[0, 1], labels=[2, 1]),
    Case("numpy scalars", **array([np.int8(2), np.float64(1)]), images=[0, 1], labels=[2, 1]),
    Case("tensors", **array([torch.tensor(2), torch.tensor(1)]), images=[0, 1], labels=[2, 1]),
    Case("a tensor", **array(torch.tensor([2, 1])), images=[0, 1], labels=[2, 1]),
    Case("a tensor of whole bfloat16", **array(torch.tensor([2, 1.0], dtype=torch.bfloat16)),
         images=[0, 1], labels=[2, 1]),
    Case("unsigned", **array(np.uint8([255, 0])), images=[0, 1], labels=[255, 0]),
    Case("an array of objects", **array(np.array(["b", "a"], object)), images=[0, 1],
         labels=[1, 0], classes=("a", "b")),
    Case("broken floats", **array([0.5, 1.7]), error="got 0.5 for image 0"),
    Case("an array of broken floats", **array(np.array([1, 1.7])), error="got 1.7 for image 1"),
    Case("NaN", **array([1.0, float("nan")]), error="got nan for image 1"),
    Case("below -1", **array([1, -7]), error="got -7 for image 1"),
    Case("larger than 64 bits", **array([1, 1 << 70]), error="from -1 .unlabelled. to 9"),
    Case("unsigned beyond 63 bits", **array(np.uint64([1, 1 << 63])),
         error="from -1 .unlabelled. to 9"),
    Case("one-hot", **array(np.eye(2)), error=r"got \[2, 2\]; of one-hot.*argmax"),
    Case("a column of labels", **array(np.array([[3], [4]])),
         error=r"got \[2, 1\]; pass labels\[:, 0"),
    Case("a one-hot tensor", **array(torch.eye(2)), error=r"one-hot.*argmax"),
    Case("a list of one-hot rows", **array([[1, 0], [0, 1]]), error="labels must be"),
    Case("a list of one-hot arrays", **array([np.eye(2)[0], np.eye(2)[1]]), error="one-hot"),
    Case("strings and numbers", **array(["cow", 1]), error="'cow' and 1"),
    Case("too few", **array([1]), error=r"labels must be \[2\], .*got \[1\]"),
    Case("dicts", **array([{}, {}]), error="got dict"),
    Case("a dict of labels", **array({"0.png": 1, "1.png": 2}), error="got dict"),
    Case("a set of labels", **array({1, 2}), error="got set"),
    Case("a generator of labels", **array(iter([1, 2])), error="got list_iterator"),
    Case("bytes as labels", **array(b"ab"), error="got bytes"),
    Case("complex", **array([1j, 2j]), error="complex"),
    Case("labels replace those of folders", folder(AB), [0, 1], [7, 6], options={"labels": [7, 6]}),
    Case("labels replace those of tars", tar(TWO), [0, 1], [1, 0], ("x", "y"),
         options={"labels": ["y", "x"]}),
    Case("csv", **csv("a/0.png,cow\na/1.png,ant\nb/2.png,cow\n"), images=[0, 1, 2],
         labels=[1, 0, 1], classes=("ant", "cow")),
    Case("csv with a header", **csv("path,label\na/0.png,4\na/1.png,2\nb/2.png,4\n"),
         images=[0, 1, 2], labels=[4, 2, 4]),
    Case("csv with another header", **csv("img,breed name\n0.png,4\n1.png,2\n2.png,4\n"),
         images=[0, 1, 2], labels=[4, 2, 4]),
    Case("csv of names without suffix", **csv("id,breed\n0,pug\n1,boxer\n2,pug\n"),
         images=[0, 1, 2], labels=[1, 0, 1], classes=("boxer", "pug")),
    Case("csv with the label first", **csv("label,file\n4,0.png\n2,1.png\n4,2.png\n"),
         images=[0, 1, 2], labels=[4, 2, 4]),
    Case("csv of names alone", **csv("2.png,1\n0.png,0\n1.png,0\n"), images=[0, 1, 2],
         labels=[0, 0, 1]),
    Case("csv of some images", **csv("0.png,5\n"), images=[0, 1, 2], labels=[5, -1, -1]),
    Case("csv with missing labels", **csv("0.png,5\n1.png,\n2.png,-1\n"), images=[0, 1, 2],
         labels=[5, -1, -1]),
    Case("csv of more images than there are", **csv("0.png,c\n1.png,c\n2.png,b\n9.png,a\n"),
         images=[0, 1, 2], labels=[2, 2, 1], classes=("a", "b", "c")),
    Case("csv with more columns", **csv("id,file,width,label\n7,a/0.png,9,3\n8,a/1.png,9,4\n"
         "9,b/2.png,9,3\n"), images=[0, 1, 2], labels=[3, 4, 3]),
    Case("csv with semicolons and quotes", **csv('"a/0.png";"x;y"\n"a/1.png";"z"\n'),
         images=[0, 1, 2], labels=[0, 1, -1], classes=("x;y", "z")),
    Case("csv with tabs", **csv("0.png\t1\n1.png\t2\n2.png\t1\n"), images=[0, 1, 2],
         labels=[1, 2, 1]),
    Case("csv of Windows", **csv("\ufeffpath,label\r\na\\0.png,1\r\na\\1.png,2\r\nb\\2.png,1\r\n"),
         images=[0, 1, 2], labels=[1, 2, 1]),
    Case("csv with ./", **csv("./a/0.png,1\n./a/1.png,2\n./b/2.png,1\n"), images=[0, 1, 2],
         labels=[1, 2, 1]),
    Case("csv in another normal form", **csv(f"{NFD}.png,1\n", {f"{NFC}.png": 0}), images=[0],
         labels=[1]),
    Case("csv that is not UTF-8", **csv("caf\xe9.png,1\n".encode("latin-1"), {f"{LATIN}.png": 0}),
         images=[0], labels=[1]),
    Case("csv of a tar", **{**csv("d/0,4\nd/1,5\n"), "make": lambda f: (
         csv("d/0,4\nd/1,5\n")["make"](f), tar([("d/0.png", 0), ("d/1.png", 1)])(f))[1]},
         images=[0, 1], labels=[4, 5]),
    Case("csv of pandas", **csv(",path,label\n0,0.png,c\n1,1.png,d\n2,2.png,c\n"),
         images=[0, 1, 2], labels=[0, 1, 0], classes=("c", "d")),
    Case("csv with a strange first label", **csv("0.png,NA\n1.png,c\n2.png,d\n"),
         images=[0, 1, 2], labels=[0, 1, 2], classes=("NA", "c", "d")),
    Case("csv with one name among numbers", **csv("0.png,x\n1.png,2\n2.png,1\n"),
         images=[0, 1, 2], labels=[2, 1, 0], classes=("1", "2", "x")),
    Case("csv with nan among numbers", **csv("0.png,nan\n1.png,2\n2.png,1\n"), error="'nan'"),
    Case("csv in UTF-16", **csv("0.png\t1\r\n1.png\t2\r\n2.png\t1\r\n".encode("utf-16")),
         images=[0, 1, 2], labels=[1, 2, 1]),
    Case("csv with old line ends", **csv("0.png,1\r1.png,2\r2.png,1\r"), images=[0, 1, 2],
         labels=[1, 2, 1]),
    Case("csv with the same line twice", **csv("0.png,1\n0.png,1\n"), images=[0, 1, 2],
         labels=[1, -1, -1]),
    Case("csv with a comma in quotes", **csv('0.png,"a,b"\n1.png,c\n'), images=[0, 1, 2],
         labels=[0, 1, -1], classes=("a,b", "c")),
    Case("csv with spaces", **csv("0.png, c\n1.png, d\n"), images=[0, 1, 2], labels=[0, 1, -1],
         classes=("c", "d")),
    Case("csv with a comma too many", **csv("0.png,1,\n1.png,2,\n"), error="two columns"),
    Case("masked", **array(np.ma.array([3, 4], mask=[True, False])), images=[0, 1],
         labels=[-1, 4]),
    Case("csv with broken numbers", **csv("0.png,0.5\n1.png,1\n"), error="got 0.5 for image 0"),
    Case("csv with two labels for an image", **csv("0.png,1\n0.png,2\n"), error="0.png twice"),
    Case("csv with a name of two images", **csv("0.png,1\n", {"a/0.png": 0, "b/0.png": 1}),
         error="may be .*a/0.png or .*b/0.png"),
    Case("csv of other images", **csv("x.png,1\ny.png,2\n"), error="names none of the images"),
    Case("csv with one column", **csv("0.png\n1.png\n"), error="two columns"),
    Case("an empty csv", **csv(""), error="is empty"),
]  # fmt: skip


class Rows(list):
    """A data set of dicts."""


class WithClasses(list):
    targets, classes = (1, 0), ("ant", "cow")


def image(i):
    return Image.new("RGB", (6, 5), (i, 0, 0))


def joined(*parts):
    return lambda folder: torch.utils.data.ConcatDataset(parts)


def transformed(path):
    return ImageFolder(write(path, AB), target_transform=ten_more)


def ten_more(label):
    return label + 10


PAIRS = WithClasses([(image(0), 1), (image(1), 0)])
DATA_SETS = [
    Case("pairs", lambda f: [(image(0), 4), (image(1), 2)], [0, 1], [4, 2]),
    Case("pairs with names", lambda f: [(image(0), "b"), (image(1), "a")], [0, 1], [1, 0],
         ("a", "b")),
    Case("images alone", lambda f: [image(0), image(1)], [0, 1]),
    Case("dicts", lambda f: Rows({"image": image(i), "label": 5 - i} for i in range(2)), [0, 1],
         [5, 4]),
    Case("dicts without an image", lambda f: Rows([{"x": 1}]), error="keys image"),
    Case("a data set with classes", lambda f: PAIRS, [0, 1], [1, 0], ("ant", "cow")),
    Case("a part of it", lambda f: torch.utils.data.Subset(PAIRS, [1, 0, 1]), [1, 0, 1], [0, 1, 0],
         ("ant", "cow")),
    Case("two of them joined", joined(PAIRS, PAIRS), [0, 1, 0, 1], [1, 0, 1, 0], ("ant", "cow")),
    Case("joined without labels", joined(PAIRS, [image(3)]), [0, 1, 3]),
    Case("labels of a data set replaced", lambda f: PAIRS, [0, 1], [8, 9],
         options={"labels": [8, 9]}),
    Case("broken labels are not needed", lambda f: [(image(0), 0.5), (image(1), 1)], [0, 1]),
    Case("paths and labels", lambda f: [(str(folder(AB)(f) / "a/0.png"), 3)], [0], [3]),
    Case("dicts of paths", lambda f: [{"image": folder(AB)(f) / "a/0.png", "label": 3}], [0], [3]),
    Case("dicts of bytes", lambda f: [{"img": picture(5), "label": 3}], [5], [3]),
    Case("dicts in dicts", lambda f: [{"image": {"bytes": picture(5), "path": None}}], [5]),
    Case("arrays and labels", lambda f: [(pixels(1)[0], 2)], [0], [2]),
    Case("no image in a row", lambda f: [{"image": None, "label": 1}], error="without an image"),
    Case("lists of numbers", lambda f: pixels(1).tolist(), error="got list"),
    Case("tensors", lambda f: [torch.zeros(3, 5, 6)], error="not tensors"),
    Case("images and labels", lambda f: (pixels(2), np.arange(2)), error="labels by labels="),
    Case("one image", lambda f: pixels(1)[0], error=r"one image of .*images\[None\]"),
    Case("images of no size", lambda f: np.zeros((2, 0, 5, 3), np.uint8), error="have pixels"),
    Case("bfloat16", lambda f: (torch.from_numpy(pixels(3)) / 255).bfloat16(), [0, 1, 2]),
    Case("arrays of several sizes", lambda f: np.array([pixels(1)[0], pixels(1)[0][:3]], object),
         [0, 0]),
    Case("negative strides", lambda f: pixels(3)[::-1, ::-1, ::-1], [2, 1, 0]),
    Case("columns first", lambda f: np.asfortranarray(pixels(3)), [0, 1, 2]),
    Case("big-endian", lambda f: (pixels(3) * 257.0).astype(">u2"), [0, 1, 2]),
    Case("int32", lambda f: pixels(3).astype(np.int32), error="got int32"),
    Case("a target_transform", lambda f: transformed(f), [0, 1], [10, 11]),
    Case("a stream", lambda f: type("IterableDataset", (), {})(), error="streams"),
    Case("a dict of data sets", lambda f: {"train": PAIRS}, error="dict of train"),
]  # fmt: skip

CASES = {
    f"{kind}: {case}": case
    for kind, cases in (
        ("folder", FOLDERS),
        ("tar", TARS),
        ("record", RECORDS),
        ("labels", LABELS),
        ("data set", DATA_SETS),
    )
    for case in cases
}


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Make a case's files; return what to open and the options, with DIR for its folder."""
    monkeypatch.setenv("SIMCLR_FAST_CACHE", str(tmp_path / "cache"))

    def make(case):
        folder = tmp_path / "data"
        folder.mkdir()
        options = dict(case.options)
        if isinstance(options.get("labels"), str):
            options["labels"] = options["labels"].replace("DIR", str(folder))
        return case.make(folder), options

    return make


def numbers(source):
    """The numbers of the pictures of a source, as decoded."""
    if source.encoded:
        reader = FileReader(source, 1)
        return [number(reader.decoded(i)) for i in range(len(source))]
    return [number(PixelReader(source, 1).read(np.array([i]))[0][0]) for i in range(len(source))]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_images_labels_and_account_of_a_case(case, opened):
    """Images, labels, classes and account are right, or the error says what is wrong."""
    data, options = opened(case)
    if case.error:
        with pytest.raises((ValueError, FileNotFoundError, TypeError), match=case.error):
            numbers(open_source(data, **options))
        if case.images is None:
            with pytest.raises((ValueError, FileNotFoundError, TypeError), match=case.error):
                numbers(open_source(data, **options, on_error="skip"))
            return
        options["on_error"] = "skip"
    source = open_source(data, **options)
    assert numbers(source) == case.images
    assert (None if source.labels is None else source.labels.tolist()) == case.labels
    assert source.classes == case.classes
    account = source.account
    assert dict(account.left_out) == case.left_out
    assert account.found == account.used + sum(case.left_out.values())
    assert account.used == len(case.images)
    assert bool(account.lost) == bool(case.error)
    assert sum(account.classes.values()) == sum(label >= 0 for label in case.labels or ())
    # Whatever the names are, it can be printed and written.
    text = "\n".join([account.line(), *account.lines(), *map(source.name, range(len(source)))])
    assert text.encode()
    assert json.loads(json.dumps(account.to_json()))["used"] == len(case.images)
    assert len(source.fingerprint()) == 16


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_loaders_show_every_image_of_a_case_once(case, opened):
    """Every image is in an epoch of views once, and in the evaluation's batches in order."""
    if case.images is None:
        return
    data, options = opened(case)
    options["on_error"] = "skip" if case.error else "raise"
    count = len(case.images)
    ((_, _, index),) = TwoViewLoader(data, count, 4, num_threads=1, **options)
    assert sorted(index.tolist()) == list(range(count))
    ((images, index),) = ImageLoader(data, count, Augmentation(size=4), num_threads=1, **options)
    assert index.tolist() == list(range(count))
    shown = (images[:, 0].amax((1, 2)) * 255).round().int().tolist()
    assert shown == case.images


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_commands_workers_and_evaluation_get_the_same(case, opened):
    """By its name as in --data, in another process, and the labelled images of an evaluation."""
    if case.images is None:
        return
    data, options = opened(case)
    options["on_error"] = "skip" if case.error else "raise"
    source = open_source(data, **options)
    if isinstance(data, str | os.PathLike):
        named = named_source(os.fspath(data), **options)
        assert numbers(named) == case.images
        assert named.labels_fingerprint() == source.labels_fingerprint()
        assert named.fingerprint() == source.fingerprint()
        assert named_source(os.fspath(data), "test", **options) is None
    assert numbers(pickle.loads(pickle.dumps(source))) == case.images
    if not source.has_labels:
        with pytest.raises(ValueError, match=r"no labels: \w"):
            source.labelled("no labels")
        return
    known = [i for i, label in enumerate(case.labels) if label >= 0]
    part = source.labelled("no labels")
    assert numbers(part) == [case.images[i] for i in known]
    assert part.labels.tolist() == [case.labels[i] for i in known]
    assert part.account.left_out["unlabelled"] == len(case.images) - len(known)
