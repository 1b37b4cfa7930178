"""Metrics of a run: scalars, and token counts of each expert.

`WORKDIR/metrics.jsonl` holds one JSON object a line, at most one row for a step's training and one for its evaluation;
TensorBoard and other `trackers` get the same scalars. `WORKDIR/expert_load/` holds the counts [layers, experts] of each
step. A run that resumes from step s first drops everything after s, so that apart from timings the files equal those of
a run that was never interrupted. In a bucket they are objects, which cannot be appended to: `working_files.Mirror`
uploads copies of the files on this machine. The balance of a step is MaxVio = max load / mean load - 1 (arXiv
2408.15664).
"""

from __future__ import annotations

import bisect
import contextlib
import json
import math
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from deepseek_jax import io, storage, working_files
from deepseek_jax.training.background import Background
from deepseek_jax.training.trackers import Apart, TensorBoard, Tracker

LAST_STEPS = 50  # whose mean is shown in summaries


def max_vio(counts_LE: np.ndarray) -> float:
    """The excess of the busiest expert's load over the mean: (max - mean) / mean, averaged over the layers."""
    if not len(counts_LE):
        return 0.0
    mean_L = counts_LE.mean(-1)
    return float(((counts_LE.max(-1) - mean_L) / (mean_L + (mean_L == 0))).mean())  # a layer without tokens counts 0


def balance_metrics(counts_LE: np.ndarray) -> dict[str, float]:
    """The balance of the experts in one step; means over the layers, {} for a dense model.

    max_vio: as above. load_entropy: entropy of the shares of the load, divided by that of an even load: 1 is even, 0
    means a single expert. idle_experts: the share of the experts that no token chose.
    """
    if not len(counts_LE):
        return {}
    total_L = np.maximum(counts_LE.sum(-1), 1)  # entropy of the shares c / total: log(total) - sum(c log c) / total
    entropy_L = np.log(total_L) - (counts_LE * np.log(np.maximum(counts_LE, 1))).sum(-1) / total_L
    entropy_L = np.where(counts_LE.any(-1), entropy_L, 0) / np.log(max(2, counts_LE.shape[1]))
    return {"max_vio": max_vio(counts_LE), "load_entropy": float(entropy_L.mean()),
            "idle_experts": float((counts_LE == 0).mean())}


def all_layers(counts: dict[str, Any]) -> np.ndarray:
    """Counts of the MoE layers and of the MTP modules, one array [layers, E]; [0, 0] for a dense model."""
    return np.concatenate([np.asarray(c) for _, c in sorted(counts.items())]) if counts else np.zeros((0, 0), np.int32)


