"""Writing files, and reading files from elsewhere, in one way for all modules (no jax here).

Files are written under another name in the same folder, then renamed. After a kill, and for any reader, there is the
old content or the new one, never a part of it. With `sync` the bytes are on the disk before the rename, so even a power
cut cannot undo it.

An address in a bucket (`storage`) is written as one object, which replaces the old one completely.

Only regular files are read, since reading a named pipe could wait forever; JSON has a bound on its size. Errors are an
OSError or a ValueError, whose text fits after the file's name.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from io import BufferedReader
from typing import Any

from deepseek_jax import storage, working_files

Path = str | os.PathLike[str]

MOST_JSON = 100_000_000  # bytes; the safetensors library has the same limit for headers
_MOST_LEVELS = 64  # nesting depth of JSON; printing, comparing and writing recurse into it
_KINDS = {stat.S_IFIFO: "Is a named pipe, not a file", stat.S_IFSOCK: "Is a socket, not a file",
          stat.S_IFCHR: "Is a device, not a file", stat.S_IFBLK: "Is a device, not a file"}


@contextlib.contextmanager
def replacing(path: Path, sync: bool = False) -> Iterator[str]:
    """Yields the name of a file to write, which replaces `path` at the end; after an error it is removed.

    For an address, the file is on this machine and becomes the object.

    Raises OSError with the name `path` if it cannot be written.
    """
    if storage.is_remote(path):
        with tempfile.TemporaryDirectory(dir=working_files.scratch()) as folder:
            partial = os.path.join(folder, os.path.basename(path))
            yield partial
            storage.upload(partial, path)
        return
    folder, name = os.path.split(os.path.abspath(path))
    partial = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.new")  # other machines may also write there
    try:
        yield partial
        if sync:
            sync_file(partial)
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        if isinstance(error, OSError) and error.errno and error.filename in (partial, None):
            raise OSError(error.errno, os.strerror(error.errno), os.fspath(path)) from error
        raise


@contextlib.contextmanager
def building(folder: Path, shared: bool = False) -> Iterator[str]:
    """Yields a new folder to fill, which becomes `folder` at the end; after an error nothing is left of it.

    Remains of a killed process's earlier attempt are removed. With `shared` several processes may build the same
    content at once, each under its own name; the first one's is kept.

    For an address, the folder is on this machine and its files become objects, with meta.json last: a reader that
    checks for it first never sees an incomplete folder. Others who build the same content there write the same objects.

    Raises OSError if `folder` exists and is not empty, except with `shared`.
    """
    if storage.is_remote(folder):
        with tempfile.TemporaryDirectory(dir=working_files.scratch()) as partial:
            yield partial
            storage.upload_folder(partial, folder, last=("meta.json",))
        return
    folder = os.path.abspath(folder)
    partial = f"{folder}.{uuid.uuid4().hex[:8]}.partial" if shared else folder + ".partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial)
        yield partial
        try:
            os.rename(partial, folder)
        except OSError:
            if not (shared and os.path.isdir(folder)):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_bytes(path: Path, data: bytes, sync: bool = False) -> None:
    """Replaces the file at `path`."""
    if storage.is_remote(path):
        storage.put(path, data)
        return
    with replacing(path, sync) as partial, open(partial, "wb") as f:
        f.write(data)


def write_text(path: Path, text: str, sync: bool = False) -> None:
    """Replaces the file at `path`, in UTF-8."""
    write_bytes(path, text.encode(), sync)


def write_json(path: Path, value: Any, indent: int | None = 2, sync: bool = False) -> None:
    """Replaces the file at `path` with JSON and a line break."""
    write_text(path, json.dumps(value, indent=indent) + "\n", sync)


class Appended:
    """A file to append to, whose content others can read after each `write`. Errors name it."""

    def __init__(self, path: Path):
        self._path = os.fspath(path)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, data: bytes) -> None:
        """Appends all of it."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._descriptor, view):]
        except OSError as error:  # its message lacks the file's name
            raise OSError(error.errno, error.strerror, self._path) from error

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


def sync_file(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if os.path.isdir(path):  # Windows cannot open folders, and has nothing to flush
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_regular(path: Path) -> None:
    """Raises OSError, with a reason in its strerror, for anything but a regular file or a link to one."""
    if storage.is_remote(path):
        storage.size(path)  # objects are always regular files
        return
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, _KINDS.get(stat.S_IFMT(mode), "Is not a regular file"), os.fspath(path))


def open_regular(path: Path) -> BufferedReader:
    """A regular file, open for reading. Raises OSError for anything else, without opening it."""
    if not storage.is_remote(path):
        check_regular(path)
    return storage.open_file(path)


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises OSError, and ValueError as `parse_json` does."""
    if storage.is_remote(path):
        return parse_json(storage.read_bytes(path))  # in one request: others may write it between two requests
    with open_regular(path) as f:
        return parse_json(f.read(MOST_JSON + 1))


def parse_json(data: bytes) -> Any:
    """The value of JSON in UTF-8; a byte order mark before it is ignored.

    Raises ValueError: not JSON, longer than MOST_JSON, nested too deeply, or an object names a key twice.
    """
    if len(data) > MOST_JSON:
        raise ValueError(f"longer than {MOST_JSON:,} bytes")
    try:
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8, byte {error.start}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(_MOST_LEVELS):
        level = [part for parts in level if isinstance(parts, (dict, list))
                 for part in (parts.values() if isinstance(parts, dict) else parts)]
    if level:
        raise ValueError("nested too deeply")
    return value


def _object(pairs):
    found = {}
    for name, value in pairs:
        if name in found:  # readers differ in which of the two they take
            raise ValueError(f"{name[:80]!r} is there twice")
        found[name] = value
    return found
