"""Renders a chat template in a separate process: an untrusted one may loop forever, or fill the memory.

That process has Jinja's sandbox and a memory limit (`jinja.main`); the time limit is enforced here. A process that
exceeds a limit is killed, and the next chat starts a new one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from typing import Any

START_SECONDS = 30.0  # seconds for Python, Jinja and the compilation of the template
SECONDS = 2.0


class Renderer:
    """(messages, **options) -> prompt, ready for the answer. Threads take turns.

    Args:
      source: the template. names: variables in addition to the messages and the options of a chat.
    Raises:
      ValueError: the template is not valid Jinja; when called: it refuses the messages or exceeds its limits.
    """

    def __init__(self, source: str, names: dict[str, Any]):
        self._about = {"source": source, "names": names}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    def __call__(self, messages: list[dict[str, Any]], /, **options: Any) -> str:
        with self._lock:
            if self._process is None:
                self._start()
            return self._ask({"messages": messages, "names": options}, SECONDS)

    def _start(self):
        # The same modules as here. A separate process group, since Ctrl-C is for the server, but not a session: Linux
        # divides processor time between sessions, and niceness only counts within one.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen([sys.executable, "-m", "deepseek_jax.chat.jinja"], env=environment,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                         process_group=0)
        self._end = weakref.finalize(self, _end, self._process)
        self._ask(self._about, START_SECONDS)

    def _ask(self, what: dict[str, Any], seconds: float) -> str:
        """Sends one line and reads one."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def overdue():
            late.set()
            process.kill()

        clock = threading.Timer(seconds, overdue)
        clock.start()
        try:
            process.stdin.write(json.dumps(what).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        clock.cancel()
        if not line.endswith(b"\n"):
            self._process = None
            self._end()
            raise ValueError(f"it takes more than {seconds:g} s." if late.is_set() else "its process has died.")
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["text"]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()
