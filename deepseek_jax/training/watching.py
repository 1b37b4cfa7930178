"""Monitoring of a training run: timings, traces, a limit for steps that do not end, goodput.

The loop reports events to it; nothing here changes the computation.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax

from deepseek_jax.config import Config
from deepseek_jax.training import goodput
from deepseek_jax.training.profiler import Profiler
from deepseek_jax.training.stall import StallWatch


class Watching:
    """Monitors one start of a run, in one process. workdir: None: nothing is recorded."""

    def __init__(self, config: Config, workdir: str | None, process: int = 0):
        self.seconds: dict[str, float] = {}
        self.stall = StallWatch(config.train.stall_minutes)
        self.profiler = Profiler(workdir or "", config.train.profile, process)
        self.goodput = goodput.Goodput(workdir) if workdir is not None and not process else None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """A context around all steps: SIGUSR2 requests a trace, and a step that does not end ends the process."""
        number = getattr(signal, "SIGUSR2", None)  # not on Windows
        previous = None if number is None else signal.signal(number, self.profiler.ask)
        try:
            with self.stall:
                yield
        finally:
            if number is not None:
                signal.signal(number, previous)

    @contextlib.contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """A context whose seconds are counted under `what`: data, step or write."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - began

    def fetched(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches; waiting for them is counted."""
        while True:
            with self.spending("data"):
                found = next(batches, None)
            if found is None:
                return
            yield found

    def row(self) -> dict[str, float | None]:
        """The machine's values in a row of metrics: seconds since the previous row, by what the loop did or waited for,
        and the peak memory of a device in bytes; None if the device does not report it."""
        spent, self.seconds = self.seconds, {}
        stats = [device.memory_stats() for device in jax.local_devices()]
        peaks = [found["peak_bytes_in_use"] for found in stats if found and "peak_bytes_in_use" in found]
        return {f"seconds_{what}": spent.get(what, 0.0) for what in ("data", "step", "write")} | {
            "device_bytes_peak": max(peaks, default=None)}

    def mark(self, what: str, **about: Any) -> None:
        """Records a time for `goodput`."""
        if self.goodput is not None:
            self.goodput.mark(what, **about)

    def marked(self, what: str) -> bool:
        """Whether that was recorded."""
        return self.goodput is None or what in self.goodput.now

    def goodput_words(self) -> str | None:
        """A summary of the time of all starts."""
        return self.goodput and goodput.words([*self.goodput.before, self.goodput.now])
