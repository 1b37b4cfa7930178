"""A mixture of experts against dense models of as many active and of as many total parameters.

Each is compared at as many tokens, at as much compute and in as much time, with a learning rate that falls within its
own run (report sections 1 and 2.1.2; DeepSeekMoE, arXiv 2401.06066).
"""

import pathlib
from typing import Any

import numpy as np

from experiments.studies.dense.kinds import KINDS, TOKENS, flops, seconds, steps
from experiments.studies.framework import plots
from experiments.studies.framework.study import Claim, Study
from experiments.studies.framework.training import Training

# arm -> (kind, budget). Compute of "mixture" and "active" is the same within 1 %.
ARMS = {"mixture": ("mixture", "tokens"), "active": ("active", "tokens"), "active, equal time": ("active", "time"),
        "total": ("total", "tokens"), "total, equal compute": ("total", "compute"),
        "total, equal time": ("total", "time"),
        **{f"{kind}, long": (kind, "long") for kind in KINDS}}
LABELS = {"mixture": "mixture", "active": "dense, as many active", "total": "dense, as many in total"}
# What a step costs: (title, label, of a kind).
AXES = (("By tokens: down is better", "million tokens", lambda kind: TOKENS / 1e6),
        ("By compute: down is better", "TFLOP", lambda kind: flops(kind) / 1e12),
        ("By time: down is better", "seconds on two cores", seconds))


def draw(results: dict[str, Any], runs: list[dict[str, Any]], folder: pathlib.Path) -> None:
    made, axes = plots.figure(4.6, 3, sharey=True)
    for axis, (title, label, cost) in zip(axes, AXES):
        for colour, kind in zip(plots.PALETTE, KINDS):
            _line(axis, results, kind, cost(kind), colour)
        axis.axvline(cost("mixture") * steps("mixture", "tokens"), color="0.6", linewidth=1, linestyle=":")
        axis.set_xlim(0.8 * axis.dataLim.x0, 1.25 * axis.dataLim.x1)
        plots.logarithmic(axis, "x")
        plots.finish(axis, title, label)
    axes[0].set_ylabel("held-out loss, nats per token", fontsize=9)
    made.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False,
                fontsize=plots.SMALL)
    plots.save(made, folder / "dense.png", f"{plots.INTERVALS} Each is a run of its own. Dotted: the mixture's\n"
               "budget, at which models are compared.")


def _line(axis, results, kind, cost, colour):
    """The arms of a kind from the shortest to the longest."""
    arms = {arm: steps(*ARMS[arm]) for arm in results["arms"] if ARMS[arm][0] == kind}
    arms = dict(sorted(arms.items(), key=lambda item: item[1]))
    if not arms:
        return
    found = [results["arms"][arm]["metrics"]["loss"] for arm in arms]
    x = [cost * number for number in arms.values()]
    mean = np.array([one["mean"] for one in found])
    ends = [[abs((m if one[end] is None else one[end]) - m) for one, m in zip(found, mean)] for end in ("low", "high")]
    axis.errorbar(x, mean, yerr=ends, color=colour, marker="o", capsize=3, label=LABELS[kind])
    for at, one in zip(x, found):
        axis.plot(np.full(len(one["seeds"]), at), list(one["seeds"].values()), ".", color=colour, alpha=0.5)


STUDY = Study(
    name="dense",
    arms={arm: {**KINDS[kind], "train.steps": steps(kind, budget)} for arm, (kind, budget) in ARMS.items()},
    measure=Training(quick={"model.num_layers": 3}),  # with its narrow FFNs "total" would equal "active"
    draw=draw,
    seeds=tuple(range(8)),
    quick_arms=("mixture", "active"),
    claims=(
        Claim("The mixture learns better than a dense model of as many active parameters, from as many tokens and with "
              "as much compute.", "loss", "mixture", "active", "lower"),
        Claim("... and in as much time.", "loss", "mixture", "active, equal time", "lower"),
        Claim("A dense model of as many parameters in total, all of them active, learns better from as many tokens.",
              "loss", "mixture", "total", "higher"),
        Claim("... with as much compute the mixture learns better.", "loss", "mixture", "total, equal compute",
              "lower"),
        Claim("... and in as much time.", "loss", "mixture", "total, equal time", "lower"),
        Claim("With four times the tokens the mixture learns better than a dense model of as many active parameters.",
              "loss", "mixture, long", "active, long", "lower"),
        Claim("... and a dense model of as many in total better than the mixture.", "loss", "mixture, long",
              "total, long", "higher"),
    ))
