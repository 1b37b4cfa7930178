"""The common style of the studies' pictures: as wide as a page, 95 % intervals as bars, plain numbers on every axis.

A page shows a picture about 830 pixels wide, so that 8 points are 10 pixels: no text is smaller.
"""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from deepseek_jax.plots.style import PALETTE, new_figure, save_figure
from experiments.studies.framework.results import interval
from experiments.studies.framework.statistics import difference

WIDTH = 9.0  # inches
SMALL = 8  # points; legends, notes
INTERVALS = "Large dots: means. Bars: their 95 % intervals. Small dots: seeds."


def page(height: float) -> Figure:
    """An empty figure, `height` inches high."""
    return new_figure(WIDTH, height)


def figure(height: float, columns: int, rows: int = 1, **options: Any) -> tuple[Figure, Any]:
    """(Figure, its axes in a flat array)."""
    made = page(height)
    return made, made.subplots(rows, columns, squeeze=False, **options).ravel()


def parts(height: float, rows: int) -> tuple[Figure, Any]:
    """(Figure, its parts, one below the other). Each part is divided into separate axes."""
    made = page(height)
    return made, made.subfigures(rows, 1)


def save(made: Figure, path: pathlib.Path, note: str = "") -> None:
    """Writes a picture atomically, with `note` as its last line."""
    if note:
        made.supxlabel(note, x=0.01, ha="left", fontsize=SMALL, color="0.3")
    save_figure(made, path)


def finish(axis: Any, title: str = "", x: str = "", y: str = "") -> None:
    """Adds title, labels, grid and a limited number of ticks to finished axes."""
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    for one in (axis.xaxis, axis.yaxis):
        if type(one.get_major_locator()).__name__ == "AutoLocator":
            one.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def legend(axis: Any, **options: Any) -> None:
    """The common legend."""
    axis.legend(**{"frameon": False, "fontsize": SMALL, "title_fontsize": SMALL, **options})


def logarithmic(axis: Any, which: str) -> None:
    """Makes the "x" or the "y" axis logarithmic, with plain numbers: 0.5, not 5 x 10^-1."""
    axis.set(**{f"{which}scale": "log"})
    made = getattr(axis, f"{which}axis")
    made.set_major_locator(LogLocator(subs=(1, 2, 5)))
    made.set_major_formatter(StrMethodFormatter("{x:g}"))
    made.set_minor_locator(NullLocator())


def _ends(metric):
    return (metric["mean"] if metric[end] is None else metric[end] for end in ("low", "high"))


def _bars(metric):
    """Mean and the distances to both ends of the interval, for errorbar."""
    low, high = _ends(metric)
    return metric["mean"], [[metric["mean"] - low], [high - metric["mean"]]]


def scatter(axis: Any, results: dict[str, Any], x: str | Mapping[str, float], y: str) -> None:
    """Every arm as a point with its intervals, and its seeds as dots. `x` is a metric, or a number for each arm."""
    for colour, (arm, found) in zip(PALETTE, results["arms"].items()):
        b = found["metrics"][y]
        if isinstance(x, str):
            a = found["metrics"][x]
        else:
            a = {"mean": x[arm], "low": None, "high": None, "seeds": dict.fromkeys(b["seeds"], x[arm])}
        (x_mean, x_error), (y_mean, y_error) = _bars(a), _bars(b)
        axis.errorbar(x_mean, y_mean, xerr=x_error if isinstance(x, str) else None, yerr=y_error, color=colour,
                      marker="o", capsize=3, label=arm)
        axis.plot(list(a["seeds"].values()), list(b["seeds"].values()), ".", color=colour, alpha=0.5)


def intervals(axis: Any, results: dict[str, Any], metric: str, colours: Sequence[str] = PALETTE,
              labels: Sequence[str] | None = None) -> None:
    """One row per arm, the first on top: mean, interval, and below it the seeds as dots."""
    for row, (colour, found) in enumerate(zip(colours, results["arms"].values(), strict=False)):
        mean, error = _bars(found["metrics"][metric])
        axis.errorbar(mean, row, xerr=error, color=colour, marker="o", capsize=3)
        seeds = list(found["metrics"][metric]["seeds"].values())
        axis.plot(seeds, np.full(len(seeds), row + 0.25), ".", color=colour, alpha=0.5)
    _rows(axis, labels or list(results["arms"]))


def cut_at_zero(axis: Any, results: dict[str, Any], metric: str, colours: Sequence[str] = PALETTE) -> None:
    """Makes the x axis of `intervals` logarithmic; an interval that reaches 0 ends in an arrow at its left end."""
    found = [arm["metrics"][metric] for arm in results["arms"].values()]
    shown = [x for one in found for x in (next(_ends(one)), *one["seeds"].values()) if x > 0]
    left = min(shown) / 1.4
    for row, (colour, one) in enumerate(zip(colours, found, strict=False)):
        if next(_ends(one)) <= 0:
            axis.plot(left, row, "<", color=colour, clip_on=False, markersize=8)
    logarithmic(axis, "x")
    axis.set_xlim(left=left)


def curves(axis: Any, results: dict[str, Any], name: str, every: int = 10) -> None:
    """Mean over the seeds of a curve, by step."""
    for colour, (arm, found) in zip(PALETTE, results["arms"].items()):
        values = found["curves"][name]
        steps = np.minimum((np.arange(len(values)) + 1) * every, found["steps"])
        axis.plot(steps, values, color=colour, label=arm, linewidth=1.6)


def differences(axis: Any, results: dict[str, Any], metric: str, pairs: Iterable[tuple[str, str]]) -> None:
    """For each (arm, arm for comparison) the mean difference of equal seeds with its interval; and a line at zero."""
    pairs = [pair for pair in pairs if results["arms"].keys() >= set(pair)]
    axis.axvline(0, color="0.4", linewidth=1)
    for row, pair in enumerate(pairs):
        seeds = [results["arms"][arm]["metrics"][metric]["seeds"] for arm in pair]
        mean, error = _bars(interval(difference(*seeds)))
        axis.errorbar(mean, row, xerr=error, color="black", marker="o", capsize=3)
        apart = [seeds[0][seed] - seeds[1][seed] for seed in seeds[0] if seed in seeds[1]]
        axis.plot(apart, np.full(len(apart), row + 0.25), ".", color="black", alpha=0.5)
    _rows(axis, [f"{arm}\nminus {against}" for arm, against in pairs])


def _rows(axis, labels):
    """Names rows from the top. Sets limits instead of inverting: shared axes would be inverted twice."""
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(max(len(labels), 1) - 0.4, -0.6)
