"""The update of the bias: by the sign of the load error, in proportion to it, or as a factor on the score (2408.15664).

The paper trains 40,000 steps at 1e-4 to 1e-2. Here 300 steps can move a bias by at most 300 times the speed, and scores
are in (0, 1), so speeds are larger by about the ratio of the lengths.
"""

import pathlib

from experiments.studies.framework import plots
from experiments.studies.framework.study import Claim, Study
from experiments.studies.framework.training import Training

SPEEDS = {"1e-3": 1e-3, "5e-3": 5e-3, "2e-2": 2e-2}
RULES = {"sign": {}, "proportional": {"balance.bias_rule": "proportional"},
         "multiplicative": {"model.router_bias": "multiplicative"}}


def draw(results: dict, runs: list[dict], folder: pathlib.Path) -> None:
    by_rule = dict(zip(RULES, plots.PALETTE))
    colours = [by_rule[arm.split()[0]] for arm in results["arms"]]
    made, (balance, loss) = plots.figure(4.2, 2, sharey=True)
    plots.intervals(balance, results, "max_vio_global", colours)
    plots.cut_at_zero(balance, results, "max_vio_global", colours)
    plots.finish(balance, "Balance: left is better", "MaxVio_global (0: even loads)", "rule (colour) and speed")
    plots.intervals(loss, results, "loss", colours)
    plots.finish(loss, "Loss: left is better", "held-out loss, nats per token")
    reaches = any((found["metrics"]["max_vio_global"]["low"] or 0) <= 0 for found in results["arms"].values())
    plots.save(made, folder / "bias_rule.png", plots.INTERVALS + " Arrow: the interval reaches zero." * reaches)


STUDY = Study(
    name="bias_rule",
    arms={f"{rule} {name}": {**keys, "balance.bias_speed": speed}
          for rule, keys in RULES.items() for name, speed in SPEEDS.items()},
    measure=Training(),
    draw=draw,
    more_seeds=dict.fromkeys(("sign 1e-3", "sign 5e-3", "proportional 2e-2", "multiplicative 5e-3"), (3, 4, 5, 6, 7)),
    quick_arms=("sign 5e-3", "proportional 2e-2", "multiplicative 5e-3"),
    claims=(
        Claim("A speed that is too low has not balanced by the end.", "max_vio_global", "sign 1e-3", "sign 5e-3",
              "higher"),
        Claim("A step in proportion to the error balances better than its sign.", "max_vio_global",
              "proportional 2e-2", "sign 5e-3", "lower"),
        Claim("A step in proportion to the error has a higher loss than its sign.", "loss", "proportional 2e-2",
              "sign 5e-3", "higher"),
        Claim("A bias that multiplies has a higher loss than one that adds.", "loss", "multiplicative 5e-3",
              "sign 5e-3", "higher"),
    ))
