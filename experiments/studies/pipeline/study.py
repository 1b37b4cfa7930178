"""Idle time and activation memory of the five schedules, read off validated tables. Exact: one seed, no training."""

import pathlib
from collections.abc import Iterator
from typing import Any

from deepseek_jax.pipeline.validate import compare
from experiments.studies.framework import plots
from experiments.studies.framework.results import provenance
from experiments.studies.framework.study import Job, Measure, Study

RANKS = 8
MICROBATCHES = (16, 20, 32, 48, 64, 120)
# What the parts of a stage take: forward, full backward, weight gradients, and F&B together.
COSTS = {"no overlap gains": {"f": 1, "b": 2, "w": 1}, "a sixth is hidden": {"f": 1, "b": 2, "w": 1, "fb": 2.5}}
CONFIG = {"ranks": RANKS, "microbatches": list(MICROBATCHES), "costs": COSTS}

WIDTHS = (6, 3, 4.5, 1.5, 2)  # of the lines: some schedules coincide


class Tables(Measure):
    """A row for each schedule and number of micro-batches."""

    resumes = False

    def run(self, job: Job) -> Iterator[dict[str, Any]]:
        for seed in job.seeds:
            yield {"seed": seed, "rows": compare([RANKS], MICROBATCHES, job.study.arms[job.arm])}
            job.tell(1)

    def summarize(self, study: Study, runs: list[dict[str, Any]]) -> dict[str, Any]:
        return {"config": CONFIG, "rows": {run["arm"]: run["rows"] for run in runs}, **provenance()}

    def lines(self, results: dict[str, Any]) -> list[str]:
        return [f"{row['schedule']:9s} idle {row['idle']:g} of {row['makespan']:g}, "
                f"activations {row['activations']:g}"
                for row in results["rows"]["no overlap gains"] if row["microbatches"] == 32]


def draw(results: dict, runs: list[dict], folder: pathlib.Path) -> None:
    made, axes = plots.figure(13, 3.9, 3)
    for axis, (name, rows) in zip(axes, results["rows"].items()):
        for width, colour, schedule in zip(WIDTHS, plots.COLOURS, dict.fromkeys(row["schedule"] for row in rows)):
            mine = [row for row in rows if row["schedule"] == schedule]
            axis.plot([r["microbatches"] for r in mine], [100 * r["idle"] / r["makespan"] for r in mine], "o-",
                      color=colour, label=schedule, markersize=2, linewidth=width)
        plots.finish(axis, f"Idle, {RANKS} ranks: {name}", "micro-batches", "% of the step")
        axis.set_ylim(0, None)
    axes[0].legend(frameon=False, fontsize=8)
    rows = next(iter(results["rows"].values()))
    for width, colour, schedule in zip(WIDTHS, plots.COLOURS, dict.fromkeys(row["schedule"] for row in rows)):
        mine = [row for row in rows if row["schedule"] == schedule]
        axes[2].plot([r["microbatches"] for r in mine], [r["activations"] for r in mine], "o-", color=colour,
                     markersize=2, linewidth=width)
    axes[2].set_yscale("log")
    plots.finish(axes[2], "Activations kept", "micro-batches", "in shares of a rank's layers")
    plots.save(made, folder / "pipeline.png")


STUDY = Study(name="pipeline", arms=COSTS, measure=Tables(), draw=draw, quick_arms=tuple(COSTS), seeds=(0,),
              quick_seeds=(0,), json_indent=2, json_end="")
