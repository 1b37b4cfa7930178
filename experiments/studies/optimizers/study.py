"""Muon against AdamW, at several learning rates, from as many tokens and in as much time, and with QK-clip (Kimi K2,
arXiv 2507.20534)."""

import pathlib
from typing import Any

from experiments.studies.framework import plots
from experiments.studies.framework.study import Claim, Study
from experiments.studies.framework.training import Training
from experiments.studies.optimizers.arms import TAU, arms
from experiments.studies.optimizers.measure import max_logit

PROBES = 10
COLOURS = {"AdamW": plots.PALETTE[0], "Muon": plots.PALETTE[1], "Muon, QK-clip": plots.PALETTE[2]}


def draw(results: dict[str, Any], runs: list[dict[str, Any]], folder: pathlib.Path) -> None:
    found = results["arms"]
    made, (loss, apart, logits) = plots.figure(5.6, 3, gridspec_kw={"width_ratios": [1, 1, 1.1]})
    colour = lambda arm: COLOURS["Muon, QK-clip" if "QK-clip" in arm else arm.split(",")[0]]
    plots.intervals(loss, results, "loss", [colour(arm) for arm in found],
                    [arm.replace(", ", ",\n", 1) for arm in found])
    plots.finish(loss, "Loss: left is better", "held-out loss, nats per token")
    plots.differences(apart, results, "loss", [(c["arm"], c["against"]) for c in results["claims"]
                                               if c["metric"] == "loss"])
    plots.finish(apart, "Paired differences", "nats per token (left of 0: better)")
    for arm, chosen in COLOURS.items():
        if arm in found:
            probes = found[arm]["probes"]
            logits.plot(probes["step"], probes["max_logit"], "o-", color=chosen, label=arm, markersize=4)
    logits.axhline(TAU, color="0.4", linestyle=":", label=f"QK-clip's tau, {TAU:g}")
    logits.set_ylim(0, 1.4 * logits.dataLim.y1)
    plots.legend(logits, loc="upper left")
    plots.finish(logits, "Largest logit, at 3e-3", "step")
    plots.save(made, folder / "optimizers.png", plots.INTERVALS)


STUDY = Study(
    name="optimizers",
    arms=arms(),
    measure=Training(probe=max_logit, probes=PROBES),
    draw=draw,
    seeds=tuple(range(8)),
    quick_arms=("AdamW", "Muon", "Muon, QK-clip"),
    claims=(
        Claim("Muon learns better than AdamW from as many tokens, at the same rate.", "loss", "Muon", "AdamW", "lower"),
        Claim("... each at the best of its rates.", "loss", "Muon, twice the rate", "AdamW", "lower"),
        Claim("... and in as much time.", "loss", "Muon, twice the rate, equal time", "AdamW", "lower"),
        Claim("Muon's attention logits grow larger than AdamW's.", "max_logit", "Muon", "AdamW", "higher"),
        Claim("They grow larger than AdamW's, each at the best of its rates.", "max_logit", "Muon, twice the rate",
              "AdamW", "higher"),
        Claim("With QK-clip Muon's are smaller.", "max_logit", "Muon, QK-clip", "Muon", "lower"),
        Claim("... and the loss is higher (K2's report sees no cost).", "loss", "Muon, QK-clip", "Muon", "higher"),
    ))
