"""Buckets: what is written is read back, what is not there is told from what fails, nothing is half there."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from deepseek_jax import io, storage
from tests.buckets import SCHEMES, stores


@pytest.fixture(params=SCHEMES)
def store(request):
    return stores()[request.param]


@pytest.fixture
def address(store):
    return store.address()


def test_an_object_is_what_was_written_last_and_a_folder_what_is_below_a_name(address):
    for content in (b"first", b"second"):
        storage.put(f"{address}/a/b.txt", content)
    io.write_json(f"{address}/a.json", {"x": 1})
    assert storage.read_bytes(f"{address}/a/b.txt") == b"second" and io.read_json(f"{address}/a.json") == {"x": 1}
    assert storage.read_range(f"{address}/a/b.txt", 1, 4) == b"eco"
    assert {name: entry.size for name, entry in storage.entries(address).items()} == {"a/b.txt": 6, "a.json": 13}
    assert sorted(storage.names(address)) == ["a", "a.json"] and storage.names(f"{address}/none") == []
    assert storage.is_folder(f"{address}/a") and not storage.is_file(f"{address}/a")
    assert storage.is_file(f"{address}/a.json") and not storage.exists(f"{address}/a/c")
    with storage.open_file(f"{address}/a/b.txt") as f:
        f.seek(3)
        assert f.read() == b"ond"
    storage.remove(f"{address}/a")
    assert list(storage.entries(address)) == ["a.json"]
    storage.remove(f"{address}/a")  # again


def test_what_is_not_there_is_no_fault_of_the_store(address):
    for ask in (storage.read_bytes, storage.size, lambda a: storage.open_file(a).read(1)):
        with pytest.raises(FileNotFoundError):
            ask(f"{address}/none")
    assert storage.entries(address) == {} and storage.glob(f"{address}/*.txt") == []


def test_a_store_that_does_not_say_whether_something_is_there_is_an_error(address, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(storage._client(address)[0], "info", refuse)
    for ask in (storage.is_file, storage.is_folder, storage.exists, storage.size):
        with pytest.raises(storage.StorageError, match=f"{address}/x: Access Denied"):
            ask(f"{address}/x")


def test_a_changed_object_has_another_version(address):
    storage.put(f"{address}/x", b"aaaa")
    before = storage.version(f"{address}/x")
    storage.put(f"{address}/x", b"aaab")
    assert before and storage.version(f"{address}/x") != before


def test_folders_go_there_and_back_with_their_markers_last(address, store, tmp_path):
    for name in ("meta.json", "train/tokens.bin", "validation/tokens.bin"):
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_text(name)
    store.requests.clear()
    storage.upload_folder(tmp_path / "from", address, last=("meta.json",))
    written = [path for method, path in store.requests if method in ("PUT", "POST")]
    assert len(written) == 3 and ("meta.json" in written[-1] or store.scheme == "gs")  # GCS has the name in the body
    storage.download_folder(address, tmp_path / "to")
    there = lambda root: {str(p.relative_to(root)): p.read_text() for p in root.rglob("*") if p.is_file()}
    assert there(tmp_path / "to") == there(tmp_path / "from")


@pytest.mark.parametrize("scheme", ["s3"])  # the emulator of GCS ignores the condition
def test_only_one_creates_an_object(scheme):
    address = stores()[scheme].address()
    assert storage.create(f"{address}/lock", b"1") and not storage.create(f"{address}/lock", b"2")
    assert storage.read_bytes(f"{address}/lock") == b"1"


def test_a_store_that_refuses_one_request_in_ten_loses_nothing(address, store, impatient):
    with store.refusing(10):
        storage.in_parallel(lambda i: storage.put(f"{address}/{i}", b"x" * i), range(30))
        assert {name: e.size for name, e in storage.entries(address).items()} == {str(i): i for i in range(30)}
        assert store.faults >= 3


def test_a_bucket_that_is_not_there_is_one_line(store):
    with pytest.raises(storage.StorageError, match=f"there is no bucket {store.scheme}://other, or these credentials"):
        storage.check_writable(f"{store.scheme}://other/run")
    with pytest.raises(storage.StorageError, match=f"names no bucket; write {store.scheme}://BUCKET/NAME"):
        storage.is_file(f"{store.scheme}://")


def test_a_place_that_can_be_written_keeps_no_probe(address):
    storage.check_writable(address)
    assert storage.entries(address) == {}


@pytest.mark.parametrize("scheme, extra", [("gs", "gcs"), ("s3", "s3")])
def test_a_missing_package_is_named_with_its_extra(scheme, extra, monkeypatch):
    storage._file_system.cache_clear()
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(storage.StorageError, match=rf"needs the package .*: pip install 'deepseek-jax\[{extra}\]'"):
        storage.is_file(f"{scheme}://bucket/x")


def test_a_file_becomes_an_object_and_nothing_stays_here(address):
    with io.replacing(f"{address}/picture.png") as partial:
        pathlib.Path(partial).write_bytes(b"png")
    assert storage.read_bytes(f"{address}/picture.png") == b"png" and not os.path.exists(partial)
    with pytest.raises(ZeroDivisionError), io.replacing(f"{address}/picture.png") as partial:
        pathlib.Path(partial).write_bytes(b"other")
        raise ZeroDivisionError
    assert storage.read_bytes(f"{address}/picture.png") == b"png" and not os.path.exists(partial)


def test_a_folder_that_is_built_counts_when_its_last_object_is_there(address, store, monkeypatch):
    order, upload = [], storage.upload
    monkeypatch.setattr(storage, "upload", lambda file, to: (order.append(to), upload(file, to)))
    with io.building(address, shared=True) as partial:
        for name in ("meta.json", "a", "z"):
            pathlib.Path(partial, name).write_text(name)
    assert order[2] == f"{address}/meta.json" and len(order) == 3 and not os.path.exists(partial)


def test_a_mirror_has_whole_files_in_the_bucket_and_continues_from_them(address):
    mirror = storage.Mirror(address, ("log.txt", "loads"), interval=0.05)
    log = pathlib.Path(mirror.folder, "log.txt")
    log.write_text("one\n")
    (log.parent / "loads").mkdir()
    (log.parent / "loads/a").write_text("a")
    deadline = time.monotonic() + 60
    while len(storage.entries(address)) < 2:  # by itself
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with open(log, "a") as f:
        f.write("two\n")
    (log.parent / "loads/a").unlink()
    mirror.close()
    assert storage.read_bytes(f"{address}/log.txt") == b"one\ntwo\n" and list(storage.entries(address)) == ["log.txt"]
    assert not os.path.exists(mirror.folder)
    again = storage.Mirror(address, ("log.txt", "loads"))
    assert pathlib.Path(again.folder, "log.txt").read_text() == "one\ntwo\n"
    again.close()


def test_a_process_leaves_no_working_files_and_the_next_removes_those_of_a_killed_one(tmp_path):
    code = "from deepseek_jax import storage; print(storage.scratch(), flush=True); "
    start = lambda rest: subprocess.Popen([sys.executable, "-c", code + rest], stdout=subprocess.PIPE, text=True,
                                          env=os.environ | {"TMPDIR": str(tmp_path)})
    with start("import time; time.sleep(600)") as killed:
        left = killed.stdout.readline().strip()
        killed.kill()
    assert os.path.isdir(left)
    pool = "from concurrent.futures import ProcessPoolExecutor as Pool; import multiprocessing; " \
           "print(Pool(1, multiprocessing.get_context('spawn')).submit(storage.scratch).result())"
    with start(pool) as other:
        said, _ = other.communicate()
        assert other.returncode == 0 and len({*said.split(), left}) == 3
    assert os.listdir(tmp_path) == []
