"""A picture of a schedule, rank by time, over as many lines as its numbers need to be readable.

The colour shows the operation, paler in the other direction; the number is the micro-batch. An overlapped cell shows
its forward pass above its backward pass.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping

from matplotlib.colors import to_rgb
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch

from deepseek_jax.pipeline.orders import kind_of
from deepseek_jax.pipeline.schedule import Schedule
from deepseek_jax.pipeline.validate import cell_costs, starts, validate
from deepseek_jax.plots.style import BLUE, GREEN, ORANGE, SKY, new_figure, save_figure

COLORS = {"F": ORANGE, "B": BLUE, "Bi": SKY, "W": GREEN}
MEANING = {"F": "F forward", "B": "B backward", "Bi": "Bi gradient of the input", "W": "W gradient of the weights"}
WIDTH, ROW = 9, 0.3  # inches: of a page, and of a rank
CELLS = 36  # of the shortest cells in a line, so that a micro-batch's number fits
HEIGHT = 200  # maximum inches: very unequal costs get longer lines


def shade(kind: str, direction: int) -> tuple[float, float, float]:
    """The operation's colour (red, green, blue); direction 1 is paler."""
    pale = 0.55 * direction
    red, green, blue = (c + (1 - c) * pale for c in to_rgb(COLORS[kind]))
    return red, green, blue


def draw(schedule: Schedule, path: str | pathlib.Path, costs: Mapping[str, float] | None = None) -> None:
    """Draws the schedule, in which every rank starts as soon as its inputs exist, into a file (.png, .svg, .pdf).

    Args:
      costs: as in `validate`.
    Raises:
      ConfigError: a format that matplotlib does not know.
    """
    report, time = validate(schedule, costs), cell_costs(costs)
    placed = [(start, rank, cell, time[kind_of(cell)]) for start, rank, cell in starts(schedule, costs)]
    shortest = min((t for t in time.values() if t > 0), default=1)
    height = ROW * schedule.ranks + 0.3
    lines = max(1, min(math.ceil(report.makespan / (CELLS * shortest)), int(HEIGHT / height)))
    span = report.makespan / lines
    figure = new_figure(WIDTH, lines * height + 0.9)
    for line, axes in enumerate(figure.subplots(lines, 1, squeeze=False)[:, 0]):
        axes.set_xlim(line * span, (line + 1) * span)
        axes.set_ylim(schedule.ranks - 0.5, -0.5)
        for start, rank, cell, width in placed:
            if start < (line + 1) * span and start + width > line * span:
                _cell(axes, start, rank, cell, width)
        axes.set_yticks(range(schedule.ranks))
        axes.set_ylabel("rank")
        axes.tick_params(length=0, labelsize=9)
        axes.spines[:].set_visible(False)
        if line == 0:
            axes.set_title(f"{schedule.name}, {schedule.ranks} ranks, {schedule.microbatches} micro-batches: "
                           f"{report.makespan:g} units of time ({report.lockstep_makespan:g} in lock step)", loc="left",
                           fontsize=10)
    axes.set_xlabel("time")
    _legend(figure, schedule)
    save_figure(figure, path)


def _cell(axes, start, rank, cell, width):
    """Draws a cell that crosses two lines on both; its number is at its middle."""
    left, right = axes.get_xlim()
    for i, op in enumerate(cell):
        height = 0.9 / len(cell)
        top = rank - 0.45 + i * height
        axes.broken_barh([(start, width)], (top, height), facecolor=shade(op.kind, op.direction), edgecolor="white",
                         linewidth=0.6)
        if left <= start + width / 2 < right:
            dark = op.direction == 0 and op.kind in ("B", "W")
            axes.text(start + width / 2, top + height / 2, str(op.microbatch), ha="center", va="center_baseline",
                      fontsize=8, color="white" if dark else "black")


def _legend(figure, schedule):
    kinds = [kind for kind in COLORS if any(op.kind == kind for row in schedule.table for c in row for op in c)]
    labels = [MEANING[kind] for kind in kinds]
    handles: list = [Patch(facecolor=shade(kind, 0)) for kind in kinds]
    if schedule.route.directions > 1:
        handles.append(tuple(Patch(facecolor=shade(kind, 1)) for kind in kinds))
        labels.append("paler: " + ("other direction" if schedule.name == "dualpipe" else "second half of the stages"))
    figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), frameon=False, fontsize=8,
                  handlelength=1.5, columnspacing=1.2, handler_map={tuple: HandlerTuple(None, pad=0)})
