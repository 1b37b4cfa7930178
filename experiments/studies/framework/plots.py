"""The common style of the studies' pictures: 95 % intervals as bars, one colour an arm."""

import pathlib
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from deepseek_jax.plots.style import PALETTE, new_figure, save_figure

COLOURS = PALETTE


def figure(width: float, height: float, columns: int, rows: int = 1, **options: Any) -> tuple[Figure, Any]:
    """(Figure, its axes in a flat array)."""
    made = new_figure(width, height, dpi=120)
    return made, made.subplots(rows, columns, squeeze=False, **options).ravel()


def save(made: Figure, path: pathlib.Path) -> None:
    """Writes a picture atomically."""
    save_figure(made, path)


def finish(axis: Any, title: str = "", x: str = "", y: str = "") -> None:
    """Title, labels and grid of finished axes."""
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)


def _bars(metric):
    """Mean and the distances to both ends of the interval, for errorbar."""
    low, high = (metric["mean"] if metric[end] is None else metric[end] for end in ("low", "high"))
    return metric["mean"], [[metric["mean"] - low], [high - metric["mean"]]]


def scatter(axis: Any, results: dict[str, Any], x: str, y: str) -> None:
    """Every arm as a point with its intervals, and its seeds as dots."""
    for colour, (arm, found) in zip(COLOURS, results["arms"].items()):
        a, b = found["metrics"][x], found["metrics"][y]
        (x_mean, x_error), (y_mean, y_error) = _bars(a), _bars(b)
        axis.errorbar(x_mean, y_mean, xerr=x_error, yerr=y_error, color=colour, marker="o", capsize=3, label=arm)
        axis.plot(list(a["seeds"].values()), list(b["seeds"].values()), ".", color=colour, alpha=0.4)


def intervals(axis: Any, results: dict[str, Any], metric: str) -> None:
    """One row an arm: mean, interval, and the seeds as dots."""
    arms = list(results["arms"])
    for row, (colour, arm) in enumerate(zip(COLOURS, arms)):
        found = results["arms"][arm]["metrics"][metric]
        mean, error = _bars(found)
        axis.errorbar(mean, row, xerr=error, color=colour, marker="o", capsize=3)
        axis.plot(list(found["seeds"].values()), np.full(len(found["seeds"]), row), ".", color=colour, alpha=0.4)
    axis.set_yticks(range(len(arms)), arms)
    axis.invert_yaxis()


def curves(axis: Any, results: dict[str, Any], name: str, every: int = 10) -> None:
    """Mean over the seeds of a curve, by step."""
    for colour, (arm, found) in zip(COLOURS, results["arms"].items()):
        values = found["curves"][name]
        steps = np.minimum((np.arange(len(values)) + 1) * every, results["steps"])
        axis.plot(steps, values, color=colour, label=arm, linewidth=1.6)


def differences(axis: Any, results: dict[str, Any]) -> None:
    """The claims: intervals of the differences, and zero."""
    for row, claim in enumerate(results["claims"]):
        mean, error = _bars(claim["difference"])
        axis.errorbar(mean, row, xerr=error, color=COLOURS[0], marker="o", capsize=3)
    axis.axvline(0, color="0.4", linewidth=1)
    axis.set_yticks(range(len(results["claims"])),
                    [f"{c['metric']}:\n{c['arm']} - {c['against']}" for c in results["claims"]], fontsize=8)
    axis.invert_yaxis()
