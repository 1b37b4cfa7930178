"""Trains all arms and draws them."""

from experiments.studies.balance_scope.config import STUDY
from experiments.studies.framework import plots, runner

KINDS = ("code", "prose", "tables")


def draw(results, path):
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
    plots.save(made, path)


if __name__ == "__main__":
    runner.main(STUDY, draw)
