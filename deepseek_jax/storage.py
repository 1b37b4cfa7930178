"""Files on disks and objects in buckets, gs:// and s3://, with the same functions (no jax here).

    path ──── an address? ── no ──> os, pathlib
                  └──────── yes ──> fsspec: gcsfs, s3fs

Only this module distinguishes them; others call `is_remote` if they have to. A bucket has only objects with complete
names: no folders, no appending, no renaming. An object is written completely, and readers see all of it or the previous
one. An operation that the store refuses, or that fails after its client's retries, raises a StorageError with one line;
a missing object raises FileNotFoundError, as on a disk.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import pathlib
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

Path = str | os.PathLike[str]

CLIENTS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # scheme -> package, and the extra of setup.py that has it
# Compare the store's checksum with that of the sent data. For S3 the client makes the store do so; reads are not
# compared, since objects uploaded in parts have no MD5.
_CHECKED: dict[str, dict[str, Any]] = {"gs": {"consistency": "md5"}, "s3": {}}
_MANY = 8  # objects, from which on bulk removal pays: it needs a second request to list the rest
THREADS = 16  # objects in flight: a store answers each request slowly, but many at once


class StorageError(Exception):
    """A store refused an operation or could not do it, in one line."""

    def __init__(self, message: str):
        line = " ".join(message.split())
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in line))  # names may have any character


class Entry(NamedTuple):
    """An object. tag: the store's own checksum of its content."""

    size: int
    tag: str


def is_remote(path: Path) -> bool:
    """Whether it is the address of something in a bucket."""
    return re.match(r"(gs|s3)://", os.fspath(path)) is not None


def as_path(path: Path) -> pathlib.Path:
    """A path object, whose parts can be joined; an address stays an address."""
    if not is_remote(path):
        return pathlib.Path(path)
    from etils import epath

    found: Any = epath.Path(path)
    return found


def absolute(path: Path) -> str:
    """A name that does not depend on the current folder."""
    return os.fspath(path) if is_remote(path) else os.path.abspath(path)


def is_file(path: Path) -> bool:
    """Whether there is a regular file or a link to one, or an object."""
    return _kind(path) == "file" if is_remote(path) else os.path.isfile(path)


def is_folder(path: Path) -> bool:
    """Whether there is a folder, or a bucket has objects below this name."""
    return _kind(path) == "directory" if is_remote(path) else os.path.isdir(path)


def exists(path: Path) -> bool:
    """Whether something exists at this name; a broken link does not count."""
    return _kind(path) is not None if is_remote(path) else os.path.exists(path)


def lexists(path: Path) -> bool:
    """Whether something exists at this name, including a broken link."""
    return exists(path) if is_remote(path) else os.path.lexists(path)


def size(path: Path) -> int:
    """Bytes. Raises FileNotFoundError."""
    return _info(path)["size"] if is_remote(path) else os.path.getsize(path)


def version(path: Path) -> str:
    """A value that changes with the content: the store's checksum, or the modification time in nanoseconds."""
    return _entry(_info(path)).tag if is_remote(path) else str(os.stat(path).st_mtime_ns)


def changed(path: Path) -> float:
    """The time when it was written, in seconds of the writer's clock."""
    if not is_remote(path):
        return os.path.getmtime(path)
    info = _info(path)
    return (info.get("mtime") or info["LastModified"]).timestamp()


def names(folder: Path) -> list[str]:
    """The names directly in a folder; [] where there is none."""
    if not is_remote(folder):
        return os.listdir(folder) if os.path.isdir(folder) else []
    with _told(folder):
        fs, key = _client(folder)
        try:
            return [name.rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(key, detail=False) if name != key]
        except FileNotFoundError:
            return []


def entries(folder: Path) -> dict[str, Entry]:
    """{name relative to the address `folder`: Entry} of every object below it.

    Raises StorageError for a name that as a path would be outside the folder, or equal to another's.
    """
    with _told(folder):
        fs, key = _client(folder)
        try:
            found = fs.find(key, detail=True)
        except FileNotFoundError:
            return {}
    # Consoles make an object "folder/" for a folder.
    below = {name.removeprefix(f"{key}/"): info for name, info in found.items() if name != key and name[-1] != "/"}
    for name in below:
        if {"", ".", ".."} & set(name.split("/")):
            raise StorageError(f"{os.fspath(folder)} has an object named {name}, which is no path below it; rename or "
                               "remove it.")
    return {name: _entry(info) for name, info in below.items()}


