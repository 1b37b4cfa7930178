"""Trains all arms and draws balance against loss."""

from experiments.studies.framework import plots, runner
from experiments.studies.load_balance.config import STUDY


def draw(results, path):
    made, (both, over_time) = plots.figure(10, 4.2, 2)
    plots.scatter(both, results, "max_vio_global", "loss")
    both.set_xscale("log")
    both.legend(frameon=False, fontsize=8)
    plots.finish(both, "Balance against loss: lower left is better", "MaxVio_global (0: even loads)",
                 "held-out loss, nats per token")
    plots.curves(over_time, results, "max_vio_batch")
    plots.finish(over_time, "Balance while training", "step", "MaxVio of a batch, mean of 10 steps")
    over_time.set_yscale("log")
    plots.save(made, path)


if __name__ == "__main__":
    runner.main(STUDY, draw)
