"""Trains all arms and draws them."""

from experiments.studies.experts.config import STUDY
from experiments.studies.framework import plots, runner


def draw(results, path):
    made, (loss, apart) = plots.figure(10, 3.6, 2)
    plots.intervals(loss, results, "loss")
    plots.finish(loss, "Loss at equal active parameters", "held-out loss, nats per token")
    plots.differences(apart, results)
    plots.finish(apart, "Differences, paired by seed", "nats per token")
    plots.save(made, path)


if __name__ == "__main__":
    runner.main(STUDY, draw)
