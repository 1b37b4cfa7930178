"""Buckets: data is read back as written, missing objects differ from failures, nothing is visible half-written."""

import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import pytest

from deepseek_jax import io, storage, working_files
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


def test_of_a_name_that_is_a_pattern_only_the_object_so_named_is_removed(address):
    siblings = ["lr0/config.json", "lr1/config.json", "lr[01]/config.json", "lr[01]-b/config.json", "lr*"]
    for name in siblings:
        storage.put(f"{address}/{name}", b"x")
    for name in "lr[01]", "lr*":
        storage.remove(f"{address}/{name}")
    assert sorted(storage.entries(address)) == ["lr0/config.json", "lr1/config.json", "lr[01]-b/config.json"]


def put_many(address, count=40):
    names = [*(f"state/c.{i}" for i in range(count)), "state/odd[0-9]*?", "meta.json"]
    for name in names:
        storage.put(f"{address}/{name}", b"x")
    storage.put(f"{address}-b", b"x")
    return names


def removals(store):
    return [path for method, path in store.requests if method == "DELETE" or "?delete" in path or "/batch" in path]


def test_many_objects_are_removed_by_few_requests_and_none_else(address, store, monkeypatch):
    put_many(address)
    if store.scheme == "gs":  # the client does not send such requests to emulators
        monkeypatch.setattr(type(storage._client(address)[0]), "on_google", True)
    store.requests.clear()
    storage.remove(address)
    assert storage.entries(address) == {} and storage.exists(f"{address}-b")
    assert len(removals(store)) == 2  # one of these is for the name that is a pattern


@pytest.mark.parametrize("fault", [PermissionError("no such operation"), None])
def test_what_a_request_for_many_leaves_is_removed_one_by_one(address, store, monkeypatch, fault):
    names, asked = put_many(address), []

    def leaves_all(paths):
        asked.extend(paths)
        if fault:
            raise fault

    monkeypatch.setattr(storage._client(address)[0], "rm", leaves_all)
    storage.remove(address)
    assert len(asked) == len(names) - 1 and storage.entries(address) == {}


def test_what_the_store_keeps_of_many_objects_is_an_error(address, store, monkeypatch):
    names = put_many(address)
    monkeypatch.setattr(store, "keeps_all", True)
    with pytest.raises(storage.StorageError, match=f"^{address}: "):
        storage.remove(address)
    assert sorted(storage.entries(address)) == sorted(names)


def test_a_store_that_refuses_one_request_in_three_removes_all_the_same(address, store, impatient):
    put_many(address)
    with store.refusing(3):
        storage.remove(address)
    assert store.faults and storage.entries(address) == {}


def test_where_nothing_may_be_removed_or_the_name_is_a_pattern_no_run_begins(address, store, monkeypatch):
    monkeypatch.setattr(store, "keeps_all", True)
    with pytest.raises(storage.StorageError, match=rf"^{address}/.probe-\w+: "):
        storage.check_writable(address)
    monkeypatch.setattr(store, "keeps_all", False)
    for name in "lr[01]", "lr0]", "run?", "run*":
        with pytest.raises(storage.StorageError, match=r"stands for others; take a name without \* \? \[ \]\."):
            storage.check_writable(f"{address}/{name}")


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
    assert len(written) == 3 and ("meta.json" in written[-1] or store.scheme == "gs")  # GCS sends the name in the body
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


@pytest.mark.parametrize("write", [storage.put, storage.create, lambda to, data: storage.upload(_file(data), to)])
def test_what_is_garbled_on_the_way_to_gcs_is_an_error(write, monkeypatch):  # the emulator of S3 does not check it
    store = stores()["gs"]
    monkeypatch.setattr(store, "garbled", (b"content", b"contend"))
    with pytest.raises(storage.StorageError, match="(?i)checksum"):
        write(f"{store.address()}/x", b"the content")


def _file(data):
    path = pathlib.Path(working_files.scratch(), "file")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["../x", "a/../../x", "a//x", "/x", "./x"])
def test_a_name_that_leads_out_of_a_folder_is_refused(name, monkeypatch, tmp_path):
    found = {"bucket/run/y": {"size": 1}, f"bucket/run/{name}": {"size": 1}}
    monkeypatch.setattr(storage._client("s3://bucket/run")[0], "find", lambda *_, **__: found)
    with pytest.raises(storage.StorageError, match=f"^s3://bucket/run has an object named {name}, which is no path"):
        storage.download_folder("s3://bucket/run", tmp_path / "here")
    assert os.listdir(tmp_path) == []


