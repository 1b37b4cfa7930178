"""Idle time and activation memory of the five schedules, from validated tables. Exact: one seed, no training."""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from deepseek_jax.pipeline.validate import compare
from experiments.studies.framework import plots
from experiments.studies.framework.results import origin, seconds
from experiments.studies.framework.study import Job, Measure, Study

RANKS = 8
MICROBATCHES = (16, 20, 32, 48, 64, 120)
# Times of the parts of a stage: forward, full backward, weight gradients, and F&B.
COSTS = {"no overlap gains": {"f": 1, "b": 2, "w": 1}, "a sixth is hidden": {"f": 1, "b": 2, "w": 1, "fb": 2.5}}
CONFIG = {"ranks": RANKS, "microbatches": list(MICROBATCHES), "costs": COSTS}
TITLES = {"no overlap gains": "Idle: F&B takes 3, as F + B", "a sixth is hidden": "Idle: F&B takes 2.5 instead of 3"}


class Tables(Measure):
    """A row for each schedule and number of micro-batches."""

    resumes = False

    def run(self, job: Job) -> Iterator[dict[str, Any]]:
        for seed in job.seeds:
            yield {"seed": seed, "rows": compare([RANKS], MICROBATCHES, job.study.arms[job.arm])}
            job.tell(1)

    def summarize(self, study: Study, runs: list[dict[str, Any]]) -> dict[str, Any]:
        return {"config": CONFIG, "rows": {run["arm"]: run["rows"] for run in runs}, "seconds": seconds(runs),
                **origin(runs)}

    def lines(self, results: dict[str, Any]) -> list[str]:
        return [f"{row['schedule']:9s} idle {row['idle']:g} of {row['makespan']:g}, "
                f"activations {row['activations']:g}"
                for row in results["rows"]["no overlap gains"] if row["microbatches"] == 32]


def draw(results: dict, runs: list[dict], folder: pathlib.Path) -> None:
    made, axes = plots.figure(3.9, 3)
    idle = lambda row: 100 * row["idle"] / row["makespan"]
    for axis, (name, rows) in zip(axes, results["rows"].items()):
        draw_schedules(axis, rows, idle)
        plots.finish(axis, TITLES[name], "micro-batches", "idle, % of the step")
        axis.set_ylim(0, 35)
        plots.legend(axis, loc="upper right")
    draw_schedules(axes[2], next(iter(results["rows"].values())), lambda row: row["activations"])
    plots.logarithmic(axes[2], "y")
    plots.legend(axes[2], loc="center right")
    plots.finish(axes[2], "Activations kept", "micro-batches", "in units of a rank's layers")
    plots.save(made, folder / "pipeline.png", f"{RANKS} ranks; F takes 1, B 2, W 1. Schedules that are the same share "
               "a line. F&B: a forward and a backward pass in one cell, in DualPipe and DualPipeV only.")


def draw_schedules(axis: Any, rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> None:
    """A line for each schedule over the micro-batches; identical ones share a line, with both names."""
    names = list(dict.fromkeys(row["schedule"] for row in rows))
    same: dict[tuple, list[str]] = {}
    for name in names:
        same.setdefault(tuple((r["microbatches"], value(r)) for r in rows if r["schedule"] == name), []).append(name)
    for points, together in same.items():
        axis.plot(*zip(*points), "o-", color=plots.PALETTE[names.index(together[0])], markersize=3,
                  label=", ".join(together))


STUDY = Study(name="pipeline", arms=COSTS, measure=Tables(), draw=draw, quick_arms=tuple(COSTS), seeds=(0,),
              quick_seeds=(0,), json_indent=2, json_end="")
