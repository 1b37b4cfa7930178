"""Muon against AdamW, each at three learning rates, and with QK-clip (Kimi K2, arXiv 2507.20534)."""

import pathlib
from typing import Any

from experiments.studies.framework import plots
from experiments.studies.framework.study import Claim, Study
from experiments.studies.framework.training import Training
from experiments.studies.optimizers.measure import max_logit

PROBES = 10
TAU = 4.0  # far below the 100 of Kimi K2: the logits of a run of this length are small
MUON = {"optimizer.kind": "muon"}
RATES = {"half": 1.5e-3, "": 3e-3, "twice": 6e-3}
COLOURS = {"AdamW": plots.PALETTE[0], "Muon": plots.PALETTE[1], "Muon, QK-clip": plots.PALETTE[2]}


def _arms(name, keys):
    """{name of an arm: its keys} at all rates."""
    return {f"{name}, {rate} the rate" if rate else name: {**keys, "optimizer.learning_rate": RATES[rate]}
            for rate in RATES}


def draw(results: dict[str, Any], runs: list[dict[str, Any]], folder: pathlib.Path) -> None:
    arms = results["arms"]
    made, (loss, apart, logits) = plots.figure(4.6, 3, gridspec_kw={"width_ratios": [1, 1, 1.1]})
    colour = lambda arm: COLOURS["Muon, QK-clip" if "QK-clip" in arm else arm.split(",")[0]]
    plots.intervals(loss, results, "loss", [colour(arm) for arm in arms], [arm.replace(", ", ",\n") for arm in arms])
    plots.finish(loss, "Loss: left is better", "held-out loss, nats per token")
    plots.differences(apart, results, "loss", [(c["arm"], c["against"]) for c in results["claims"]
                                               if c["metric"] == "loss"])
    plots.finish(apart, "Differences, paired by seed", "nats per token (left of 0: better)")
    for arm, chosen in COLOURS.items():
        if arm in arms:
            probes = arms[arm]["probes"]
            logits.plot(probes["step"], probes["max_logit"], "o-", color=chosen, label=arm, markersize=4)
    logits.axhline(TAU, color="0.4", linestyle=":", label=f"QK-clip's tau, {TAU:g}")
    logits.set_ylim(bottom=0)
    plots.legend(logits)
    plots.finish(logits, "Largest attention logit, held-out text", "step")
    plots.save(made, folder / "optimizers.png", plots.INTERVALS)


STUDY = Study(
    name="optimizers",
    arms={**_arms("AdamW", {}), **_arms("Muon", MUON), "Muon, QK-clip": {**MUON, "optimizer.qk_clip": TAU}},
    measure=Training(probe=max_logit, probes=PROBES),
    draw=draw,
    quick_arms=("AdamW", "Muon", "Muon, QK-clip"),
    claims=(
        Claim("Muon learns better than AdamW from as many tokens, at the same rate.", "loss", "Muon", "AdamW", "lower"),
        Claim("... and than AdamW at twice the rate.", "loss", "Muon", "AdamW, twice the rate", "lower"),
        Claim("Muon's attention logits grow larger than AdamW's.", "max_logit", "Muon", "AdamW", "higher"),
        Claim("With QK-clip they are smaller.", "max_logit", "Muon, QK-clip", "Muon", "lower"),
        Claim("... and the loss is higher (K2's report sees no cost).", "loss", "Muon, QK-clip", "Muon", "higher"),
    ))
