"""A schedule as a picture, rank by time: free-running, and in lock step.

The colour shows the operation, its shade the direction, the number the micro-batch. An overlapped cell shows its
forward pass above its backward pass.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from deepseek_jax.pipeline.orders import kind_of
from deepseek_jax.pipeline.schedule import Schedule
from deepseek_jax.pipeline.validate import cell_costs, starts, validate
from deepseek_jax.plots.style import BLUE, GREEN, ORANGE, SKY, new_figure, save_figure

COLORS = {"F": ORANGE, "B": BLUE, "Bi": SKY, "W": GREEN}
MEANING = {"F": "F forward", "B": "B backward", "Bi": "Bi gradient of the input", "W": "W gradient of the weights"}
CELL = 0.3  # inches for the shortest cell, so that a micro-batch's number fits in


def shade(kind: str, direction: int) -> tuple[float, float, float]:
    """The operation's colour (red, green, blue); direction 1 is paler."""
    pale = 0.55 * direction
    red, green, blue = (c + (1 - c) * pale for c in to_rgb(COLORS[kind]))
    return red, green, blue


def draw(schedule: Schedule, path: str | pathlib.Path, costs: Mapping[str, float] | None = None) -> None:
    """Draws the schedule, free-running above and in lock step below, into a file (.png, .svg, .pdf).

    Args:
      costs: as `validate` takes them.
    Raises:
      ConfigError: a format that matplotlib does not know.
    """
    report, time = validate(schedule, costs), cell_costs(costs)
    shortest = min((t for t in time.values() if t > 0), default=1)
    width = max(report.lockstep_makespan, report.makespan) / shortest
    inches = min(max(width * CELL, 7), 60)
    height = 0.26 * schedule.ranks
    figure = new_figure(inches + 0.9, 2 * height + 2.2, dpi=110)
    free, locked = figure.subplots(2, 1, sharex=True)
    size = min(7.5, 72 * 0.75 * inches / width / 1.3)  # points, for two digits
    for axes, placed in ((free, starts(schedule, costs)), (locked, _ticks(schedule, time))):
        for start, rank, cell in placed:
            _cell(axes, start, rank, cell, time[kind_of(cell)], size)
        axes.set_ylim(schedule.ranks - 0.5, -0.5)
        axes.set_yticks(range(schedule.ranks))
        axes.set_ylabel("rank")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    free.set_xlim(0, max(report.lockstep_makespan, report.makespan))
    free.set_title(f"{schedule.name}, {schedule.ranks} ranks, {schedule.microbatches} micro-batches: every rank for "
                   f"itself, {report.makespan:g}", loc="left", fontsize=10)
    locked.set_title(f"in {report.ticks} ticks that all ranks share, {report.lockstep_makespan:g}", loc="left",
                     fontsize=10)
    locked.set_xlabel("time")
    _legend(figure, schedule)
    save_figure(figure, path)


def _ticks(schedule, time):
    """(start, rank, cell) in lock step."""
    start = 0
    for row in schedule.table:
        yield from ((start, rank, cell) for rank, cell in enumerate(row) if cell)
        start += max(time[kind_of(cell)] for cell in row)


def _cell(axes, start, rank, cell, width, size):
    for i, op in enumerate(cell):
        height = 0.9 / len(cell)
        top = rank - 0.45 + i * height
        axes.broken_barh([(start, width)], (top, height), facecolor=shade(op.kind, op.direction), edgecolor="white",
                         linewidth=0.6)
        dark = op.direction == 0 and op.kind in ("B", "W")
        axes.text(start + width / 2, top + height / 2, str(op.microbatch), ha="center", va="center_baseline",
                  fontsize=size if len(cell) == 1 else 0.8 * size, color="white" if dark else "black")


def _legend(figure, schedule):
    kinds = [kind for kind in COLORS if any(op.kind == kind for row in schedule.table for c in row for op in c)]
    directions = range(schedule.route.directions)
    handles = [Patch(facecolor=shade(kind, d)) for kind in kinds for d in directions]
    suffix = ["", ", other direction"] if schedule.name == "dualpipe" else ["", ", second half of the stages"]
    labels = [MEANING[kind] + suffix[d] for kind in kinds for d in directions]
    figure.legend(handles, labels, loc="outside lower left", ncols=len(kinds), frameon=False, fontsize=8)
