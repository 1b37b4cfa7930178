"""Many small experts and a shared one against few large ones: 192 active hidden units in a MoE layer in every arm.

Routed and shared experts together have 1056 units in the arm of few large experts and 1088 in the others.
"""

import pathlib

from experiments.studies.framework import plots
from experiments.studies.framework.study import Claim, Study
from experiments.studies.framework.training import Training


def _experts(number, active, width, shared):
    return {"model.num_experts": number, "model.experts_per_token": active, "model.expert_ffn_dim": width,
            "model.num_shared_experts": shared}


def _label(arm, config):
    shared = config["model.num_shared_experts"]
    return (f"{arm}\n{config['model.experts_per_token']} of {config['model.num_experts']}{' + 1 shared' * shared}, "
            f"{config['model.expert_ffn_dim']} wide")


def draw(results: dict, runs: list[dict], folder: pathlib.Path) -> None:
    made, (loss, apart) = plots.figure(3.8, 2)
    plots.intervals(loss, results, "loss", labels=[_label(arm, found["config"])
                                                   for arm, found in results["arms"].items()])
    plots.finish(loss, "Loss at equal active parameters: left is better", "held-out loss, nats per token")
    plots.differences(apart, results, "loss", [(c["arm"], c["against"]) for c in results["claims"]])
    plots.finish(apart, "Differences, paired by seed", "nats per token (left of 0: better)")
    plots.save(made, folder / "experts.png", plots.INTERVALS)


STUDY = Study(
    name="experts",
    arms={"few large": _experts(11, 2, 96, 0), "fine": _experts(17, 3, 64, 0), "fine, shared": _experts(16, 2, 64, 1),
          "finer, shared": _experts(33, 5, 32, 1)},
    measure=Training(quick={"model.expert_ffn_dim": 32}),
    draw=draw,
    seeds=tuple(range(8)),
    quick_arms=("few large", "fine, shared"),
    claims=(
        Claim("Smaller experts, more of them, learn better.", "loss", "fine", "few large", "lower"),
        Claim("A shared expert helps.", "loss", "fine, shared", "fine", "lower"),
        Claim("Still smaller experts learn better still.", "loss", "finer, shared", "fine, shared", "lower"),
        Claim("Fine-grained and shared together beat few large ones.", "loss", "finer, shared", "few large", "lower"),
    ))