class MetricsWriter:
    """Writes the metrics of one work directory in a separate thread; in a run of several processes, only the first may
    have one. The thread's exceptions are raised by the next call here."""

    def __init__(self, workdir: str | os.PathLike[str], resume_step: int | None, trackers: Sequence[Tracker] = ()):
        """Opens the files and drops everything after `resume_step`; None (a run from the start) drops all.

        trackers: they also get each row, if they keep up, and are closed together with this.
        """
        names = "metrics.jsonl", "expert_load", "tensorboard"
        self._mirror = working_files.Mirror(os.fspath(workdir), names) if storage.is_remote(workdir) else None
        try:
            self._open(pathlib.Path(self._mirror.folder if self._mirror else workdir), resume_step)
        except BaseException:
            if self._mirror:
                self._mirror.leave()
            raise
        self._trackers = [self._tensorboard, *map(Apart, trackers)]
        self._background = Background("metrics")

    def _open(self, workdir, resume_step):
        workdir.mkdir(parents=True, exist_ok=True)
        last = -1 if resume_step is None else resume_step
        path, self._loads = workdir / "metrics.jsonl", workdir / "expert_load"
        drop = self._mirror.drop if self._mirror else lambda name: shutil.rmtree(workdir / name, ignore_errors=True)
        if resume_step is None:
            drop("tensorboard")
        rows = _drop_rows(path, last)
        self._written = {_kind(row): row["step"] for row in rows}
        self._written["load"] = _drop_loads(self._loads, last, drop)
        self._rows, self._counts = io.Appended(path), None
        self._tensorboard = TensorBoard(workdir / "tensorboard", last + 1)

    def do(self, call: Callable[..., None], *arguments: Any) -> None:
        """Calls it in the thread, after everything queued before it."""
        self._background.do(call, *arguments)

    def write(self, step: int, **values: Any) -> None:
        """Appends one row, unless there already is one of that step and kind.

        A row with a name that begins with `eval_` is the step's evaluation, any other its training. Values that are not
        finite become null: NaN is not JSON.
        """
        self.do(self._write, int(step), values)

    def _write(self, step, values):
        row = {"step": step} | {name: _number(value) for name, value in values.items()}
        kind = _kind(row)
        if not self._is_new(kind, step):
            return
        self._rows.write((json.dumps(row, allow_nan=False) + "\n").encode())
        self._log(step, {f"{kind}/{name.removeprefix('eval_')}": row[name] for name in values if row[name] is not None})

    def write_expert_load(self, step: int, counts_LE: np.ndarray) -> None:
        """Appends the number of tokens that chose each expert in this step, over the global batch."""
        self.do(self._write_load, int(step), counts_LE)

    def _write_load(self, step, counts_LE):
        if not self._is_new("load", step):
            return
        counts_LE = np.asarray(counts_LE, np.int32)
        if self._counts is None:
            if not (self._loads / "shape.json").exists():
                self._loads.mkdir(exist_ok=True)
                io.write_json(self._loads / "shape.json", counts_LE.shape, indent=None, sync=True)
            self._counts = io.Appended(self._loads / "counts.int32")
        self._counts.write(np.concatenate([np.array([step], np.int32), counts_LE.ravel()]).tobytes())

    def track(self, step: int, values: dict[str, float]) -> None:
        """Passes further scalars to the trackers; they are not a row."""
        self.do(self._log, int(step), values)

    def _log(self, step, values):
        for tracker in self._trackers:
            tracker.log(step, values)

    def flush(self) -> None:
        """Returns when everything written so far is in the work directory, which the next checkpoint relies on."""
        self._background.flush()
        for tracker in self._trackers:
            tracker.flush()
        if self._mirror:
            self._mirror.flush()

    def close(self, failed: bool = False) -> None:
        """Flushes; nothing may be written afterwards. failed: whether the run ends with an error."""
        with contextlib.ExitStack() as open_ones:  # all are closed, even if one of them raises
            if self._mirror:
                open_ones.callback(self._mirror.close)
            open_ones.callback(lambda: self._counts and self._counts.close())
            open_ones.callback(self._rows.close)
            for tracker in self._trackers:
                open_ones.callback(_close, tracker, failed)
            open_ones.callback(self._background.close)

    def _is_new(self, kind, step):
        new = step > self._written.get(kind, -1)
        if new:
            self._written[kind] = step
        return new


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict]:
    """All complete rows, in the order of writing. null becomes None."""
    path = storage.as_path(workdir) / "metrics.jsonl"
    rows = []
    for line in storage.read_bytes(path).decode(errors="replace").split("\n") if storage.exists(path) else ():
        try:
            row = json.loads(line)
        except ValueError:  # a partial line from a killed run
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def read_expert_loads(workdir: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """-> (steps_S, counts_SLE); of length 0 if the run has recorded none, as a dense model's has not."""
    folder = storage.as_path(workdir) / "expert_load"
    records, shape = _records(folder)
    return records[:, 0], records[:, 1:].reshape(len(records), *shape)


def _close(tracker, failed):
    try:
        tracker.close(failed)
    except OSError as error:  # of events, which are written at once
        print(f"note: the end of {type(tracker).__name__}: {error}.", file=sys.stderr, flush=True)


def _kind(row):
    return "eval" if any(name.startswith("eval_") for name in row) else "train"


def _number(value):
    value = value.item() if hasattr(value, "item") else value
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _drop_rows(path, last):
    """Drops rows after step `last`, and partial rows; returns the remaining ones."""
    rows = [row for row in read_metrics(path.parent) if row["step"] <= last]
    if path.exists():
        io.write_text(path, "".join(json.dumps(row) + "\n" for row in rows), sync=True)
    return rows


def _records(folder):
    """-> (int32 [records, 1 + layers * experts]: step, counts; (layers, experts)). A partial record at the end is
    ignored."""
    try:
        shape = tuple(json.loads(storage.read_bytes(folder / "shape.json")))
        data = np.frombuffer(storage.read_bytes(folder / "counts.int32"), np.uint8)
    except FileNotFoundError:
        return np.zeros((0, 1), np.int32), (0, 0)
    width = 1 + math.prod(shape)
    return data[:len(data) // (4 * width) * 4 * width].view(np.int32).reshape(-1, width), shape


def _drop_loads(folder, last, drop):
    """Drops records after step `last`, and a partial record; returns the last remaining step, or -1. Records have a
    fixed length and ascending steps, so only few of them are read."""
    try:
        width = 4 * (1 + math.prod(io.read_json(folder / "shape.json")))
        with open(folder / "counts.int32", "rb") as f:
            def step_of(index):
                f.seek(width * index)
                return int(np.frombuffer(f.read(4), np.int32)[0])

            kept = bisect.bisect_right(range(os.path.getsize(f.name) // width), last, key=step_of)
            newest = step_of(kept - 1) if kept else -1
    except FileNotFoundError:
        kept, width, newest = 0, 0, -1
    if not kept:  # with the shape: another model may follow
        drop(folder.name)
        return -1
    os.truncate(folder / "counts.int32", kept * width)
    return newest
