"""Trains all arms and draws them."""

from experiments.studies.framework import plots, runner
from experiments.studies.routing_limit.config import STUDY


def draw(results, path):
    made, (both, over_time) = plots.figure(10, 4, 2)
    plots.scatter(both, results, "nodes_per_token", "loss")
    both.legend(frameon=False, fontsize=8, title="nodes allowed")
    plots.finish(both, "What a token may cost across nodes", "nodes a token is sent to",
                 "held-out loss, nats per token")
    plots.curves(over_time, results, "train_loss")
    plots.finish(over_time, "Loss while training", "step", "nats per token, mean of 10 steps")
    plots.save(made, path)


if __name__ == "__main__":
    runner.main(STUDY, draw)
