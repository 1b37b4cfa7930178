"""Balance inside every sequence or only over a batch, and experts' specialisation (report section 4.5.3).

The text has equal shares of three kinds: code, prose, tables.
"""

import pathlib

from experiments.studies.balance_scope.measure import specialisation
from experiments.studies.framework import corpora, plots
from experiments.studies.framework.study import Claim, Study
from experiments.studies.framework.training import Training

NO_BIAS = {"balance.bias_speed": 0.0}
KINDS = ("code", "prose", "tables")
SOURCES = {"data.sources": tuple((f"corpus/{kind}", 1.0) for kind in KINDS)}


def draw(results: dict, runs: list[dict], folder: pathlib.Path) -> None:
    arms = results["arms"]
    made, axes = plots.figure(4 * len(arms), 5.2, len(arms), 2)
    for axis, (arm, found) in zip(axes, arms.items()):
        load_KE = [layers[-1] for layers in found["arrays"]["load_by_kind"]]
        picture = axis.imshow(load_KE, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
        axis.set_yticks(range(3), KINDS)
        axis.set_title(f"{arm}, seed {results['seeds'][0]}", loc="left", fontsize=10)
        axis.set_xlabel("expert of the last layer")
    made.colorbar(picture, ax=list(axes[:len(arms)]), label="load, 1 is fair", extend="max")
    below = axes[len(arms):]
    plots.intervals(below[0], results, "specialisation")
    plots.finish(below[0], "Specialisation", "distance of a kind's loads from all")
    plots.intervals(below[1], results, "loss")
    plots.finish(below[1], "Loss", "held-out, nats per token")
    for axis in below[2:]:
        axis.axis("off")
    plots.save(made, folder / "balance_scope.png")


STUDY = Study(
    name="balance_scope",
    arms={"loss-free": {}, "batch-wise": {**NO_BIAS, "balance.aux_loss_weight": 0.1},
          "sequence-wise": {**NO_BIAS, "balance.sequence_loss_weight": 0.1}},
    measure=Training(base=SOURCES, quick=SOURCES, corpus=corpora.kinds, probe=specialisation),
    draw=draw,
    quick_arms=("loss-free", "sequence-wise"),
    claims=(
        Claim("Balance inside every sequence leaves experts less specialised than the bias does.", "specialisation",
              "sequence-wise", "loss-free", "lower"),
        Claim("Balance inside every sequence leaves experts less specialised than balance over a batch.",
              "specialisation", "sequence-wise", "batch-wise", "lower"),
        Claim("The bias has a lower loss than balance inside every sequence.", "loss", "loss-free", "sequence-wise",
              "lower"),
        Claim("Balance over a batch has a lower loss than inside every sequence.", "loss", "batch-wise",
              "sequence-wise", "lower"),
    ))
