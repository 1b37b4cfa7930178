"""Temporary files of a process on this machine, and local files that are mirrored to a bucket (no jax here)."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import multiprocessing.util
import os
import pathlib
import re
import shutil
import socket
import tempfile
import threading
import time
import urllib.parse

from deepseek_jax import storage

_SCRATCH = "deepseek_jax-"


class Mirror:
    """Local files that are appended to and mirrored to a bucket: changed files are uploaded completely, every
    `interval` seconds (or every 20 upload times, if that is longer) and in `flush`.

    Args:
      address: the objects' folder.
      names: of the files and folders that are mirrored; those already in the bucket are downloaded first.
    """

    def __init__(self, address: str, names: tuple[str, ...], interval: float = 30):
        self.address, self.folder, self.interval = address, tempfile.mkdtemp(dir=scratch()), interval
        there = [name for name in names if storage.is_file(f"{address}/{name}")]
        there += [f"{name}/{below}" for name in names for below in storage.entries(f"{address}/{name}")]
        for name in there:
            os.makedirs(os.path.dirname(os.path.join(self.folder, name)), exist_ok=True)
            storage.download(f"{address}/{name}", os.path.join(self.folder, name))
        self._kept, self._dropped = {name: self._state(name) for name in there}, set()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def drop(self, name: str) -> None:
        """Removes a file or a folder here, and with the next flush in the bucket. Files that disappear here in any
        other way stay in the bucket: temporary files may be cleaned up by others."""
        with self._lock:
            storage.remove(os.path.join(self.folder, name))
            self._dropped |= {kept for kept in self._kept if kept == name or kept.startswith(f"{name}/")}

    def flush(self) -> None:
        """Returns when the bucket has the content of the files. Raises StorageError, also if the files are gone."""
        with self._lock:
            if not os.path.isdir(self.folder):
                raise storage.StorageError(f"{self.folder}, where what goes to {self.address} is written first, has "
                                           "been removed; what is in the bucket stays as it is. Set TMPDIR to a folder "
                                           "that nobody cleans up.")
            files = [p for p in pathlib.Path(self.folder).rglob("*") if p.suffix != ".new" and p.is_file()]
            names = [p.relative_to(self.folder).as_posix() for p in files]  # without those of `io.replacing`
            for name in self._dropped - set(names):
                storage.remove(f"{self.address}/{name}")
                self._kept.pop(name, None)  # the store may have failed after it
            self._dropped.clear()
            for name in names:
                state = self._state(name)
                if self._kept.get(name) != state:
                    storage.put(f"{self.address}/{name}", pathlib.Path(self.folder, name).read_bytes())
                    self._kept[name] = state

    def close(self) -> None:
        """Flushes, and removes the files."""
        self._ended.set()
        self._thread.join()
        self.flush()
        self.leave()

    def leave(self) -> None:
        """Removes the local files; the bucket keeps its objects."""
        self._ended.set()
        self._thread.join()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _state(self, name):
        found = os.stat(os.path.join(self.folder, name))
        return found.st_size, found.st_mtime_ns

    def _keep(self):
        pause = self.interval
        while not self._ended.wait(pause):
            began = time.monotonic()
            with contextlib.suppress(storage.StorageError, OSError):  # the next one may find both again
                self.flush()
            pause = max(self.interval, 20 * (time.monotonic() - began))


def scratch() -> str:
    """A temporary folder of this process on the machine's disk (TMPDIR). It is removed when the process ends, or, if
    the process is killed, by the next process that asks for one."""
    return _scratch(os.getpid())


@functools.cache
def _scratch(pid):
    root, here = tempfile.gettempdir(), hashlib.sha256(machine().encode()).hexdigest()[:12]
    for name in os.listdir(root) if os.name == "posix" else ():
        found = re.fullmatch(rf"{_SCRATCH}{here}-(\d+)-\w+", name)  # other users may share this TMPDIR
        path = os.path.join(root, name)
        with contextlib.suppress(OSError):  # of a folder that has just been removed
            if found and not is_running(int(found[1])) and os.lstat(path).st_uid == os.getuid():
                shutil.rmtree(path, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=f"{_SCRATCH}{here}-{pid}-")
    # Not with atexit, which processes of `multiprocessing` skip.
    multiprocessing.util.Finalize(None, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=0)
    return folder


def remove_scratch() -> None:
    """Removes it now, for a process that ends at once."""
    if _scratch.cache_info().currsize:
        shutil.rmtree(scratch(), ignore_errors=True)


def machine() -> str:
    """An identifier of the process-id namespace: containers with the same host name have separate ones."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as f:
            return f"{f.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def is_running(pid: int) -> bool:
    """Whether this machine has such a process. Always true on Windows, where the check would end it."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def on_disk(folder: storage.Path) -> str:
    """A local folder with the content of `folder`: itself, or a copy in `scratch`, made once."""
    return _copied(os.fspath(folder), os.getpid()) if storage.is_remote(folder) else os.fspath(folder)


@functools.cache
def _copied(address, pid):
    copy = os.path.join(_scratch(pid), urllib.parse.quote(address, safe=""))
    storage.download_folder(address, copy)
    return copy
