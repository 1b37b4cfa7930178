"""Multi-token prediction against none, on the same data (report section 2.2)."""

import pathlib

import numpy as np

from experiments.studies.framework import plots
from experiments.studies.framework.study import Claim, Study
from experiments.studies.framework.training import Training
from experiments.studies.mtp.measure import acceptance


def draw(results: dict, runs: list[dict], folder: pathlib.Path) -> None:
    made, (rising, losses, speed) = plots.figure(12, 3.8, 3)
    probes, metrics = results["arms"]["MTP"]["probes"], results["arms"]["MTP"]["metrics"]
    for colour, name, label in zip(plots.COLOURS, ("greedy", "sampled", "bigrams"),
                                   ("greedy", "sampling at temperature 1", "a table of bigrams, greedy")):
        rising.plot(probes["step"], np.multiply(100, probes[f"acceptance_{name}"]), "o-", color=colour, label=label)
    rising.axhspan(85, 90, color="0.9", label="the report")
    rising.set_ylim(0, 100)
    rising.legend(frameon=False, fontsize=8)
    plots.finish(rising, "Drafts accepted on held-out text", "step", "%")
    plots.intervals(losses, results, "loss")
    plots.finish(losses, "Next token, with and without MTP", "held-out loss, nats per token")
    share = np.linspace(0, 1, 50)
    for cost, style in ((0.0, "-"), (0.1, "--"), (0.3, ":")):
        speed.plot(100 * share, (1 + share) / (1 + cost), style, color=plots.COLOURS[0],
                   label=f"a draft costs {cost:.0%} of a pass")
    for seed in metrics["acceptance_decoding"]["seeds"].values():
        speed.plot(100 * seed, 1 + seed, "o", color=plots.COLOURS[1])
    speed.legend(frameon=False, fontsize=8)
    plots.finish(speed, "Decoding speed-up (dots: seeds)", "drafts accepted in greedy decoding, %",
                 "speed-up")
    plots.save(made, folder / "mtp.png")


STUDY = Study(
    name="mtp",
    arms={"none": {}, "MTP": {"model.mtp_depth": 1}},
    measure=Training(base={"train.steps": 360}, probe=acceptance, probes=6),
    draw=draw,
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
