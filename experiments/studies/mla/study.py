"""Latent attention against full, grouped and single keys and values, at equal parameters (report section 2.1.1).

30,720 attention weights a layer in each arm (MHA 32,768: its width comes in even steps).
"""

import pathlib

from experiments.studies.framework import plots
from experiments.studies.framework.study import Claim, Study
from experiments.studies.framework.training import Training
from experiments.studies.mla.attention import VARIANTS, attention_of

# Numbers that a token takes in the cache of a layer: keys and values, or MLA's latent and its rotary key.
CACHE = {"MLA": 32 + 16, **{arm: 2 * heads * width for arm, (heads, width) in VARIANTS.items()}}


def draw(results: dict, runs: list[dict], folder: pathlib.Path) -> None:
    made, (both, apart) = plots.figure(10, 3.8, 2)
    for colour, (arm, found) in zip(plots.COLOURS, results["arms"].items()):
        for seed, loss in found["metrics"]["loss"]["seeds"].items():
            both.plot(4 * CACHE[arm], loss, "o", color=colour, label=arm if seed == str(results["seeds"][0]) else None)
    both.legend(frameon=False, fontsize=8)
    plots.finish(both, "What a token leaves in the cache", "bytes a token and layer, float32",
                 "held-out loss, nats per token")
    plots.differences(apart, results)
    plots.finish(apart, "Differences, paired by seed", "nats per token")
    plots.save(made, folder / "mla.png")


STUDY = Study(
    name="mla",
    arms={"MLA": {}, **{arm: {} for arm in VARIANTS}},
    measure=Training(network=attention_of),
    draw=draw,
    quick_arms=("MLA", "GQA"),
    claims=(
        Claim("MLA learns better than MHA, from a cache of 48 numbers instead of 128.", "loss", "MLA", "MHA", "lower"),
        Claim("MLA learns better than GQA, from a cache of 48 numbers instead of 80.", "loss", "MLA", "GQA", "lower"),
        Claim("MLA learns better than MQA, from a cache of the same size.", "loss", "MLA", "MQA", "lower"),
    ))
