"""A comparison of runs: the differences between their configs, and the results of each."""

from __future__ import annotations

import statistics
from typing import Any

from deepseek_jax.training.metrics import LAST_STEPS

SOURCE = "eval_loss/"  # prefix of the held-out loss of one source
MEANS = ("loss", "max_vio", "tokens_per_second")  # of the last steps


def compare(configs: dict[str, dict[str, Any]], rows: dict[str, list[dict]]) -> dict[str, dict[str, Any]]:
    """{run: {what: value}}: config keys that differ between runs, then the values of `summary`.

    Held-out losses of a source are left out unless every run has them.

    Args:
      configs: {run: its config as sections of keys}.
      rows: {run: rows of its metrics.jsonl, at least one of them of a training step}.
    """
    flat = {run: _flat(config) for run, config in configs.items()}
    table = {run: _differing(flat, run) | summary(rows[run], flat[run]["train.steps"]) for run in configs}
    lacking = {key for row in table.values() for key in row if key.startswith(SOURCE)
               and not all(key in other for other in table.values())}
    return {run: {key: value for key, value in row.items() if key not in lacking} for run, row in table.items()}


def summary(rows: list[dict], steps: int) -> dict[str, Any]:
    """The results of a run. Losses in nats per token; MEANS over the last steps; None: not measured yet.

    eval_share: the share of the held-out text over which bits_per_byte and the losses of sources were measured; 1: all.
    """
    trained, evaluated = ([row for row in rows if key in row] for key in ("loss", "eval_loss"))
    mean = lambda key: statistics.fmean(values) if (
        values := [row[key] for row in trained[-LAST_STEPS:] if row.get(key) is not None]) else None
    last = evaluated[-1] if evaluated else {}
    return {"step": trained[-1]["step"], "of": steps, "tokens": trained[-1]["tokens"], "loss": mean("loss"),
            "bits_per_byte": last.get("eval_bits_per_byte"), "eval_share": last.get("eval_share"),
            **{key: value for key, value in last.items() if key.startswith(SOURCE)},
            **{key: mean(key) for key in MEANS[1:]}}


def label(what: str) -> str:
    """The name of a row in a printed table."""
    return f"{what}, last {LAST_STEPS} steps" if what in MEANS else what


def _differing(configs, run):
    keys = sorted({key for config in configs.values() for key in config})
    return {key: configs[run].get(key) for key in keys
            if len({repr(config.get(key)) for config in configs.values()}) > 1}


def _flat(tree, prefix=""):
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}.{key}" if prefix else key).items()}
