"""The one way files and folders are written: next to their place under another name, then renamed (no jax here).

A reader, or a kill, finds the old content or the new one, never a part of it. With `sync` the bytes are on the disk
before the rename: a power cut cannot undo it either.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from typing import Any

Path = str | os.PathLike[str]


@contextlib.contextmanager
def replacing(path: Path, sync: bool = False) -> Iterator[str]:
    """Yields the name of a file to write, which takes the place of `path` at the end; after an error it is removed.

    Raises OSError with the name `path` where it cannot be written.
    """
    folder, name = os.path.split(os.path.abspath(path))
    partial = os.path.join(folder, f".{name}.{os.getpid()}.new")
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

    What a killed process left of an earlier try is removed. With `shared` several processes may build the same content
    at once, each under a name of its own; the first one's is kept.

    Raises OSError where `folder` exists and is not empty, but with `shared`.
    """
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
    with replacing(path, sync) as partial, open(partial, "wb") as f:
        f.write(data)


def write_text(path: Path, text: str, sync: bool = False) -> None:
    """Replaces the file at `path`, in UTF-8."""
    write_bytes(path, text.encode(), sync)


def write_json(path: Path, value: Any, indent: int | None = 2, sync: bool = False) -> None:
    """Replaces the file at `path` with JSON and a line break."""
    write_text(path, json.dumps(value, indent=indent) + "\n", sync)


def sync_file(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if os.path.isdir(path):  # Windows opens no folders, and has nothing to bring there
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
