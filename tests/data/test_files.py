"""A folder and a glob of it give the same files, each real file once, also with links and pipes among them."""

import os
import signal
import socket

import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.data import corpus
from deepseek_jax.data.files import find


@pytest.fixture(autouse=True)
def soon():
    """Makes code that waits for a pipe, or follows a loop of links, fail instead."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("took too long"))
    signal.alarm(20)
    yield
    signal.alarm(0)


def put(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"the text of {name}\n")


def names(path):
    return [f.name for f in corpus.list_files(str(path))]


def both(root):
    """The names found by a folder and by a glob of everything in it; checks that they are the same."""
    globs = [names(root / "**"), names(root / "**/*"), names(root / "**/**/*.txt"), names(root / "**/*.txt")]
    assert all(found == names(root) for found in globs)
    return names(root)


def test_linked_folders_and_files_are_followed(tmp_path):
    put(tmp_path / "far", "z.txt", "deep/y.txt", ".hidden/x.txt")
    put(tmp_path / "here", "a.txt")
    (tmp_path / "here/link").symlink_to(tmp_path / "far")
    (tmp_path / "here/b.txt").symlink_to(tmp_path / "far/deep/y.txt")
    # y has two names here, both of them links: the first counts.
    assert both(tmp_path / "here") == ["a.txt", "b.txt", "link/z.txt"]


def test_a_loop_of_links_ends_and_a_file_keeps_its_own_name(tmp_path):
    put(tmp_path, "m/a.txt", "m/b.txt")
    for link in ("m/again", "m/other", "a_link"):
        (tmp_path / link).symlink_to(tmp_path)
    (tmp_path / "a_first.txt").symlink_to(tmp_path / "m/b.txt")
    (tmp_path / "itself.txt").symlink_to(tmp_path / "itself.txt")
    assert both(tmp_path) == ["itself.txt", "m/a.txt", "m/b.txt"]


def test_a_pattern_may_lead_through_a_link_to_a_folder_that_has_another_name(tmp_path):
    put(tmp_path, "real/a.txt", "b.txt")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert names(tmp_path / "l*/*.txt") == ["link/a.txt"]
    assert names(tmp_path / "**/l*/*.txt") == ["link/a.txt"]
    assert names(tmp_path / "link") == ["a.txt"]
    assert names(tmp_path / "*/*.txt") == ["real/a.txt"]


def test_a_link_with_a_known_ending_is_read_where_its_target_has_none(tmp_path):
    put(tmp_path, "blobs/0a1b")
    (tmp_path / "rows.txt").symlink_to(tmp_path / "blobs/0a1b")
    assert names(tmp_path) == ["rows.txt"]
    assert corpus.ignored_files(str(tmp_path)) == []


def test_globs_of_a_relative_path(tmp_path, monkeypatch):
    put(tmp_path, "a.txt", "d/b.txt", "d/e/c.txt", "d/__pycache__/p.txt", "d/.git/g.txt")
    monkeypatch.chdir(tmp_path)
    assert names("**/*.txt") == names("**") == names(".") == ["a.txt", "d/b.txt", "d/e/c.txt"]
    assert names("d/**/*.txt") == ["b.txt", "e/c.txt"]
    assert names("d/**/e/*") == ["e/c.txt"]
    assert names("[a]*") == ["a.txt"]


def test_what_is_no_file_is_named_skipped_and_counted(tmp_path):
    put(tmp_path, "good.txt", "more.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "null.md").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(os.path.relpath(tmp_path / "socket.py"))
    counts, warnings = corpus.Counts(), []
    files = corpus.list_files(str(tmp_path))
    documents = list(corpus.read_documents(files, counts, warnings.append))
    assert [d.name for d in documents] == ["good.txt", "more.txt"]
    assert (counts.files, counts.skipped) == (6, 4)
    assert warnings == ["skipped gone.jsonl: No such file or directory",
                        "skipped null.md: Is a device, not a file",
                        "skipped pipe.txt: Is a named pipe, not a file",
                        "skipped socket.py: Is a socket, not a file"]
    assert corpus.digest(files) == corpus.digest(corpus.list_files(str(tmp_path / "*")))


def test_a_pipe_that_is_named_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(ConfigError, match=r"pipe.txt cannot be read: Is a named pipe, not a file"):
        corpus.list_files(str(tmp_path / "pipe.txt"))


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    put(tmp_path, "a.txt", "locked/b.txt")
    scandir = os.scandir

    def refusing(path):
        if os.path.basename(path) == "locked":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert [(f.name, f.fault) for f in find(str(tmp_path), lambda name: True)] == [
        ("a.txt", ""), ("locked", "Permission denied")]


def test_names_that_are_not_utf8_are_read_and_hashed_by_their_bytes(tmp_path):
    put(tmp_path, "a.txt")
    with open(os.fsencode(tmp_path) + b"/caf\xe9.txt", "wb") as f:
        f.write(b"coffee")
    os.mkdir(os.fsencode(tmp_path) + b"/\xff")
    with open(os.fsencode(tmp_path) + b"/\xff/b.txt", "wb") as f:
        f.write(b"below")
    files = corpus.list_files(str(tmp_path))
    assert [os.fsencode(f.name) for f in files] == [b"a.txt", b"caf\xe9.txt", b"\xff/b.txt"]
    assert len({corpus.hash_position(f.name) for f in files}) == 3 and corpus.digest(files)
    assert [d.parts[0][0] for d in corpus.read_documents(files)][1:] == ["coffee", "below"]
