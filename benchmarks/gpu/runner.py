"""Runs stages one after another, each in child processes that are killed when they, or one of their cases, take too
long. No jax here.
"""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.stage import AGAIN, read
from benchmarks.gpu.stages import Stage
from benchmarks.machine import ROOT
from deepseek_jax import io

LEAST = 10  # seconds: with less left no stage is started
POLL = 0.1


def environment(rehearse: bool) -> dict[str, str]:
    """Environment of a stage. torch shares the GPU, so jax allocates as needed; a fallback to the CPU is an error."""
    ours = {"JAX_PLATFORMS": "cpu"} if rehearse else {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cuda,cpu"),
                                                      "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    # A stage that is restarted, after a crash or by the next run, compiles nothing twice.
    ours |= {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "gpu"),
             "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1"}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | ours | {"PYTHONPATH": os.pathsep.join(paths)}


def run_stage(stage: Stage, out: pathlib.Path, deadline: float, rehearse: bool) -> dict[str, Any]:
    """Runs the remaining cases of a stage until `deadline` (of time.monotonic) or the stage's own limit.

    Returns {"state": "done", "out of time" or "failed", "seconds", how many cases are in each state, "why" if failed}.
    """
    path, log, start = out / f"{stage.name}.json", out / f"{stage.name}.log", time.monotonic()
    deadline = min(deadline, start + stage.limit)
    _settle(path, "late")  # left by a run that was killed
    state, why = "out of time", {}
    while deadline - time.monotonic() > LEAST or rehearse:
        end = _watch(stage, path, log, deadline, rehearse)
        running = _settle(path, end)
        if end == 0:
            state = "done"
            break
        if end == "late":
            break
        if not running and end != AGAIN:  # between cases, or before the first
            state, why = "failed", {"why": _last_line(log) or f"exit code {end}"}
            break
    counts: dict[str, int] = {}
    for row in read(str(path)).values():
        counts[row["state"]] = counts.get(row["state"], 0) + 1
    return {"state": state, "seconds": round(time.monotonic() - start, 1), "cases": counts} | why


def _watch(stage, path, log, deadline, rehearse):
    """Starts a child. Returns its exit code, or "late" or "silent" if it was killed."""
    command = [sys.executable, "-m", "benchmarks.gpu.stage", stage.cases, str(path), *["--rehearse"] * rehearse]
    with open(log, "a") as out:
        child = subprocess.Popen(command, cwd=ROOT, env=environment(rehearse), stdout=out, stderr=subprocess.STDOUT,
                                 stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            heard = time.monotonic()
            changed = _changed(path)
            while child.poll() is None:
                now = time.monotonic()
                if changed != (changed := _changed(path)):
                    heard = now
                if not rehearse and now > deadline:
                    return "late"
                if now - heard > stage.silence * (20 if rehearse else 1):
                    return "silent"
                time.sleep(POLL)
            return child.returncode
        finally:  # also when this process is interrupted
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                try:
                    child.wait(timeout=20)
                except subprocess.TimeoutExpired:  # it hangs in the driver
                    print(f"{stage.name}: process {child.pid} does not end.", flush=True)


def _changed(path):
    return path.stat().st_mtime_ns if path.exists() else None


def _settle(path, end):
    """Records the outcome of the case that was running, if any; the row of one that ran out of time is removed."""
    rows = read(str(path))
    running = [name for name, row in rows.items() if row["state"] == "running"]
    for name in running:
        if end == "late":
            del rows[name]
        elif end == "silent":
            rows[name] = {"state": "hung", "why": "no result within the time limit of a case"}
        else:
            rows[name] = {"state": "crashed", "why": f"the process ended with {end}"}
    if running:
        io.write_json(path, rows, indent=1)
    return bool(running)


def _last_line(log):
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


def run_all(stages: Sequence[Stage], out: pathlib.Path, minutes: float, rehearse: bool, facts: dict[str, Any]) -> bool:
    """Runs the stages and writes out/summary.json after each. Returns whether all finished and no case failed."""
    deadline = time.monotonic() + 60 * minutes
    summary = facts | {"stages": {}}

    def ended(stage, found):
        summary["stages"][stage.name] = found
        io.write_json(out / "summary.json", summary, indent=1)
        cases = ", ".join(f"{count} {state}" for state, count in found["cases"].items()) or "no case"
        print(f"{stage.name}: {found['state']} after {found['seconds']} s: {cases}{_reason(found)}", flush=True)

    waiting = {stage.beforehand: _Background(stage.beforehand, out, deadline, rehearse)
               for stage in stages if stage.beforehand}
    pending = list(stages)
    while pending:
        # While its programs are still being compiled, a stage lets the next one go first, but not the last.
        late = pending[0].beforehand and waiting[pending[0].beforehand].is_alive() and len(pending) > 2
        stage = pending.pop(1 if late else 0)
        if stage.beforehand:
            ended(stage.beforehand, waiting[stage.beforehand].result())
        print(f"{stage.name} ...", flush=True)
        ended(stage, run_stage(stage, out, deadline, rehearse))
    return all(found["state"] == "done" and set(found["cases"]) <= {"done"} for found in summary["stages"].values())


class _Background(threading.Thread):
    """A stage that runs in parallel to others, always from its first case: the cache of earlier rows may be gone."""

    def __init__(self, stage, out, deadline, rehearse):
        super().__init__(daemon=True)  # ends with this process, and on Linux so does its child
        self._arguments = stage, out, deadline, rehearse
        self._found = {"state": "failed", "seconds": 0.0, "cases": {}, "why": "it could not run: see above"}
        (out / f"{stage.name}.json").unlink(missing_ok=True)
        self.start()

    def run(self):
        self._found = run_stage(*self._arguments)

    def result(self) -> dict[str, Any]:
        self.join()
        return self._found


def _reason(found):
    return f" ({found['why']})" if "why" in found else ""