def test_what_a_console_makes_for_a_folder_is_no_file(monkeypatch):
    found = {"bucket/run/": {"size": 0}, "bucket/run/a/": {"size": 0}, "bucket/run/a/x": {"size": 1}}
    monkeypatch.setattr(storage._client("s3://bucket/run")[0], "find", lambda *_, **__: found)
    assert list(storage.entries("s3://bucket/run")) == ["a/x"]


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


def test_a_broken_link_is_there_only_for_who_asks_for_links(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    assert storage.lexists(link) and not storage.exists(link)


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
    mirror = working_files.Mirror(address, ("log.txt", "loads"), interval=0.05)
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
    mirror.drop("loads")
    mirror.close()
    assert storage.read_bytes(f"{address}/log.txt") == b"one\ntwo\n" and list(storage.entries(address)) == ["log.txt"]
    assert not os.path.exists(mirror.folder)
    again = working_files.Mirror(address, ("log.txt", "loads"))
    assert pathlib.Path(again.folder, "log.txt").read_text() == "one\ntwo\n"
    again.close()


def test_what_others_remove_among_the_temporary_files_stays_in_the_bucket(address):
    mirror = working_files.Mirror(address, ("log.txt", "loads"), interval=3600)
    pathlib.Path(mirror.folder, "log.txt").write_text("one")
    pathlib.Path(mirror.folder, ".log.txt.0.new").write_text("half")
    mirror.flush()
    os.unlink(os.path.join(mirror.folder, "log.txt"))
    mirror.flush()
    shutil.rmtree(mirror.folder)
    with pytest.raises(storage.StorageError, match=f"^{mirror.folder}, where what goes to {address} .* been removed"):
        mirror.close()
    assert {name: entry.size for name, entry in storage.entries(address).items()} == {"log.txt": 3}


def test_a_file_that_goes_while_it_is_copied_ends_no_copying(address, monkeypatch):
    mirror, seen = working_files.Mirror(address, ("a",), interval=0.01), threading.Event()
    state = working_files.Mirror._state

    def gone(self, name):
        if not seen.is_set():
            seen.set()
            raise FileNotFoundError(name)
        return state(self, name)

    monkeypatch.setattr(working_files.Mirror, "_state", gone)
    pathlib.Path(mirror.folder, "a").write_text("a")
    assert seen.wait(60)
    deadline = time.monotonic() + 60
    while not storage.entries(address):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    mirror.close()


def test_working_files_of_another_machine_and_entries_that_are_none_stay(tmp_path, monkeypatch):
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    here = os.path.basename(working_files.scratch()).split("-")[1]
    theirs, ours, link = (f"deepseek_jax-{where}-{gone.pid}-{end}" for where, end in
                          (("0123456789ab", "x"), (here, "x"), (here, "link")))
    for name in theirs, ours:
        (tmp_path / name).mkdir()
    (tmp_path / link).symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(storage.tempfile, "tempdir", str(tmp_path))
    working_files._scratch.__wrapped__(os.getpid())
    assert theirs in os.listdir(tmp_path) and ours not in os.listdir(tmp_path)


def test_a_process_that_ends_at_once_leaves_no_working_files(tmp_path):
    code = ("import os; from deepseek_jax import stop, working_files; print(os.listdir(working_files.scratch())); "
            "stop.leave(75)")
    ended = subprocess.run([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)}, check=False,
                           capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (75, "[]\n") and os.listdir(tmp_path) == []


def test_an_error_is_one_line_of_characters_that_a_terminal_shows():
    assert str(storage.StorageError("gs://b/\x1b[2J\nx: no.")) == r"gs://b/\x1b[2J x: no."


def test_a_process_leaves_no_working_files_and_the_next_removes_those_of_a_killed_one(tmp_path):
    code = "from deepseek_jax import working_files; print(working_files.scratch(), flush=True); "
    start = lambda rest: subprocess.Popen([sys.executable, "-c", code + rest], stdout=subprocess.PIPE, text=True,
                                          env=os.environ | {"TMPDIR": str(tmp_path)})
    with start("import time; time.sleep(600)") as killed:
        left = killed.stdout.readline().strip()
        killed.kill()
    assert os.path.isdir(left)
    pool = "from concurrent.futures import ProcessPoolExecutor as Pool; import multiprocessing; " \
           "print(Pool(1, multiprocessing.get_context('spawn')).submit(working_files.scratch).result())"
    with start(pool) as other:
        said, _ = other.communicate()
        assert other.returncode == 0 and len({*said.split(), left}) == 3
    assert os.listdir(tmp_path) == []
