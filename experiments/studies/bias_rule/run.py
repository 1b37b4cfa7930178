"""Trains all arms and draws them."""

from experiments.studies.bias_rule.config import STUDY
from experiments.studies.framework import plots, runner


def draw(results, path):
    made, (balance, loss) = plots.figure(10, 4, 2, sharey=True)
    plots.intervals(balance, results, "max_vio_global")
    balance.set_xscale("log")
    plots.finish(balance, "Balance", "MaxVio_global (0: even loads)")
    plots.intervals(loss, results, "loss")
    plots.finish(loss, "Loss", "held-out loss, nats per token")
    plots.save(made, path)


if __name__ == "__main__":
    runner.main(STUDY, draw)