def glob(address: Path) -> list[str]:
    """The addresses of the objects that a pattern of * ? [] and ** matches, sorted."""
    with _told(address):
        fs, key = _client(address)
        try:
            found = fs.glob(key, detail=True)
        except FileNotFoundError:
            return []
        return sorted(f"{_scheme(address)}://{name}" for name, info in found.items() if info["type"] == "file")


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents, unless they exist. Buckets need none."""
    if not is_remote(folder):
        os.makedirs(folder, exist_ok=True)


def open_file(path: Path) -> Any:
    """A file or object, open for reading bytes, with seek."""
    if not is_remote(path):
        return open(path, "rb")
    with _told(path):
        fs, key = _client(path)
        return _Reading(path, fs.open(key, "rb", cache_type="readahead"))


def read_bytes(path: Path) -> bytes:
    """Raises FileNotFoundError."""
    if not is_remote(path):
        return pathlib.Path(path).read_bytes()
    with _told(path):
        fs, key = _client(path)
        return fs.cat_file(key)


def read_range(address: Path, start: int, stop: int) -> bytes:
    """Bytes start..stop of an object; fewer if it ends earlier."""
    with _told(address):
        fs, key = _client(address)
        return fs.cat_file(key, start=start, end=stop) if stop > start else b""


def read_into(file: Any, view: memoryview, start: int) -> int:
    """Fills a buffer from byte `start` of a file opened by `open_file`, from any thread. Returns the number of
    bytes."""
    if not isinstance(file, _Reading):
        return os.preadv(file.fileno(), [view], start)
    data = read_range(file.name, start, start + len(view))
    view[:len(data)] = data
    return len(data)


def put(address: Path, data: bytes) -> None:
    """Writes a complete object."""
    with _told(address):
        fs, key = _client(address)
        fs.pipe_file(key, bytes(data), **_CHECKED[_scheme(address)])


def create(address: Path, data: bytes) -> bool:
    """Writes an object unless there already is one. Returns whether it was written.

    The store decides (`ifGenerationMatch: 0` of GCS, `If-None-Match: *` of S3); a store that ignores the condition
    always writes.
    """
    with _told(address):
        fs, key = _client(address)
        try:
            fs.pipe_file(key, data, mode="create", **_CHECKED[_scheme(address)])
            return True
        except FileExistsError:
            return False


def upload(file: Path, address: Path) -> None:
    """Writes an object with the content of a file."""
    with _told(address):
        fs, key = _client(address)
        fs.put_file(os.fspath(file), key, **_CHECKED[_scheme(address)])


def upload_folder(folder: Path, address: Path, last: tuple[str, ...] = ()) -> None:
    """Writes an object for each file below a folder. last: names of files that mark it as complete."""
    files = [p for p in pathlib.Path(folder).rglob("*") if p.is_file()]
    for part in ([p for p in files if p.name not in last], [p for p in files if p.name in last]):
        in_parallel(lambda p: upload(p, f"{os.fspath(address)}/{p.relative_to(folder).as_posix()}"), part)


def download(address: Path, file: Path) -> None:
    """Writes a file with the content of an object."""
    with _told(address):
        fs, key = _client(address)
        fs.get_file(key, os.fspath(file))


def download_folder(address: Path, folder: Path) -> None:
    """Writes a file for each object below an address."""
    found = list(entries(address))
    for parent in {os.path.dirname(os.path.join(folder, name)) for name in found}:
        os.makedirs(parent, exist_ok=True)
    in_parallel(lambda name: download(f"{os.fspath(address)}/{name}", os.path.join(folder, name)), found)


def copy(source: Path, target: Path) -> None:
    """Copies a small file or object to an object, or to a file that nobody is reading."""
    data = read_bytes(source)
    put(target, data) if is_remote(target) else pathlib.Path(target).write_bytes(data)


def remove(path: Path) -> None:
    """Removes a file, or a folder with its content, if it exists."""
    if not is_remote(path):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            pathlib.Path(path).unlink(missing_ok=True)
        return
    with _told(path):
        fs, key = _client(path)
        try:
            found = fs.find(key)
        except FileNotFoundError:
            return
        in_parallel(lambda name: _remove_object(fs, name), _remove_many(fs, key, found))


def _remove_many(fs, key, found):
    """Removes many objects per request, if the store supports it. Returns those that are left: clients take some names
    for patterns, and some ignore refusals, which are reported only for single removals."""
    plain = [name for name in found if not re.search(r"[*?[\]]|/$", name)]
    if len(plain) < _MANY:
        return found
    with contextlib.suppress(Exception):  # of any kind; the remaining objects are removed one by one
        fs.rm(plain)
    try:
        return sorted(set(found).intersection(fs.find(key)))
    except FileNotFoundError:
        return []


def _remove_object(fs, name):
    with contextlib.suppress(FileNotFoundError):
        fs.rm_file(name)


def in_parallel(function: Any, items: Any) -> list[Any]:
    """[function(item)] for items, on THREADS threads. Raises the exception of the first one that fails."""
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            return list(pool.map(function, items))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def check_writable(address: Path) -> None:
    """Writes, reads and removes an object below an address; or makes and removes a file in a folder, or in its nearest
    existing parent.

    Raises StorageError if that fails: a package or credentials are missing, there is no such bucket, the store or the
    disk refuses, or the address is a pattern.
    """
    if not is_remote(address):
        _check_disk(pathlib.Path(address).absolute())  # `..` after a link is not resolved
        return
    if found := re.search(r"[*?[\]]", os.fspath(address)):
        raise StorageError(f"{os.fspath(address)} has a {found[0]}, which in the name of an object stands for others; "
                           "take a name without * ? [ ].")
    probe, data = f"{os.fspath(address)}/.probe-{uuid.uuid4().hex}", b"may be removed"
    try:
        put(probe, data)
        back = read_bytes(probe)
        remove(probe)
    except FileNotFoundError:
        bucket = re.match(r"\w+://[^/]*", os.fspath(address))
        raise StorageError(f"there is no bucket {bucket and bucket[0]}, or these credentials may not see it; make it "
                           "first.") from None
    if back != data:
        raise StorageError(f"{os.fspath(address)}: what was written there comes back changed.")


def _check_disk(folder):
    there, missing = folder, []
    while not os.path.lexists(there):
        there, missing = there.parent, [there.name, *missing]
    for name in missing:
        try:
            os.lstat(there / name)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError) as error:  # too long, or with a character that is not allowed
            why = getattr(error, "strerror", None) or error
            raise StorageError(f"{folder} cannot be a folder: {why}; take another name.") from None
    if not os.path.isdir(there):
        raise StorageError(f"{folder} cannot be a folder: {there} is none; take another name.")
    try:
        probe, name = tempfile.mkstemp(prefix=".probe-", dir=there)
        os.close(probe)
        os.unlink(name)
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror} in {there}; take another folder, or make it "
                           "writable.") from error


# The clients.


@functools.cache
def _file_system(scheme, pid):
    """pid: clients have threads, which do not exist in a forked process."""
    for name in ("gcsfs", "s3fs", "botocore", "aiobotocore", "google.auth"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they also raise failures, without tracebacks
    if scheme == "gs":
        # Its core, which treats every bucket as flat: the default first asks for the kind of each bucket, by another
        # protocol that no emulator supports. Listings are never cached, since others write there too.
        import gcsfs.core

        token = "anon" if os.environ.get("STORAGE_EMULATOR_HOST") else None  # an emulator has no accounts
        return gcsfs.core.GCSFileSystem(token=token, use_listings_cache=False, skip_instance_cache=True)
    import s3fs

    return s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)


def _scheme(address):
    return os.fspath(address).split("://")[0]


def _client(address) -> tuple[Any, str]:
    """-> (the file system, the name of the object with its bucket)."""
    scheme, key = os.fspath(address).split("://", 1)
    if not key.strip("/").split("/")[0]:
        raise StorageError(f"{os.fspath(address)} names no bucket; write {scheme}://BUCKET/NAME.")
    return _file_system(scheme, os.getpid()), key.rstrip("/")


@contextlib.contextmanager
def _told(address) -> Iterator[None]:
    """Converts a client's exceptions to FileNotFoundError and StorageError."""
    address = os.fspath(address)
    package, extra = CLIENTS[_scheme(address)]
    try:
        yield
    except (StorageError, FileExistsError):
        raise
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "No such object or bucket", address) from None
    except ModuleNotFoundError:
        raise StorageError(f"{address} needs the package {package}: pip install 'deepseek-jax[{extra}]'.") from None
    except Exception as error:  # clients raise any exception of their libraries
        why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise StorageError(f"{address}: {why[:300].rstrip('. ')}.") from error


def _info(address) -> dict[str, Any]:
    with _told(address):
        fs, key = _client(address)
        return fs.info(key)


def _kind(address):
    """ "file", "directory" or None. A client's own `isfile` is also False if the store does not answer."""
    try:
        return _info(address)["type"]
    except FileNotFoundError:
        return None


def _entry(info) -> Entry:
    return Entry(info["size"] or 0, str(info.get("crc32c") or info.get("ETag") or ""))


class _Reading:
    """An object open for reading, whose errors are those of this module."""

    def __init__(self, address, file):
        self.name, self._file = os.fspath(address), file

    def __getattr__(self, attribute):
        return getattr(self._file, attribute)

    def __iter__(self):
        while line := self.readline():
            yield line

    def read(self, length: int = -1) -> bytes:
        with _told(self.name):
            return self._file.read(length)

    def readline(self) -> bytes:
        with _told(self.name):
            return self._file.readline()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()
