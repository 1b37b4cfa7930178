"""What experts become while a model trains, and how far the routing biases go (report sections 2.1.2, 4.2 and 4.5.3).

The text has equal shares of three kinds: code, prose, tables. Arms differ in the bias's speed and the run's length.
"""

import pathlib
from typing import Any

import numpy as np

from experiments.studies.balance_scope.study import SOURCES
from experiments.studies.framework import corpora, plots
from experiments.studies.framework.study import Claim, Study
from experiments.studies.framework.training import EVERY, Training
from experiments.studies.specialization.measure import FAST_STEPS, experts

PROBES = 12
SLOW = {"balance.bias_speed": 1e-3}
FAST_START = {**SLOW, "balance.bias_rule": "experiments.studies.specialization.measure:FAST_START"}


def draw(results: dict[str, Any], runs: list[dict[str, Any]], folder: pathlib.Path) -> None:
    made, (becoming, balance, offset, spread) = plots.figure(7.2, 2, 2)
    long = results["arms"].get("5e-3, long") or results["arms"]["5e-3"]
    for colour, name, label in zip(plots.PALETTE, ("token_bits", "text_bits"), ("of its token", "of its text")):
        becoming.plot(long["probes"]["step"], long["probes"][name], "o-", color=colour, label=label, markersize=4)
    becoming.set_ylim(bottom=0)
    plots.legend(becoming, title="an expert says about the kind", loc="lower right")
    plots.finish(becoming, "What an expert says about kinds (5e-3, long)", "step", "bits")
    colours = dict(zip(results["arms"], plots.PALETTE))
    for arm in ("1e-3", "1e-3, fast start", "5e-3", "2e-2"):
        if arm in results["arms"]:
            values, last = (results["arms"][arm][part] for part in ("curves", "probes"))
            steps = np.minimum((np.arange(len(values["max_vio_batch"])) + 1) * EVERY, last["step"][-1])
            balance.plot(steps, values["max_vio_batch"], color=colours[arm], label=arm, linewidth=1.6)
    balance.axvspan(0, FAST_STEPS, color="0.92")
    plots.logarithmic(balance, "y")
    plots.legend(balance, title="speed of the bias")
    plots.finish(balance, "Balance while training: lower is better", "step", "MaxVio of a batch, mean of 10 steps")
    for axis, name in ((offset, "bias_offset"), (spread, "bias_spread")):
        for arm, found in results["arms"].items():
            axis.plot(found["probes"]["step"], found["probes"][name], "o-", color=colours[arm], label=arm, markersize=3)
    plots.legend(offset, title="speed of the bias", ncols=2)
    plots.finish(offset, "Mean of a layer's biases: no choice depends on it", "step", "bias")
    plots.finish(spread, "Largest less smallest bias: what chooses", "step", "bias")
    plots.save(made, folder / "specialization.png", f"Means of {len(results['seeds'])} seeds. Scores are between 0 "
               "and 1. Grey: the fast start's steps at 20 times the speed.")


STUDY = Study(
    name="specialization",
    arms={"5e-3": {}, "5e-3, short": {"train.steps": 100}, "5e-3, long": {"train.steps": 900}, "1e-3": SLOW,
          "1e-3, fast start": FAST_START, "2e-2": {"balance.bias_speed": 2e-2}},
    measure=Training(base=SOURCES, quick=SOURCES, corpus=corpora.kinds, probe=experts, probes=PROBES),
    draw=draw,
    seeds=tuple(range(8)),
    quick_arms=("5e-3", "1e-3", "1e-3, fast start"),
    claims=(
        Claim("Experts take kinds of text apart more and more (from a twelfth of the run to its end).",
              "text_bits_gained", "5e-3, long", 0.0, "higher"),
        Claim("An expert says more about the kind of a token than about the kind of its text.", "token_over_text_bits",
              "5e-3, long", 0.0, "higher"),
        Claim("The router becomes surer: the entropy of its scores falls.", "routing_entropy_gained", "5e-3, long", 0.0,
              "lower"),
        Claim("In a run three times as long the largest bias is larger.", "bias_largest", "5e-3, long", "5e-3",
              "higher"),
        Claim("... because what all biases of a layer share is larger.", "bias_offset", "5e-3, long", "5e-3", "higher"),
        Claim("... and so is how far they are apart.", "bias_spread", "5e-3, long", "5e-3", "higher"),
        Claim("A higher speed takes biases further apart.", "bias_spread", "2e-2", "5e-3", "higher"),
        Claim("A speed 20 times as high in the first tenth of the run balances better in the end.", "max_vio_global",
              "1e-3, fast start", "1e-3", "lower"),
        Claim("... and learns better.", "loss", "1e-3, fast start", "1e-3", "lower"),
    ))
