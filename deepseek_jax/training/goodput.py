"""The share of a run's time that went into useful steps: WORKDIR/goodput.json, five timestamps of each start.

    start ── data, devices ── restored ── compiled ── first_step ─── steps ─── stopped

"stopped" is the time when the last written checkpoint began, or the end. A checkpoint in progress is "saving", until
the next one, or a start that continues from it, confirms it. For a start that was killed, the next start adds "killed",
the time of its last row: the time between "stopped" and that is lost.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import Any

from deepseek_jax import io, storage

NAME = "goodput.json"


class Goodput:
    """The record of one start, in process 0. Each mark is written at once, if it can be."""

    def __init__(self, workdir: str, start: float | None = None):
        """start: of the process, in seconds since 1970; None: read from the system."""
        self.path = os.path.join(workdir, NAME)
        self.before: list[dict[str, Any]] = read(workdir)
        if self.before:
            rows, before = os.path.join(workdir, "metrics.jsonl"), self.before[-1]
            with contextlib.suppress(OSError, storage.StorageError):  # not a reason to end a run
                last = storage.changed(rows) if storage.is_file(rows) else 0.0
                if last > max(before["start"], before.get("stopped", 0)):
                    before["killed"] = last
        start = process_start() if start is None else start
        ends = [start[end] for start in self.before[-1:] for end in ("stopped", "killed") if end in start]
        self.now: dict[str, Any] = {"start": max([start, *ends])}  # a process may train twice

    def mark(self, what: str, **about: Any) -> None:
        """Records the time of an event. about: further values to record, such as the step.

        "saving": a checkpoint of `saved` steps begins, and the previous one is written. "restored": from the one at
        `begin`.
        """
        if what == "saving" and what in self.now:
            self.now["stopped"] = self.now["saving"]
        if what == "restored" and self.before:
            before = self.before[-1]
            if before.get("saved", about["begin"] + 1) <= about["begin"]:
                before["stopped"] = max(before["saving"], before.get("stopped", 0))
        self.now |= {what: time.time(), **about}
        with contextlib.suppress(OSError, storage.StorageError):  # not a reason to end a run
            io.write_json(self.path, [*self.before, self.now], indent=1)


def read(workdir: str) -> list[dict[str, Any]]:
    """The starts of a run so far; [] if there is no record, or an unreadable one, which is reported."""
    path = os.path.join(workdir, NAME)
    try:
        found = io.read_json(path) if storage.is_file(path) else []
        if isinstance(found, list) and all(map(_is_start, found)):
            return found
        reason: object = "it is no list of starts"
    except (OSError, ValueError, storage.StorageError) as error:
        reason = error
    print(f"note: {path} cannot be read ({reason}); goodput counts from this start on.", file=sys.stderr, flush=True)
    return []


def _is_start(found):
    return isinstance(found, dict) and "start" in found and all(isinstance(x, int | float) for x in found.values())


def process_start() -> float:
    """The start time of this process, in seconds since 1970; the present time if the system does not provide it."""
    try:
        with open("/proc/self/stat", encoding="ascii", errors="replace") as f:
            ticks = int(f.read().rsplit(")", 1)[1].split()[19])
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError, ValueError, IndexError):
        return time.time()


def summary(starts: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds by category, over all starts; goodput: the share of useful ones.

    starting: until the first step, of which compiling. steps: with their evaluations and checkpoints. lost: steps after
    the last checkpoint of a start that was killed.
    """
    found = {"starting": 0.0, "compiling": 0.0, "steps": 0.0, "lost": 0.0}
    for this in starts:
        first = this.get("first_step")  # without one, its last known time
        reached = first or max(this[name] for name in ("start", "restored", "compiled", "stopped", "killed")
                               if name in this)
        found["starting"] += reached - this["start"]
        found["compiling"] += this["compiled"] - this["restored"] if {"compiled", "restored"} <= this.keys() else 0
        if first is not None:
            saved = this.get("stopped", first)
            found["steps"] += saved - first
            found["lost"] += max(0.0, this.get("killed", saved) - saved)
    total = found["starting"] + found["steps"] + found["lost"]
    return found | {"total": total, "goodput": found["steps"] / total if total else 0.0}


def words(starts: list[dict[str, Any]]) -> str:
    """The summary as a line."""
    s = summary(starts)
    lost = f", {s['lost']:,.0f} into steps that were lost" if s["lost"] else ""
    return (f"Goodput {s['goodput']:.1%}: of {s['total']:,.0f} s in {len(starts)} start{'s' * (len(starts) > 1)} "
            f"{s['steps']:,.0f} went into steps, {s['starting']:,.0f} into starting ({s['compiling']:,.0f} into "
            f"compiling){lost}.")
