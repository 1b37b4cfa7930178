"""Traces of some steps, for XProf and Perfetto: the steps of train.profile, and the next five after SIGUSR2."""

from __future__ import annotations

import contextlib
import os
import tempfile
from typing import Any

import jax

from deepseek_jax import storage, working_files

ON_SIGNAL = 5  # steps


class Profiler:
    """Traces of a process in WORKDIR/profile; those of processes other than the first in folders below."""

    def __init__(self, workdir: str, profile: str, process: int = 0):
        """profile: A:B, the steps after A up to B; "": none before a signal."""
        first, _, last = profile.partition(":") if not process else ("", "", "")
        self.range = (int(first), int(last)) if last else None
        self.folder = os.path.join(workdir, "profile", *([f"process_{process:04}"] if process else []))
        self.asked, self.until, self.local = False, None, ""

    def ask(self, *_: Any) -> None:
        """Traces the next steps; a handler of signals."""
        self.asked = True

    def before(self, step: int, state: Any) -> str | None:
        """Called with the steps done and the state after them: starts or ends a trace between two steps. Returns a
        message to print."""
        said = None
        if self.until is not None and step >= self.until:
            jax.block_until_ready(state)
            said = self._end(step)
        if self.until is None and (self.asked or (self.range and self.range[0] == step)):
            self.first, self.until = step, step + ON_SIGNAL if self.asked else self.range[1]  # pyright: ignore[reportOptionalSubscript]
            self.asked = False
            jax.block_until_ready(state)
            try:
                remote = storage.is_remote(self.folder)
                self.local = tempfile.mkdtemp(dir=working_files.scratch()) if remote else self.folder
                jax.profiler.start_trace(self.local)
            except Exception as error:  # from the disk or the profiler; not a reason to end a run
                self.until = None
                said = "\n".join([*([said] if said else []), f"note: no profile from step {step} on: {error}"])
        return said

    def step(self, number: int) -> contextlib.AbstractContextManager[Any]:
        """A context around a step that names it in the trace."""
        if self.until is None:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def close(self, step: int, state: Any) -> str | None:
        """Ends a trace that is still active at the end of the run."""
        if self.until is None:
            return None
        jax.block_until_ready(state)
        return self._end(step)

    def _end(self, step):
        self.until = None
        try:
            jax.profiler.stop_trace()
            if self.local != self.folder:
                storage.upload_folder(self.local, self.folder)
        except Exception as error:
            return f"note: the profile of steps {self.first + 1} to {step} could not be written: {error}"
        return f"Profile of steps {self.first + 1} to {step}: xprof --logdir {self.folder}"
