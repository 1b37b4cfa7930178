"""Loss-free balancing against the auxiliary loss at several weights, and against nothing (report section 2.1.2)."""

import pathlib

from experiments.studies.framework import plots
from experiments.studies.framework.study import Claim, Study
from experiments.studies.framework.training import Training

AUXILIARY = {"balance.bias_speed": 0.0}
PUBLISHED = 0.006  # nats that the auxiliary loss costs more than the bias (arXiv 2408.15664)


def draw(results: dict, runs: list[dict], folder: pathlib.Path) -> None:
    made, (balance, apart, over_time) = plots.figure(4.2, 3, gridspec_kw={"width_ratios": [1, 1, 1.15]})
    plots.intervals(balance, results, "max_vio_global")
    plots.logarithmic(balance, "x")
    plots.finish(balance, "Balance: left is better", "MaxVio_global (0: even loads)")
    others = [arm for arm in results["arms"] if arm != "loss-free"]
    plots.differences(apart, results, "loss", [(arm, "loss-free") for arm in others])
    if "aux 1e-3" in others:
        row = others.index("aux 1e-3")
        apart.plot([PUBLISHED] * 2, [row - 0.4, row + 0.4], ":", color=plots.PALETTE[1], label="aux 1e-3, as published")
        plots.legend(apart, loc="lower center", bbox_to_anchor=(0.4, 1.08))
    plots.finish(apart, "Loss, paired by seed", "nats per token (right of 0: the bias is better)")
    plots.curves(over_time, results, "max_vio_batch")
    plots.logarithmic(over_time, "y")
    plots.legend(over_time, loc="center right")
    plots.finish(over_time, "While training: down is better", "step", "MaxVio of a batch, mean of 10 steps")
    plots.save(made, folder / "load_balance.png", plots.INTERVALS)


STUDY = Study(
    name="load_balance",
    arms={
        "loss-free": {},
        "none": {"balance.bias_speed": 0.0},
        "aux 1e-3": {**AUXILIARY, "balance.aux_loss_weight": 1e-3},
        "aux 1e-2": {**AUXILIARY, "balance.aux_loss_weight": 1e-2},
        "aux 1e-1": {**AUXILIARY, "balance.aux_loss_weight": 1e-1},
    },
    measure=Training(),
    draw=draw,
    seeds=tuple(range(8)),
    quick_arms=("loss-free", "none", "aux 1e-2"),
    claims=(
        Claim("The bias balances the experts.", "max_vio_global", "loss-free", "none", "lower"),
        Claim("The bias balances better than the auxiliary loss at its usual weight.", "max_vio_global", "loss-free",
              "aux 1e-3", "lower"),
        Claim("The bias costs less loss than an auxiliary loss at its usual weight.", "loss", "loss-free", "aux 1e-3",
              "lower"),
        Claim("The bias costs less loss than an auxiliary loss that balances strongly.", "loss", "loss-free",
              "aux 1e-1", "lower"),
    ))
