"""Bubble and memory of the five schedules, read off tables that are proven first. Exact: no seeds, no training.

    python -m experiments.studies.pipeline.run
"""

import argparse
import pathlib

from deepseek_jax import cli, io
from deepseek_jax.pipeline.validate import compare
from experiments.studies.framework import plots, runner
from experiments.studies.pipeline.config import CONFIG, COSTS, MICROBATCHES, RANKS

WIDTHS = (6, 3, 4.5, 1.5, 2)  # some schedules lie on each other


def table() -> dict:
    """{costs: rows}, a row for each schedule and number of micro-batches."""
    return {name: compare([RANKS], MICROBATCHES, costs) for name, costs in COSTS.items()}


def draw(rows_by_costs, path):
    made, axes = plots.figure(13, 3.9, 3)
    for axis, (name, rows) in zip(axes, rows_by_costs.items()):
        for width, colour, schedule in zip(WIDTHS, plots.COLOURS, dict.fromkeys(row["schedule"] for row in rows)):
            mine = [row for row in rows if row["schedule"] == schedule]
            axis.plot([r["microbatches"] for r in mine], [100 * r["idle"] / r["makespan"] for r in mine], "o-",
                      color=colour, label=schedule, markersize=2, linewidth=width)
        plots.finish(axis, f"Idle, {RANKS} ranks: {name}", "micro-batches", "% of the step")
        axis.set_ylim(0, None)
    axes[0].legend(frameon=False, fontsize=8)
    rows = next(iter(rows_by_costs.values()))
    for width, colour, schedule in zip(WIDTHS, plots.COLOURS, dict.fromkeys(row["schedule"] for row in rows)):
        mine = [row for row in rows if row["schedule"] == schedule]
        axes[2].plot([r["microbatches"] for r in mine], [r["activations"] for r in mine], "o-", color=colour,
                     markersize=2, linewidth=width)
    axes[2].set_yscale("log")
    plots.finish(axes[2], "Activations kept", "micro-batches", "in shares of a rank's layers")
    plots.save(made, path)


def main():
    parser = argparse.ArgumentParser(prog="python -m experiments.studies.pipeline.run", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the same, in seconds; nothing is written beside")
    quick = parser.parse_args().quick
    folder = runner.ROOT / ".cache" / "studies" / "pipeline-quick" if quick else pathlib.Path(__file__).parent
    folder.mkdir(parents=True, exist_ok=True)
    rows = table()
    draw(rows, folder / "pipeline.png")
    io.write_json(str(folder / "results.json"), {"config": CONFIG, "rows": rows, **runner.provenance()})
    for row in rows["no overlap gains"]:
        if row["microbatches"] == 32:
            print(f"{row['schedule']:9s} idle {row['idle']:g} of {row['makespan']:g}, "
                  f"activations {row['activations']:g}")


if __name__ == "__main__":
    cli.run(main)
