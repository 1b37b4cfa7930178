"""Trains with and without MTP and draws acceptance over training beside the loss."""

import numpy as np

from experiments.studies.framework import plots, runner
from experiments.studies.mtp.config import STUDY


def draw(results, path):
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
    plots.save(made, path)


if __name__ == "__main__":
    runner.main(STUDY, draw)
