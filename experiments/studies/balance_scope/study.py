"""Balance within every sequence or only over a batch, and the specialisation of experts (report section 4.5.3).

The text has equal shares of three kinds: code, prose, tables.
"""

import pathlib

from experiments.studies.balance_scope.measure import specialisation
from experiments.studies.framework import corpora, plots
from experiments.studies.framework.study import Claim, Study
from experiments.studies.framework.training import Training

NO_BIAS = {"balance.bias_speed": 0.0}
PUBLISHED = 2.258 - 2.253  # nats; the report's 1B model (section 4.5.3)
KINDS = ("code", "prose", "tables")
SOURCES = {"data.sources": tuple((f"corpus/{kind}", 1.0) for kind in KINDS)}


def draw(results: dict, runs: list[dict], folder: pathlib.Path) -> None:
    arms = results["arms"]
    made, (above, below) = plots.parts(5.2, 2)
    maps = above.subplots(1, len(arms), squeeze=False, sharey=True)[0]
    for axis, (arm, found) in zip(maps, arms.items()):
        load_KE = [layers[-1] for layers in found["arrays"]["load_by_kind"]]
        picture = axis.imshow(load_KE, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto")
        plots.finish(axis, f"{arm}, seed {results['seeds'][0]}", "expert of the last layer")
        axis.grid(visible=False)
        axis.set_yticks(range(3), KINDS)
    bar = above.colorbar(picture, ax=list(maps), extend="max", ticks=(0, 1, 2))
    bar.set_ticklabels(["none", "even share", "twice"], fontsize=plots.SMALL)
    kinds, apart = below.subplots(1, 2)
    plots.intervals(kinds, results, "specialisation")
    plots.finish(kinds, "Specialisation: right is more", "0: all kinds of text choose the same experts")
    kinds.set_xlim(left=0)
    plots.differences(apart, results, "loss", [("sequence-wise", arm) for arm in ("loss-free", "batch-wise")])
    apart.axvline(PUBLISHED, color=plots.PALETTE[1], linestyle=":", label="as published")
    plots.legend(apart, loc="upper right")
    plots.finish(apart, "Loss, paired by seed", "nats per token (right of 0: sequence-wise is worse)")
    plots.save(made, folder / "balance_scope.png", f"Colours: tokens of a kind of text that choose an expert. "
               f"{plots.INTERVALS}")


STUDY = Study(
    name="balance_scope",
    arms={"loss-free": {}, "batch-wise": {**NO_BIAS, "balance.aux_loss_weight": 0.1},
          "sequence-wise": {**NO_BIAS, "balance.sequence_loss_weight": 0.1}},
    measure=Training(base=SOURCES, quick=SOURCES, corpus=corpora.kinds, probe=specialisation),
    draw=draw,
    seeds=tuple(range(8)),
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
