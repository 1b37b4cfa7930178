"""Trains all arms and draws them."""

import numpy as np

from experiments.studies.framework import plots, runner
from experiments.studies.long_context.config import LONG, MIDDLE, SHORT, STUDY
from experiments.studies.long_context.measure import DEPTHS, ENDS, LENGTHS


def draw(results, path):
    arms = results["arms"]
    shown = [arm for arm in ("64", "2048, plain", "2048, YaRN") if arm in arms]
    made, axes = plots.figure(4.2 + 3 * len(shown), 3.6, 1 + len(shown),
                              gridspec_kw={"width_ratios": [1.5] + [1] * len(shown)})
    middles = np.sqrt(np.maximum(ENDS[:-1], 4) * np.array(ENDS[1:], float))
    for colour, (arm, found) in zip(plots.COLOURS, arms.items()):
        axes[0].plot(middles, found["arrays"]["by_position"], "o-", color=colour, markersize=3, label=arm)
    for length in (SHORT, MIDDLE, LONG):
        axes[0].axvline(length, color="0.8", zorder=0)
    axes[0].set_xscale("log", base=2)
    axes[0].legend(frameon=False, fontsize=8)
    plots.finish(axes[0], f"Held-out code, seed {results['seeds'][0]}", "position", "nats a token")
    for axis, arm in zip(axes[1:], shown):
        axis.imshow(np.array(arms[arm]["arrays"]["needles"]).T, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_xticks(range(len(LENGTHS)), LENGTHS, rotation=60)
        axis.set_yticks(range(len(DEPTHS)), [f"{100 * depth:.0f} %" for depth in DEPTHS])
        for (column, row), share in np.ndenumerate(arms[arm]["arrays"]["needles"]):
            axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7,
                      color="black" if share > 0.6 else "white")
        axis.set_title(f"Needles found, %: {arm}", loc="left", fontsize=10)
        axis.set_xlabel("tokens")
    axes[1].set_ylabel("depth of the needle")
    plots.save(made, path)


if __name__ == "__main__":
    runner.main(STUDY, draw)
