"""Files and folders appear complete or not at all, and an error names the file that could not be written."""

import json
import os

import pytest

from deepseek_jax import io


def test_a_reader_finds_the_old_content_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    io.write_text(path, "old")
    with io.replacing(path) as partial:
        with open(partial, "w") as f:
            f.write("ne")
        assert path.read_text() == "old"
        with open(partial, "a") as f:
            f.write("w")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_the_old_file_stays_and_nothing_else(tmp_path, error):
    io.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(error), io.replacing(tmp_path / "a.txt") as partial:
        open(partial, "w").close()
        raise error
    assert (tmp_path / "a.txt").read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_an_error_names_the_destination(tmp_path):
    path = str(tmp_path / "missing" / "a.json")
    with pytest.raises(FileNotFoundError) as caught:
        io.write_json(path, {})
    assert caught.value.filename == path and ".new" not in str(caught.value)
    (tmp_path / "folder" / "full").mkdir(parents=True)
    with pytest.raises(OSError) as caught:
        io.write_text(tmp_path / "folder", "a folder is in the way")
    assert caught.value.filename == str(tmp_path / "folder") and os.listdir(tmp_path) == ["folder"]


def test_a_full_disk_is_said_of_the_destination(tmp_path):
    with pytest.raises(OSError) as caught, io.replacing(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    assert (caught.value.errno, caught.value.filename) == (28, str(tmp_path / "a"))


def test_an_error_of_another_file_is_left_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, io.replacing(tmp_path / "a"):
        (tmp_path / "another").read_text()
    assert caught.value.filename == str(tmp_path / "another")


@pytest.mark.parametrize("sync", [False, True])
def test_bytes_and_json_come_back(tmp_path, sync):
    io.write_bytes(tmp_path / "a", b"\0\xff", sync)
    io.write_json(tmp_path / "b", {"ü": [1, None]}, sync=sync)
    assert (tmp_path / "a").read_bytes() == b"\0\xff"
    assert json.loads((tmp_path / "b").read_text()) == {"ü": [1, None]}
    assert (tmp_path / "b").read_text().endswith("}\n")


def test_a_synced_file_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    order = []
    rename = os.replace
    monkeypatch.setattr(io, "sync_file", lambda path: order.append("sync"))
    monkeypatch.setattr(os, "replace", lambda old, new: (order.append("rename"), rename(old, new)))
    io.write_text(tmp_path / "a", "", sync=True)
    assert order == ["sync", "rename"]


def test_a_folder_appears_complete_and_removes_what_a_killed_process_left(tmp_path):
    folder = tmp_path / "made"
    (tmp_path / "made.partial").mkdir()
    (tmp_path / "made.partial" / "old").write_text("")
    with io.building(folder) as partial:
        io.write_text(os.path.join(partial, "new"), "")
        assert not folder.exists()
    assert os.listdir(folder) == ["new"] and os.listdir(tmp_path) == ["made"]


def test_of_a_folder_that_failed_nothing_is_left(tmp_path):
    with pytest.raises(ValueError), io.building(tmp_path / "made") as partial:
        io.write_text(os.path.join(partial, "a"), "")
        raise ValueError
    assert os.listdir(tmp_path) == []


def test_a_folder_with_files_is_never_replaced(tmp_path):
    io.write_text(tmp_path / "a", "kept")
    with pytest.raises(OSError), io.building(tmp_path):
        pass
    assert (tmp_path / "a").read_text() == "kept"


def test_a_folder_that_cannot_be_opened_is_not_synced_and_a_file_is_an_error(tmp_path, monkeypatch):
    """Windows cannot open folders."""
    def no_folders(path, flags):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(io.os, "open", no_folders)
    io.sync_file(tmp_path)
    with pytest.raises(PermissionError):
        io.sync_file(tmp_path / "file")


def test_of_two_that_build_the_same_folder_the_first_wins_and_nothing_else_is_left(tmp_path):
    folder = tmp_path / "made"
    with io.building(folder, shared=True) as slow, io.building(folder, shared=True) as fast:
        io.write_text(f"{slow}/a", "slow")
        io.write_text(f"{fast}/a", "fast")
    assert (folder / "a").read_text() == "fast"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("data, words", [
    (b"{", "line 1"), (b"[" * 10**5, "nested too deeply"), (b"[" * 65 + b"]" * 65, "nested too deeply"),
    (b'"\xe9"', "not UTF-8, byte 1"), (b'{"a": {"b": 1, "c": 2, "b": 3}}', "'b' is there twice"),
    (b"1" * 5000, "5000 digits"), (b" " * 100_000_001, "longer than 100,000,000 bytes")])
def test_json_that_no_reader_should_trust_is_refused(data, words):
    with pytest.raises(ValueError, match=words):
        io.parse_json(data)


def test_json_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": [1]}')
    assert io.read_json(tmp_path / "a.json") == {"a": [1]}


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for path, why in ((tmp_path / "pipe", "Is a named pipe, not a file"), (tmp_path, "Is a directory"),
                      ("/dev/null", "Is a device, not a file"), (tmp_path / "none", "No such file or directory")):
        with pytest.raises(OSError) as caught:
            io.open_regular(path)
        assert (caught.value.strerror, caught.value.filename) == (why, str(path))
    with io.open_regular(tmp_path / "link") as f:
        assert f.read() == b"text"
