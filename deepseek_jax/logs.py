"""The output of a process in WORKDIR/logs/process_0003.log: without progress bars, with the traceback of an error.

It has Python's output only, not what C++ libraries write to the terminal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, TextIO

from deepseek_jax import storage


@contextlib.contextmanager
def kept(workdir: str, process: int) -> Iterator[None]:
    """A context in which this process's output is logged, as soon as the work directory exists. A work directory in a
    bucket has no logs, since objects cannot be appended to."""
    if storage.is_remote(workdir):
        yield
        return
    log = _Log(workdir, process)
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        setattr(sys, name, _Copied(stream, log))
    handlers = [h for h in logging.getLogger().handlers
                if isinstance(h, logging.StreamHandler) and h.stream is streams["stderr"]]
    for handler in handlers:
        handler.setStream(sys.stderr)
    try:
        yield
    except BaseException:
        log.write(traceback.format_exc())
        raise
    finally:
        for handler in handlers:
            handler.setStream(streams["stderr"])
        for name, stream in streams.items():
            setattr(sys, name, stream)
        log.write("")  # even for a process without output, the file records when it ran
        log.close()


class _Log:
    """Writes to the file; if the disk refuses, the output was still printed, and the run continues."""

    def __init__(self, workdir, process):
        self.workdir, self.path = workdir, os.path.join(workdir, "logs", f"process_{process:04}.log")
        self.file: TextIO | None = None
        self.closed = False
        self.waiting = [f"--- {time.strftime('%Y-%m-%d %H:%M:%S %z')}, process {os.getpid()}: {' '.join(sys.argv)}\n"]

    def write(self, text):
        if self.closed:
            return
        with contextlib.suppress(OSError, ValueError):  # a full disk; another thread has just closed it
            if self.file is None:
                self.waiting.append(text)
                if not os.path.isdir(self.workdir):
                    return
                text, self.waiting = "".join(self.waiting), []
                self._open()
            if self.file is not None:
                self.file.write(text)

    def _open(self):
        try:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            self.file = open(  # noqa: SIM115 (`kept` closes it)
                self.path, "a", buffering=1, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            self.closed = True  # otherwise it would stay in memory
            print(f"note: what this process prints is not kept: {error}.", file=sys.__stderr__)

    def close(self):
        self.closed, file, self.file = True, self.file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()


class _Copied:
    """A stream whose text is also written to the log."""

    def __init__(self, stream, log):
        self.stream, self.log = stream, log

    def write(self, text: str) -> int:
        count = self.stream.write(text)
        if not text.startswith("\r") and "\x1b[A" not in text:  # of a progress bar
            self.log.write(text)
        return count

    @property
    def copy(self) -> TextIO | None:
        """The file of the log."""
        return self.log.file

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
