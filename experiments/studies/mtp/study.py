"""Multi-token prediction against none, on the same data (report section 2.2)."""

import json
import pathlib
from typing import Any

import numpy as np

from experiments.studies.framework import plots
from experiments.studies.framework.study import Claim, Study
from experiments.studies.framework.training import Training
from experiments.studies.mtp.measure import acceptance

ROOT = pathlib.Path(__file__).resolve().parents[3]
# For larger models than the study's; one point for each number of sequences decoded together.
MEASURED = {"tiny": "benchmarks/results/speculative_cpu.json",
            "small": "benchmarks/results/speculative_small_cpu.json"}


def draw(results: dict, runs: list[dict], folder: pathlib.Path) -> None:
    made, (rising, losses, speed) = plots.figure(4.5, 3, gridspec_kw={"width_ratios": [1, 0.8, 1.2]})
    probes = results["arms"]["MTP"]["probes"]
    for colour, name, label in zip(plots.PALETTE, ("sampled", "greedy", "bigrams"),
                                   ("sampling, temperature 1", "greedy", "greedy, table of bigrams")):
        rising.plot(probes["step"], np.multiply(100, probes[f"acceptance_{name}"]), "o-", color=colour, label=label)
    rising.axhspan(85, 90, color="0.88", label="the report")
    rising.set_ylim(0, 100)
    plots.legend(rising, loc="upper center", bbox_to_anchor=(0.5, -0.17))
    plots.finish(rising, "Drafts accepted: up is better", "step", "%")
    plots.intervals(losses, results, "loss", labels=("without", "with\nMTP"))
    plots.finish(losses, "Loss: left is better", "nats per token")
    draw_speed(speed, results["arms"]["MTP"]["metrics"]["acceptance_decoding"])
    plots.save(made, folder / "mtp.png", f"{plots.INTERVALS} Right: measured on a CPU, with larger models.")


def draw_speed(axis: Any, acceptance: dict[str, Any]) -> None:
    """The maximum speed-up that acceptance allows, and the one measured on a CPU."""
    low, high = (acceptance["mean"] if acceptance[end] is None else acceptance[end] for end in ("low", "high"))
    axis.axvspan(100 * low, 100 * high, color=plots.PALETTE[1], alpha=0.2, linewidth=0,
                 label="this study's acceptance")
    share = np.array([0.4, 1])
    axis.plot(100 * share, 1 + share, color="0.4", label="bound: drafts cost nothing")
    axis.axhline(1, color="0.4", linestyle=":", label="no gain")
    for colour, marker, (name, file) in zip(plots.PALETTE[3:], "os", MEASURED.items()):
        found = [batch["depths"][0] for batch in json.loads((ROOT / file).read_text())["batches"]]
        axis.plot([100 * one["acceptance"] for one in found], [one["measured_speedup"] for one in found], marker,
                  color=colour, alpha=0.8, label=f"measured: {name}")
    axis.set_ylim(0.8, 2.05)
    plots.legend(axis, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, columnspacing=1.0)
    plots.finish(axis, "Speed-up of decoding by one draft", "drafts accepted, greedy, %", "times as fast")


STUDY = Study(
    name="mtp",
    arms={"none": {}, "MTP": {"model.mtp_depth": 1}},
    measure=Training(base={"train.steps": 360}, probe=acceptance, probes=6),
    draw=draw,
    seeds=tuple(range(8)),
    quick_arms=("none", "MTP"),
    claims=(
        Claim("Predicting the token after next as well makes the main head better.", "loss", "MTP", "none", "lower"),
        Claim("The second token is accepted in 85 to 90 % of the cases (greedy decoding, at least 85 %).",
              "acceptance_decoding", "MTP", 0.85, "higher"),
        Claim("Drafts get better while the model learns (held-out text, from a sixth of the run to its end).",
              "acceptance_greedy_gained", "MTP", 0.0, "higher"),
        Claim("The module drafts better than a table of which token follows which.", "acceptance_over_bigrams",
              "MTP", 0.0, "higher"),
        Claim("A pass of the main model gives more than one token (tokens a pass, greedy decoding).",
              "tokens_per_pass", "MTP", 1.0, "higher"),
    ))
