"""The settings that may change between two starts of a run, and the record of changes (no jax here).

config.json of a run is its present config and "history", which lists each change with its step and time:

    [{"step": 30, "when": "2026-11-30 12:00:00 +0000", "changed": {"train.steps": [30, 60]}}]
"""

from __future__ import annotations

import fnmatch
import json
import os
import time
from typing import Any

from deepseek_jax import io
from deepseek_jax.config import Config, ConfigError, as_dict, freeze
from deepseek_jax.config.load import HISTORY

# Keys that do not affect the arrays of a run's state or the meaning of its tokens.
CHANGEABLE = ("train.steps", "train.batch_size", "train.accumulation_steps", "train.ramp_*", "train.mtp_weights",
              "train.loss_chunk", "train.eval_*", "train.final_eval_batches", "train.checkpoint*", "train.sample_*",
              "train.tracker", "train.prometheus", "train.profile", "train.stall_minutes",
              "optimizer.*", "balance.bias_speed", "balance.bias_until", "balance.*_weight", "data.sources",
              "data.stages", "data.prefetch", "data.cache_dir", "mesh.*", "pipeline.*", "model.implementation",
              "fp8.implementation")
FIXED = ("optimizer.kind", "optimizer.moment_dtype")
OF_DOCUMENTS = ("data.sources", "data.stages", "train.batch_size", "train.accumulation_steps",
                "train.ramp_*")  # pairs are counted


def differences(before: Config, after: Config) -> dict[str, tuple[Any, Any]]:
    """{key: (its value before, after)} of the keys that differ."""
    ours, theirs = (dict(_flat(as_dict(config))) for config in (after, before))
    return {key: (theirs.get(key), ours.get(key)) for key in sorted(ours.keys() | theirs.keys())
            if theirs.get(key) != ours.get(key)}


def _flat(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def check_changes(before: Config, after: Config, run: str, advice: str, ignored: tuple[str, ...] = ()) -> None:
    """Raises ConfigError for keys that may not change in the middle of a run.

    run: its folder. advice: the end of the message. ignored: keys that may have any value.
    """
    may = [key for key in CHANGEABLE if after.preference.objective is None or key not in OF_DOCUMENTS]
    found = {key: values for key, values in differences(before, after).items() if key not in ignored}
    wrong = [f"{key} is {there!r} there, {here!r} here" for key, (there, here) in found.items()
             if key in FIXED or not any(fnmatch.fnmatchcase(key, allowed) for allowed in may)]
    if wrong:
        raise ConfigError(f"{run} holds a run with another config: {'; '.join(wrong)}. These may change: "
                          f"{', '.join(may)} (not {', '.join(FIXED)}); {advice}")


def check_steps(config: Config, done: int, run: str) -> None:
    """Raises ConfigError for a run that already has more steps than train.steps."""
    if config.train.steps < done:
        raise ConfigError(f"train.steps={config.train.steps} is less than the {done} steps that the run in {run} has "
                          f"behind it; take {done} or more.")


def saved_config(meta: dict[str, Any]) -> Config | None:
    """The config that a checkpoint was saved with; None: a conversion made it."""
    return freeze(meta["config"]) if "config" in meta else None


def record(config: Config, workdir: str, step: int, before: Config | None, branch: str | None = None) -> list[str]:
    """Writes into config.json what is another from `step` on, and returns it as words.

    What was noted for later steps, whose checkpoints are gone, is dropped.

    Args:
      before: the config that the checkpoint of `step` was saved with.
      branch: RUN@STEP, if that is the checkpoint.
    """
    path = os.path.join(workdir, "config.json")
    there = io.read_json(path)
    found = {} if before is None else differences(before, config)
    if branch is not None:
        found.pop("init.from", None)
    entry = {"step": step, **({} if branch is None else {"from": branch}),
             "changed": io.parse_json(json.dumps(found).encode())}
    noted = there.get(HISTORY, [])
    kept = [e for e in noted if e["step"] < step]
    if found or branch is not None:  # unchanged, if an earlier start was killed before it had saved
        now = {"when": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        kept.append(next((e for e in noted if {"when": e["when"]} | entry == e), entry | now))
    if kept != noted or differences(freeze(there), config):
        io.write_json(path, as_dict(config) | ({HISTORY: kept} if kept else {}))
    return [f"{key} {old!r} -> {new!r}" for key, (old, new) in found.items()]
