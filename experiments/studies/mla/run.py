"""Trains all arms and draws them."""

from experiments.studies.framework import plots, runner
from experiments.studies.mla.config import CACHE, STUDY


def draw(results, path):
    made, (both, apart) = plots.figure(10, 3.8, 2)
    for colour, (arm, found) in zip(plots.COLOURS, results["arms"].items()):
        for seed, loss in found["metrics"]["loss"]["seeds"].items():
            both.plot(4 * CACHE[arm], loss, "o", color=colour, label=arm if seed == str(results["seeds"][0]) else None)
    both.legend(frameon=False, fontsize=8)
    plots.finish(both, "What a token leaves in the cache", "bytes a token and layer, float32",
                 "held-out loss, nats per token")
    plots.differences(apart, results)
    plots.finish(apart, "Differences, paired by seed", "nats per token")
    plots.save(made, path)


if __name__ == "__main__":
    runner.main(STUDY, draw)
