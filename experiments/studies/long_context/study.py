"""Two phases of YaRN extension, to 8 and 32 times the length of pre-training as in the report (section 4.3).

Half of the text is code; the other half repeats one secret word among meaningless words, so often that a small model
learns to look it up, which only much larger models learn from code alone.
"""

import pathlib
from typing import Any

import numpy as np

from experiments.studies.framework import corpora, plots
from experiments.studies.framework.study import Claim, Study
from experiments.studies.framework.training import Training
from experiments.studies.long_context.measure import DEPTHS, ENDS, LENGTHS, far

SHORT, MIDDLE, LONG = 64, 512, 2048
# Factor 40 in both phases, as in the report: it covers 2,560 tokens.
YARN = {"model.yarn": {"factor": 40.0, "original_length": SHORT}}
# A thirtieth of the peak, as the report's 7.3e-6 of 2.2e-4.
PHASE = {"train.steps": 75, "optimizer.learning_rate": 1e-4, "optimizer.constant_until": 0.966}
TO_MIDDLE = {**PHASE, "train.sequence_length": MIDDLE, "train.batch_size": 8}
TO_LONG = {**PHASE, "train.sequence_length": LONG, "train.batch_size": 2}
LABELS = {"64": "64 tokens", "512, YaRN": "64, then 512 with YaRN", "2048, YaRN": "64, 512, 2,048 with YaRN",
          "512, plain": "64, then 512 without YaRN", "2048, plain": "64, 512, 2,048 without YaRN"}
SOURCES = {"data.sources": (("corpus/code", 1.0), ("corpus/words", 1.0))}
PRETRAINING = {**SOURCES, "train.steps": 300, "train.sequence_length": SHORT, "train.batch_size": 32,
               "train.eval_batches": 4, "model.init_std": 0.06}


def draw(results: dict, runs: list[dict], folder: pathlib.Path) -> None:
    made, (above, below) = plots.parts(6, 2)
    draw_loss(above.subplots(), results)
    shown = [arm for arm in ("64", "2048, plain", "2048, YaRN") if arm in results["arms"]]
    below.suptitle("Needles found, %, by length of the text and depth in it; above each: lengths trained at", x=0.01,
                   ha="left", fontsize=10)
    axes = below.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axis, arm in zip(axes, shown):
        draw_needles(axis, results["arms"][arm]["arrays"]["needles"], LABELS[arm])
    axes[0].set_ylabel("depth of the needle", fontsize=9)
    plots.save(made, folder / "long_context.png",
               f"Seed {results['seeds'][0]}. Guessing finds 4 % of the needles.")


def draw_loss(axis: Any, results: dict) -> None:
    """Loss of code by position, and where each phase of training ends."""
    middles = np.sqrt(np.maximum(ENDS[:-1], 4) * np.array(ENDS[1:], float))
    for colour, (arm, found) in zip(plots.PALETTE, results["arms"].items()):
        axis.plot(middles, found["arrays"]["by_position"], "--" if "plain" in arm else "-", marker="o", color=colour,
                  markersize=3, label=LABELS[arm])
    axis.set_xscale("log", base=2)
    for length, phase in ((SHORT, "pre-training"), (MIDDLE, "phase 1"), (LONG, "phase 2")):
        axis.axvline(length, color="0.7", zorder=0)
        axis.text(length * 0.96, 1, f"{phase}:\nto {length:,}", transform=axis.get_xaxis_transform(), ha="right",
                  va="top", fontsize=plots.SMALL, color="0.3")
    plots.finish(axis, "Loss of held-out code by position, each with other text: down is better", "position",
                 "nats per token")
    axis.set_xticks(ENDS[1:], [f"{end:,}" for end in ENDS[1:]])
    axis.minorticks_off()
    plots.legend(axis, loc="center left", bbox_to_anchor=(1.01, 0.5), title="trained on sequences of",
                 alignment="left")


def draw_needles(axis: Any, found_LD: list[list[float]], title: str) -> None:
    """Share of needles found, by length and depth."""
    axis.imshow(np.array(found_LD).T, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (column, row), share in np.ndenumerate(found_LD):
        axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=plots.SMALL,
                  color="black" if share > 0.6 else "white")
    plots.finish(axis, title, "tokens")
    axis.grid(visible=False)
    axis.set_xticks(range(len(LENGTHS)), [f"{length:,}" for length in LENGTHS], fontsize=plots.SMALL)
    axis.set_yticks(range(len(DEPTHS)), [f"{100 * depth:.0f} %" for depth in DEPTHS])


STUDY = Study(
    name="long_context",
    arms={"64": {}, "512, YaRN": {**YARN, **TO_MIDDLE}, "2048, YaRN": {**YARN, **TO_LONG}, "512, plain": TO_MIDDLE,
          "2048, plain": TO_LONG},
    measure=Training(
        base=PRETRAINING,
        quick=SOURCES, corpus=corpora.needles, probe=far,
        after={"512, YaRN": "64", "2048, YaRN": "512, YaRN", "512, plain": "64", "2048, plain": "512, plain"}),
    draw=draw,
    seeds=tuple(range(8)),
    quick_arms=("64", "512, YaRN"),
    claims=(
        # Past 64 tokens the text is another than inside; the same model, trained on at 512, says what that costs.
        Claim("Past its training length, 64 tokens, a model loses more than the same model trained on at 512 does.",
              "past_inside", "64", "512, plain", "higher"),
        Claim("Both phases lower the loss of code at positions 512 to 2,047.", "loss_512_2048", "2048, YaRN", "64",
              "lower"),
        Claim("... at no loss at the first 64 positions.", "loss_0_64", "2048, YaRN", "64", "lower"),
        Claim("After the first phase a needle is found more often in 512 tokens.", "needle_512", "512, YaRN", "64",
              "higher"),
        Claim("After the second phase a needle is found more often in 2,048 tokens.", "needle_2048", "2048, YaRN", "64",
              "higher"),
        Claim("With YaRN the loss at positions 512 to 2,047 is lower than after the same training without.",
              "loss_512_2048", "2048, YaRN", "2048, plain", "lower"),
        Claim("With YaRN a needle is found more often in 2,048 tokens than after the same training without.",
              "needle_2048", "2048, YaRN", "2048, plain", "higher"),
        Claim("Without any further training YaRN finds more needles in 2,048 tokens.", "yarn_gains", "64", 0.0,
              "higher"),
    ))
