"""Data at addresses: copied once, checked, and read like local data."""

import functools
import http.server
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import write_photos

from simclr_fast.data import remote
from simclr_fast.data.datasets import open_source
from simclr_fast.data.remote import fetched, is_address


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIMCLR_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def memory():
    """An object store in memory that counts what is read from it."""
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def put_photos(system, tmp_path, base="/bucket/photos"):
    photos = write_photos(tmp_path / "photos", 4)
    for path in photos.rglob("*.jpg"):
        name = f"{base}/{path.relative_to(photos)}"
        system.pipe_file(name, path.read_bytes())
    return photos


def test_a_folder_has_the_images_and_classes_of_a_local_one(memory, tmp_path, monkeypatch):
    local = open_source(put_photos(memory, tmp_path))
    source = open_source("memory://bucket/photos/")
    assert source.classes == local.classes
    np.testing.assert_array_equal(source.labels, local.labels)
    assert [bytes(source.read(i)) for i in range(4)] == [bytes(local.read(i)) for i in range(4)]
    with monkeypatch.context() as patch:
        # A second time nothing is copied.
        patch.setattr(remote, "_copy", None)
        assert len(open_source("memory://bucket/photos/")) == 4
    # A file of another size is copied again.
    memory.pipe_file("/bucket/photos/class0/0.jpg", bytes(local.read(1)) + b"x")
    assert bytes(open_source("memory://bucket/photos/").read(0)).endswith(b"x")


def test_patterns_and_lists_of_addresses(memory, tmp_path):
    put_photos(memory, tmp_path)
    assert len(open_source("memory://bucket/photos/class*/*.jpg")) == 4
    assert len(open_source("memory://bucket/photos/class{0,1}/[01].jpg")) == 2


def test_what_is_not_there_is_named(memory):
    with pytest.raises(FileNotFoundError, match="nothing is at memory://bucket/none"):
        open_source("memory://bucket/none*.tar")


def test_a_file_that_arrives_in_part_is_not_kept(memory, tmp_path, cache, monkeypatch):
    put_photos(memory, tmp_path)
    monkeypatch.setattr(memory, "get_file", lambda name, to: Path(to).write_bytes(b"half"))
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda address: (memory, "/bucket/photos/"))
    with pytest.raises(OSError, match="was cut off: 4 of"):
        fetched("memory://bucket/photos/")
    assert not list(cache.rglob("*.jpg"))


def test_a_server_may_not_write_elsewhere(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_names", lambda *_: ["/bucket/../../evil.jpg"])
    with pytest.raises(ValueError, match="outside of its folder"):
        fetched("memory://bucket/")


def test_only_addresses_are_addresses():
    assert is_address("s3://a/b.tar")
    assert is_address("https://host/a.tar")
    assert not any(map(is_address, ("photos/", "/a/b", "cifar10:data", "C:\\photos", "demo")))


def test_a_web_server_on_loopback(tmp_path):
    pytest.importorskip("aiohttp")
    photos = write_photos(tmp_path / "photos", 4)
    (tmp_path / "web").mkdir()
    with tarfile.open(tmp_path / "web" / "a.tar", "w") as archive:
        for path in sorted(photos.rglob("*.jpg")):
            archive.add(path, path.name)

    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.command)

    handler = functools.partial(Handler, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/a.tar"
        source = open_source(address)
        assert len(source) == 4
        assert bytes(source.read(0)) == (photos / "class0" / "0.jpg").read_bytes()
        first = asked.count("GET")
        assert len(open_source(address)) == 4
        # Only asked for its size.
        assert asked.count("GET") - first <= 1
        with pytest.raises(FileNotFoundError, match=r"nothing is at http://127\.0\.0\.1"):
            open_source(address.replace("a.tar", "b.tar"))
        server.shutdown()
