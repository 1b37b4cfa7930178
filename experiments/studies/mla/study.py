"""MLA against MHA, GQA and MQA, at equal parameters (report section 2.1.1).

30,720 attention weights a layer in each arm (MHA 32,768: its width comes in even steps).
"""

import pathlib

from experiments.studies.framework import plots
from experiments.studies.framework.study import Claim, Study
from experiments.studies.framework.training import Training
from experiments.studies.mla.attention import VARIANTS, attention_of

# Numbers per token in the cache of a layer: keys and values, or MLA's latent and its rotary key.
CACHE = {"MLA": 32 + 16, **{arm: 2 * heads * width for arm, (heads, width) in VARIANTS.items()}}


def draw(results: dict, runs: list[dict], folder: pathlib.Path) -> None:
    made, (both, apart) = plots.figure(4, 2, gridspec_kw={"width_ratios": [1.15, 1]})
    plots.scatter(both, results, CACHE, "loss")
    plots.legend(both, loc="upper right")
    plots.finish(both, "Loss against the size of the cache: lower left is better",
                 "numbers that a token leaves in a layer's cache", "held-out loss, nats per token")
    both.set_xlim(0, 1.1 * max(CACHE.values()))
    both.set_xticks([0, *sorted(set(CACHE.values()))])
    plots.differences(apart, results, "loss", [(c["arm"], c["against"]) for c in results["claims"]])
    plots.finish(apart, "Differences, paired by seed", "nats per token (left of 0: MLA is better)")
    plots.save(made, folder / "mla.png", f"{plots.INTERVALS} MQA's one head is 24 wide, so that its cache is as large "
               "as MLA's.")


STUDY = Study(
    name="mla",
    arms={"MLA": {}, **{arm: {} for arm in VARIANTS}},
    measure=Training(network=attention_of),
    draw=draw,
    seeds=tuple(range(8)),
    quick_arms=("MLA", "GQA"),
    claims=(
        Claim("MLA learns better than MHA, from a cache of 48 numbers instead of 128.", "loss", "MLA", "MHA", "lower"),
        Claim("MLA learns better than GQA, from a cache of 48 numbers instead of 80.", "loss", "MLA", "GQA", "lower"),
        Claim("MLA learns better than MQA, from a cache of the same size.", "loss", "MLA", "MQA", "lower"),
    ))
