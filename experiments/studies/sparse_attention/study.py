"""V3.2's path to sparse attention, the indexer's warm-up and then training over the chosen tokens, against dense
attention.

It continues the model of the study long_context, whose phases it repeats. After the warm-up, which trains only the
indexer, the dense arm reads the same tokens as the sparse ones.
"""

import itertools
import pathlib
from typing import Any

import numpy as np

from experiments.studies.framework import corpora, plots
from experiments.studies.framework.study import Claim, Study
from experiments.studies.framework.training import Training
from experiments.studies.long_context.measure import ENDS
from experiments.studies.long_context.study import PRETRAINING, SOURCES, TO_LONG, TO_MIDDLE, YARN
from experiments.studies.sparse_attention.measure import CONTEXTS, costs, kept

CHOSEN = (256, 128, 64)  # of 2,048
CONTINUED = {**YARN, **TO_LONG, "train.steps": 40}


def indexer(topk: int) -> dict[str, Any]:
    """An indexer with the same size relative to this model's attention, 4 heads of 32, as in V3.2."""
    return {"model.index_topk": topk, "model.index_heads": 2, "model.index_head_dim": 32}


ARMS = {"64 tokens": {}, "512 tokens": {**YARN, **TO_MIDDLE}, "2,048 tokens": {**YARN, **TO_LONG},
        # At the peak of pre-training: its weights are new. V3.2 takes 137 times the rate of its sparse training.
        "warm-up": {**CONTINUED, **indexer(CHOSEN[-1]), "model.index_warmup": True, "optimizer.learning_rate": 3e-3},
        "dense": CONTINUED, **{f"k = {k}": {**CONTINUED, **indexer(k)} for k in CHOSEN}}
SHOWN = ("dense", *(f"k = {k}" for k in CHOSEN), "warm-up")


def draw(results: dict, runs: list[dict], folder: pathlib.Path) -> None:
    shown = {**results, "arms": {arm: results["arms"][arm] for arm in SHOWN if arm in results["arms"]}}
    labels = [f"{arm}, k = {CHOSEN[-1]}\n(no more training)" if arm == "warm-up" else arm for arm in shown["arms"]]
    made, axes = plots.figure(6.6, 2, 2)
    pairs = [*((arm, "dense") for arm in SHOWN[1:]), (f"k = {CHOSEN[-1]}", "warm-up")]
    plots.differences(axes[0], results, "loss_512_2048", pairs)
    plots.finish(axes[0], "Loss at positions 512 to 2,047: left is better", "nats per token, paired by seed")
    plots.intervals(axes[1], shown, "needle_2048", labels=labels)
    plots.finish(axes[1], "Needles found in 2,048 tokens: right is better", "share")
    draw_positions(axes[2], shown)
    draw_costs(axes[3])
    plots.save(made, folder / "sparse_attention.png", plots.INTERVALS)


def draw_positions(axis: Any, results: dict) -> None:
    """Draws the loss added by choosing tokens, by position."""
    middles = np.sqrt(np.maximum(ENDS[:-1], 4) * np.array(ENDS[1:], float))
    dense = np.array(results["arms"]["dense"]["arrays"]["by_position"])
    axis.axhline(0, color="0.4", linewidth=1)
    for colour, (arm, found) in itertools.islice(zip(plots.PALETTE, results["arms"].items()), 1, None):
        axis.plot(middles, found["arrays"]["by_position"] - dense, marker="o", markersize=3, color=colour, label=arm)
    axis.set_xscale("log", base=2)
    plots.finish(axis, f"Loss by position, minus dense (seed {results['seeds'][0]})", "position", "nats per token")
    axis.set_xticks(ENDS[1::2], [f"{end:,}" for end in ENDS[1::2]])
    axis.minorticks_off()
    plots.legend(axis)


def draw_costs(axis: Any) -> None:
    """Calculated for the released models: the bytes that a decoded token reads."""
    counted = costs()
    for colour, name in zip(plots.PALETTE, ("V3", "V3.2")):
        axis.plot(CONTEXTS, counted[f"{name}, MB"], marker="o", markersize=3, color=colour, label=name)
    plots.logarithmic(axis, "y")
    axis.set_xscale("log", base=2)
    plots.finish(axis, "Counted: cache read for a token, FP8", "context, tokens", "MB")
    axis.set_xticks(CONTEXTS[::2], [f"{n // 1024}K" for n in CONTEXTS[::2]])
    axis.minorticks_off()
    plots.legend(axis)


STUDY = Study(
    name="sparse_attention",
    arms=ARMS,
    measure=Training(
        base=PRETRAINING, quick={**SOURCES, "train.steps": 4}, corpus=corpora.needles, probe=kept,
        after={"512 tokens": "64 tokens", "2,048 tokens": "512 tokens", "warm-up": "2,048 tokens",
               "dense": "2,048 tokens", **{f"k = {k}": "warm-up" for k in CHOSEN}}),
    draw=draw,
    quick_arms=("64 tokens", "512 tokens", "2,048 tokens", "warm-up", "dense", "k = 64"),
    claims=(
        *(Claim(f"Attending to {k} of 2,048 tokens costs loss of code at positions 512 to 2,047.",
                "loss_512_2048", f"k = {k}", "dense", "higher") for k in CHOSEN),
        *(Claim(f"Attending to {k} of 2,048 tokens costs needles in 2,048 tokens.", "needle_2048", f"k = {k}", "dense",
                "lower") for k in CHOSEN),
        Claim("Sparse training lowers the loss that choosing 64 tokens costs after the warm-up alone.",
              "loss_512_2048", "k = 64", "warm-up", "lower"),
        Claim("After the warm-up alone fewer needles are found with 64 tokens than after sparse training.",
              "needle_2048", "warm-up", "k = 64", "lower"),
        Claim("The indexer's 64 tokens hold more of dense attention than 64 tokens at random would, 1 of 32.",
              "recall", "k = 64", 1 / 32, "higher"),
    ))
